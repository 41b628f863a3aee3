"""
Fine-tune a flow by a reward
============================

Policy gradients need the probability of every step of the sampler. Which noise should the steps
have? With the posterior covariance each step is a Gaussian whose log-density is known, and no noise
level has to be guessed. This script moves the samples of a small flow to where a reward is.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import ocm

# %%
# A flow of two clusters
# ----------------------


class Velocity(nn.Module):
    """The velocity n - x0 of points in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()
        )
        self.out = nn.Linear(64, 2)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return the velocity at x, shape (B, 2), and the time 1000 sigma, shape (B,)."""
        return self.out(self.hidden(torch.cat([x, time[:, None] / 1000], dim=1)))


torch.manual_seed(0)
x0 = 0.2 * torch.randn(4096, 2)
x0[:, 0] += torch.randint(2, (4096,)) * 2 - 1  # clusters at (-1, 0) and (1, 0)
architecture = ocm.Architecture("Velocity", "out", lambda net, x, time, labels: net(x, time))
flow = ocm.Denoiser(
    Velocity(), ocm.flow(), "flow_prediction", architecture, data_covariance=x0.var(dim=0)
)
settings = ocm.TrainingSettings(num_steps=800, batch_size=256, learning_rate=3e-3)
ocm.train_denoiser(flow, x0, settings, progress=False)

# %%
# A reward
# --------
# It prefers the cluster on the right.


def reward(x0: torch.Tensor) -> torch.Tensor:
    """Return 1 on the right and 0 on the left."""
    return (x0[:, 0] > 0).float()


# %%
# Policy gradients
# ----------------
# ``sample_trajectory`` keeps the points between the steps, and the log-density of each step.
# ``trajectory_log_prob`` computes the same again, differentiable for the parameters of the network.
# The rest is the clipped objective of PPO. In the plane, the exact covariance takes two products a
# step.

covariance = ocm.Exact(flow)
sampling = {"steps": ocm.trailing_timesteps(flow.schedule, 6), "x0_range": None}
parameters = list(flow.backbone.requires_grad_(True).parameters())
optimiser = torch.optim.AdamW(parameters, lr=3e-4)
samples, mean_rewards = [], []
for iteration in range(31):
    trajectory = ocm.sample_trajectory(flow, covariance, (256, 2), seed=iteration, **sampling)
    rewards = reward(trajectory.x0)
    samples.append(trajectory.x0)
    mean_rewards.append(float(rewards.mean()))
    if iteration % 10 == 0:
        print(f"iteration {iteration:3d}   mean reward {mean_rewards[-1]:.3f}")
    advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    for _ in range(2):  # the ratio is 1 the first time
        log_prob = ocm.trajectory_log_prob(flow, covariance, trajectory, x0_range=None)
        ratio = (log_prob - trajectory.log_prob).exp()
        clipped = ratio.clamp(0.8, 1.2)
        gain = torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None]).mean()
        optimiser.zero_grad()
        (-gain).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()

# %%
# The picture
# -----------

figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.7), layout="constrained")
axes[0].plot(mean_rewards, color="#006BA4")
axes[0].set(xlabel="iteration", ylabel="mean reward", ylim=(0, 1))
for axis, x, title in zip(axes[1:], (samples[0], samples[-1]), ("before", "after"), strict=True):
    axis.plot(*x.T, ".", color="#006BA4", markersize=3, alpha=0.6)
    axis.set(title=title, xlim=(-2, 2), ylim=(-1.5, 1.5), xticks=(-1, 1), yticks=(-1, 0, 1))
figure.savefig("reward_on_a_flow.png", dpi=150)
print("the picture is reward_on_a_flow.png")
