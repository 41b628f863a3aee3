"""
The Hessian diagonal of a function
==================================

How do you get the diagonal of a Hessian that is too large to form? This script estimates it for a
function of 1,000 variables, compares the estimates with the exact diagonal, and shows what knowing
the structure of the Hessian is worth.
"""

import matplotlib.pyplot as plt
import torch

import hessdiag

plt.style.use("tableau-colorblind10")

# %%
# A function
# ----------
# ``hessdiag`` works on batches. The function maps each row of ``x`` to one number, and every row
# gets a diagonal of its own. This is Rosenbrock's function: each variable meets its two neighbours
# only, so the Hessian has three diagonals.


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    """Return the function of each row of x, shape (B,)."""
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(dim=1)


x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))

# %%
# The exact diagonal
# ------------------
# The Hessian is the Jacobian of the gradient. ``hessdiag.exact`` multiplies that Jacobian with the
# 1,000 unit vectors. It never holds the matrix, but 1,000 products are many.

gradient = torch.func.grad(lambda x: rosenbrock(x).sum())
exact = hessdiag.exact(gradient, x)

# %%
# Estimates
# ---------
# ``hessdiag.hessian_diagonal`` takes the function itself. With M random sign vectors v it averages
# v * (H v). The estimate is unbiased, and its error falls as one over the square root of M.

counts = [2, 4, 8, 16, 32, 64, 128]
errors = []
for M in counts:
    result = hessdiag.hessian_diagonal(rosenbrock, x, max_probes=M)
    errors.append(float((result.diagonal - exact).norm() / exact.norm()))
    print(f"{M:4d} products   relative error {errors[-1]:.3f}")

# %%
# Use what you know
# -----------------
# Other entries of its row disturb the estimate of an entry. Variables three places apart do not
# meet in this Hessian. So give every third variable the same color, and multiply with one vector
# for each of the three colors: nothing disturbs, and three products are exact. Colors follow the
# positions along an axis, so ``x`` gets the shape (B, channels, length).

colored = hessdiag.hessian_diagonal(
    lambda x: rosenbrock(x.flatten(1)),
    x[:, None],
    max_probes=3,
    probes=hessdiag.Coloring(3),
)
error = float((colored.diagonal.flatten(1) - exact).norm() / exact.norm())
print(f"   3 products of 3 colors   relative error {error:.1e}")

# %%
# The picture
# -----------

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
axis.loglog(counts, errors, "o-", label="random signs")
guide = [errors[0] * (counts[0] / M) ** 0.5 for M in counts]
axis.loglog(counts, guide, "--", color="gray", label="one over the square root of M")
axis.set(xlabel="products M", ylabel="relative error")
axis.set_xticks(counts, counts)
axis.set_yticks([0.02, 0.05, 0.1, 0.2], ["2%", "5%", "10%", "20%"])
axis.minorticks_off()
axis.legend()
figure.savefig("hessian_diagonal.png", dpi=150)
print("the picture is hessian_diagonal.png")
