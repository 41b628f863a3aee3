"""What a GPU is asked to do, found without one: launches, copies from the host, and waiting.

The device "meta" stands for the GPU: its tensors have shapes and no values, so that reading one
back to the host raises by itself.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)
# Those that copy a number of the host rather than take it with their arguments.
COPIES = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.where.self,
)


@contextmanager
def one_device():
    """Raise where a tensor or a number of the host is copied to "meta", or one of "meta" is read.

    Yields:
        The list of the operators that are called; its ``launches`` are those for which a GPU
        launches a kernel, which makes neither views nor memory that nobody has written.
    """
    mode = _OneDevice()
    with _NoTensorFromNumbers(), mode:
        yield mode.operators


class Operators(list):
    """Names of operators."""

    def __init__(self):
        super().__init__()
        self.launches = []


class _OneDevice(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = Operators()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func.name())
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        is_memory = func.is_view or "empty" in func.name() or "_unsafe_view" in func.name()
        if any(t.is_meta for t in tensors) and not is_memory:
            self.operators.launches.append(func.name())
        # A lone number on the host is handed to a kernel with its arguments, unless it is copied.
        on_host = [t for t in tensors if not t.is_meta and (t.dim() > 0 or func in COPIES)]
        if on_host and any(t.is_meta for t in tensors):
            raise RuntimeError(f"{func.name()} copies {on_host[0]!r} of the host to the device")
        return result


class _NoTensorFromNumbers(TorchFunctionMode):
    """``torch.tensor(1.0, device=...)`` fills a tensor on the host and copies it, unseen above."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func not in MAKERS or not result.is_meta or isinstance(args[0], Tensor):
            return result
        raise RuntimeError(f"torch.{func.__name__} copies {args[0]!r} to the device")
