"""What the project does beside other libraries, with ratios from records: a table for the README.

What is said of a library was read in the version that is named: of curvlinops, BackPACK, azula and
diffusers in ``benchmarks/peers.txt`` and ``constraints.txt``; HesScale and k-diffusion, which are
not installed here, in their repositories.
"""

from __future__ import annotations

from pathlib import Path

from ocm.evaluation.environment import Row
from ocm.evaluation.markdown import markdown_table

ROOT = Path(__file__).parents[2]
# Products that the table speaks of: the most for which the libraries were timed.
PRODUCTS = 48


def table(estimators: Row, products: Row, parameters: Row, inverse: Row, sampling: Row) -> str:
    """Return the table, of the records of these suites."""
    rows = [
        {
            "beside": "a loop over Rademacher probes",
            "what it does": "unbiased diagonals, without error bars",
            "what is added here": "error bars; tolerances; colored probes, in which neighbours do "
            "not disturb each other; the same probes in any batch and on any device",
            "measured here": _loop(estimators, products),
        },
        {
            "beside": f"curvlinops {_version('curvlinops-for-pytorch')}",
            "what it does": "Rademacher, normal and XDiag estimates of any linear operator, "
            "without error bars",
            "what is added here": "the same as above; every sample of a batch at once",
            "measured here": _curvlinops(estimators),
        },
        {
            "beside": f"BackPACK {_version('backpack-for-pytorch')}, HesScale",
            "what it does": "curvature diagonals over parameters, for a list of layers",
            "what is added here": "any differentiable module; diagonals over inputs; whole data "
            "sets",
            "measured here": _backpack(parameters),
        },
        {
            "beside": f"azula {_version('azula')}",
            "what it does": "many samplers, whose steps take the mean alone; inverse problems by "
            "DPS, PiGDM, TMPD, MMPS and others",
            "what is added here": "the covariance in every step, learned or estimated; bits/dim; "
            "draws whose spread fits their errors",
            "measured here": _azula(inverse),
        },
        {
            "beside": f"diffusers {_version('diffusers')}",
            "what it does": "models, and steps with DDPM's variances or those that a model was "
            "trained to predict",
            "what is added here": "a covariance for models that were trained without; bits/dim; "
            "maps of uncertainty",
            "measured here": _diffusers(sampling),
        },
        {
            "beside": "k-diffusion",
            "what it does": "samplers whose noise the schedule fixes; the likelihood of the "
            "ODE, by one probe",
            "what is added here": "the same as for diffusers; error bars of the ODE's likelihood",
            "measured here": "not measured",
        },
    ]
    return markdown_table(rows, dict.fromkeys(rows[0], ""))


def _loop(estimators: Row, products: Row) -> str:
    faster = [r["times_faster"] for r in estimators["time_to_error"] if r["colors"] == PRODUCTS]
    (same,) = _of(estimators["passes"], way="hutchinson, vjp", M=PRODUCTS)
    (small,) = _of(products["small_calls"], D=16, M=1)
    return (
        f"U-Net: {min(faster):.0f} to {max(faster):,.0f} times faster to the error of {PRODUCTS} "
        f"colored probes, least where the noise is high; as many Rademacher probes in "
        f"{same['over_loop']:.0%} of the time. A small function, {small['D']} features and one "
        f"probe: {small['over_by_hand']:.1f} times slower"
    )


def _curvlinops(estimators: Row) -> str:
    (theirs,) = _of(estimators["peers"], method="curvlinops.hutchinson_diag")
    (ours,) = _of(estimators["peers"], method="hessdiag.estimate, auto", M=theirs["M"])
    return (
        f"U-Net, one image, {theirs['M']} products: "
        f"{theirs['relative_error'] / ours['relative_error']:.1f} times less error in "
        f"{ours['milliseconds'] / theirs['milliseconds']:.0%} of the time"
    )


def _backpack(parameters: Row) -> str:
    over = [r["over_backpack"] for r in _of(parameters["gauss_newton"], method="hessdiag, exact")]
    return (
        f"exact Gauss-Newton diagonals of {len(over)} networks: {min(over):.0%} to {max(over):.0%} "
        "of BackPACK's time; HesScale was not measured"
    )


def _azula(inverse: Row) -> str:
    problem = inverse["fashion"]["lengths"][0]["problem"]
    rows = _of(inverse["fashion"]["rows"], problem=problem)
    (ours,) = _of(rows, library="ocm", method="MMPS (1 CG), drawn")
    (theirs,) = _of(rows, library="azula", method="MMPS (1 CG)")
    key = "squared_error_over_variance"
    return (
        f"MMPS given the upper half of images: squared errors are {ours[key]:.1f} times the "
        f"variance of the draws, azula's {theirs[key]:.1f} times (1 is right); "
        f"{ours['crps'] / theirs['crps']:.0%} of azula's CRPS, an error of draws, in "
        f"{ours['times_plain_sampling'] / theirs['times_plain_sampling']:.0%} of its time"
    )


def _diffusers(sampling: Row) -> str:
    largest = max(row["parameters"] for row in sampling["rows"])
    rows = _of(sampling["rows"], parameters=largest)
    simple = [row["over_plain"] - 1 for row in rows if "simple head" in row["covariance"]]
    (residual,) = [row["over_plain"] - 1 for row in rows if "residual head" in row["covariance"]]
    return (
        f"U-Net of ddpm-cifar10-32: a simple head adds {min(simple):.1%} to {max(simple):.1%} to "
        f"the time of a step, a residual one {residual:.1%}"
    )


def _of(rows: list[Row], **values: object) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def _version(package: str) -> str:
    """Return the version of a package that tests and benchmarks are pinned to.

    Example:
        >>> _version("azula").count(".")
        2
    """
    pins = "".join(
        (ROOT / name).read_text() for name in ("benchmarks/peers.txt", "constraints.txt")
    )
    (version, *_) = [
        line.split(";")[0].split("==")[1].strip()
        for line in pins.splitlines()
        if line.startswith(f"{package}==")
    ]
    return version
