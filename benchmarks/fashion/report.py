"""Tables and pictures of the experiment on Fashion-MNIST, from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fashion.methods import PRODUCTS, SHIFT, Method
from ocm.covariances.names import label
from ocm.evaluation.environment import Row
from ocm.evaluation.markdown import markdown_table, table_of_lines
from ocm.evaluation.pictures import sample_rows

NAMES = {"flow": "flow matching", "cosine": "variance preserving (cosine schedule)"}
LEFT_OUT = "features_left_out"
_CLAIMED = 10
_SECOND_ORDER = ("Heun", "DPM-Solver++")


def tables(record: Row) -> list[str]:
    """Return the tables of the record, in Markdown."""
    settings, features = record["settings"], record["features"]
    floor = features["training_images"]
    side = settings["image_size"]
    sections = [
        f"**Fashion-MNIST at {side}x{side} pixels.** Two models of the same U-Net "
        f"({record['models'][0]['training']['parameters']['denoiser'] / 1e6:.2f} million "
        f"parameters, {settings['denoiser']['num_steps']} steps of "
        f"{settings['denoiser']['batch_size']} images), one of each path. It sees 2x2 pixels as "
        "the channels of one place. Distances are Fréchet distances to "
        f"{settings['num_real']} test images in {features['name']}, right on "
        f"{features['accuracy']:.1%} of them, and in pixels; ± the standard error of the samples, "
        f"by leaving out {settings['blocks']} blocks in turn. {settings['num_samples']} training "
        f"images are at {floor['features']:.3f} and {floor['pixels']:.2f}.",
        "Spacing, and whether noise is added at the end, were chosen for each line on validation "
        f"images, by {settings['tuning_samples']} samples of another seed, at "
        f"{settings['tuning_budget']} evaluations. The shifted spacing is the trailing one with a "
        f"shift of {SHIFT:g}; of ours the even one bounds the last noisy step, to t = 1. At other "
        "numbers of evaluations the best four of the others and the best process of ours are "
        "drawn. OCM's heads are trained up to t = "
        + ", ".join(
            f"{model['training']['head_trained_up_to']} ({NAMES[model['path']]})"
            for model in record["models"]
        )
        + " and used beyond.",
        *(verdict(model, settings["tuning_budget"]) for model in record["models"]),
    ]
    for model in record["models"]:
        name = NAMES[model["path"]]
        sections += [
            f"**{name[0].upper()}{name[1:]}**: Fréchet distance in features (in pixels) at E "
            "evaluations of the network, best first",
            _budgets(model["rows"]),
            _gains(model, settings["tuning_budget"]),
            _with_products(model, settings),
            "Bits/dim of "
            f"{model['bits_per_dim'][0]['num_images']} test images, even steps, calibrated on "
            f'{settings["num_calibration"]} validation images; "coloring" takes '
            f"{settings['coloring_probes']} products a step",
            _likelihoods(model["bits_per_dim"]),
        ]
    for model in record["models"]:
        sections += [
            f"What was tried on validation images, {NAMES[model['path']]}: Fréchet distance in "
            "features by spacing, without noise at the end / with it",
            _tried(model["tried"]),
        ]
    return sections


def verdict(model: Row, budget: int = _CLAIMED) -> str:
    """Return how the best of ours compares with the best of the others, on the same footing."""
    rows = sorted(
        (row for row in model["rows"] if row["budget"] == budget), key=lambda row: row["features"]
    )
    ours = next(row for row in rows if row["covariance"])
    others = [row for row in rows if not row["covariance"]]
    text = (
        f"- {NAMES[model['path']]}, {budget} evaluations: the best of ours ({name_of(ours)}) is at "
        f"{ours['features']:.3f}, the best of the others ({name_of(others[0])}) at "
        f"{others[0]['features']:.3f}: {_difference(ours, others[0])}."
    )
    first_order = next(row for row in others if row["method"] not in _SECOND_ORDER)
    if first_order is not others[0]:
        text += (
            f" That one takes steps of second order, which ours are not. The best of first order "
            f"({name_of(first_order)}) is at {first_order['features']:.3f}: "
            f"{_difference(ours, first_order)}."
        )
    return text


def _difference(ours: Row, other: Row) -> str:
    difference = ours["features"] - other["features"]
    # Samples of one number begin with the same noise: the same blocks are left out of both.
    error = jackknife([a - b for a, b in zip(ours[LEFT_OUT], other[LEFT_OUT], strict=True)])
    word = "below" if difference < 0 else "above"
    size = "within" if abs(difference) < 2 * error else "more than"
    return f"ours is {word} by {abs(difference):.3f} ± {error:.3f}, {size} two standard errors"


def name_of(row: Mapping[str, Any]) -> str:
    """Return how a row's method is written."""
    covariance = row["covariance"]
    if not covariance:
        return str(row["method"])
    return f"{row['method']}, {covariance if covariance in PRODUCTS else label(covariance)}"


def jackknife(values: Sequence[float]) -> float:
    """Return the standard error of a figure from its values without each block of samples.

    It is that of the samples drawn; the real ones are given.
    """
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return float(((len(values) - 1) / len(values) * squares) ** 0.5)


def _cell(row: Row) -> str:
    return f"{row['features']:.3f} ± {jackknife(row[LEFT_OUT]):.3f} ({row['pixels']:.2f})"


