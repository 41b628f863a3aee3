"""Samples of the suite `heads`: its methods against closed forms and diffusers, its tables."""

from dataclasses import replace

import pytest
import torch
from cifar10.parts import Parts
from harness import budget
from heads import methods, samples, samples_report
from heads.models import Splits
from heads.sizes import QUICK_SAMPLES, REDUCED

import ocm
from ocm import data as datasets
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.diffusion.timesteps import trailing_timesteps
from ocm.evaluation.distances import frechet_distance
from ocm.evaluation.features import FeatureExtractor
from ocm.sampling.samplers import starting_noise
from ocm.training.small_unet import small_unet

PATHS = {
    "linear": (ocm.linear, "epsilon"),
    "cosine": (ocm.cosine, "v_prediction"),
    "flow": (ocm.flow, "flow_prediction"),
}
HEADS = ("ocm", "npr")


def checkpoint_of(path, shape=(4, 4, 4)):
    """An untrained model whose last layer is not zero, with two heads."""
    make, kind = PATHS[path]
    unet = small_unet(shape, width=8)
    denoiser = ocm.Denoiser(unet, make(), kind, data_covariance=0.25).freeze()
    units = ocm.Parameterisation(0.5, True)
    learned = {
        "ocm": ocm.OptimalCovarianceMatching(denoiser, ocm.make_head(denoiser), units),
        "npr": ocm.NPR(denoiser, ocm.make_head(denoiser, seed=1), units),
    }
    return Checkpoint(denoiser, shape, 256, "none", learned)


@pytest.fixture(params=PATHS)
def path(request):
    return request.param


def test_methods_take_the_evaluations_that_are_counted(path):
    checkpoint = checkpoint_of(path)
    found = methods.methods_of(path, HEADS)
    assert (
        len({(m.name, m.covariance) for m in found}) == len(found) == (18 if path != "flow" else 17)
    )
    for method in found:
        K = method.steps_within(5)
        steps = methods.timesteps(checkpoint.denoiser.schedule, method.spacings[-1], K)
        with budget.forward_passes(checkpoint.denoiser.backbone) as counted:
            images = method.draw(checkpoint, steps, (2, 4, 4, 4), 0, 0)
        assert counted[0] == method.evaluations_of(K) == 5, method
        assert images.shape == (2, 4, 4, 4)
        assert torch.isfinite(images).all()


def test_a_sample_is_the_same_in_any_batch(path):
    checkpoint = checkpoint_of(path)
    for method in methods.methods_of(path, HEADS):
        steps = methods.timesteps(checkpoint.denoiser.schedule, method.spacings[-1], 3)
        together = method.draw(checkpoint, steps, (3, 4, 4, 4), 5, 10)
        alone = method.draw(checkpoint, steps, (1, 4, 4, 4), 5, 12)
        assert (together[2:] - alone).abs().max() < 1e-4, method
        assert (together[0] - together[1]).abs().max() > 1e-3, method


def test_all_start_from_the_noise_of_sample(path):
    """One step from N returns the x0_hat of the same noise; solvers start at a little less."""
    checkpoint = checkpoint_of(path)
    steps = [checkpoint.denoiser.schedule.num_timesteps]
    wanted = ocm.sample(
        checkpoint.denoiser, ocm.BetaTilde(checkpoint.denoiser), (2, 4, 4, 4), steps, seed=3
    )
    for method in methods.methods_of(path, ()):
        found = method.draw(checkpoint, steps, (2, 4, 4, 4), 3, 0)
        assert (found - wanted).norm() < 0.15 * wanted.norm(), method


def test_the_table_of_ours_is_what_it_says():
    checkpoint = checkpoint_of("flow")
    denoiser, steps = checkpoint.denoiser, [300, 700, 1000]
    by_name = {(m.name, m.covariance): m for m in methods.methods_of("flow", HEADS)}
    for name, sampler in (
        ("λ = 0", ocm.ddim),
        ("DDPM", ocm.ddpm),
        ("second order, η = 0.3", ocm.SecondOrder(0.3)),
    ):
        for head in HEADS:
            found = by_name[name, head].draw(checkpoint, steps, (2, 4, 4, 4), 1, 4)
            wanted = ocm.sample(
                denoiser, checkpoint.learned[head], (2, 4, 4, 4), steps, sampler=sampler, seed=1,
                sample_offset=4,
            )  # fmt: skip
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("spacing", methods.SPACINGS)
@pytest.mark.parametrize("K", [1, 2, 5, 20])
def test_timesteps_increase_to_the_last(path, spacing, K):
    schedule = PATHS[path][0]()
    steps = methods.timesteps(schedule, spacing, K)
    assert len(steps) == K
    assert steps == sorted(set(steps))
    assert steps[-1] == 1000
    assert steps[0] > 1 - 1e-9
    if not schedule.is_continuous:
        assert all(isinstance(t, int) for t in steps)
    if spacing == "rho = 7" and K == 20:
        roots = (-0.5 * schedule.log_snr(torch.tensor(steps)) / 7).exp()
        gaps = roots[1:-1] - roots[:-2]
        # Whole timesteps are far apart where there is little noise.
        assert (gaps / gaps.median() - 1).abs()[10:].max() < (0.02 if path == "flow" else 0.3)


