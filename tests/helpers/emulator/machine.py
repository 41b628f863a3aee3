"""The machine: registers, branches, and the order in which threads go on.

A strand is a set of blocks (CTAs) that are at the same place. It executes an instruction for all
of their threads at once, on arrays of shape (blocks, threads), or with 1 in place of either where
the values do not depend on it. Where the threads of whole blocks part at a branch, the strand is
split in two, which go on one after the other. Where those of one block part, the rest waits at its
place in the program: the part that is furthest behind goes on, until it meets the other again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from emulator import instructions
from emulator.instructions import Operation
from emulator.memory import GlobalMemory, SharedMemory
from emulator.parsing import (
    Address,
    Both,
    EmulationError,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Program,
    Register,
    Symbol,
)
from emulator.values import UNSIGNED, Array, decode, encode, width

WARP = 32
GRID_LIMITS = (2**31 - 1, 65535, 65535)
# What a register holds in threads that wrote nothing into it, where others did: a NaN, and an
# address of nothing.
_UNDEFINED = {1: True, 8: 0xFB, 16: 0xFFAD, 32: 0xFFADBEEF, 64: 0xFFFADBEEFADBEEF5}
_THREADS_AT_ONCE = 2**16

Execute = Callable[["Strand", Instruction], None]


@dataclass
class Statistics:
    """What was executed: instructions of a strand by opcode."""

    opcodes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Executable:
    """A program, and what executes each of its instructions."""

    program: Program
    code: tuple[Execute | str, ...]


def prepare(program: Program) -> Executable:
    """Return a program that can be run.

    Raises:
        EmulationError: If it has an instruction that is not known, with its line.
    """
    return Executable(program, tuple(_decoded(each) for each in program.instructions))


class Strand:
    """Blocks at the same place of a program, and what their registers hold."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        blocks: Array,
        parameters: dict[str, bytes],
        memory: GlobalMemory,
        shared: SharedMemory,
    ) -> None:
        self.program = program
        self.grid = grid
        self.blocks = blocks  # linear numbers
        self.rows = np.arange(len(blocks))  # their places in shared memory
        self.parameters = parameters
        self.memory = memory
        self.shared = shared
        self.registers: dict[str, Array] = {}
        self.place = 0
        self.active: Array | None = None  # which threads are here; None for all
        self.waiting: list[tuple[int, Array]] = []

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks and threads."""
        return len(self.blocks), self.program.threads

    # Operands

    def bits(self, operand: Operand, bits: int) -> Array:
        """Return what an operand holds, as unsigned integers of ``bits`` bits."""
        if isinstance(operand, Register):
            value = self._register(operand.name)
        elif isinstance(operand, Immediate):
            return _immediate(operand, bits)
        elif isinstance(operand, Negated):
            value = ~self._register(operand.register.name)
        elif isinstance(operand, Symbol):
            value = self._symbol(operand.name)
        else:
            raise EmulationError(f"cannot read {operand} as a number")
        held = 8 * value.itemsize if value.dtype != np.bool_ else 1
        if held == bits:
            return value
        if held < bits or bits == 1:
            raise EmulationError(f"{operand} has {held} bits where {bits} are read")
        return value.astype(UNSIGNED[bits])

    def numbers(self, operand: Operand, type_: str) -> Array:
        """Return what an operand holds, as numbers of a type."""
        if isinstance(operand, Immediate) and isinstance(operand.number, float):
            if type_ not in ("f32", "f64"):
                raise EmulationError(f"{operand.number} is read as .{type_}")
            return np.full((1, 1), operand.number, dtype=np.dtype(f"f{width(type_) // 8}"))
        return decode(self.bits(operand, width(type_)), type_)

    def _register(self, name: str) -> Array:
        try:
            return self.registers[name]
        except KeyError:
            pass
        if name in self.program.registers:
            raise EmulationError(f"{name} is read and was never written")
        return self._special(name)

    def _special(self, name: str) -> Array:
        x, y, _ = self.grid
        threads = np.arange(self.program.threads, dtype=np.uint32)[None]
        whole = np.uint32
        makers: dict[str, Callable[[], Array]] = {
            "%tid.x": lambda: threads,
            "%tid.y": lambda: np.zeros((1, 1), whole),
            "%tid.z": lambda: np.zeros((1, 1), whole),
            "%ntid.x": lambda: np.full((1, 1), self.program.threads, whole),
            "%ntid.y": lambda: np.ones((1, 1), whole),
            "%ntid.z": lambda: np.ones((1, 1), whole),
            "%ctaid.x": lambda: (self.blocks % x).astype(whole)[:, None],
            "%ctaid.y": lambda: (self.blocks // x % y).astype(whole)[:, None],
            "%ctaid.z": lambda: (self.blocks // x // y).astype(whole)[:, None],
            "%nctaid.x": lambda: np.full((1, 1), self.grid[0], whole),
            "%nctaid.y": lambda: np.full((1, 1), self.grid[1], whole),
            "%nctaid.z": lambda: np.full((1, 1), self.grid[2], whole),
            "%laneid": lambda: threads % whole(WARP),
            "%warpid": lambda: threads // whole(WARP),
        }
        if name not in makers:
            raise EmulationError(f"unknown register {name}")
        return makers[name]()

    def _symbol(self, name: str) -> Array:
        if name in self.program.registers:  # of inline assembly
            return self._register(name)
        if name in self.program.shared:
            return np.full((1, 1), self.program.shared[name], dtype=np.uint64)
        raise EmulationError(f"unknown name {name}")

    def address(self, operand: Operand, bits: int) -> Array:
        """Return the addresses that ``[base + offset]`` stands for, as int64 or uint64."""
        if not isinstance(operand, Address):
            raise EmulationError(f"{operand} must be an address")
        base = self.bits(operand.base, bits).astype(np.uint64)
        return base + np.uint64(operand.offset % 2**64)

    # Results

    def mask(self, instruction: Instruction) -> Array | None:
        """Return which threads execute an instruction; None for all."""
        mask = self.active
        if instruction.predicate is not None:
            chosen = self._register(instruction.predicate.name)
            if instruction.negated:
                chosen = ~chosen
            mask = chosen if mask is None else mask & chosen
        return mask

    def write(self, operand: Operand, bits: Array, mask: Array | None) -> None:
        """Put bits into a register, in the threads that execute."""
        name = operand.name if isinstance(operand, (Register, Symbol)) else None
        if name == "_":
            return
        if name is None or name not in self.program.registers:
            raise EmulationError(f"{operand} is no register")
        held = width(self.program.registers[name])
        if bits.dtype != UNSIGNED[held]:
            raise EmulationError(f"{name} has {held} bits, the result has another width")
        if mask is not None:
            old = self.registers.get(name)
            if old is None:
                old = np.full((1, 1), _UNDEFINED[held], dtype=UNSIGNED[held])
            bits = np.where(mask, bits, old)
        self.registers[name] = bits

    def write_number(self, operand: Operand, values: Array, type_: str, mask: Array | None) -> None:
        """Put numbers of a type into a register; integers are extended to its width."""
        bits = encode(values, type_)
        name = getattr(operand, "name", "_")
        if name in self.program.registers:
            held = width(self.program.registers[name])
            if held > width(type_) and type_[0] in "usb" and type_ != "pred":
                wide = f"{'s' if type_[0] == 's' else 'u'}{held}"
                bits = encode(decode(bits, type_), wide)
        self.write(operand, bits, mask)

    # Order

    def select(self, chosen: Array) -> Strand:
        """Return a strand of some of the blocks, none of whose threads wait elsewhere."""
        part = Strand(
            self.program, self.grid, self.blocks[chosen], self.parameters, self.memory, self.shared
        )
        part.rows = self.rows[chosen]
        part.place = self.place

        def take(array: Array) -> Array:
            return array[chosen] if array.shape[0] > 1 else array

        part.registers = {name: take(array) for name, array in self.registers.items()}
        part.active = None if self.active is None else take(self.active)
        return part


def _immediate(operand: Immediate, bits: int) -> Array:
    if operand.bits is not None and operand.bits != bits:
        raise EmulationError(f"a constant of {operand.bits} bits is read as one of {bits}")
    if isinstance(operand.number, float):
        raise EmulationError(f"{operand.number} is read as an integer")
    if bits == 1:
        return np.full((1, 1), operand.number != 0)
    return np.full((1, 1), operand.number % 2**bits, dtype=UNSIGNED[bits])


def run(
    executable: Executable,
    grid: Sequence[int],
    arguments: Sequence[int | float],
    memory: GlobalMemory,
    *,
    shared_bytes: int = 0,
    only: Sequence[int] | None = None,
) -> Statistics:
    """Execute a program.

    Args:
        executable: What to execute.
        grid: Number of blocks in x, y and z.
        arguments: One number for each parameter; of those that are left out, zero.
        memory: What may be accessed.
        shared_bytes: Size of the dynamic shared memory.
        only: Linear numbers of the blocks to execute; None for all.

    Raises:
        EmulationError: If a grid is too large for a launch, or the program does what it must not,
            or what is not known.
    """
    program = executable.program
    x, y, z = grid
    for name, size, limit in zip("xyz", (x, y, z), GRID_LIMITS, strict=True):
        if not 1 <= size <= limit:
            raise EmulationError(f"grid.{name} must be from 1 to {limit}, got {size}")
    blocks = np.arange(x * y * z) if only is None else np.asarray(only, dtype=np.int64)
    parameters = _parameter_bytes(program, arguments)
    statistics = Statistics()
    at_once = max(1, _THREADS_AT_ONCE // program.threads)
    size = program.shared_bytes + shared_bytes
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), at_once):
            part = blocks[start : start + at_once]
            shared = SharedMemory(len(part), size)
            strands = [Strand(program, (x, y, z), part, parameters, memory, shared)]
            while strands:
                strands += _run_strand(strands.pop(), executable.code, statistics)
    return statistics


def _parameter_bytes(program: Program, arguments: Sequence[int | float]) -> dict[str, bytes]:
    if len(arguments) > len(program.parameters):
        raise EmulationError(
            f"{program.name} has {len(program.parameters)} parameters, got {len(arguments)}"
        )
    values = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    result = {}
    for parameter, value in zip(program.parameters, values, strict=True):
        bits = width(parameter.type)
        if parameter.type[0] == "f":
            result[parameter.name] = np.dtype(f"<f{bits // 8}").type(value).tobytes()
        else:
            result[parameter.name] = (int(value) % 2**bits).to_bytes(bits // 8, "little")
    return result


def _decoded(instruction: Instruction) -> Execute | str:
    """Return what executes an instruction, or the name of what the machine does by itself."""
    opcode = instruction.opcode
    if opcode in ("bra", "bra.uni"):
        return "bra"
    if opcode in ("ret", "exit"):
        return "ret"
    found = instructions.find(opcode)
    if isinstance(found, Operation):
        return _pure(found, instruction)
    if found is not None:
        return found
    raise EmulationError(f"unknown instruction {opcode}: {instruction.place}")


def _pure(operation: Operation, instruction: Instruction) -> Execute:
    target, *sources = instruction.operands
    targets = (target.first, target.second) if isinstance(target, Both) else (target,)
    if len(sources) != len(operation.sources):
        raise EmulationError(
            f"{len(operation.sources)} operands are read, got {len(sources)}: {instruction.place}"
        )
    types = operation.sources
    compute, results = operation.compute, operation.results
    several = len(results) > 1

    def execute(strand: Strand, instruction: Instruction) -> None:
        values = compute(*[strand.numbers(s, t) for s, t in zip(sources, types, strict=True)])
        mask = strand.mask(instruction)
        for operand, value, type_ in zip(targets, values if several else (values,), results):  # noqa: B905
            strand.write_number(operand, value, type_, mask)

    return execute


def _run_strand(
    strand: Strand, code: tuple[Execute | str, ...], statistics: Statistics
) -> list[Strand]:
    """Execute a strand to its end or to where it is split; return the parts."""
    program = strand.program.instructions
    while True:
        if strand.waiting and strand.place >= strand.waiting[-1][0]:
            _meet(strand)
        if strand.place >= len(code):
            raise EmulationError("the program ends without ret")
        instruction, execute = program[strand.place], code[strand.place]
        statistics.opcodes[instruction.opcode] += 1
        try:
            if execute == "ret":
                if _leave(strand, instruction):
                    return []
            elif execute == "bra":
                if parts := _branch(strand, instruction):
                    return parts
            else:
                execute(strand, instruction)
                strand.place += 1
        except EmulationError as error:
            raise EmulationError(f"{error}: {instruction.place}") from None


def _meet(strand: Strand) -> None:
    """Let the threads go on that are furthest behind, all that are at the same place."""
    everyone = [*strand.waiting, (strand.place, _active(strand))]
    place = min(place for place, _ in everyone)
    mask = np.logical_or.reduce([mask for at, mask in everyone if at == place])
    strand.place = place
    strand.waiting = sorted(
        (pair for pair in everyone if pair[0] != place), key=lambda pair: -pair[0]
    )
    strand.active = None if mask.all() else mask


def _active(strand: Strand) -> Array:
    return np.ones(strand.shape, dtype=bool) if strand.active is None else strand.active


def _leave(strand: Strand, instruction: Instruction) -> bool:
    """Let threads return; say whether none is left."""
    if instruction.predicate is not None:
        stay = _active(strand) & ~strand.mask(instruction)
        if stay.any():
            strand.active = stay
            strand.place += 1
            return False
    if not strand.waiting:
        return True
    strand.place, strand.active = strand.waiting.pop()
    return False


def _branch(strand: Strand, instruction: Instruction) -> list[Strand]:
    """Go where a branch leads, or return two strands, of blocks that part there."""
    label = instruction.operands[-1]
    if not isinstance(label, Symbol) or label.name not in strand.program.labels:
        raise EmulationError("the label is unknown")
    target = strand.program.labels[label.name]
    if instruction.predicate is None:
        strand.place = target
        return []
    active = _active(strand)
    taken = np.broadcast_to(strand.mask(instruction), strand.shape)
    some = taken.any(axis=1)
    every = some & (taken | ~active).all(axis=1)
    if not some.any():
        strand.place += 1
    elif (taken == active).all():
        strand.place = target
    elif not strand.waiting and (some == every).all():
        go, stay = strand.select(every), strand.select(~every)
        go.place = target
        stay.place += 1
        return [stay, go]
    elif not strand.waiting and (some == every).any():
        # Blocks whose threads part go on apart from those whose threads stay together.
        return [strand.select(some != every), strand.select(some == every)]
    else:
        strand.waiting = sorted([*strand.waiting, (target, taken)], key=lambda pair: -pair[0])
        strand.active = active & ~taken
        strand.place += 1
    return []