def _budgets(rows: Sequence[Row]) -> str:
    budgets = sorted({row["budget"] for row in rows})
    lines: dict[str, Row] = {}
    order: dict[str, float] = {}
    for row in rows:
        name = name_of(row)
        line = lines.setdefault(
            name,
            {
                "sampler": name,
                "spacing": row["spacing"],
                "noise_at_end": "yes" if row["noise_at_end"] else "no",
            },
        )
        line[f"E = {row['budget']}"] = _cell(row)
        if row["budget"] == _CLAIMED or len(budgets) == 1:
            order[name] = row["features"]
    sorted_lines = sorted(lines.values(), key=lambda line: order.get(line["sampler"], 1e9))
    columns = dict.fromkeys(("sampler", "spacing", "noise_at_end"), "")
    return markdown_table(sorted_lines, columns | {f"E = {E}": ">" for E in budgets})


# The same process of ours, and of others: x0_hat clipped alike, and no covariance.
_WITHOUT = {
    "flow": {"λ = 0": "Euler, clipped", "λ = σ": "stochastic_sampling, clipped"},
    "cosine": {"λ = 0": "DDIM", "DDPM": "DDPM, β̃"},
}


def _gains(model: Row, budget: int) -> str:
    """Return what a covariance changes in processes that others take without one."""
    rows = {name_of(row): row for row in model["rows"] if row["budget"] == budget}
    found = []
    for process, without in _WITHOUT[model["path"]].items():
        for covariance in ("analytic", "ocm"):
            ours, other = rows[f"{process}, {label(covariance)}"], rows[without]
            found.append(f"{name_of(ours)}, against {without}: {_difference(ours, other)}")
    return f"What the covariance changes at {budget} evaluations. {'; '.join(found)}."


def _with_products(model: Row, settings: Row) -> str:
    rows = [
        {
            "sampler": name_of(row),
            "K": row["K"],
            "products": row["products"],
            "evaluations": row["evaluations"] + row["products"],
            "distance": _cell(row),
        }
        for row in sorted(model["with_products"], key=lambda row: row["features"])
    ]
    first, paid = next(row for row in model["with_products"] if row["covariance"]), []
    for covariance in PRODUCTS:
        method = Method(first["method"], covariance, first["spacing"], first["noise_at_end"])
        steps = {E: method.steps_with_products_within(E) for E in sorted(settings["budgets"])}
        paid += [f"{K} of {covariance} within {E}" for E, K in steps.items()]
    table = markdown_table(
        rows, {"sampler": "", "K": "d", "products": "d", "evaluations": "d", "distance": ">"}
    )
    names = " and ".join(f"{count} a step ({name})" for name, count in PRODUCTS.items())
    return (
        f"With Jacobian products, {names}; {first['num_samples']} samples a line, to be compared "
        "with one another only. Products apart, K evaluations; a product counting as one, those of "
        f"the column. Steps that a budget counted so pays for: {', '.join(paid)}\n\n{table}"
    )


def _likelihoods(rows: Sequence[Row]) -> str:
    counts = sorted({row["K"] for row in rows})
    lines: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row["K"]):
        name, *calibrated = row["covariance"].split(", ")
        written = ", ".join([name if name == "coloring" else label(name), *calibrated])
        lines.setdefault(written, []).append(
            f"{row['bits_per_dim']:.3f} ± {row['standard_error']:.3f}"
        )
    return table_of_lines("covariance", [f"K = {K}" for K in counts], lines)


def _tried(rows: Sequence[Row]) -> str:
    lines: dict[str, Row] = {}
    spacings = list(dict.fromkeys(row["spacing"] for row in rows))
    for row in rows:
        line = lines.setdefault(name_of(row), {"sampler": name_of(row)})
        cell = f"{row['features']:.3f}"
        before = line.get(row["spacing"])
        line[row["spacing"]] = cell if before is None else f"{before} / {cell}"
    return markdown_table(list(lines.values()), {"sampler": ""} | dict.fromkeys(spacings, ">"))


def plot(record: Row, work: Path, path: Path) -> None:
    """Draw the first samples of every method at ten evaluations, a picture for each model.

    Args:
        record: Of the experiment.
        work: Where the samples of the same run are; where they are not, a line says so.
        path: Of the plot that these stand beside.
    """
    from safetensors.torch import load_file

    budget = record["settings"]["tuning_budget"]
    for model in record["models"]:
        rows = [row for row in model["rows"] if row["budget"] == budget]
        rows.sort(key=lambda row: row["features"])
        files = {name_of(row): work / "parts" / row["samples"] for row in rows}
        missing = [file.name for file in files.values() if not file.exists()]
        if missing:
            print(f"samples are not drawn: {missing[0]} is not in {work / 'parts'}")
            continue
        images = {
            name: load_file(file)["images"].float() / 127.5 - 1.0 for name, file in files.items()
        }
        sample_rows(
            images,
            path.with_name(f"{path.stem}_samples_{model['path']}.png"),
            title=f"{NAMES[model['path']]}, {budget} evaluations, the same first noise, best first",
        )


def draw_distances(axis: Any, model: Row) -> None:
    """Draw the distances of one model against the number of evaluations."""
    for name in dict.fromkeys(name_of(row) for row in model["rows"]):
        rows = sorted(
            (row for row in model["rows"] if name_of(row) == name), key=lambda row: row["budget"]
        )
        if len(rows) > 1:
            own = bool(rows[0]["covariance"])
            axis.errorbar(
                [row["budget"] for row in rows],
                [row["features"] for row in rows],
                [2 * jackknife(row[LEFT_OUT]) for row in rows],
                marker="o" if own else "s",
                linestyle="-" if own else ":",
                capsize=2,
                label=name,
            )
    axis.set(yscale="log", xlabel="network evaluations", ylabel="Fréchet distance, features")
    axis.set_title(NAMES[model["path"]], fontsize=10)
