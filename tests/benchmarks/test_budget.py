"""Equal network evaluations: the counts, and diffusers' solvers against other integrators."""

import math
from types import SimpleNamespace

import pytest
import torch
from gaussian_denoiser import GaussianUNet
from harness import budget

import ocm
from hessdiag.kernels import normal
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.diffusion.backbones.families import UNET
from ocm.diffusion.tables import Table
from ocm.evaluation.features import FeatureExtractor
from ocm.training.small_unet import small_unet

VARIANCES = torch.tensor([0.09, 0.04, 0.01, 0.0025])
PIXELS = FeatureExtractor("pixels", 4, lambda images: images.flatten(1))


class SmoothUNet(GaussianUNet):
    """Takes timesteps between those of training, as Heun's are, with sigma linear in between."""

    def forward(self, x, t, class_labels=None):
        t, sigmas = torch.as_tensor(t).double(), (1 / self.schedule.snr[1:]).sqrt()
        low, high = (sigmas[level.long()] for level in (t.floor(), t.ceil()))
        squares = torch.lerp(low, high, t - t.floor()).square().expand(len(x))[:, None]
        alpha_bar, beta_bar = 1 / (1 + squares), squares / (1 + squares)
        flat = self.conv_norm_out(x).flatten(1).double()
        epsilon = beta_bar.sqrt() * flat / (alpha_bar * VARIANCES + beta_bar)
        return SimpleNamespace(sample=(self.scale * epsilon).to(x.dtype).reshape(x.shape))


def gaussian_checkpoint(schedule):
    unet = SmoothUNet(torch.zeros(4), torch.diag(VARIANCES), schedule)
    denoiser = ocm.Denoiser(unet, schedule, architecture=UNET).freeze()
    return Checkpoint(denoiser, (1, 1, 4), 256, "gaussian")


@pytest.fixture(scope="module")
def checkpoint():
    denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.cosine()).freeze()
    head = ocm.OptimalCovarianceMatching(denoiser, ocm.make_head(denoiser))
    table = Table({1: [0.1], 1000: [0.9]})
    analytic = {"analytic": ocm.Analytic(denoiser, table)}
    return Checkpoint(denoiser, (1, 8, 8), 17, "digits", {"ocm": head}, analytic)


