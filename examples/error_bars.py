"""
How far can I trust an estimate?
================================

An estimate from a few random probes has an error. How large is it, if the exact diagonal is too
expensive to look at? This script draws the error bars of an estimate, checks that they cover the
exact values as often as they say, and stops as soon as a tolerance is reached.
"""

import matplotlib.pyplot as plt
import torch

import hessdiag

plt.style.use("tableau-colorblind10")

# %%
# A function and its exact diagonal
# ---------------------------------
# The function is small, so that the exact diagonal is at hand for comparison.

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.Tanh(), torch.nn.Linear(200, 200))
x = torch.randn(8, 200)


def field(x: torch.Tensor) -> torch.Tensor:
    """Return the right-hand side of an ODE, say, shape (B, 200)."""
    return network(x) - x


exact = hessdiag.exact(field, x)  # 200 products

# %%
# An interval for every entry
# ---------------------------
# ``estimate`` returns a standard error for each entry, from the spread of its own probes.
# ``interval`` makes a confidence interval of it.

result = hessdiag.estimate(field, x, max_probes=32)
low, high = result.interval(level=0.95)

# %%
# Do they cover?
# --------------
# Of the intervals at 95%, 19 in 20 should contain the exact value. Here 100 seeds tell, for each
# number of probes. Intervals from four probes are wide, since so few probes say little about their
# own spread; they must still cover.

counts = [4, 8, 16, 32, 64]
coverage = []
for M in counts:
    inside = []
    for seed in range(100):
        ends = hessdiag.estimate(field, x, max_probes=M, seed=seed).interval(level=0.95)
        inside.append(((ends[0] <= exact) & (exact <= ends[1])).float().mean())
    coverage.append(float(torch.stack(inside).mean()))
    print(f"{M:3d} probes   {coverage[-1]:.1%} of the intervals cover")

# %%
# Stop when it is good enough
# ---------------------------
# With ``rtol`` each sample takes probes until its error is below that share of its diagonal, with
# 95% confidence. ``max_probes`` bounds the cost, and ``converged`` says who got there.

for rtol in (0.1, 0.05, 0.02):
    stopped = hessdiag.estimate(field, x, max_probes=1000, rtol=rtol)
    error = (stopped.diagonal - exact).norm(dim=1) / exact.norm(dim=1)
    print(
        f"rtol {rtol:.2f}   {stopped.num_probes.min()} to {stopped.num_probes.max()} probes, "
        f"true errors {error.min():.3f} to {error.max():.3f}, "
        f"{int(stopped.converged.sum())} of {len(x)} samples converged"
    )

# %%
# The picture
# -----------
# Left: the intervals of the first sample, and the exact values. Right: how many intervals cover.

figure, (left, right) = plt.subplots(
    1, 2, figsize=(7, 3.4), width_ratios=(3, 2), layout="constrained"
)
entries = torch.arange(20)
left.errorbar(
    entries,
    result.diagonal[0, :20],
    (high - low)[0, :20] / 2,
    fmt="o",
    markersize=4,
    capsize=2,
    label="estimate, 95% interval",
)
left.plot(entries, exact[0, :20], "x", color="black", label="exact")
left.set(xlabel="entry of the diagonal", ylabel="value", title="32 probes", ylim=(None, -0.7))
left.legend(fontsize=8, loc="upper left")
right.plot(counts, coverage, "o-")
right.axhline(0.95, color="gray", linestyle="--")
right.set(xscale="log", xticks=counts, xticklabels=counts, ylim=(0.8, 1.0))
right.set(xlabel="probes", ylabel="share that covers", title="Intervals of 95%")
right.minorticks_off()
figure.savefig("error_bars.png", dpi=150)
print("the picture is error_bars.png")
