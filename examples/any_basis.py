"""
The diagonal in another basis
=============================

Is your Jacobian closer to diagonal in frequencies than in pixels? Then take its diagonal there.
This script does so for a denoiser of photographs, whose pixels are strongly correlated, while its
frequencies hardly are.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_image

import hessdiag

plt.style.use("tableau-colorblind10")

# %%
# A denoiser of photographs
# -------------------------
# The patches are 8 by 8 pixels of a photograph that comes with scikit-learn. Their best linear
# denoiser, Wiener's filter, is the matrix C (C + s² I)⁻¹, with C the covariance of the patches and
# s the standard deviation of the noise. That matrix is its Jacobian too.

photograph = torch.tensor(load_sample_image("china.jpg")).double().mean(dim=2) / 127.5 - 1
patches = photograph.unfold(0, 8, 4).unfold(1, 8, 4).reshape(-1, 64)
C = patches.T.cov()
noise_std = 0.3
wiener = C @ torch.linalg.inv(C + noise_std**2 * torch.eye(64))


def denoise(x: torch.Tensor) -> torch.Tensor:
    """Return the denoised patches, shape (B, 1, 8, 8), without the mean of the patches."""
    return (x.flatten(1) @ wiener).reshape(x.shape)


# %%
# One option changes the basis
# ----------------------------
# ``basis=hessdiag.dct()`` asks for the diagonal of F J Fᵀ, with F the cosine transform of the last
# two axes. Any orthonormal transform can stand there: ``hessdiag.Basis(analyse, synthesise)``.

x = patches[:1].reshape(1, 1, 8, 8)
bases = {"pixels": None, "frequencies": hessdiag.dct()}
exact = {name: hessdiag.exact(denoise, x, basis=basis) for name, basis in bases.items()}
counts = [1, 2, 4, 8, 16, 32]
errors = {}
for name, basis in bases.items():
    errors[name] = []
    for M in counts:
        found = [hessdiag.hutchinson(denoise, x, M, basis=basis, seed=seed) for seed in range(30)]
        error = (torch.cat(found) - exact[name]).square().mean().sqrt()
        errors[name].append(float(error / exact[name].square().mean().sqrt()))
    print(f"{name:12}", "  ".join(f"{error:.3f}" for error in errors[name]))

# %%
# The picture
# -----------
# Left: the Jacobian itself, which ``hessdiag.jacobian`` forms since it is small. In frequencies
# almost all of it lies on the diagonal. Right: the error of an estimate of the diagonal comes from
# what lies beside it, so the estimate in frequencies needs far fewer products.

matrices = {
    name: hessdiag.jacobian(denoise, x, basis=basis)[0].reshape(64, 64)
    for name, basis in bases.items()
}
figure, axes = plt.subplots(1, 3, figsize=(8, 2.8), layout="constrained")
for axis, (name, J) in zip(axes, matrices.items(), strict=False):
    shown = axis.imshow(J.abs(), cmap="viridis", norm="log", vmin=1e-4, vmax=1)
    axis.set(title=f"|J| in {name}", xticks=[], yticks=[])
figure.colorbar(shown, ax=axes[:2], shrink=0.7)
for (name, values), marker in zip(errors.items(), "os", strict=True):
    axes[2].loglog(counts, values, marker=marker, label=name)
axes[2].set(xlabel="products", ylabel="relative error", ylim=(0.02, 2))
axes[2].set_xticks(counts, counts)
axes[2].set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["5%", "10%", "20%", "50%", "100%"])
axes[2].minorticks_off()
axes[2].legend(loc="upper right")
figure.savefig("any_basis.png", dpi=150)
print("the picture is any_basis.png")
