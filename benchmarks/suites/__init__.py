"""The suites of ``benchmarks/run.py``, a module each.

A suite has

- ``run(setting)``, which returns its record, JSON values with an ``environment``, and its tables;
- ``report(record)``, which makes these tables, Markdown, from a record alone; without it reports
  show the ``<suite>.md`` that was written with the record;
- ``plot(record, path)`` if there is something to see: a PNG, and further ones beside it whose names
  begin with the stem of ``path`` and an underscore.
"""

from __future__ import annotations

import importlib
from types import ModuleType

SUITES = {
    "products": "Jacobian products against the loop that runs the network for each probe",
    "host": "what the ops take of the host: to launch on a GPU, to compute on a CPU",
    "divergence": "the trace in the right-hand side of an ODE beside the lines one writes by hand",
    "kernels": "the ops against eager PyTorch, torch.compile and diffusers' schedulers",
    "attention": "attention with tangents against the mathematical backend of PyTorch",
    "machine_code": "the Triton kernels compiled for sm_90, which takes no GPU",
    "estimators": "every estimator on a trained U-Net: cost, error and memory; other libraries",
    "structures": "the choice of probes against Rademacher on Jacobians of 60 structures",
    "parameters": "Hessian, Gauss-Newton and Fisher diagonals over parameters; other libraries",
    "sampling": "passes and time that a covariance adds to a sampling step",
    "overhead": "host time and launches of a sampling step whose network does nothing",
    "data": "memory and time to the first step of training on image files",
    "mixtures": "every covariance on mixtures, with the true score and a learned one",
    "flow": "few steps on any path: exact moments, and samples and bits/dim of Fashion-MNIST",
    "inverse": "posterior draws of inverse problems: error and calibration beside azula's solvers",
    "uncertainty": "uncertainty maps against errors of held-out images, by covariance",
    "heads": "heads of covariances on digits, Fashion-MNIST and CIFAR-10: likelihood, samples",
    "likelihoods": "log-likelihoods by the ODE: probes, time, and the bound beside it",
    "digits": "every covariance on scikit-learn's digits: likelihood, samples, diagonal and full",
    "cifar10": "covariances on CIFAR-10: likelihood, samples, and equal numbers of evaluations",
}


def load(name: str) -> ModuleType:
    """Import one suite, so that another that does not import stops nothing.

    Raises:
        ValueError: If there is no suite of that name.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    return importlib.import_module(f"suites.{name}")
