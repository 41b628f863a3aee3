"""The documents quote the recorded results, and their links and commands exist."""

import inspect
import json
import math
import re
import shutil
import subprocess
import warnings
from collections import Counter
from pathlib import Path

import pytest
from records import quotes

import ocm
from ocm.cli.train import train
from ocm.training.small_unet import small_unet

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = {str(file.relative_to(ROOT)): file.read_text() for file in quotes.DOCUMENTS}
MOST_LINES_OF_THE_README = 150
DEFAULTS = ocm.TrainingSettings(1)
each_document = pytest.mark.parametrize("name", TEXTS)


def recorded(name):
    return json.loads((RESULTS / name).read_text())


# Blocks, which benchmarks/records quotes writes


@each_document
def test_every_block_is_what_its_record_holds(name):
    """If this fails, `python benchmarks/records quotes` writes the blocks again."""
    assert quotes.filled(TEXTS[name]) == TEXTS[name]


def test_every_block_is_quoted_once_and_says_where_it_is_from():
    quoted = Counter(re.findall(r"<!-- figures: ([\w-]+) -->", "".join(TEXTS.values())))
    assert quoted == dict.fromkeys(quotes.BLOCKS, 1)
    for name, block in quotes.BLOCKS.items():
        last_line = quotes.rendered(name).strip().splitlines()[-1]
        records = [recorded(file) for file in (block.record, *block.further)]
        sources = [rf"`[^`]+` at {record['environment']['commit'][:7]}" for record in records]
        assert re.fullmatch(f"_{', '.join(sources)}_", last_line)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- figures: unheard-of -->\n<!-- end -->",
        "<!-- figures: demo -->\n",
        "<!-- figures: demo -->\n<!-- figures: digits -->\n<!-- end -->",
        "<!-- end -->",
    ],
)
def test_blocks_that_are_not_whole_or_not_known_are_errors(text):
    with pytest.raises(ValueError, match=r"figures must be one of|must have its"):
        quotes.filled(text)


# Figures in sentences


def time_of_a_simple_head():
    """The most that one adds to the time of a sampling step, over the networks."""
    rows = recorded("cpu/sampling.json")["rows"]
    return max(row["over_plain"] - 1 for row in rows if "simple head" in row["covariance"])


def largest_amplification():
    """Of the papers' unit, to two digits."""
    schedule = ocm.linear()
    return float(f"{(schedule.beta_bar[-1] / schedule.alpha_bar[-1]).item():.1e}")


def parameters_of_the_digits_denoiser():
    width = recorded("cpu/digits.json")["training"]["denoiser"]["width"]
    return sum(p.numel() for p in small_unet((1, 8, 8), width=width).parameters()) / 1e6


# What a sentence says, and the value that its figure is formatted from. In a bound the figure is
# the least number of its digits that is not below the value.
QUOTED = {
    "head errors are amplified up to {:,.0f} times near t = N": largest_amplification,
    "a denoiser of {:.2f} million parameters": parameters_of_the_digits_denoiser,
    "`learning_rate` | {:g}, falling": lambda: DEFAULTS.learning_rate,
    "The command takes {:g} for heads": lambda: (
        inspect.signature(train).parameters["head_learning_rate"].default
    ),
    "`ema_decay` | {:g} |": lambda: DEFAULTS.ema_decay,
    "`warmup_steps` | {} |": lambda: DEFAULTS.warmup_steps,
}
BOUNDS = {
    "a simple one adds at most {:.0%} to the time of a step": (time_of_a_simple_head, 0.01),
}
# Numbers that nothing measured.
CONSTANTS = {
    "Python 3.10 to 3.13": "versions, of pyproject.toml",
    "need PyTorch 2.13": "a version, of the advice in hessdiag/compat.py",
    "Apache-2.0": "a licence's name",
    "rtol=0.02": "an argument in an example",
    "eta=0.3": "an argument in an example",
    "denoiser.condition(labels, 2.0)": "an argument in an example",
}


