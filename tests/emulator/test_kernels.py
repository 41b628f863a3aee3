"""The tests of the kernels once more, on what Triton compiles for a GPU."""

import pytest
from emulation import ALL, emulate

# Each kernel, and between them every type, alignment, layout, and size of numbers.
SPECIALISATIONS = [
    "test_signs[torch.float32-5x2x12-odd]",
    "test_normals[torch.float32-19x3x7-odd]",
    "test_moments[torch.float16-1x3x64-aligned]",
    "test_loss_and_gradient[torch.bfloat16-1x3x64-aligned]",
    "test_step[per element-torch.bfloat16-16x1x72-aligned]",
]
LARGE = ["test_signs[2147483948-3]", "test_step[False-1-2147487747]"]
SUBSET = [
    f"tests/kernels/emulated/{file}.py::{test}"
    for file, tests in (("test_specialisations", SPECIALISATIONS), ("test_large", LARGE))
    for test in tests
]


def test_a_few_of_the_kernels_as_compiled():
    passed, launches, _ = emulate(SUBSET)
    assert passed == len(SUBSET)
    # Moments are computed twice, and the loss has a gradient.
    assert launches == len(SUBSET) + 2


@pytest.mark.soak
def test_all_kernels_as_compiled():
    _, launches, _ = emulate(ALL)
    assert launches >= 400
