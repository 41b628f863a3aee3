"""Tables and the picture of the comparison of log-likelihoods."""

from __future__ import annotations

from pathlib import Path

from ocm.covariances.names import NAMES, label
from ocm.evaluation.environment import Row
from ocm.evaluation.markdown import markdown_table

# Lists of rows in a record.
TABLES = ("scores", "equal", "timed", "coverage")
_DATA = {"digits": "digits", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}


def report(record: Row) -> str:
    """Return the tables of a record."""
    settings = record["settings"]
    titles, found = _by_model(record)
    lines: dict[str, Row] = {}
    for title, row in zip(titles, found, strict=True):
        for cell in row["scores"]:
            name = cell["what"].removeprefix("bound, ")
            if "K" in cell:
                head = label(name) if name in NAMES else "likelihood head in frequencies"
                name = f"bound, {head}, K = {cell['K']}"
            line = lines.setdefault(name, {"": name})
            line[title] = f"{cell['bits_per_dim']:.3f} ± {cell['standard_error']:.3f}"
    evaluations = found[0]["equal"][0]["evaluations"]
    parts = [
        f"Bits/dim of {settings['num_images']} test images, ± the standard error over images. The "
        f"ODE takes {evaluations} evaluations of the network, with 2 products each.",
        markdown_table(list(lines.values()), {"": ""} | dict.fromkeys(titles, ">")),
    ]
    equal = {row["probes"]: {"probes": row["probes"]} for model in found for row in model["equal"]}
    for title, model in zip(titles, found, strict=True):
        for row in model["equal"]:
            ratio = f"{row['standard_error']:.5f} ({row['ratio']:.1f})"
            equal[row["probes"]][title] = ratio
    parts += [
        f"Standard error in bits/dim of an image at {settings['num_products']} products an "
        f"evaluation (how many times smaller than with kept Rademacher probes), root mean square "
        f"over {settings['num_compared']} images. Each way is within six standard errors of the "
        "exact divergence of the first image.",
        markdown_table(list(equal.values()), {"probes": ""} | dict.fromkeys(titles, ">")),
    ]
    timed: dict[str, Row] = {}
    for title, model in zip(titles, found, strict=True):
        base = model["timed"][0]["seconds_to_target"]
        for row in model["timed"]:
            line = timed.setdefault(row["probes"], {"probes": row["probes"]})
            line[title] = (
                f"{row['seconds_to_target']:.1f} s, M = {row['products']} "
                f"({base / row['seconds_to_target']:.1f})"
            )
    parts += [
        f"Seconds for {settings['num_compared']} images to a standard error of "
        f"{settings['target']:g} bits/dim each (how many times faster than with kept Rademacher "
        "probes in one solution), in one run of one thread; where a run falls short of the target, "
        "or is repeated, by 1 / M.",
        markdown_table(list(timed.values()), {"probes": ""} | dict.fromkeys(titles, ">")),
    ]
    for title, model in zip(titles, found, strict=True):
        if model["coverage"]:
            rows = [
                {
                    "probes": f"{row['probes']}, M = {row['products']}",
                    "held": f"{row['coverage']:.1%}",
                    "error / stated": f"{row['error_over_stated']:.3f}",
                    "mean error, in standard errors": f"{row['mean_error_in_standard_errors']:.2f}",
                }
                for row in model["coverage"]
            ]
            columns = {"probes": "", "held": ">", "error / stated": ">"}
            columns |= {"mean error, in standard errors": ">"}
            parts += [
                f"{title}: 95% intervals of {model['coverage'][0]['seeds']} seeds on one image, "
                "against the exact divergence.",
                markdown_table(rows, columns),
            ]
    return "\n\n".join(parts)


def plot(record: Row, path: Path) -> None:
    """Draw the standard errors of probes, and bits/dim by bound and by ODE, of every model."""
    import matplotlib.pyplot as plt

    settings = record["settings"]
    titles, found = _by_model(record)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.5 * len(found) + 2.2), sharey=True)
    places = range(len(found))
    for k, name in enumerate(row["probes"] for row in found[0]["equal"]):
        errors = [model["equal"][k]["standard_error"] for model in found]
        left.plot(errors, places, "os^D"[k], label=name, markersize=7)
    left.set_xscale("log")
    left.set_yticks(list(places), titles)
    left.invert_yaxis()
    left.set_xlabel(
        f"standard error of an image, bits/dim, at {settings['num_products']} products\n"
        "an evaluation"
    )
    few, many = min(settings["step_counts"]), max(settings["step_counts"])
    for what, marker in ((few, "<"), (many, "o"), ("ODE", "D")):
        scores = [
            min(
                cell["bits_per_dim"]
                for cell in model["scores"]
                if (cell.get("K") == what if what != "ODE" else "K" not in cell)
            )
            for model in found
        ]
        name = "ODE, best dequantisation" if what == "ODE" else f"bound, best head, K = {what}"
        right.plot(scores, places, marker, label=name, markersize=7)
    right.set_xlabel(f"bits/dim of {settings['num_images']} test images")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.22), ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _by_model(record: Row) -> tuple[list[str], list[Row]]:
    """Return the titles of the models, and the rows of each by table."""
    models = list(dict.fromkeys((row["data"], row["path"]) for row in record["scores"]))
    found = [
        {
            table: [row for row in record[table] if (row["data"], row["path"]) == model]
            for table in TABLES
        }
        for model in models
    ]
    return [f"{_DATA[data]}, {path}" for data, path in models], found