def fragments():
    """Every fragment of a sentence that may hold a figure, with the figure as recorded."""
    for template, value in QUOTED.items():
        yield template.format(value())
    for template, (value, step) in BOUNDS.items():
        yield template.format(-(-value() // step) * step)
    yield from CONSTANTS


# Decimals, powers of ten, percentages, errors, and numbers with a unit of something measured.
MEASURED = re.compile(
    r"""(?<![\w.])\d[\d,]*(?:
        \.\d+(?:e[+-]?\d+)?
      | e[+-]?\d+
      | \s?%
      | \s*±
      | x(?![\w])
      | [\s-](?:times|fold|ms|milliseconds?|s|seconds?|min|minutes?|h|hours?|days?
               |[kKMGT]i?B(?:/s)?|bits?|bits/dim|nats?|W|FLOPS?|images/s|steps/s|percent)\b
    )""",
    re.VERBOSE,
)


def prose(text):
    """Sentences: without fences, generated blocks, comments, targets of links and arXiv numbers."""
    for pattern in (
        r"<!-- figures: .*?<!-- end -->",
        r"^```.*?^```",
        r"<!--.*?-->",
        r"(?<=\])\([^)]*\)",
        r"\barXiv\s\d{4}\.\d{4,5}\b",
    ):
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\s+", " ", text)


def unfounded(text):
    """Figures of a text that lie in none of the fragments."""
    text, spans = prose(text), []
    for fragment in fragments():
        spans += [found.span() for found in re.finditer(re.escape(fragment), text)]
    return [
        text[max(0, found.start() - 40) : found.end() + 20]
        for found in MEASURED.finditer(text)
        if not any(low <= found.start() and found.end() <= high for low, high in spans)
    ]


@each_document
def test_every_figure_in_a_sentence_is_recorded(name):
    assert unfounded(TEXTS[name]) == []


def test_no_fragment_has_gone():
    text = " ".join(prose(text) for text in TEXTS.values())
    assert [fragment for fragment in fragments() if fragment not in text] == []


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= MOST_LINES_OF_THE_README


@pytest.mark.parametrize(
    "claim",
    [
        "It is 3.5 times faster.", "It is 12 times faster.", "It takes 41% of the time.",
        "It gains 0.2 bits/dim.", "It needs 4 GB.", "A step takes 12 ms.", "4 ± 1",
        "Errors grow by up to 2.6e4 towards t = N.", "It is 3x as fast.", "5 minutes",
        "head errors are amplified up to 26,000 times near t = N", "`beta` reaches 3.10 bits/dim",
        "a simple one adds at most 2% to the time of a step", "a 10-fold gain",
    ],
)  # fmt: skip
def test_a_figure_that_is_not_recorded_is_found(claim):
    assert len(unfounded(claim)) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("K = 10 steps of N = 1000", "images of 8x8", "version 2", "64 products", "M = 16,"),
        "(arXiv 2406.10808)",
    ],
)
def test_settings_are_no_figures(text):
    assert unfounded(text) == []


# Records


RECORDS = sorted(RESULTS.glob("*/*.json"))


def commit_of(record):
    """The commit of a record, and whether the checkout differed from it."""
    if "commit_info" in record:  # pytest-benchmark
        return record["commit_info"]["id"], record["commit_info"]["dirty"]
    if "recorded_at" in record:  # of no command: the commit that holds it first
        return record["recorded_at"], False
    return record["environment"]["commit"], record["environment"]["uncommitted_changes"]


def git(*arguments):
    return subprocess.run(
        ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False
    )


def has_history():
    """Whether this is a checkout with every commit, and not a copy or a shallow clone."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return False
    return git("rev-parse", "--is-shallow-repository").stdout.strip() == "false"


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_record_names_the_commit_that_it_was_made_at(file):
    record = json.loads(file.read_text())
    # A record may hold another, of what was trained before.
    for part in (
        record,
        *(v for v in record.values() if isinstance(v, dict) and "environment" in v),
    ):
        commit, changed = commit_of(part)
        assert re.fullmatch("[0-9a-f]{40}", commit)
        assert changed is False
        if not has_history():
            warnings.warn(f"no history here to look for {commit} in", stacklevel=1)
            continue
        assert git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0, commit


# But that of pytest-benchmark, whose format is its own, and what was tried by hand.
OTHERS = ("small", "cifar10_tried")
SUITES = [file for file in RECORDS if file.parent.name == "cpu" and file.stem not in OTHERS]


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_records_of_suites_name_their_command(file):
    record = json.loads(file.read_text())
    assert record["suite"] == file.stem
    assert record["command"].startswith(f"python benchmarks/run.py --suite {file.stem}")


# What the recorded figures show


def test_the_recorded_demo_shows_what_it_is_for():
    """The likelihood head is below all others, plain or calibrated, and β above all heads."""
    bits = recorded("demo/metrics.json")["nll_bits_per_dim"]
    for K in ("5", "10", "25", "50"):
        assert bits["ml"][K] == min(row[K] for row in bits.values())
        assert bits["beta"][K] > max(bits["ocm"][K], bits["ocm_calibrated"][K])


def test_the_recorded_estimators_show_what_is_claimed():
    """Every coloring gains at every noise level, and "auto" never loses more than 5%."""
    record = recorded("cpu/estimators.json")
    gains = {(row["t"], row["M"]): row["coloring_gain"] for row in record["errors"]}
    assert all(gain > 1 for (_, M), gain in gains.items() if M > 1)
    assert min(gains[t, 48] for t in (5, 50)) >= 30
    assert gains[200, 48] >= 4
    assert all(row["auto_gain_measured"] > 0.95 for row in record["errors"] if row["M"] < 192)
    fastest = {
        t: max(row["times_faster"] for row in record["time_to_error"] if row["t"] == t)
        for t in (50, 200, 500)
    }
    assert fastest[50] >= 60
    assert fastest[200] >= 8
    assert fastest[500] >= 2.5


def headings(file):
    """The places of a document that a link may end at, as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(links, file):
    """Links of a document, PATH#HEADING, to files or headings that do not exist."""
    found = []
    for link in links:
        path, _, heading = link.partition("#")
        target = file.parent / path if path else file
        if not target.exists() or (heading and heading not in headings(target)):
            found.append(link)
    return found


