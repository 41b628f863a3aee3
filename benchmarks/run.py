"""Run benchmark suites: ``python benchmarks/run.py --quick``, or ``--suite products`` for one.

Every figure is a ratio or a time measured in this run, after the results were checked. A suite's
rows go to JSON with the command, commit, versions and hardware, its tables to Markdown, and
report.md shows all that the directory holds. A suite that fails stops no other; the report names
it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import suites
import torch
from harness.timing import Setting, write
from records import report

ALL = "all"
_DATA = Path("../shared/data/cifar10")
_FASHION_MNIST = Path("../shared/data/fashion_mnist")
# The files of CIFAR-10 that the suite cifar10 reads.
_CIFAR10_FILES = ("train.parquet", "test.parquet")


def main() -> None:
    """Parse the command line and run the suites."""
    arguments = _parser().parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"error: --device {arguments.device} needs a CUDA device, and there is none")
    setting = Setting(
        torch.device(arguments.device), arguments.quick, arguments.data, arguments.fashion_mnist
    )
    names, left_out = chosen(arguments.suite or [ALL], arguments.data)
    failed: dict[str, str] = {}
    for name in names:
        print(f"== {name}: {suites.SUITES[name]}", flush=True)
        start = time.perf_counter()
        try:
            tables = run_suite(name, setting, arguments.out, command(name, arguments))
        except Exception as error:
            # Whatever it is, the other suites are still to run; it is shown here and at the end.
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            print(tables, flush=True)
        print(f"== {name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    report.write_run(
        arguments.out, shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]), failed, left_out
    )
    print(f"report: {report.write(arguments.out)}")
    for name, reason in left_out.items():
        print(f"LEFT OUT {name}: {reason}")
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    if failed:
        sys.exit(1)


def chosen(asked: Sequence[str], data: Path) -> tuple[list[str], dict[str, str]]:
    """Return the suites to run, in their order, and those left out with the reason.

    Args:
        asked: Names of suites, or "all".
        data: Directory of CIFAR-10. Where it lacks a file, "all" leaves cifar10 out.

    Raises:
        SystemExit: If cifar10 is asked for by name and its data are missing.
    """
    missing = [file for file in _CIFAR10_FILES if not (data / file).exists()]
    reason = f"no {' and no '.join(missing)} in {data}; --data names another directory"
    if missing and "cifar10" in asked:
        sys.exit(f"error: --suite cifar10: {reason}")
    names = list(suites.SUITES) if ALL in asked else [n for n in suites.SUITES if n in asked]
    if missing and "cifar10" in names:
        return [name for name in names if name != "cifar10"], {"cifar10": reason}
    return names, {}


def run_suite(name: str, setting: Setting, out: Path, command: str) -> str:
    """Run one suite, write its record, tables and plots to ``out``, and return the tables."""
    suite = suites.load(name)
    start = time.perf_counter()
    record, tables = suite.run(setting)
    seconds = time.perf_counter() - start
    record = write(out, name, record, tables, command=command, seconds=seconds)
    if hasattr(suite, "plot"):
        suite.plot(record, out / f"{name}.png")
    return str(tables)


def command(name: str, arguments: argparse.Namespace) -> str:
    """Return the command that makes the rows of one suite again, wherever they are written."""
    words = ["python", "benchmarks/run.py", "--suite", name]
    if arguments.device != "cpu":
        words += ["--device", arguments.device]
    if arguments.quick:
        words.append("--quick")
    if arguments.data != _DATA:
        words += ["--data", str(arguments.data)]
    if arguments.fashion_mnist != _FASHION_MNIST:
        words += ["--fashion-mnist", str(arguments.fashion_mnist)]
    return shlex.join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="suites:\n" + "\n".join(f"  {n:14}{what}" for n, what in suites.SUITES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--suite",
        action="append",
        choices=[*suites.SUITES, ALL],
        metavar="SUITE",
        help="what to measure, see below; may be given several times (default: all)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds and sizes: every line runs, in minutes"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="directory for all that is made"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=_DATA,
        help="directory with train.parquet and test.parquet of CIFAR-10 (default: %(default)s); "
        "where it is absent estimators trains on digits, and cifar10 is left out",
    )
    parser.add_argument(
        "--fashion-mnist",
        type=Path,
        default=_FASHION_MNIST,
        help="the same of Fashion-MNIST (default: %(default)s); where it is absent flow computes "
        "its moments alone",
    )
    return parser


if __name__ == "__main__":
    main()
