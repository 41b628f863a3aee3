"""Try the hessdiag that is installed, where nothing but what it requires is beside it."""

from __future__ import annotations

from importlib.metadata import version

import torch

import hessdiag
import hessdiag.kernels

# The Jacobian of a function of each feature is diagonal, so any number of probes gives it exactly.
x = torch.linspace(-1, 1, 24).reshape(2, 12)
torch.testing.assert_close(hessdiag.hutchinson(torch.sin, x, M=2), x.cos())
result = hessdiag.estimate(torch.sin, x, max_probes=4)
torch.testing.assert_close(result.diagonal, x.cos())
signs = hessdiag.kernels.rademacher((2, 2, 12), seed=0)
assert torch.equal(signs.abs(), torch.ones_like(signs)), signs
assert version("hessdiag") == hessdiag.__version__
print("hessdiag", hessdiag.__version__, "of", hessdiag.__file__)
