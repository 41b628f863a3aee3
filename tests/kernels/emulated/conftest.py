"""How memory is allocated for the kernels here: at odd places, or larger than the machine's."""

import pytest
import torch


def misaligned(shape, dtype):
    """A tensor full of NaN whose first address is no multiple of 16, but of its element."""
    count = 1
    for size in shape:
        count *= size
    whole = torch.full((count + 1,), float("nan"), dtype=dtype)
    assert whole.data_ptr() % 16 == 0
    return whole[1:].view(shape)


def _replace_allocations(monkeypatch, allocate):
    def empty(*shape, dtype=None, device=None):
        shape = shape[0] if isinstance(shape[0], (tuple, list, torch.Size)) else shape
        return allocate(tuple(shape), dtype or torch.get_default_dtype())

    def empty_like(tensor, dtype=None):
        return allocate(tuple(tensor.shape), dtype or tensor.dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)


@pytest.fixture
def place(request, monkeypatch):
    """How a test puts its tensors into memory; results of the kernels are put there too.

    By ``indirect`` parameters: "aligned" to 16 bytes, or not ("odd").
    """
    if request.param == "aligned":
        real = torch.empty
        _replace_allocations(
            monkeypatch, lambda shape, dtype: real(shape, dtype=dtype).fill_(float("nan"))
        )
        return torch.Tensor.clone

    _replace_allocations(monkeypatch, misaligned)

    def put(tensor):
        return misaligned(tensor.shape, tensor.dtype).copy_(tensor)

    return put


@pytest.fixture
def sparse(monkeypatch):
    """Let kernels allocate what no machine has: zeros, of which only touched pages exist."""
    # Not at the top: Triton is imported once it is known whether it interprets or compiles.
    from emulator.memory import sparse_tensor

    _replace_allocations(monkeypatch, sparse_tensor)
    return sparse_tensor
