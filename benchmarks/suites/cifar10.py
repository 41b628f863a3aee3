"""Every head, plain and calibrated, on CIFAR-10 with two schedules; samplers at equal evaluations.

What is trained and scored is in ``benchmarks/cifar10``, whose three commands do the same. Here
the work is kept below ``.cache/benchmarks``, in a directory for each size, and goes on where it was
interrupted: on a GPU the full size, on a CPU a reduced one of 16x16 pixels.
"""

from __future__ import annotations

from pathlib import Path

from cifar10 import experiment, figures
from cifar10.report import tables
from cifar10.sizes import FULL, QUICK, REDUCED
from cifar10.training import check_data, train_schedule
from harness.timing import Setting

from ocm.evaluation.environment import Row

_CACHE = Path(__file__).parent.parent.parent / ".cache" / "benchmarks"


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables.

    Raises:
        ValueError: If CIFAR-10 is not in ``setting.data``.
    """
    full = FULL if setting.device.type == "cuda" else REDUCED
    size = QUICK if setting.quick else full
    check_data(setting.data)
    work = work_directory(size.name)
    experiment.over_schedules(train_schedule, work, setting.data, size, setting.device)
    record = experiment.evaluate(work, setting.data, size, setting.device)
    return record, report(record)


def work_directory(size: str) -> Path:
    """Return where the suite keeps what it trains and has finished."""
    return _CACHE / f"cifar10-{size}"


def report(record: Row) -> str:
    """Return the tables of a record."""
    return tables(record)


def plot(record: Row, path: Path) -> None:
    """Draw the curves, and the samples that are in the suite's work directory."""
    figures.plot_curves(record, path)
    figures.plot_samples(record, work_directory(record["settings"]["name"]), path)
