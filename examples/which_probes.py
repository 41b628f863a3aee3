"""
Which probes should I take?
===========================

A product with the Jacobian costs about as much as an evaluation of the network. Which probes give
the smallest error for the same number of products? This script compares four designs on a denoiser
of photographs, with the exact diagonal as reference.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_image

import hessdiag

plt.style.use("tableau-colorblind10")

# %%
# A denoiser and its exact diagonal
# ---------------------------------
# A small convolutional network is trained for some seconds on patches of a photograph that comes
# with scikit-learn. Its Jacobian couples each pixel with its surroundings, and most of all with its
# nearest neighbours. The patches have 768 features, so the exact diagonal takes 768 products.

photograph = torch.tensor(load_sample_image("china.jpg")).float() / 127.5 - 1
patches = photograph.unfold(0, 16, 8).unfold(1, 16, 8).reshape(-1, 3, 16, 16)
torch.manual_seed(0)
network = torch.nn.Sequential(
    torch.nn.Conv2d(3, 24, 3, padding=1),
    torch.nn.SiLU(),
    torch.nn.Conv2d(24, 24, 3, padding=1),
    torch.nn.SiLU(),
    torch.nn.Conv2d(24, 24, 3, padding=1),
    torch.nn.SiLU(),
    torch.nn.Conv2d(24, 3, 3, padding=1),
)
optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
for _ in range(200):
    noise = 0.3 * torch.randn(32, 3, 16, 16)
    noisy = patches[torch.randint(len(patches), (32,))] + noise
    optimiser.zero_grad()
    (network(noisy) - noise).square().mean().backward()
    optimiser.step()


def denoise(x: torch.Tensor) -> torch.Tensor:
    """Return noisy patches without the noise that the network sees in them."""
    return x - network(x)


x = patches[1000:1004] + 0.3 * torch.randn(4, 3, 16, 16)
exact = hessdiag.exact(denoise, x)

# %%
# Four designs
# ------------
# - Random signs, one vector for each product, know nothing of images.
# - Random colors of equal size ("orthogonal") take a sign vector apart at random.
# - A lattice of M colors takes it apart so that features of one color are far from each other.
#   Direct neighbours never share a color, so the strongest couplings do not disturb.
# - "auto" looks at its first products, and chooses between a lattice and random colors within small
#   cells.
#
# A coloring takes all its products for one sign vector. So errors are averaged here over seeds.


def error(probes: str | hessdiag.ProbeDesign, M: int) -> float:
    """Return the relative error of M products, a root mean square over eight seeds."""
    squares = []
    for seed in range(8):
        result = hessdiag.estimate(denoise, x, max_probes=M, probes=probes, seed=seed)
        squares.append((result.diagonal - exact).square().mean())
    return float((torch.stack(squares).mean() / exact.square().mean()).sqrt())


counts = [3, 6, 12, 24, 48]
errors = {
    "random signs": [error("rademacher", M) for M in counts],
    "random colors": [error("orthogonal", M) for M in counts],
    "lattice of colors": [error(hessdiag.Coloring(M), M) for M in counts],
    '"auto"': [error("auto", M) for M in counts],
}
for name, values in errors.items():
    print(f"{name:18}", "  ".join(f"{value:.3f}" for value in values))

# %%
# The picture
# -----------
# The lines of random probes fall as one over the square root of the number of products. The lattice
# falls faster, since with more colors the features of one color move further apart. How much it
# gains depends on the Jacobian: a denoiser of stronger noise looks further around, and gains less.

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
styles = ("o-", "s--", "D-", "^-")  # the first two lines lie upon each other
for (name, values), style in zip(errors.items(), styles, strict=True):
    axis.loglog(counts, values, style, label=name)
axis.set(xlabel="products M", ylabel="relative error")
axis.set_xticks(counts, counts)
axis.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["5%", "10%", "20%", "50%", "100%"])
axis.minorticks_off()
axis.legend()
figure.savefig("which_probes.png", dpi=150)
print("the picture is which_probes.png")

# %%
# The choice
# ----------
# For images, sequences and video take ``hessdiag.Coloring(M)`` or ``probes="auto"``. For features
# without geometry take "orthogonal". One block of colors leaves no error bars: ask for a tolerance,
# or take several blocks, if you need them.
