"""Launches of Triton on the emulated device: mistakes that were planted are found."""

import emulator
import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _copy_kernel(source, target, length, MASKED: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = i < length if MASKED else i >= 0
    tl.store(target + i, tl.load(source + i, mask=mask), mask=mask)


def test_a_copy_is_a_copy():
    source, target = torch.arange(300.0), torch.zeros(300)
    before = len(emulator.launches())
    _copy_kernel[(2,)](source, target, 300, MASKED=True, SIZE=256)
    assert torch.equal(target, source)
    launch = emulator.launches()[-1]
    assert len(emulator.launches()) == before + 1
    assert (launch.kernel, launch.grid) == ("_copy_kernel", (2, 1, 1))


def test_an_access_beyond_a_tensor_is_caught():
    source = torch.arange(300.0)
    with pytest.raises(
        emulator.EmulationError, match=r"at byte 1200 of .* 1200 bytes: line \d+: .*ld"
    ):
        _copy_kernel[(2,)](source, torch.zeros(512), 300, MASKED=False, SIZE=256)
    # Inside of the storage, but not of the view that the kernel was given.
    with pytest.raises(emulator.EmulationError, match=r"line \d+: .*st\.global"):
        _copy_kernel[(1,)](source, torch.zeros(512)[:255], 300, MASKED=False, SIZE=256)


def test_code_for_aligned_pointers_needs_aligned_pointers():
    source, target = torch.arange(512.0), torch.zeros(513)
    compiled = _copy_kernel[(2,)](source, target[:512], 512, MASKED=True, SIZE=256)
    with pytest.raises(emulator.EmulationError, match="not aligned"):
        compiled[(2, 1, 1)](source, target[1:], 512, True, 256)


def test_a_grid_beyond_the_limits_is_refused():
    with pytest.raises(
        emulator.EmulationError, match=r"grid\.y must be from 1 to 65535, got 65536"
    ):
        _copy_kernel[(1, 65536)](torch.ones(4), torch.ones(4), 4, MASKED=True, SIZE=256)


def test_without_execution_nothing_is_written():
    target = torch.zeros(4)
    before = emulator.launches()
    with emulator.without_execution():
        _copy_kernel[(1,)](torch.ones(4), target, 4, MASKED=True, SIZE=256)
    _copy_kernel[(0,)](torch.ones(4), target, 4, MASKED=True, SIZE=256)
    assert not target.any()
    assert emulator.launches() == before


def test_other_devices_are_refused():
    with (
        pytest.raises(ValueError, match=r"number must be one of \[80, 90\], got 75"),
        emulator.capability(75),
    ):
        pass
