"""The kernels' machine code for an H100 or H200 (sm_90), compiled without a GPU.

Counts what bounds a kernel besides bytes: instructions an element by the pipe that executes them,
whether global memory is read and written 16 bytes at a time, and local memory not at all.

A scheduler of Hopper issues one instruction of a warp a cycle. Integer and logic instructions have
half of the lanes and so take two cycles of theirs, as do products of integers, on one of the two
pipes that share the products of floats; special functions take eight. The slowest of these is the
number of cycles. An H200 moves 4.3 TB/s, and its schedulers' 132 x 4 x 32 lanes have 29.6e12 cycles
a second at 1.75 GHz; the ceiling is what these allow, as a share of the time of a copy. From 130%
on a kernel is expected to reach nine tenths of a copy.

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

from hessdiag.kernels import _tuning
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table

CYCLES_PER_BYTE = 29.6 / 4.3

# The pipes, by how the names of their instructions begin; the first that fits counts.
PIPES = {
    "special": r"MUFU|I2F\b|F2I\b|F2F\b",
    "float": r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|DFMA|DMUL|DADD|HGMMA|HMMA",
    "product": r"IMAD",
    "uniform": r"U[A-Z0-9]+|R2UR|S2UR",
    "memory": r"LD|ST|RED|ATOM",
    "control": r"BRA|BSSY|BSYNC|EXIT|BAR|CALL|RET|WARPSYNC|S2R|CS2R|DEPBAR|WARPGROUP|BREAK|YIELD",
    "integer": r"",
}

COLUMNS = {
    "kernel": "",
    "instructions_per_element": ".1f",
    "integer": ".1f",
    "product": ".1f",
    "float": ".1f",
    "special": ".1f",
    "cycles_per_element": ".1f",
    "bytes_per_element": ".1f",
    "ceiling": ".0%",
    "registers": "d",
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
        types: Triton type of each argument that is neither an int32 nor, in a small letter, a
            float32.
        constants: Values of the compile-time arguments.
        elements: How many elements a program takes.
        bytes_per_element: Least traffic.
        warps: Warps of a program.
    """

    name: str
    module: tuple[str, str]
    types: dict[str, str]
    constants: dict[str, Any]
    elements: int
    bytes_per_element: float
    warps: int


def variants() -> list[Variant]:
    """Return what is compiled: whole groups, everything 16-byte aligned."""
    result = []
    for dtype, pointer, size in (("float32", "*fp32", 4), ("bfloat16", "*bf16", 2)):
        result += _of_signs(dtype, pointer, size)
        result += _of_normals(dtype, pointer, size)
    return result


def _of_signs(dtype: str, pointer: str, size: int) -> list[Variant]:
    halves = 1 if size == 2 else 2
    groups, warps = _tuning.RADEMACHER[size]
    result = [
        Variant(
            f"rademacher{probes}, {dtype}",
            ("rademacher", "_rademacher_kernel"),
            {"out_ptr": pointer},
            {**_PLAIN, "WHOLE": whole, "GROUPS": groups},
            groups * 8 * (16 if whole else 1),
            size,
            warps,
        )
        for probes, whole in (("", True), (" of one probe", False))
    ]
    groups, warps = _tuning.PROBE_MOMENTS[size]
    result.append(
        Variant(
            f"probe_moments, {dtype}",
            ("probe_moments", "_probe_moments_kernel"),
            {"products_ptr": pointer},
            {**_PLAIN, "CONTINUED": False, "WHOLE": True, "HALVES": halves, "GROUPS": groups},
            groups * 8 * 16,
            size,
            warps,
        )
    )
    groups, warps = _tuning.OCM_LOSS[size]
    for backward in (False, True):
        result.append(
            Variant(
                f"ocm_loss {'backward' if backward else 'forward'}, {dtype}",
                ("ocm_loss", "_ocm_loss_kernel"),
                {
                    "head_ptr": pointer,
                    "products_ptr": pointer,
                    "out_ptr": pointer if backward else "*fp32",
                },
                {
                    **_PLAIN,
                    "BACKWARD": backward,
                    "PER_SAMPLE": False,
                    "ONE_PROBE": True,
                    "HALVES": halves,
                    "GROUPS": groups,
                },
                groups * 8,
                size * (3 if backward else 2),
                warps,
            )
        )
    return result


