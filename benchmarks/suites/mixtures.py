"""Covariances on 2-D mixtures, where the true one is known."""

from __future__ import annotations

from pathlib import Path

from harness.timing import Setting
from mixtures import experiment, plots
from mixtures.report import tables
from mixtures.settings import QUICK, MixtureSettings

from ocm.evaluation.environment import Row


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its Markdown tables."""
    settings = QUICK if setting.quick else MixtureSettings()
    record = experiment.run(settings, setting.device, progress=False)
    return record, report(record)


def report(record: Row) -> str:
    """Return the tables of a record."""
    return tables(record)


def plot(record: Row, path: Path) -> None:
    """Draw errors, samples and checks, as ``mixtures.png`` and two pictures beside it."""
    plots.draw(record, path.parent, path.stem)