# Gaussian data, where every step is known


VARIANCE = 0.04
SHAPE = (50, 1, 2, 2)


@pytest.fixture
def gaussian():
    """The exact denoiser of N(0, VARIANCE) on a flow."""

    def velocity(x, time):
        sigma = (time / 1000).view(-1, 1, 1, 1)
        gain = (1 - sigma) * VARIANCE / ((1 - sigma) ** 2 * VARIANCE + sigma**2)
        return (x - gain * x) / sigma

    denoiser = ocm.Denoiser(velocity, ocm.flow(), "flow_prediction", data_covariance=VARIANCE)
    return Checkpoint(denoiser, SHAPE[1:], 256, "none")


@pytest.mark.parametrize(
    ("name", "K", "atol"),
    [("Euler", 500, 0.01), ("Heun", 60, 0.01), ("DPM-Solver++ 2M", 100, 0.01), ("UniPC", 60, 0.01)],
)
def test_many_steps_follow_the_flow(gaussian, name, K, atol):
    """x_sigma / sqrt((1 - sigma)^2 VARIANCE + sigma^2) does not change."""
    method = next(m for m in methods.methods_of("flow", ()) if m.name == name)
    steps = trailing_timesteps(gaussian.denoiser.schedule, K)
    found = method.draw(gaussian, steps, SHAPE, 2, 0)
    start = starting_noise(gaussian.denoiser, SHAPE, 1000, 2, 0)
    torch.testing.assert_close(found, VARIANCE**0.5 * start, rtol=0, atol=atol)


def test_many_steps_of_the_sde_have_the_variance_of_the_data(gaussian):
    steps = trailing_timesteps(gaussian.denoiser.schedule, 100)
    shape = (1000, 1, 2, 2)
    found = methods.multistep("DPM-Solver++ 2M SDE", gaussian, steps, shape, 0, 0)
    # 4000 numbers tell a variance to 2.2%.
    assert found.var().item() == pytest.approx(VARIANCE, rel=0.1)
    start = starting_noise(gaussian.denoiser, shape, 1000, 0, 0)
    assert abs((found * start).mean().item()) < 0.1 * VARIANCE**0.5


def test_a_step_of_adjusted_ddim_is_that_of_the_paper(gaussian):
    """The noise gains the variance b^2 / (10 (2 + SNR)), b the weight of x0_hat."""
    stated = replace(gaussian, learned={"full": ocm.Full(gaussian.denoiser)})
    for head, v in (("", 0.1 / 2), ("full", VARIANCE)):
        found = methods.adjusted_ddim(head, stated, [500, 1000], SHAPE, 0, 0)
        n = starting_noise(gaussian.denoiser, SHAPE, 1000, 0, 0)
        # From sigma = 1, where x0_hat = 0 and n_hat = x: alpha_s = sigma_s = b = 1/2, SNR = 0.
        gained = 0.5**2 * v
        x = n * (0.5**2 + gained / n.square().mean((1, 2, 3), keepdim=True)).sqrt()
        # x0_hat at sigma = 1/2.
        wanted = x * 0.5 * VARIANCE / (0.25 * VARIANCE + 0.25)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["linear", "flow"])