def test_the_first_order_solver_takes_the_steps_of_ddim():
    """DPM-Solver++ of order 1 is DDIM (Lu et al., 2022, section 4), here at the same timesteps."""
    checkpoint = gaussian_checkpoint(ocm.linear())
    K = 6
    levels = budget.dpm_solver(checkpoint, K, order=1)
    timesteps = (levels.timesteps.flip(0) + 1).tolist()
    assert timesteps[-1] == 1000
    expected = ocm.sample(
        checkpoint.denoiser, ocm.BetaTilde(checkpoint.denoiser), (5, 1, 1, 4), timesteps,
        sampler=ocm.ddim, seed=3, sample_offset=2,
    )  # fmt: skip
    found = budget.solve(checkpoint, lambda c, K: budget.dpm_solver(c, K, order=1), K, 5, 3, 2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    second = budget.solve(checkpoint, budget.dpm_solver, K, 5, 3, 2)
    assert (second - expected).abs().max() > 1e-3


@pytest.mark.parametrize("schedule", [ocm.linear(), ocm.cosine()])
@pytest.mark.parametrize("solver", ["dpm_solver", "heun_solver"])
def test_many_steps_of_a_solver_follow_the_flow(schedule, solver):
    """With y = x / sqrt(alpha_bar) and sigma^2 = 1 / SNR, y is proportional to
    sqrt(variance + sigma^2) along the probability flow of Gaussian data."""
    checkpoint = gaussian_checkpoint(schedule)
    K = 112 if solver == "heun_solver" else 333
    found = budget.solve(checkpoint, getattr(budget, solver), K, 50, 1, 0).flatten(1)
    start = normal((50, 1, 1, 4), 1).flatten(1).double()
    # Where Heun begins: diffusers' advice for schedules that reach further.
    sigma_squared = (1 / schedule.snr[-1]).clamp(max=math.exp(2 * 5.1))
    expected = start * (VARIANCES * sigma_squared / (VARIANCES + sigma_squared)).sqrt()
    if solver == "dpm_solver":  # starts from z where Heun starts from sigma z in y
        expected = (
            start
            * (VARIANCES / (schedule.alpha_bar[-1] * VARIANCES + schedule.beta_bar[-1])).sqrt()
        )
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.02


def test_every_method_stays_within_its_budget(checkpoint):
    rows = budget.equal_evaluations(
        checkpoint, torch.randn(40, 64), FeatureExtractor("pixels", 64, lambda x: x.flatten(1)),
        (5, 9), num_images=6, batch_size=4,
    )  # fmt: skip
    found = {(r["budget"], r["method"], r["sampler"]): r for r in rows}
    assert len(found) == len(rows) == 2 * len(budget.METHODS) - 1
    assert all(row["evaluations"] <= row["budget"] for row in rows)
    # K, evaluations, products and forward passes: one of the latter for each step, whose graph the
    # products go back through, and one for each forward product.
    expected = {
        (5, "ocm", "ddpm"): (5, 5, 0, 5),
        (9, "beta_tilde", "ddim"): (9, 9, 0, 9),
        (5, "cosine, M = 1", "ddpm"): (3, 5, 2, 3),
        (9, "cosine, M = 1", "ddpm"): (5, 9, 4, 5),
        (5, "lanczos, k = 3", "ddpm"): (2, 5, 3, 2),
        (9, "lanczos, k = 3", "ddpm"): (3, 9, 6, 3),
        (9, "lanczos, k = 3, symmetric", "ddpm"): (2, 8, 6, 5),
        (5, "DPM-Solver++", ""): (5, 5, 0, 5),
        (9, "Heun", ""): (5, 9, 0, 9),
    }
    counts = ("K", "evaluations", "products", "forward_passes")
    for key, numbers in expected.items():
        assert tuple(found[key][name] for name in counts) == numbers, key
    assert (5, "lanczos, k = 3, symmetric", "ddpm") not in found
    assert all(0 <= row["precision"] <= 1 and row["frechet"] > 0 for row in rows)


def test_rows_do_not_depend_on_batches(checkpoint):
    def rows(batch_size):
        return budget.equal_evaluations(
            checkpoint, torch.randn(40, 64, generator=torch.Generator().manual_seed(0)),
            FeatureExtractor("pixels", 64, lambda x: x.flatten(1)),
            (5,), num_images=7, batch_size=batch_size,
        )  # fmt: skip

    for one, other in zip(rows(7), rows(3), strict=True):
        assert one["frechet"] == pytest.approx(other["frechet"], rel=1e-3)


def test_a_method_that_takes_other_passes_than_it_says_is_refused(checkpoint):
    draw = budget.METHODS[0].draw
    lying = budget.Method("liar", "ddpm", 0, lambda K: K - 1, draw)
    with pytest.raises(
        AssertionError, match=r"liar ddpm took 5 forward passes for 1 .* not 4 each"
    ):
        budget.equal_evaluations(
            checkpoint, torch.randn(9, 4), PIXELS, (5,), num_images=4, methods=[lying]
        )


def test_what_a_checkpoint_lacks_is_named(checkpoint):
    bare = Checkpoint(checkpoint.denoiser, (1, 8, 8), 17, "digits")
    with pytest.raises(ValueError, match="covariance 'ocm' needs a trained head"):
        budget.equal_evaluations(bare, torch.randn(9, 4), PIXELS, (5,), num_images=4)
    odd = Checkpoint(checkpoint.denoiser, (1, 8, 8), 17, "digits", x0_range=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"x0_range must be \(-1, 1\) or None .* got \(0.0, 1.0\)"):
        budget.dpm_solver(odd, 5)
