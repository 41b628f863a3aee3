"""How batches are dealt out to programs, and how compiled kernels are found again."""

import random

import pytest
import torch

from hessdiag.kernels import _launch
from hessdiag.kernels._layout import as_int32, layout, reciprocal
from hessdiag.kernels.philox import SignTiles


def numerators(divisor):
    """Where a quotient steps, and the ends of the range."""
    draw = random.Random(divisor)
    multiples = [divisor * draw.randrange(2**31 // divisor + 1) for _ in range(50)]
    multiples.append((2**31 - 1) // divisor * divisor)
    near = {n + step for n in multiples for step in (-1, 0, 1)} | {0, 1, 2**31 - 1}
    return [n for n in near if 0 <= n < 2**31]


@pytest.mark.parametrize(
    "divisor",
    [1, 2, 3, 5, 7, 384, 641, 768, 2**16 - 1, 2**16 + 1, 2**30 + 1, 2**31 - 1, 2**31],
)
def test_a_product_in_place_of_a_division(divisor):
    multiplier, shift = reciprocal(divisor)
    assert 0 < multiplier < 2**32
    assert 0 <= shift < 32
    for n in numerators(divisor):
        assert (2 * n * multiplier >> 32) >> shift == n // divisor


def test_a_product_in_place_of_a_division_by_any_number():
    draw = random.Random(0)
    for _ in range(2000):
        divisor = draw.randrange(1, 2 ** draw.randrange(1, 32))
        multiplier, shift = reciprocal(divisor)
        for n in numerators(divisor)[:20]:
            assert (2 * n * multiplier >> 32) >> shift == n // divisor


def test_numbers_go_through_int32_unharmed():
    for number in (0, 1, 2**31 - 1, 2**31, 2**32 - 1):
        passed = as_int32(number)
        assert -(2**31) <= passed < 2**31
        assert passed % 2**32 == number
    # 2**32 passes as 0, which no count is.
    assert as_int32(2**32) == 0


@pytest.mark.parametrize(
    ("batch", "features", "programs", "aligned", "wide"),
    [
        (3, 16, 2, True, False),
        (3, 20, 3, False, False),
        (1, 1, 1, False, False),
        # The last program's groups are numbered too, those that do not exist among them.
        (2**31 - 4, 8, 2**29 - 1, True, False),
        (2**31 - 3, 8, 2**29, True, True),
        (1, 8 * 2**31, 2**29, True, True),
    ],
)
def test_layouts(batch, features, programs, aligned, wide):
    found = layout(batch, features, features_per_group=8, groups_per_program=4)
    assert (found.num_programs, found.aligned, found.wide) == (programs, aligned, wide)
    groups = -(-features // 8)
    assert found.num_programs * 4 >= batch * groups > (found.num_programs - 1) * 4
    numbers = [number % 2**32 for number in found.numbers]
    assert numbers == [batch, groups % 2**32, *reciprocal(groups), features % 2**32]


def test_tiles_of_probes():
    for probe_offset in (0, 1, 15, 16, 31, 2**32 - 40):
        for num_probes in (1, 15, 16, 17, 32, 40):
            tiles = SignTiles.of(probe_offset, num_probes)
            touched = {p // 16 for p in range(probe_offset, probe_offset + num_probes)}
            assert (tiles.first, tiles.num_tiles) == (min(touched), len(touched))
            assert tiles.first * 16 + tiles.first_probe == probe_offset
            assert tiles.whole == (num_probes == 16 * len(touched))


class Kernel:
    """Stands for a kernel of Triton: says when it is compiled, and when what was is launched."""

    def __init__(self):
        self.log = []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, num_warps):
            self.log.append(("compiled", grid, arguments, num_warps))
            return Compiled(self.log)

        return compile_and_launch


class Compiled:
    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *arguments: self.log.append(("launched", grid, arguments))


def test_a_compiled_kernel_is_launched_again():
    kernel, x, y = Kernel(), torch.zeros(8), torch.zeros(8)
    _launch.launch(kernel, (2, 1, 1), (x, y), (1, 0.5), (True, 256), 4)
    _launch.launch(kernel, (3, 1, 1), (y, x), (7, 2.5), (True, 256), 4)
    assert kernel.log == [
        ("compiled", (2, 1, 1), (x, y, 1, 0.5, True, 256), 4),
        ("launched", (3, 1, 1), (y, x, 7, 2.5, True, 256)),
    ]


@pytest.mark.parametrize(
    "change",
    ["dtype", "dtype of the other", "alignment", "alignment of the other", "constant", "warps"],
)
def test_code_that_would_differ_is_compiled_anew(change):
    kernel, storage = Kernel(), torch.zeros(9)
    x, y, constants, warps = storage[:8], torch.zeros(8), (True, 256), 4
    _launch.launch(kernel, (1, 1, 1), (x, y), (), constants, warps)
    if change == "dtype":
        x = x.bfloat16()
    elif change == "dtype of the other":
        y = y.double()
    elif change == "alignment":
        x = storage[1:]
    elif change == "alignment of the other":
        y = storage[1:]
    elif change == "constant":
        constants = (False, 256)
    else:
        warps = 8
    assert x.data_ptr() % 16 == (4 if change == "alignment" else 0)
    _launch.launch(kernel, (1, 1, 1), (x, y), (), constants, warps)
    assert [entry[0] for entry in kernel.log] == ["compiled", "compiled"]


def test_kernels_are_told_apart():
    kernels, x = (Kernel(), Kernel()), torch.zeros(8)
    for kernel in kernels:
        _launch.launch(kernel, (1, 1, 1), (x,), (), (), 4)
    assert [kernel.log[0][0] for kernel in kernels] == ["compiled", "compiled"]