def test_a_first_and_last_step_of_solvers_is_ddim(path):
    """Of two steps neither is of second order: a multistep solver has nothing to build on."""
    checkpoint = checkpoint_of(path)
    steps = [400, 990]
    wanted = ocm.sample(
        checkpoint.denoiser, ocm.BetaTilde(checkpoint.denoiser), (2, 4, 4, 4), steps,
        sampler=ocm.ddim, seed=1,
    )  # fmt: skip
    found = methods.multistep("DPM-Solver++ 2M", checkpoint, steps, (2, 4, 4, 4), 1, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    more = [200, 400, 990]
    second = methods.multistep("DPM-Solver++ 2M", checkpoint, more, (2, 4, 4, 4), 1, 0)
    first = ocm.sample(
        checkpoint.denoiser, ocm.BetaTilde(checkpoint.denoiser), (2, 4, 4, 4), more,
        sampler=ocm.ddim, seed=1,
    )  # fmt: skip
    assert (second - first).abs().max() > 1e-3


def test_heun_is_that_of_diffusers():
    """On a variance-preserving path; that of flows is compared in test_flow."""
    from diffusers import HeunDiscreteScheduler

    checkpoint = checkpoint_of("linear")

    def scheduler(checkpoint, K):
        schedule = checkpoint.denoiser.schedule
        made = HeunDiscreteScheduler(
            trained_betas=[schedule.beta(t - 1, t) for t in range(1, 1001)],
            clip_sample=True,
        )
        made.set_timesteps(timesteps=[899, 499, 199])
        return made

    wanted = budget.solve(checkpoint, scheduler, 3, 2, 1, 5)
    steps, shape = [200, 500, 900], (2, 4, 4, 4)
    found = methods.heun(checkpoint, steps, shape, 1, 5)
    # Its tables are float32, and start from noise of 32 standard deviations.
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.01)
    denoiser = checkpoint.denoiser
    euler = ocm.sample(
        denoiser, ocm.BetaTilde(denoiser), shape, steps, sampler=ocm.ddim, seed=1, sample_offset=5
    )
    assert (euler - wanted).abs().max() > 0.1


# Distances, and the run


def test_the_reference_gives_the_frechet_distance():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator)
    real = torch.randn(100, 12, generator=generator) @ mix
    reference = samples.Reference.of(real)
    for count in (200, 7):  # above and below the number of features
        drawn = torch.randn(count, 12, generator=generator) @ mix.T + 1
        assert reference.distance(drawn) == pytest.approx(frechet_distance(real, drawn), rel=1e-5)
    assert reference.distance(real) == pytest.approx(0, abs=1e-6 * real.var().item())


def test_leading_components_are_those_of_most_variance():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 5.0, 0.1, 3.0])
    images = torch.randn(2000, 4, 1, 1, generator=generator) * scales.view(4, 1, 1)
    pixels = FeatureExtractor("pixels", 4, lambda some: some.flatten(1))
    found = samples.leading(pixels, images, 2)
    assert found.name == "the first 2 principal components, of 2000 validation images, of pixels"
    components = found(images)
    assert components.std(0).tolist() == pytest.approx([3, 5], rel=0.1)
    assert abs(components.T.corrcoef()[0, 1].item()) < 1e-6


def test_settings_are_chosen_and_the_best_are_kept():
    def method(name, head=""):
        return methods.Method(name, head, None, is_ours=bool(head))

    best = [
        (method("A", "ocm"), 1.0),
        (method("X"), 2.0),
        (method("B", "ml"), 3.0),
        (method("Y"), 4.0),
        (method("B", "ocm"), 5.0),
        (method("A", "ml"), 6.0),
        (method("C", "ml"), 7.0),
    ]
    size = replace(QUICK_SAMPLES, kept_others=1, kept_ours=2)
    found = [(m.name, m.covariance) for m in samples.kept(best, size)]
    assert found == [("X", ""), ("A", "ocm"), ("B", "ml"), ("B", "ocm"), ("A", "ml")]


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """The judges of digits, at sizes of no meaning, and as if they were larger."""
    directory = tmp_path_factory.mktemp("judges")
    digits = datasets.digits()
    images = Splits(digits.train[:-150], digits.train[-150:], digits.test, digits.levels)
    parts = Parts(directory, "", {})
    size = replace(REDUCED.data["digits"], image_size=16)
    return samples.judges_of("digits", directory, directory, images, size, QUICK_SAMPLES, parts)


def test_small_images_are_not_shown_to_imagenet_and_both_networks_choose(judges):
    digits = datasets.digits()
    images = Splits(digits.train[:-150], digits.train[-150:], digits.test, digits.levels)
    few = replace(judges, extractors={"classifier": judges.extractors["classifier"]})
    distances = [
        judges.validation[name].distance(extractor(images.train[:20]))
        for name, extractor in judges.extractors.items()
    ]
    assert few.validation_distance(images.train[:20]) == pytest.approx(distances[0])
    both = judges.validation_distance(images.train[:20])
    assert both == pytest.approx((distances[0] * distances[1]) ** 0.5)


