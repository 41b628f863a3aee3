"""The tests of the kernels on what the oldest Triton that they are for compiles."""

import pytest
from emulation import ALL, ROOT, emulate

# As `make soak` installs it.
OLDER_TRITON = ROOT / ".cache" / "triton-3.6"


# In a file of its own, so that the tests of both versions can run side by side.
@pytest.mark.soak
def test_all_kernels_as_compiled_by_an_older_triton():
    if not OLDER_TRITON.is_dir():
        pytest.skip(f"needs triton 3.6.0 in {OLDER_TRITON}, which `make soak` installs")
    _, launches, version = emulate(ALL, triton=OLDER_TRITON)
    assert launches >= 400
    assert version == "3.6.0"
