"""The kernels' machine code for an H100 or H200 (sm_90), compiled without a GPU.

Counts what bounds a kernel besides bytes: instructions per element, and whether global memory is
read and written 16 bytes at a time and local memory not at all. An H200 moves 4.3 TB/s and issues
about 29.6e12 instructions of a lane a second (132 multiprocessors x 128 lanes x 1.75 GHz), so a
kernel that moves b bytes an element is bound by memory while it needs fewer than 6.9 b
instructions an element.

The count is of the code as it stands: 16 probes in the unrolled loops, one in ``ocm_loss``.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.timing import Setting

from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table

INSTRUCTIONS_PER_BYTE = 29.6 / 4.3
THREADS = 128

COLUMNS = {
    "kernel": "",
    "instructions_per_element": ".1f",
    "budget": ".0f",
    "bytes_per_element": ".1f",
    "wide_loads": "d",
    "wide_stores": "d",
    "local_accesses": "d",
}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel.

    Attributes:
        name: How the table calls it.
        module: Module of ``hessdiag.kernels`` and name of the kernel in it.
        types: Triton type of each argument that is no number of int32.
        constants: Values of the compile-time arguments.
        elements_per_group: Elements that a group of features stands for.
        bytes_per_element: Least traffic.
    """

    name: str
    module: tuple[str, str]
    types: dict[str, str]
    constants: dict[str, Any]
    elements_per_group: int
    bytes_per_element: float


def variants() -> list[Variant]:
    """Return what is compiled: whole groups, everything 16-byte aligned."""
    flags = {"ALIGNED": True, "WIDE": False}
    counters = dict.fromkeys(("probe_offset", "sample_offset", "step", "num_probes"), "i64")
    coefficients = ("p", "q", "a", "b", "c", "k", "weight", "scale", "shift", "factor")
    clamps = ("x0_low", "x0_high", "variance_low", "variance_high", "noise_variance_high")
    floats = dict.fromkeys((*coefficients, *clamps), "fp32")
    common = {"seed_ptr": "*i64", "rows_ptr": "*fp32", **counters, **floats}
    result = [
        Variant(
            f"rademacher, {name}",
            ("rademacher", "_rademacher_kernel"),
            {**common, "out_ptr": pointer},
            {**flags, "GROUPS": 256},
            8 * 16,
            size,
        )
        for name, pointer, size in (("float32", "*fp32", 4), ("bfloat16", "*bf16", 2))
    ]
    result.append(
        Variant(
            "normal, float32",
            ("normal", "_normal_kernel"),
            {**common, "out_ptr": "*fp32"},
            {**flags, "STREAM": 2, "GROUPS": 256},
            4,
            4,
        )
    )
    for name, pointer, size in (("float32", "*fp32", 4), ("bfloat16", "*bf16", 2)):
        tensors = ("x_t_ptr", "prediction_ptr", "variance_ptr", "out_ptr")
        result.append(
            Variant(
                f"gaussian_step, {name}",
                ("gaussian_step", "_gaussian_step_kernel"),
                {**common, **dict.fromkeys(tensors, pointer)},
                {**flags, "VARIANCE": 3, "PER_SAMPLE": False, "GROUPS": 256},
                4,
                4 * size,
            )
        )
        state = ("mean_ptr", "deviations_ptr", "mean_out_ptr", "deviations_out_ptr")
        result.append(
            Variant(
                f"probe_moments, {name}",
                ("probe_moments", "_probe_moments_kernel"),
                {**common, "products_ptr": pointer, **dict.fromkeys(state, "*fp32")},
                {**flags, "CONTINUED": False, "GROUPS": 128},
                8 * 16,
                size,
            )
        )
        for backward in (False, True):
            result.append(
                Variant(
                    f"ocm_loss {'backward' if backward else 'forward'}, {name}",
                    ("ocm_loss", "_ocm_loss_kernel"),
                    {
                        **common,
                        "head_ptr": pointer,
                        "products_ptr": pointer,
                        "upstream_ptr": "*fp32",
                        "out_ptr": pointer if backward else "*fp32",
                    },
                    {**flags, "BACKWARD": backward, "PER_SAMPLE": False, "GROUPS": 128},
                    8,
                    size * (3 if backward else 2),
                )
            )
    return result


def compile_variant(variant: Variant) -> Any:
    """Compile one specialisation for sm_90; needs no GPU, and Triton's interpreter off."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = variant.module
    kernel = getattr(importlib.import_module(f"hessdiag.kernels.{module}"), name)
    names = kernel.arg_names
    signature = {
        argument: "constexpr"
        if argument in variant.constants
        else variant.types.get(argument, "i32")
        for argument in names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(names)
        if signature[argument].startswith("*") or argument == "row_length"
    }
    constants = {(names.index(key),): value for key, value in variant.constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def disassemble(compiled: Any) -> list[str]:
    """Return the instructions, by the nvdisasm that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--print-code", file.name], capture_output=True, text=True, check=True
        ).stdout
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.MULTILINE)
    return [line for line in lines if not line.startswith("NOP")]


def measure(variant: Variant) -> Row:
    """Return the counts of one specialisation."""
    compiled = compile_variant(variant)
    instructions, ptx = disassemble(compiled), compiled.asm["ptx"]
    elements = variant.constants["GROUPS"] * variant.elements_per_group / THREADS
    return {
        "kernel": variant.name,
        "instructions": len(instructions),
        "instructions_per_element": len(instructions) / elements,
        "bytes_per_element": variant.bytes_per_element,
        "budget": INSTRUCTIONS_PER_BYTE * variant.bytes_per_element,
        "wide_loads": count_accesses(instructions, "LDG", 128),
        "wide_stores": count_accesses(instructions, "STG", 128),
        "half_wide_loads": count_accesses(instructions, "LDG", 64),
        "half_wide_stores": count_accesses(instructions, "STG", 64),
        "local_accesses": _count(instructions, r"\b(LDL|STL)"),
        "nan_propagating_clamps": len(re.findall(r"(?:min|max)\.NaN\.f32", ptx)),
        "silent_clamps": len(re.findall(r"(?:min|max)\.f32", ptx)),
    }


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET must not be 1: the interpreter compiles nothing")
    rows = [measure(variant) for variant in variants()]
    record = {
        "suite": "machine_code",
        "target": "sm_90",
        "environment": environment(setting.device),
        "rows": rows,
    }
    return record, report(record)


def report(record: Row) -> str:
    """Return the tables of a record."""
    return markdown_table(record["rows"], COLUMNS)


def count_accesses(instructions: list[str], name: str, bits: int) -> int:
    """Return how many instructions LDG or STG access ``bits`` bits a thread.

    The width is a suffix of the instruction; an address has one too, which says nothing of it.

    Example:
        >>> narrow = "@!P0 LDG.E.U16 R7, desc[UR6][R2.64]"
        >>> wide = "LDG.E.128.CONSTANT R8, desc[UR6][R2.64]"
        >>> count_accesses([narrow, wide], "LDG", 64), count_accesses([narrow, wide], "LDG", 128)
        (0, 1)
    """
    return _count(instructions, rf"\b{name}(\.\w+)*\.{bits}\b(\.\w+)* ")


def _count(lines: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)
