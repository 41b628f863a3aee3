"""The text of a PTX program as instructions and operands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import TypeAlias

import numpy as np


class EmulationError(RuntimeError):
    """A program that cannot be run, or that does what it must not do."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Negated:
    """``!%p1``."""

    register: Register


@dataclass(frozen=True)
class Immediate:
    """A constant: bits of a float32 (``0f``) or float64 (``0d``), or a number."""

    number: int | float
    bits: int | None = None  # how many, where the number is a pattern of bits


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or a variable of the module."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Operand
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Both:
    """``a|b``: two results."""

    first: Operand
    second: Operand


Operand: TypeAlias = Register | Negated | Immediate | Symbol | Address | Vector | Both


@dataclass(frozen=True)
class Instruction:
    """One statement.

    Attributes:
        opcode: With all its modifiers, as ``ld.global.v4.b32``.
        operands: Results first.
        predicate: The register that says which threads execute it; None for all.
        negated: Whether the threads whose predicate is false do.
        text: The statement as it was written.
        line: Number of its line in the program.
    """

    opcode: str
    operands: tuple[Operand, ...]
    predicate: Register | None
    negated: bool
    text: str
    line: int

    @property
    def place(self) -> str:
        """How errors name it."""
        return f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str


@dataclass(frozen=True)
class Program:
    """One entry of a module.

    Attributes:
        name: Of the entry.
        parameters: In their order.
        threads: How many a block has.
        instructions: In their order.
        labels: Number of the instruction that follows each label.
        registers: Type that each register was declared with.
        shared: Offset of each variable in shared memory, and the bytes of all that have a size.
    """

    name: str
    parameters: tuple[Parameter, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: dict[str, str] = field(repr=False)
    shared: dict[str, int]
    shared_bytes: int


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_DEBUG_LINE = re.compile(r"^[ \t]*\.(loc|file)\b[^\n]*", re.MULTILINE)
_STATEMENT = re.compile(
    r"(?:@(?P<not>!?)(?P<predicate>%?[\w$]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<operands>.*)", re.DOTALL
)
_DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\s*\[(\d*)\]")


def parse(text: str) -> Program:
    """Return the entry of a module that has one.

    Raises:
        EmulationError: If the module has none or several, or a statement cannot be understood.
    """
    text = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise EmulationError(f"a program must have one .entry, got {len(entries)}")
    (entry,) = entries
    name, parameters, attributes = entry.groups()
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)((?:\s*,\s*1\b)*)\s*(,)?", attributes)
    if threads is None or threads.group(3):
        raise EmulationError(f"entry {name} must state its threads, in x alone, by .reqntid")
    end = _end_of_block(text, entry.end())
    body = _DEBUG_LINE.sub("", text[entry.end() : end])
    first_line = text.count("\n", 0, entry.end()) + 1
    instructions, labels, registers = _read_body(body, first_line)
    shared, shared_bytes = _shared_variables(text)
    return Program(
        name,
        tuple(_parameters(parameters)),
        int(threads.group(1)),
        tuple(instructions),
        labels,
        registers,
        shared,
        shared_bytes,
    )


def _parameters(text: str) -> list[Parameter]:
    found = []
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"\.param\s+\.(\w+)\s+(?:\.\w+\s+|\d+\s+)*([\w$]+)", declaration)
        if match is None:
            raise EmulationError(f"cannot read the parameter: {declaration}")
        found.append(Parameter(match.group(2), match.group(1)))
    return found


def _shared_variables(text: str) -> tuple[dict[str, int], int]:
    """Place the variables one after the other; the one without a size, which is dynamic, last."""
    offsets: dict[str, int] = {}
    end = 0
    for alignment, name, size in sorted(_SHARED.findall(text), key=lambda found: not found[2]):
        step = int(alignment or 1)
        end = -(-end // step) * step
        offsets[name] = end
        end += int(size or 0)
    return offsets, end


def _end_of_block(text: str, start: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise EmulationError("a program must close its braces")


def _read_body(
    body: str, first_line: int
) -> tuple[list[Instruction], dict[str, int], dict[str, str]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    registers: dict[str, str] = {}
    position, line, counted = 0, first_line, 0
    label = re.compile(r"\s*([\w$]+):(?!:)")
    # Braces around statements are scopes; those of operands are inside of a statement.
    between = re.compile(r"[\s{}]+")
    while True:
        if found := between.match(body, position):
            position = found.end()
        if position == len(body):
            return instructions, labels, registers
        if found := label.match(body, position):
            labels[found.group(1)] = len(instructions)
            position = found.end()
            continue
        end = body.find(";", position)
        line += body.count("\n", counted, position)
        counted = position
        if end < 0:
            raise EmulationError(f"line {line}: a statement must end with a semicolon")
        statement = " ".join(body[position:end].split())
        position = end + 1
        if statement.startswith(".reg"):
            _declare(statement, registers, line)
        elif statement and not statement.startswith(".pragma"):
            instructions.append(_instruction(statement, line))


def _declare(statement: str, registers: dict[str, str], line: int) -> None:
    match = _DECLARATION.fullmatch(statement)
    if match is None:
        raise EmulationError(f"line {line}: cannot read {statement}")
    type_, names = match.groups()
    for name in (part.strip() for part in names.split(",")):
        if ranged := re.fullmatch(r"(.+)<(\d+)>", name):
            new = [f"{ranged.group(1)}{i}" for i in range(int(ranged.group(2)))]
        else:
            new = [name]
        for register in new:
            # Scopes are not kept apart.
            if registers.setdefault(register, type_) != type_:
                raise EmulationError(
                    f"line {line}: {register} is declared as .{type_} and .{registers[register]}"
                )


def _instruction(statement: str, line: int) -> Instruction:
    match = _STATEMENT.fullmatch(statement)
    if match is None or statement.startswith("."):
        raise EmulationError(f"line {line}: cannot read {statement}")
    try:
        operands = tuple(_operand(part) for part in _split(match["operands"]))
    except ValueError as error:
        raise EmulationError(f"line {line}: {error} in {statement}") from None
    predicate = match["predicate"]
    return Instruction(
        match["opcode"],
        operands,
        None if predicate is None else Register(predicate),
        match["not"] == "!",
        statement,
        line,
    )


def _split(text: str) -> list[str]:
    """Split at the commas that are outside of brackets and braces."""
    if "{" not in text and "[" not in text:
        return [part.strip() for part in text.split(",") if part.strip()]
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


@cache
def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(part) for part in _split(text[1:-1])))
    if text.startswith("["):
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)|(-\s*\w+))?\s*\]", text)
        if match is None:
            raise ValueError(f"cannot read the address {text}")
        offset = (match.group(2) or match.group(3) or "0").replace(" ", "")
        return Address(_operand(match.group(1)), int(offset, 0))
    if "|" in text:
        first, second = text.split("|")
        return Both(_operand(first.strip()), _operand(second.strip()))
    if text.startswith("!"):
        return Negated(Register(text[1:].strip()))
    if text.startswith("%") or text == "_":
        return Register(text)
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Immediate(int(match.group(1), 16), 32)
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(int(match.group(1), 16), 64)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        digits = text.rstrip("U")
        is_octal = re.fullmatch(r"-?0\d+", digits)
        return Immediate(int(digits, 8 if is_octal else 0))
    if re.fullmatch(r"-?\d+\.\d*(e[-+]?\d+)?", text):
        return Immediate(np.float64(text).item())
    if re.fullmatch(r"[\w$.]+", text):
        return Symbol(text)
    raise ValueError(f"cannot read the operand {text}")
