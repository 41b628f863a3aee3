"""The experiment on mixtures: its measures against independent ones, and what the record shows."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixtures.checks import with_weight_noise
from mixtures.errors import off_diagonal_share, score_error, variance_error, weighted_points
from mixtures.experiment import Task, run_task
from mixtures.mixture import correlated_mixture, nine_gaussians
from mixtures.networks import point_denoiser, point_head
from mixtures.plots import draw
from mixtures.report import by_seed, other_way, tables
from mixtures.samples import discrepancies, discrepancy
from mixtures.settings import MIXTURES, QUICK, MixtureSettings
from mixtures.true_score import mixture_denoiser
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import ocm
from ocm.evaluation.distances import maximum_mean_discrepancy

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu" / "mixtures.json"
SCHEDULE = ocm.linear()
TINY = replace(
    QUICK,
    head_steps=3,
    head_batch_size=32,
    denoiser_steps=3,
    denoiser_batch_size=32,
    num_data=500,
    num_fit=100,
    num_test=100,
    timesteps=(100, 700),
    num_samples=50,
    step_counts=(2, 3),
    check_step_counts=(2,),
    early_steps=(2,),
    weight_noise=(0.1,),
)


@pytest.mark.parametrize("bandwidth", [0.3, 2.0])
@pytest.mark.parametrize("mixture", [nine_gaussians(), correlated_mixture()])
def test_the_discrepancy_in_closed_form_is_that_to_many_draws(mixture, bandwidth):
    x = mixture.sample(300, seed=1) + 0.3
    y = mixture.sample(4000, seed=2)
    stated = discrepancy(mixture, x, bandwidth)
    several = [maximum_mean_discrepancy(x, part, bandwidth) for part in y.split(500)]
    error = statistics.stdev(several) / len(several) ** 0.5
    assert abs(stated - statistics.fmean(several)) < 5 * error


def test_the_discrepancy_of_the_mixture_itself_is_zero_on_average():
    mixture = correlated_mixture()
    values = [discrepancy(mixture, mixture.sample(200, seed=i), 1.0) for i in range(60)]
    assert abs(statistics.fmean(values)) < 4 * statistics.stdev(values) / len(values) ** 0.5


@pytest.mark.parametrize("t", [100, 400])
@pytest.mark.parametrize("mixture", [nine_gaussians(), correlated_mixture()])
def test_weighted_points_stand_for_q(mixture, t):
    """The mean square of the posterior variance by a sum over a grid, and by far fewer points."""
    places = torch.linspace(-7, 7, 351, dtype=torch.float64)
    x = torch.cartesian_prod(places, places)
    variance = mixture.posterior_covariance(x, t, SCHEDULE).diagonal(dim1=1, dim2=2)
    q = mixture.log_density(x, t, SCHEDULE).softmax(dim=0)
    expected = (q @ variance.square().mean(dim=1)).item()
    estimates, plain = [], []
    for seed in range(12):
        points = weighted_points(mixture, SCHEDULE, t, 4000, seed)
        assert points.weights.sum().item() == pytest.approx(1.0)
        estimates.append((points.weights @ points.variance.square().mean(dim=1)).item())
        draws = points.variance[:2000].square().mean(dim=1)
        plain.append(draws.mean().item())
    error = statistics.stdev(estimates) / len(estimates) ** 0.5
    assert abs(statistics.fmean(estimates) - expected) < 5 * error + 1e-6 * expected
    if t == 100 and len(mixture.means) == 9:  # what lies between the components decides
        assert statistics.stdev(estimates) < statistics.stdev(plain) / 3


def test_the_density_of_wide_points_is_that_of_twice_the_noise():
    """The weights are q / ((q + q_wide) / 2), which average to 1."""
    mixture, t, count = correlated_mixture(), 300, 40_000
    points = weighted_points(mixture, SCHEDULE, t, count, 3)
    alpha_bar, beta_bar = SCHEDULE.alpha_bar[t], SCHEDULE.beta_bar[t]

    def density(variance):
        covariances = alpha_bar * mixture.covariances + variance * torch.eye(2).double()
        return MixtureSameFamily(
            Categorical(mixture.weights),
            MultivariateNormal(alpha_bar.sqrt() * mixture.means, covariances),
        ).log_prob(points.x_t.double())

    narrow, wide = density(beta_bar).exp(), density(4 * beta_bar).exp()
    expected = narrow / ((narrow + wide) / 2)
    torch.testing.assert_close(points.weights, expected / expected.sum(), rtol=1e-6, atol=0.0)
    assert abs(expected.mean() - 1) < 5 * expected.std() / count**0.5


def test_the_true_score_and_its_exact_diagonal_have_no_error():
    mixture = correlated_mixture()
    denoiser = mixture_denoiser(mixture, SCHEDULE)
    for t in (50, 500):
        points = weighted_points(mixture, SCHEDULE, t, 200)
        assert score_error(denoiser, mixture, points) < 1e-9
        exact = variance_error(ocm.Exact(denoiser), denoiser, points, torch.float64)
        assert exact.relative < 1e-20
        size = (points.weights @ points.variance.square().mean(dim=1)).item()
        none = variance_error(ocm.BetaTilde(denoiser), denoiser, points)
        assert none.mse == pytest.approx(size)
        assert none.relative == pytest.approx(1.0)


def test_the_share_off_the_diagonal():
    points = weighted_points(correlated_mixture(), SCHEDULE, 200, 500)
    C = points.covariance
    energy = points.weights[:, None, None] * C.square()
    expected = 2 * energy[:, 0, 1].sum() / energy.sum()
    assert off_diagonal_share(points) == pytest.approx(expected.item())
    assert off_diagonal_share(weighted_points(nine_gaussians(), SCHEDULE, 200, 50)) < 1e-12


def test_points_must_be_two_or_more():
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        weighted_points(nine_gaussians(), SCHEDULE, 5, 1)


@pytest.mark.parametrize("x", [torch.zeros(1, 2), torch.zeros(5, 3), torch.zeros(4)])
def test_what_has_no_discrepancy(x):
    with pytest.raises(ValueError, match="x must have shape"):
        discrepancy(nine_gaussians(), x, 1.0)
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        discrepancy(nine_gaussians(), torch.zeros(4, 2), 0.0)


def test_noise_in_the_weights_is_of_the_size_that_was_asked_for():
    denoiser = point_denoiser(2, SCHEDULE, 1.0).freeze()
    noisy = with_weight_noise(denoiser, 0.1, seed=0)
    pairs = zip(denoiser.backbone.parameters(), noisy.backbone.parameters(), strict=True)
    for weight, changed in pairs:
        if weight.numel() > 1000:
            ratio = ((changed - weight).std() / weight.std()).item()
            assert ratio == pytest.approx(0.1, rel=0.1)
    assert not any(p.requires_grad for p in noisy.backbone.parameters())
    assert (
        with_weight_noise(denoiser, 0.0, 0)
        .predict(torch.ones(1, 2), 9)
        .output.equal(denoiser.predict(torch.ones(1, 2), 9).output)
    )


def test_a_covariance_with_its_own_backbone_ignores_the_other():
    own, other = (point_denoiser(2, SCHEDULE, 1.0, seed=seed).freeze() for seed in (0, 1))
    head = point_head(own)
    torch.nn.init.normal_(head.out.linear.weight, generator=torch.Generator().manual_seed(0))
    covariance = ocm.OptimalCovarianceMatching(own, head.requires_grad_(False))
    x_t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    borrowed = covariance.at(other.predict(x_t, 300)).diagonal()
    assert torch.equal(borrowed, covariance.at(own.predict(x_t, 300)).diagonal())
    moved = ocm.OptimalCovarianceMatching(other, head)
    assert not torch.equal(borrowed, moved.at(other.predict(x_t, 300)).diagonal())


def test_samples_do_not_depend_on_what_else_is_measured():
    mixture = nine_gaussians()
    denoiser = mixture_denoiser(mixture, SCHEDULE)
    free = {"beta": ocm.Beta(denoiser), "full": ocm.Full(denoiser)}
    sizes = {"num_samples": 40, "bandwidth": 1.0, "seed": 3}
    both = discrepancies(denoiser, mixture, free, (2, 4), **sizes)
    alone = discrepancies(
        denoiser, mixture, {"full": free["full"]}, (4,), samplers=("ddim",), **sizes
    )
    assert alone[0] in both
    assert len(both) == 8


@pytest.fixture(scope="module")
def small_record():
    """A record of the experiment at a size at which every line runs in seconds."""
    rows = {}
    for mixture in MIXTURES:
        for score in ("true", "learned"):
            parts = run_task(Task(mixture, score, 0, True), TINY, torch.device("cpu"))
            origin = {"mixture": mixture, "score": score, "seed": 0}
            for part, entries in parts.items():
                rows.setdefault(part, []).extend(origin | entry for entry in entries)
    settings = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
    return {"schedule": "linear", "seeds": [0], "settings": settings, **rows}


def test_every_covariance_is_measured_everywhere(small_record):
    heads = {"iddpm", "npr", "sn", "ocm"}
    errors = small_record["errors"]
    for mixture in MIXTURES:
        for score in ("true", "learned"):
            rows = [r for r in errors if (r["mixture"], r["score"]) == (mixture, score)]
            expected = heads | {"analytic", "exact", "hutchinson-1", "hutchinson-10"}
            assert {r["covariance"] for r in rows} == expected
            assert {r["t"] for r in rows} == set(TINY.timesteps)
        cells = {
            (r["sampler"], r["covariance"], r["K"])
            for r in small_record["samples"]
            if r["mixture"] == mixture
        }
        names = heads | {"beta", "beta_tilde", "analytic", "exact", "full", "lanczos"}
        assert cells == {("data", "data", 0)} | {
            (sampler, name, K) for sampler in ("ddpm", "ddim") for name in names for K in (2, 3)
        }
    assert {r["degradation"] for r in small_record["degraded"]} == {
        *("none", "training steps", "noise in the weights"),
    }
    assert len(small_record["one_head"]) == 14


def test_the_tables_hold_the_rows(small_record):
    text = tables(small_record)
    row = small_record["errors"][0]
    assert f"{row['relative']:.1e}" in text
    for part in ("Error of the variance", "Samples in few steps", "Scores that err", "One head"):
        assert f"## {part}" in text
    assert "nan" not in text


def test_the_pictures_are_written(small_record, tmp_path):
    files = draw(small_record, tmp_path)
    assert [file.stem for file in files] == ["mixtures", "mixtures_samples", "mixtures_checks"]
    assert all(file.stat().st_size > 10_000 for file in files)


def test_cells_that_go_the_other_way_are_named():
    rows = [
        {"covariance": name, "parameterisation": "", "t": t, "relative": error}
        for name, t, error in (
            *(("ocm", 5, 0.1), ("npr", 5, 0.2), ("sn", 5, 0.1)),
            *(("ocm", 9, 0.1), ("npr", 9, 0.05), ("sn", 9, 0.3)),
        )
    ]
    assert other_way(rows) == {"npr": [9], "sn": [5]}


# What the recorded run shows.


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


def mean_errors(record, mixture, score):
    rows = [
        r
        for r in record["errors"]
        if (r["mixture"], r["score"]) == (mixture, score) and r["parameterisation"] != "paper"
    ]
    values = by_seed(rows, lambda r: (r["covariance"], r["t"]), "relative")
    assert {len(v) for v in values.values()} == {5}
    return {key: statistics.fmean(v) for key, v in values.items()}


def mean_discrepancies(record, mixture, sampler, K):
    rows = [
        r
        for r in record["samples"]
        if (r["mixture"], r["sampler"], r["K"]) == (mixture, sampler, K)
    ]
    values = by_seed(rows, lambda r: r["covariance"], "mmd")
    return {name: statistics.fmean(v) for name, v in values.items()}


def test_the_record_is_of_the_default_size(record):
    assert record["settings"] == json.loads(json.dumps(vars(MixtureSettings())))
    assert record["environment"]["uncommitted_changes"] is False


@pytest.mark.parametrize("mixture", list(MIXTURES))
def test_ocm_has_the_least_error_of_all_heads_at_every_noise_level(record, mixture):
    errors = mean_errors(record, mixture, "true")
    for t in record["settings"]["timesteps"]:
        assert errors["ocm", t] < min(errors[name, t] for name in ("iddpm", "npr", "sn")), t


def test_ocm_is_below_analytic_where_the_variance_depends_on_x(record):
    errors = mean_errors(record, "nine Gaussians", "true")
    levels = [t for t in record["settings"]["timesteps"] if t >= 100]
    assert len(levels) == 10
    assert all(errors["ocm", t] < errors["analytic", t] for t in levels)


def test_a_head_of_one_probe_targets_is_below_ten_probes(record):
    errors = mean_errors(record, "correlated mixture", "true")
    for t in record["settings"]["timesteps"]:
        assert errors["ocm", t] < errors["hutchinson-10", t], t


def test_samples_of_five_steps(record):
    nine = mean_discrepancies(record, "nine Gaussians", "ddpm", 5)
    assert nine["ocm"] < min(nine[name] for name in ("beta", "beta_tilde", "analytic"))
    correlated = mean_discrepancies(record, "correlated mixture", "ddpm", 5)
    diagonal = [e for name, e in correlated.items() if name not in ("full", "lanczos")]
    assert len(diagonal) == 8
    assert max(correlated["full"], correlated["lanczos"]) < min(diagonal)


def test_the_papers_units_multiply_errors_towards_t_n(record):
    for mixture in MIXTURES:
        for name in ("npr", "ocm"):
            (error,) = (
                r["relative"]
                for r in record["errors"]
                if (r["mixture"], r["covariance"], r["t"]) == (mixture, name, 1000)
                and r["parameterisation"] == "paper"
            )
            assert error > 10