@each_document
def test_files_and_headings_that_are_linked_exist(name):
    links = re.findall(r"\]\(([^):]+)\)", TEXTS[name])
    assert links or "{toctree}" in TEXTS[name]
    assert broken(links, ROOT / name) == []


def test_links_to_nothing_are_found(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("# What a step costs: all\n```\n# a comment\n```\n")
    right = ["a.md", "#what-a-step-costs-all", "a.md#what-a-step-costs-all"]
    wrong = ["b.md", "#a-comment", "a.md#costs"]
    assert broken([*right, *wrong], file) == wrong


def test_the_recorded_cifar10_shows_what_is_said():
    """OCM is below analytic, SN and I-DDPM at K = 10 and 25, and NPR within 0.1% of it."""
    rows = [row for row in recorded("cpu/cifar10.json")["rows"] if row["K"] in (10, 25)]
    for name in ("analytic", "sn", "iddpm"):
        compared = [row for row in rows if row["covariance"] == name]
        assert len({(row["schedule"], row["K"]) for row in compared}) == 4
        assert all(row["minus_ocm"] > 0 for row in compared)
    compared = [row for row in rows if row["covariance"] == "npr"]
    assert len(compared) == 8
    assert all(abs(row["minus_ocm"]) < 1e-3 * row["bits_per_dim"] for row in compared)


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z-]+)", "\n".join(TEXTS.values()), re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= targets


def test_the_recorded_digits_show_what_is_claimed():
    """Calibration lowers every bound up to K = 25, and the lowest of all is a calibrated one.

    A number for each timestep has nothing to gain from another: the calibrated analytic variance
    may differ from the plain one by its own error of estimation, but not by more.
    """
    bits = recorded("cpu/digits.json")["nll_bits_per_dim"]
    plain = [name for name in bits if not name.endswith("_calibrated")]
    for name in plain:
        for K in ("5", "10", "25"):
            gain = bits[name][K] - bits[f"{name}_calibrated"][K]
            assert gain > (-0.002 if name == "analytic" else 0.0), (name, K)
    for K in ("5", "10", "25"):
        best = min(bits[f"{name}_calibrated"][K] for name in plain)
        assert best < min(bits[name][K] for name in plain)


def test_a_head_costs_one_pass_and_little_time():
    rows = recorded("cpu/sampling.json")["rows"]
    heads = [row for row in rows if "simple head" in row["covariance"]]
    assert len({row["network"] for row in heads}) == 2
    assert all(row["passes"] == 1 for row in heads)
    assert all(row["over_plain"] <= 1.05 for row in heads)


def test_the_recorded_samples_of_heads_show_what_is_said():
    rows = recorded("cpu/heads.json")["samples"]

    def of(data, path, evaluations):
        some = [
            r for r in rows if (r["data"], r["path"], r["evaluations"]) == (data, path, evaluations)
        ]
        ours, others = ([r for r in some if r["is_ours"] is own] for own in (True, False))
        return ours, others

    def best(some, network):
        return min(row[network] for row in some)

    for path in ("linear", "cosine", "flow"):
        for evaluations in (10, 20):
            ours, others = of("fashion_mnist", path, evaluations)
            second = [row for row in ours if row["method"] == "second order, η = 1"]
            for network in ("classifier", "imagenet"):
                is_below = best(second, network) < best(others, network)
                assert is_below == ((path, evaluations, network) != ("cosine", 20, "classifier"))
            ours, others = of("cifar10", path, evaluations)
            second = [
                row
                for row in ours
                if (row["method"], row["covariance"]) == ("second order, η = 0.3", "frequency")
            ]
            if not second:  # not among those that are drawn at every number of evaluations
                assert (path, evaluations) == ("flow", 20)
                continue
            (plain,) = [row for row in others if row["method"] == "DPM-Solver++ 2M"]
            (sde,) = [row for row in others if row["method"] == "DPM-Solver++ 2M SDE"]
            error = math.hypot(*(r["classifier_standard_error"] for r in (second[0], plain)))
            assert abs(second[0]["classifier"] - plain["classifier"]) < 2 * error
            if evaluations == 10:
                both = second[0]["classifier"], plain["classifier"]
                assert sde["classifier"] < min(both)
    few = [
        of(data, path, 5)
        for data in ("fashion_mnist", "cifar10")
        for path in ("linear", "cosine", "flow")
    ]
    assert sum(best(ours, "classifier") < best(others, "classifier") for ours, others in few) == 5
    for ours, _ in few:
        first = min(ours, key=lambda row: row["classifier"])
        loses = (first["data"], first["path"]) == ("fashion_mnist", "cosine")
        assert loses or first["method"] in ("second order, η = 0.3", "λ = 0")
