"""Run the PTX that Triton compiles, in NumPy, so that compiled kernels are tested without a GPU.

All threads of many blocks (CTAs) go through the program together. Every access to memory is
checked: inside of a live allocation, and aligned to its full width. What is not known is refused,
with the line of the program: an instruction, a modifier of one, a register that nobody wrote.

It shows what a compiled program computes and where it reads and writes. It cannot show:

- a race between threads or blocks, since they go on in a fixed order, or a barrier, a fence or a
  wait that is missing, as for ``cp.async`` and ``wgmma``, which are done at once;
- the last bit of functions that the hardware approximates (``ex2.approx``, ``div.full``, ...),
  which are rounded correctly here;
- mistakes of the assembler that makes machine code of PTX, and registers that it spills;
- an access beyond its own tensor that hits another one of the same launch.

Not emulated, and refused: clusters, tensor descriptors, scratch memory, calls of functions, and
blocks of more than one dimension, which Triton does not make.

| module | has one task |
|---|---|
| ``parsing`` | text of a program -> instructions and their operands |
| ``values`` | bits <-> numbers, each rounded once |
| ``memory`` | allocations, and what may be accessed |
| ``instructions`` | what each does, in modules of its own |
| ``machine`` | registers, branches and the order of execution |
| ``driver`` | a device for Triton, which launches into the machine |
"""

from emulator.driver import (
    capability,
    install,
    launches,
    only_programs,
    without_execution,
)
from emulator.machine import Executable, prepare, run
from emulator.memory import GlobalMemory
from emulator.parsing import EmulationError, Program, parse

__all__ = [
    "EmulationError",
    "Executable",
    "GlobalMemory",
    "Program",
    "capability",
    "install",
    "launches",
    "only_programs",
    "parse",
    "prepare",
    "run",
    "without_execution",
]
