"""The rounding of another machine's matrix library, for ``pytest --vary-rounding``.

How a product of matrices or a convolution rounds depends on the processor, its library and the
shapes: a row may come out differently in a batch of another size. Here a pattern that depends on
the shapes changes the last bit of such results. A test that rests on one machine's rounding fails.
"""

import zlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PRODUCTS = {
    "addbmm",
    "addmm",
    "addmv",
    "baddbmm",
    "bmm",
    "convolution",
    "convolution_backward",
    "dot",
    "mm",
    "mv",
    "vdot",
}


class VariedRounding(TorchDispatchMode):
    """Changes the last bit of what products of matrices and convolutions return."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in PRODUCTS:
            return result
        shapes = [leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        seed = zlib.crc32(repr((name, shapes)).encode())
        return tree_map_only(Tensor, lambda tensor: varied(tensor, seed), result)


def varied(tensor, seed):
    """Change the last bit of some entries, but not of numbers so short that they may be exact."""
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 4 or tensor.is_meta:
        return tensor
    generator = torch.Generator().manual_seed(seed)
    units = torch.randint(-1, 2, tensor.shape, generator=generator).to(tensor.dtype)
    scaled = tensor * 2.0**10
    exact = scaled == scaled.round()
    return torch.where(exact, tensor, tensor * (1 + units * torch.finfo(tensor.dtype).eps))
