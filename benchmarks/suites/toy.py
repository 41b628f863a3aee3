"""Covariances on 2-D mixtures, where the true one is known: the experiment of ``ocm toy``."""

from __future__ import annotations

from pathlib import Path

from harness import Setting

from ocm.environment import Row
from ocm.toy import experiment, plots
from ocm.toy.report import tables
from ocm.toy.settings import QUICK, ToySettings


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its Markdown tables."""
    settings = QUICK if setting.quick else ToySettings()
    record = experiment.run(settings, setting.device, progress=False)
    return record, report(record)


def report(record: Row) -> str:
    """Return the tables of a record."""
    return tables(record)


def plot(record: Row, path: Path) -> None:
    """Draw errors, samples and checks, as ``toy.png``, ``toy_samples.png``, ``toy_checks.png``."""
    plots.draw(record, path.parent, path.stem)
