"""Fine-tune a flow model by policy gradients on a reward: ``python examples/reward_on_a_flow.py``.

Each step of the sampler is a Gaussian with the posterior covariance, so that its log-density is
known and no noise level has to be guessed. The flow learns two clusters; the reward prefers the
right one.
"""

import torch
from torch import nn

import ocm


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


def points(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return points of the two clusters, at (-1, 0) and (1, 0)."""
    side = torch.randint(2, (count, 1), generator=generator) * 2.0 - 1
    noise = 0.2 * torch.randn(count, 2, generator=generator)
    return torch.cat([side, torch.zeros(count, 1)], dim=1) + noise


def reward(x0: torch.Tensor) -> torch.Tensor:
    """Return 1 on the right and 0 on the left."""
    return (x0[:, 0] > 0).float()


torch.manual_seed(0)
x0 = points(4096, torch.Generator().manual_seed(0))
architecture = ocm.Architecture("Velocity", "out", lambda net, x, time, labels: net(x, time))
flow = ocm.Denoiser(
    Velocity(), ocm.flow(), "flow_prediction", architecture, data_covariance=x0.var(dim=0)
)
settings = ocm.TrainingSettings(num_steps=800, batch_size=256, learning_rate=3e-3)
ocm.train_denoiser(flow, x0, settings, progress=False)

covariance = ocm.Exact(flow)  # two products a step, of two features
sampling = {"steps": ocm.trailing_timesteps(flow.schedule, 6), "x0_range": None}
parameters = list(flow.backbone.requires_grad_(True).parameters())
optimiser = torch.optim.AdamW(parameters, lr=3e-4)
for iteration in range(31):
    trajectory = ocm.sample_trajectory(flow, covariance, (256, 2), seed=iteration, **sampling)
    rewards = reward(trajectory.x0)
    if iteration % 10 == 0:
        print(f"iteration {iteration:3d}   mean reward {rewards.mean():.3f}")
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
