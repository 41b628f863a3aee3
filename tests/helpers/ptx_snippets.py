"""Small PTX programs around a few statements, for tests of the emulator."""

import emulator
import numpy as np
from emulator.memory import extent_of_array

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
REGISTER = {1: "%p", 16: "%h", 32: "%w", 64: "%l"}

HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet({parameters})
.reqntid {threads}
{{
    .reg .pred %p<20>;
    .reg .b16 %h<20>;
    .reg .b32 %w<200>;
    .reg .b64 %l<40>;
    {body}
    ret;
}}
"""


def program(body, threads=32, pointers=0, parameters=()):
    """The text of a program whose parameters are pointers, read into %l20 and on, and others."""
    names = [f".param .u64 p{i}" for i in range(pointers)]
    names += [f".param .{type_} q{i}" for i, type_ in enumerate(parameters)]
    loads = "\n".join(f"ld.param.b64 %l{20 + i}, [p{i}];" for i in range(pointers))
    return HEADER.format(parameters=", ".join(names), threads=threads, body=loads + body)


def run(
    body, *arrays, threads=32, grid=(1, 1, 1), shared_bytes=0, only=None, parameters=(), values=()
):
    """Run statements on arrays, whose addresses are in %l20, %l21 and on."""
    text = program(body, threads, len(arrays), parameters)
    memory = emulator.GlobalMemory(extent_of_array(array) for array in arrays)
    return emulator.run(
        emulator.prepare(emulator.parse(text)),
        grid,
        [*(array.ctypes.data for array in arrays), *values],
        memory,
        shared_bytes=shared_bytes,
        only=only,
    )


def evaluate(statements, result_bits, *sources, results=1):
    """The results of statements for each row of the sources.

    Registers are named by width and order: the sources are %h1, %w1, %l1 (16, 32, 64 bits; a
    Boolean is %p1), the next %h2 and so on; results are %h0 (%h10 the second) and so on.
    """
    count = max(len(source) for source in sources)
    threads = -(-count // 32) * 32
    body = ["mov.u32 %w100, %tid.x;", "cvt.u64.u32 %l10, %w100;"]
    arrays = []
    for i, source in enumerate(sources, 1):
        padded = np.zeros(threads, source.dtype)
        padded[: len(source)] = source
        padded = padded.astype(np.uint16) if source.dtype == bool else padded
        bits = 8 * padded.itemsize
        body += [
            f"mul.lo.s64 %l11, %l10, {bits // 8};",
            f"add.s64 %l11, %l11, %l{19 + i};",
            f"ld.global.b{bits} {REGISTER[bits]}{i}, [%l11];",
        ]
        if source.dtype == bool:
            body.append(f"setp.ne.u16 %p{i}, %h{i}, 0;")
        arrays.append(padded)
    body.append(statements)
    held = 32 if result_bits == 1 else result_bits
    outs = []
    for j in range(results):
        out = np.zeros(threads, UNSIGNED[held])
        outs.append(out)
        register = f"{REGISTER[result_bits]}{10 * j}"
        if result_bits == 1:
            body.append(f"selp.b32 %w9, 1, 0, {register};")
            register = "%w9"
        body += [
            f"mul.lo.s64 %l11, %l10, {held // 8};",
            f"add.s64 %l11, %l11, %l{20 + len(sources) + j};",
            f"st.global.b{held} [%l11], {register};",
        ]
    run("\n".join(body), *arrays, *outs, threads=threads)
    found = [out[:count] for out in outs]
    return found[0] if results == 1 else found