def _of_normals(dtype: str, pointer: str, size: int) -> list[Variant]:
    groups, warps = _tuning.GAUSSIAN_STEP[size]
    tensors = ("x_t_ptr", "prediction_ptr", "variance_ptr", "out_ptr")
    result = [
        Variant(
            f"gaussian_step, {dtype}",
            ("gaussian_step", "_gaussian_step_kernel"),
            dict.fromkeys(tensors, pointer),
            {**_PLAIN, "VARIANCE": 3, "PER_SAMPLE": False, "GROUPS": groups},
            groups * 4,
            4 * size,
            warps,
        )
    ]
    if dtype == "float32":
        groups, warps = _tuning.NORMAL[4]
        result.append(
            Variant(
                "normal, float32",
                ("normal", "_normal_kernel"),
                {"out_ptr": pointer},
                {**_PLAIN, "STREAM": 2, "GROUPS": groups},
                groups * 4,
                4,
                warps,
            )
        )
    return result


_PLAIN = {"ALIGNED": True, "WIDE": False}
_FLOATS = (
    *("p", "q", "a", "b", "c", "k", "x0_low", "x0_high", "low", "high", "noise_variance_high"),
    *("weight", "scale", "offset_of_target", "factor"),
)
_POINTERS = {"seed_ptr": "*i64", "rows_ptr": "*fp32", "upstream_ptr": "*fp32"} | dict.fromkeys(
    ("mean_ptr", "deviations_ptr", "mean_out_ptr", "deviations_out_ptr"), "*fp32"
)
_TYPES = _POINTERS | dict.fromkeys(_FLOATS, "fp32")


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
        else (_TYPES | variant.types).get(argument, "i32")
        for argument in names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(names)
        if signature[argument].startswith("*")
    }
    constants = {(names.index(key),): value for key, value in variant.constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": variant.warps}
    )


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


def registers(compiled: Any) -> int:
    """Return how many registers a thread has, by the ptxas that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        said = subprocess.run(
            [tool, "--gpu-name=sm_90a", "--verbose", "--output-file=/dev/null", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    found = re.search(r"Used (\d+) registers", said)
    if found is None:
        raise RuntimeError(f"ptxas does not say how many registers it used: {said!r}")
    return int(found[1])


def count_by_pipe(instructions: list[str]) -> dict[str, int]:
    """Return how many instructions each pipe executes.

    Example:
        >>> counts = count_by_pipe(["@!P0 IMAD.WIDE.U32 R2, R0, R4, RZ", "LOP3.LUT R0, R1, R2"])
        >>> counts["product"], counts["integer"], counts["float"]
        (1, 1, 0)
    """
    counts = dict.fromkeys(PIPES, 0)
    for instruction in instructions:
        name = re.sub(r"^@!?U?P\w+\s+", "", instruction)
        counts[next(pipe for pipe, start in PIPES.items() if re.match(start, name))] += 1
    return counts


def cycles(counts: dict[str, int]) -> int:
    """Return how many cycles a scheduler needs for the instructions of a warp, at the least.

    Example:
        >>> cycles(dict.fromkeys(PIPES, 0) | {"integer": 10, "float": 5, "special": 1})
        20
    """
    products = counts["product"]
    return max(
        sum(counts.values()),
        2 * counts["integer"],
        2 * products,
        products + counts["float"],
        8 * counts["special"],
    )


def measure(variant: Variant) -> Row:
    """Return the counts of one specialisation."""
    compiled = compile_variant(variant)
    instructions, ptx = disassemble(compiled), compiled.asm["ptx"]
    elements = variant.elements / (32 * variant.warps)  # of a thread
    by_pipe = count_by_pipe(instructions)
    cycles_per_element = cycles(by_pipe) / elements
    return {
        "kernel": variant.name,
        "instructions": len(instructions),
        "instructions_per_element": len(instructions) / elements,
        **{pipe: count / elements for pipe, count in by_pipe.items()},
        "cycles_per_element": cycles_per_element,
        "bytes_per_element": variant.bytes_per_element,
        "ceiling": CYCLES_PER_BYTE * variant.bytes_per_element / cycles_per_element,
        "registers": registers(compiled),
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
