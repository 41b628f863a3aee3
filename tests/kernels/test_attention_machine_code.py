"""``attention_jvp`` compiles for sm_90 without a GPU, into code that fits its registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import attention_code
import pytest

pytestmark = pytest.mark.soak  # half a minute of compilation

SHARED_BYTES = 227 * 1024  # of a program on an H100


@pytest.fixture(scope="module")
def rows():
    """From a process without Triton's interpreter."""
    pytest.importorskip("triton", reason="triton has no wheels for this platform")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(attention_code.__file__)
    finished = subprocess.run(
        [sys.executable, str(script)], check=True, env=environment, capture_output=True, text=True
    )
    return json.loads(finished.stdout.splitlines()[-1])


def test_no_tile_touches_local_memory(rows):
    assert len(rows) == len(attention_code.CASES)
    assert {row["case"]: row["local_accesses"] for row in rows} == {row["case"]: 0 for row in rows}


def test_tiles_fit_the_shared_memory(rows):
    assert all(0 < row["shared_bytes"] <= SHARED_BYTES for row in rows)


def test_half_types_take_tensor_cores_and_float32_does_not(rows):
    for row in rows:
        assert (row["tensor_core_products"] > 0) == (row["dtype"] != "torch.float32")
        assert row["tensor_core_products_of_tf32"] == 0


def test_half_types_are_copied_16_bytes_at_a_time(rows):
    """Head sizes that are multiples of 8 too, whose rows no power of two divides."""
    for row in rows:
        if row["dtype"] != "torch.float32":
            assert row["wide_copies"] >= 12, row["case"]
