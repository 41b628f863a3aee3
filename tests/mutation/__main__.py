"""Plant every fault in a copy of the project and run the tests that must notice it.

    python tests/mutation [--only TEXT] [--processes 2] [--again]

The same tests are run without a fault first, and must pass. A fault that changes nothing that can
be noticed says why (``equivalent``), and must live. What was found is kept in .cache/faults.json,
and tried again where the fault, its file or its tests have changed, or where it should have been
otherwise. The exit status is 1 if a fault lived, or could not be tried.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from faults import AREAS
from faults.copies import Copy
from faults.fault import Fault, nothing

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / ".cache" / "faults.json"
LIMIT = 600  # seconds; a fault that keeps the tests from ending is noticed too


def main() -> int:
    """Run the faults that are asked for, and return the exit status."""
    options = _options()
    faults = [
        fault
        for area, faults in AREAS.items()
        for fault in faults
        if options.only in f"{area}: {fault.name} ({fault.path})"
    ]
    if not faults:
        print(f"no fault has {options.only!r} in 'area: name (path)'", file=sys.stderr)
        return 2
    untouched = [nothing(tests) for tests in dict.fromkeys(fault.tests for fault in faults)]
    # Once, whatever is edited while they are tried.
    keys = {fault: fault.fingerprint(ROOT) for fault in (*untouched, *faults)}
    known = {} if options.again or not RECORD.exists() else json.loads(RECORD.read_text())
    todo = [
        fault
        for fault, key in keys.items()
        if key not in known or known[key]["outcome"] != fault.expected
    ]
    print(
        f"{len(faults)} faults for {len(untouched)} choices of tests; of both "
        f"{len(keys) - len(todo)} known from before",
        flush=True,
    )
    for fault, outcome in _tried(todo, options.processes):
        known[keys[fault]] = outcome
        _keep(known)
        print(f"  {outcome['outcome']:8} {outcome['seconds']:4.0f} s  {fault.name}", flush=True)

    wrong = [fault for fault in keys if known[keys[fault]]["outcome"] != fault.expected]
    argued = sum(bool(fault.equivalent) for fault in faults)
    print(
        f"{len(faults) - argued} faults to be caught and {argued} argued to be equivalent: "
        f"{sum(fault in wrong for fault in faults)} came out otherwise"
    )
    for fault in wrong:
        outcome = known[keys[fault]]
        print(f"  {outcome['outcome']}: {fault.name} ({fault.path})\n{outcome['output']}")
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/mutation", description=__doc__)
    parser.add_argument("--only", default="", help="faults with this text in 'area: name (path)'")
    parser.add_argument("--processes", type=int, default=2, help="how many at a time (2)")
    parser.add_argument("--again", action="store_true", help="try also what is known")
    return parser.parse_args()


def _tried(faults: list[Fault], processes: int) -> Iterator[tuple[Fault, dict[str, Any]]]:
    """Yield each fault with what came of it, in order, as many at a time as there are processes."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        copies: Queue[Copy] = Queue()
        for number in range(processes):
            copies.put(Copy(ROOT, Path(folder) / str(number)))
        outcomes = pool.map(lambda fault: _try(fault, copies), faults)
        yield from zip(faults, outcomes, strict=True)
        while not copies.empty():
            copies.get().close()


def _try(fault: Fault, copies: Queue[Copy]) -> dict[str, Any]:
    """Plant one fault in a copy, run its tests, take it out again, and say what came of it."""
    copy, start = copies.get(), time.monotonic()
    file = copy.place / fault.path
    text = file.read_text(encoding="utf-8")
    try:
        file.write_text(fault.planted(text), encoding="utf-8")
        status, output = copy.test(fault.tests, LIMIT)
    finally:
        file.write_text(text, encoding="utf-8")
        copies.put(copy)
    # 0: all passed; 1: one failed; below 0: the process died of it; else nothing was tested.
    outcome = "caught" if status < 0 else {0: "lived", 1: "caught"}.get(status, "untried")
    return {
        "name": fault.name,
        "path": fault.path,
        "outcome": outcome,
        "output": "\n".join(output.splitlines()[-15:]),
        "seconds": time.monotonic() - start,
    }


def _keep(known: dict[str, Any]) -> None:
    RECORD.parent.mkdir(exist_ok=True)
    beside = RECORD.with_suffix(".new")
    beside.write_text(json.dumps(known, indent=1), encoding="utf-8")
    beside.replace(RECORD)


if __name__ == "__main__":
    sys.exit(main())
