"""Machine code of ``attention_jvp`` for sm_90, compiled without a GPU: a row of JSON for each tile.

A program of its own, since Triton's interpreter, under which tests run, compiles nothing.
"""

import importlib
import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
NO_MASK, BOOLEAN, ADDITIVE = range(3)
# Type, head size, mask, causal.
CASES = [
    *(
        (dtype, head, ADDITIVE, True)
        for dtype in (torch.float32, torch.bfloat16)
        for head in (32, 64, 128)
    ),
    (torch.float16, 64, NO_MASK, False),
    (torch.bfloat16, 128, NO_MASK, False),
    (torch.bfloat16, 40, NO_MASK, False),
    (torch.bfloat16, 72, BOOLEAN, False),
]


def compiled(dtype, head, mask, causal):
    """The kernel as it is launched for contiguous inputs, each with a tangent, and S of 16 n."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module("hessdiag.kernels.attention_triton")
    kernel, block = module._attention_jvp_kernel, module._power_of_two(head)
    tile = module.tile_of(dtype, block, mask != NO_MASK)
    constants = {
        "mask_column": 1,
        "HEAD": head,
        "VALUE_HEAD": head,
        "QUERY_TANGENT": True,
        "KEY_TANGENT": True,
        "VALUE_TANGENT": True,
        "MASK": mask,
        "CAUSAL": causal,
        "WIDE": False,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "BLOCK_HEAD": block,
        "BLOCK_VALUE": block,
        "CHUNK": min(tile.chunk, block),
        "PROBES": tile.probes,
        "UNIT": 16 // dtype.itemsize,
        "UPCAST": False,
    }
    names = kernel.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "mask_ptr" and mask == BOOLEAN:
            signature[name] = "*u8"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS[dtype]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name.endswith("_ptr") or name in ("mask_sample", "mask_head", "mask_row")
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def row(case):
    from suites.machine_code import disassemble, registers

    code = compiled(*case)
    instructions = disassemble(code)

    def count(pattern):
        return sum(bool(re.search(pattern, line)) for line in instructions)

    return {
        "case": " ".join(map(str, case)),
        "dtype": str(case[0]),
        "head": case[1],
        "instructions": len(instructions),
        "registers": registers(code),
        "shared_bytes": code.metadata.shared,
        "local_accesses": count(r"\b(LDL|STL)"),
        "tensor_core_products": count(r"\bHGMMA"),
        "tensor_core_products_of_tf32": count(r"\bHGMMA\S*TF32|\bHMMA\S*TF32"),
        "wide_copies": count(r"\bLDGSTS\S*\.128|\bLDG\S*\.128"),
    }


if __name__ == "__main__":
    print(json.dumps([row(case) for case in CASES]))