@pytest.mark.parametrize("path", ["cosine", pytest.param("flow", marks=pytest.mark.soak)])
def test_a_run_goes_through_and_on_where_it_was(path, judges, tmp_path, capsys):
    checkpoint = checkpoint_of(path, (1, 8, 8))
    parts = Parts(tmp_path, "x-", {})
    rows = samples.sample_rows(checkpoint, path, judges, QUICK_SAMPLES, parts, HEADS)
    at = {E: [row for row in rows if row["evaluations"] == E] for E in (2, 3)}
    assert len(at[3]) == len(methods.methods_of(path, HEADS))
    assert len(at[2]) == 1 + 2
    for row in rows:
        for name in ("classifier", "imagenet"):
            assert row[name] == pytest.approx(sum(row[f"{name}_sets"]) / 2)
            assert row[f"{name}_standard_error"] > 0
        assert (tmp_path / row["samples"]).exists()
    assert len({row["samples"] for row in rows}) == len(rows)
    capsys.readouterr()
    again = samples.sample_rows(checkpoint, path, judges, QUICK_SAMPLES, parts, HEADS)
    assert again == rows
    lines = capsys.readouterr().out.splitlines()
    assert all("made before" in line for line in lines)
    # Another head: its cells are made again, and no others.
    other = replace(
        checkpoint,
        learned={**checkpoint.learned, "npr": checkpoint_of(path, (1, 8, 8)).learned["npr"]},
    )
    with torch.no_grad():
        next(other.learned["npr"].head.parameters()).add_(1)
    samples.sample_rows(other, path, judges, QUICK_SAMPLES, parts, HEADS)
    made = [line for line in capsys.readouterr().out.splitlines() if "made again" in line]
    assert made
    assert all("npr" in line for line in made)
    text = samples_report.samples_markdown(rows, {"digits": judges.described})
    assert "DDIM (Euler)" in text
    assert f"{path}, E = 3" in text
    picture = tmp_path / "samples.png"
    assert samples_report.samples_picture(
        rows, parts, picture, data="digits", process=path, evaluations=3
    )
    assert picture.stat().st_size > 1000
    (tmp_path / rows[0]["samples"]).unlink()
    assert not samples_report.samples_picture(
        rows, parts, picture, data="digits", process=path, evaluations=3
    )
    assert f"{rows[0]['samples']} is not in" in capsys.readouterr().out


def test_a_missing_head_and_missing_samples_are_named(judges, tmp_path, capsys):
    checkpoint = checkpoint_of("linear", (1, 8, 8))
    parts = Parts(tmp_path, "", {})
    with pytest.raises(ValueError, match=r"which has \['npr', 'ocm'\], got 'ml'"):
        samples.sample_rows(checkpoint, "linear", judges, QUICK_SAMPLES, parts)
    drawn = samples_report.samples_picture(
        [], parts, tmp_path / "a.png", data="digits", process="linear", evaluations=3
    )
    assert not drawn
    assert "samples are not drawn" in capsys.readouterr().out


def row(path, method, covariance, evaluations, value, **more):
    figures = {
        "classifier": value,
        "classifier_standard_error": 0.25,
        "classifier_sets": [value] * 3,
    }
    identity = {"data": "digits", "path": path, "method": method, "covariance": covariance}
    return {
        **identity, "is_ours": covariance == "ocm", "evaluations": evaluations, "num_samples": 7,
        "spacing": "even", **figures, **more,
    }  # fmt: skip


def test_the_table_marks_the_best_of_each_column():
    rows = [
        row("flow", "DDPM", "ocm", 10, 1.0),
        row("flow", "Euler", "", 10, 2.0, spacing="trailing"),
        row("linear", "DDIM", "", 10, 3.0),
        row("linear", "DDPM", "ocm", 10, 4.0),
        row("linear", "DDPM", "beta", 10, 5.0),
        row("linear", "DDPM", "ocm", 5, 6.0, spacing="rho = 7"),
    ]
    about = {
        "features": {"classifier": "4 features"},
        "missing": "No ImageNet here.",
        "accuracy": 0.5,
        "training_images": {"classifier": 0.5, "classifier_standard_error": 0.125},
    }
    text = samples_report.samples_markdown(rows, {"digits": about})
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table == [
        "| method | flow, E = 10 | linear, E = 5 | linear, E = 10 |",
        "|:---|---:|---:|---:|",
        "| DDIM (Euler) | 2.00 ± 0.25 t |  | **3.00 ± 0.25** e |",
        "| DDPM, β |  |  | 5.00 ± 0.25 e |",
        "| DDPM, OCM head | **1.00 ± 0.25** e | **6.00 ± 0.25** ρ | 4.00 ± 0.25 e |",
    ]
    assert "right on 50.0% of test images" in text
    assert "training images are at 0.50 ± 0.12" in text
    assert "No ImageNet here." in text
    assert "sets of 7 samples" in text
