"""
The same numbers in any split of a batch
========================================

Does my result change if I use smaller batches, more GPUs, or continue tomorrow? With a generator
that draws one number after the other it does. Here every random number is a function of the seed,
the sample, the probe and the feature, so it does not.
"""

import matplotlib.pyplot as plt
import torch

import hessdiag
from hessdiag.kernels import rademacher

# %%
# Probes have an address
# ----------------------
# ``sample_offset`` says which number the first sample of a batch has. The probes of samples 3 to 5
# are the same whether they are drawn for all eight samples or for these three alone.

whole = rademacher((1, 8, 32), seed=0)[0]  # one probe for 8 samples of 32 features
part = rademacher((1, 3, 32), seed=0, sample_offset=3)[0]
print("the same signs:", torch.equal(part, whole[3:6]))

# %%
# Estimates do not depend on the split
# ------------------------------------
# Two processes may each take half of a batch, or one process may take sample by sample. What
# differs is the rounding of the network itself, which may sum in another order for another batch
# size.

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
x = torch.randn(8, 32)
options = {"max_probes": 16, "seed": 0}

at_once = hessdiag.estimate(network, x, **options).diagonal
splits = {
    "two halves": [(0, 4), (4, 8)],
    "3 + 5": [(0, 3), (3, 8)],
    "one by one": [(k, k + 1) for k in range(8)],
}
for name, pieces in splits.items():
    parts = [
        hessdiag.estimate(network, x[first:last], sample_offset=first, **options).diagonal
        for first, last in pieces
    ]
    difference = float((torch.cat(parts) - at_once).abs().max())
    print(f"{name:11} differs by {difference:.1e} at most")

# %%
# Go on later
# -----------
# ``probe_offset`` says which number the first probe has. An estimate of 16 probes and one of the
# next 16 are together the estimate of 32.

first = hessdiag.estimate(network, x, max_probes=16)
second = hessdiag.estimate(network, x, max_probes=16, probe_offset=16)
both = first.merged(second)
together = hessdiag.estimate(network, x, max_probes=32)
print(f"16 + 16 differs from 32 by {float((both.diagonal - together.diagonal).abs().max()):.1e}")
print(f"standard errors differ by {float((both.stderr - together.stderr).abs().max()):.1e}")

# %%
# The picture
# -----------
# Black and white are the signs, and the line shows where a batch of eight is split into three and
# five. Above, a generator starts from its seed in each part: the second part gets the probes of the
# first again. Below, the parts have the probes of the whole.

fives = rademacher((1, 5, 32), seed=0, sample_offset=3)[0]
in_order = []  # what a generator gives that starts from its seed in each process
for count in (3, 5):
    torch.manual_seed(0)
    in_order.append(torch.randn(count, 32).sign())
torch.manual_seed(0)
rows = {
    "a generator, 8 at once": torch.randn(8, 32).sign(),
    "a generator, 3 and 5": torch.cat(in_order),
    "hessdiag, 8 at once": whole,
    "hessdiag, 3 and 5": torch.cat([whole[:3], fives]),
}
figure, axes = plt.subplots(2, 2, figsize=(6, 3.8), sharex=True, sharey=True, layout="constrained")
for axis, (name, signs) in zip(axes.flat, rows.items(), strict=True):
    axis.imshow(signs, cmap="gray", aspect="auto")
    axis.set_title(name, fontsize=10)
for axis in axes[:, 1]:
    axis.axhline(2.5, color="C1", linewidth=3)  # where the split is
for axis in axes[:, 0]:
    axis.set_ylabel("sample")
for axis in axes[1]:
    axis.set_xlabel("feature")
figure.savefig("same_probes_anywhere.png", dpi=150)
print("the picture is same_probes_anywhere.png")
