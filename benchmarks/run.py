"""Run a benchmark suite: ``python benchmarks/run.py --suite products``.

Every figure is a ratio or a time measured in this run, after the results were checked; the rows
go to JSON with the commit, versions and hardware, and to a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from harness import Setting, write
from suites import estimators, kernels, machine_code, products, sampling, toy

SUITES = {
    "estimators": estimators,
    "kernels": kernels,
    "machine_code": machine_code,
    "products": products,
    "sampling": sampling,
    "toy": toy,
}


def main() -> None:
    """Parse the command line and run the suite."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="products", help="what to measure")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="directory for JSON and Markdown"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data/cifar10"),
        help="directory with train.parquet and test.parquet of CIFAR-10; digits where it is absent",
    )
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"error: --device {arguments.device} needs a CUDA device, and there is none")
    suite = SUITES[arguments.suite]
    setting = Setting(torch.device(arguments.device), arguments.quick, arguments.data)
    record, table = suite.run(setting)
    write(arguments.out, arguments.suite, record, table)
    if hasattr(suite, "plot"):
        suite.plot(record, arguments.out / f"{arguments.suite}.png")
    print(table)
    print(f"\nrows: {arguments.out / arguments.suite}.json")


if __name__ == "__main__":
    main()
