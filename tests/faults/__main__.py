"""Plant every fault in a copy of the project and run the tests that must notice it.

    python tests/faults [--only TEXT] [--processes 2] [--again]

What was found is kept in .cache/faults.json, and tried again only where the fault, its file or its
tests have changed. The exit status is 1 if a fault lived, or could not be tried.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from faults.attention import FAULTS as ATTENTION  # noqa: E402
from faults.fault import Fault  # noqa: E402
from faults.kernels import FAULTS as KERNELS  # noqa: E402

FAULTS = [*KERNELS, *ATTENTION]
RECORD = ROOT / ".cache" / "faults.json"
COPIED = ("hessdiag", "ocm", "tests", "benchmarks", "examples", "pyproject.toml")
LIMIT = 600  # seconds; a fault that keeps the tests from ending is noticed too


def main() -> int:
    """Run the faults that are asked for, and return the exit status."""
    options = _options()
    faults = [fault for fault in FAULTS if options.only in fault.name or options.only in fault.path]
    if not faults:
        print(f"no fault has {options.only!r} in its name or its path", file=sys.stderr)
        return 2
    known = {} if options.again or not RECORD.exists() else json.loads(RECORD.read_text())
    todo = [fault for fault in faults if fault.fingerprint(ROOT) not in known]
    print(f"{len(faults)} faults, {len(faults) - len(todo)} known from before", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        copies: Queue[Path] = Queue()
        for number in range(options.processes):
            copies.put(_copy(Path(folder) / str(number)))
        with ThreadPoolExecutor(options.processes) as pool:
            for outcome in pool.map(lambda fault: _try(fault, copies), todo):
                known[outcome["fingerprint"]] = outcome
                _keep(known)
                print(
                    f"  {outcome['outcome']:8} {outcome['seconds']:4.0f} s  {outcome['name']}",
                    flush=True,
                )

    results = [known[fault.fingerprint(ROOT)] for fault in faults]
    lived = [result for result in results if result["outcome"] != "caught"]
    print(f"{len(results) - len(lived)} of {len(results)} caught")
    for result in lived:
        print(f"  {result['outcome']}: {result['name']} ({result['path']})\n{result['output']}")
    return 1 if lived else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    parser.add_argument("--only", default="", help="faults with this text in their name or path")
    parser.add_argument("--processes", type=int, default=2, help="how many at a time (2)")
    parser.add_argument("--again", action="store_true", help="try also what is known")
    return parser.parse_args()


def _copy(place: Path) -> Path:
    """Copy what the tests need; the kernels lie where the installed package has them."""
    ignored = shutil.ignore_patterns("__pycache__", "results", "kernels@")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=ignored, symlinks=True)
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place / name)
    if not (place / "hessdiag" / "kernels").exists():
        shutil.copytree(ROOT / "kernels", place / "hessdiag" / "kernels", ignore=ignored)
    (place / "kernels").symlink_to(place / "hessdiag" / "kernels")
    return place


def _try(fault: Fault, copies: Queue[Path]) -> dict[str, object]:
    """Plant one fault in a copy, run its tests, take it out again, and say what came of it."""
    copy = copies.get()
    file, start = copy / fault.path, time.monotonic()
    text = file.read_text()
    try:
        file.write_text(fault.planted(text))
        outcome, output = _outcome(copy, fault.tests)
    finally:
        file.write_text(text)
        copies.put(copy)
    return {
        "name": fault.name,
        "path": fault.path,
        "fingerprint": fault.fingerprint(ROOT),
        "outcome": outcome,
        "output": output,
        "seconds": time.monotonic() - start,
    }


def _outcome(copy: Path, tests: tuple[str, ...]) -> tuple[str, str]:
    cache = {"TRITON_CACHE_DIR": str(copy / ".cache")} if "--emulate" in tests else {}
    environment = {
        **os.environ,
        **cache,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return "caught", f"the tests did not end within {LIMIT} s"
    # 0: all passed; 1: one failed; below 0: the process died of it; else nothing was tested.
    outcome = {0: "lived", 1: "caught"}.get(done.returncode, "untried")
    if done.returncode < 0:
        outcome = "caught"
    return outcome, "\n".join((done.stdout + done.stderr).splitlines()[-15:])


def _keep(known: dict[str, object]) -> None:
    RECORD.parent.mkdir(exist_ok=True)
    beside = RECORD.with_suffix(".new")
    beside.write_text(json.dumps(known, indent=1))
    beside.replace(RECORD)


if __name__ == "__main__":
    sys.exit(main())
