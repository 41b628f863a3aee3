"""On a CUDA device: samples against those of the CPU, captured and not (``pytest -m gpu``)."""

import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from small_backbone import small_denoiser, small_head

import ocm
from ocm.covariances.names import LEARNED
from ocm.diffusion.tables import Table

pytestmark = pytest.mark.gpu

SHAPE = (3, 2, 8, 8)


@contextmanager
def waiting_for_nothing():
    """Raise where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class FrequencyHead(torch.nn.Module):
    def forward(self, features, energies, log_snr):
        return energies + log_snr[:, None, None, None]


def frequencies(denoiser, head):
    variances, colours = torch.ones(2, 8, 8, device="cuda"), torch.eye(2, device="cuda")
    return ocm.FrequencyLikelihood(denoiser, FrequencyHead(), variances=variances, colours=colours)


COVARIANCES = {
    **LEARNED,
    "beta": lambda denoiser, head: ocm.Beta(denoiser),
    "analytic": lambda denoiser, head: ocm.Analytic(denoiser, Table({1: [0.5], 1000: [1.0]})),
    "calibrated": lambda denoiser, head: ocm.Calibrated(
        (ocm.OptimalCovarianceMatching(denoiser, head),),
        Table({1: [0.5, 0.1], 1000: [1.0, 0.2]}),
    ),
    "frequencies": frequencies,
}
SAMPLERS = {
    "ddpm": ocm.ddpm,
    "ddim": partial(ocm.ddim, eta=0.5),
    "renoised": partial(ocm.renoised, noise=0.5),
    "second order": ocm.SecondOrder(0.5),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", COVARIANCES)
def test_a_whole_sampling_loop_waits_for_nothing(name, sampler):
    denoiser = small_denoiser("cuda")
    covariance = COVARIANCES[name](denoiser, small_head("cuda"))
    draw = partial(
        ocm.sample, denoiser, covariance, SHAPE, [1, 400, 700, 1000], sampler=SAMPLERS[sampler]
    )
    expected = draw(seed=3)  # compiles the kernels, and moves what is kept on the device
    with waiting_for_nothing():
        drawn = draw(seed=3)
    torch.testing.assert_close(drawn, expected)


@pytest.mark.parametrize("kind", ["OCMScheduler", "OCMDDIMScheduler", "OCMFlowScheduler"])
def test_steps_of_a_scheduler_wait_for_nothing(kind):
    """From the second on: the first reads the tables."""
    pytest.importorskip("diffusers", reason="steps of its schedulers")
    scheduler = getattr(ocm, kind)(data_std=0.5)
    scheduler.set_timesteps(5, device="cuda")
    if kind != "OCMFlowScheduler":
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.cuda()  # as add_noise leaves it
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(SHAPE, device="cuda", generator=generator)
    stated = torch.cat([x, x.abs()], dim=1)
    first, *others = scheduler.timesteps
    x = scheduler.step(stated, first, x, generator=generator).prev_sample
    with waiting_for_nothing():
        for t in others:
            x = scheduler.step(stated, t, x, generator=generator).prev_sample
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("name", LEARNED)
def test_a_whole_sampling_loop_in_one_cuda_graph(name):
    """Captured once, replayed with a new seed written into the seed's tensor."""
    denoiser = small_denoiser("cuda")
    covariance = LEARNED[name](denoiser, small_head("cuda"))
    arguments = denoiser, covariance, SHAPE, 4
    draw = ocm.capture(*arguments)
    for seed in (7, 2**40, 2**64 - 1):
        expected = ocm.sample(*arguments, seed=seed)
        torch.testing.assert_close(draw(seed), expected, rtol=1e-3, atol=1e-3)


def test_a_capture_on_another_stream():
    denoiser = small_denoiser("cuda")
    covariance = ocm.OptimalCovarianceMatching(denoiser, small_head("cuda"))
    arguments = denoiser, covariance, SHAPE, 4
    with torch.cuda.stream(torch.cuda.Stream()):
        draw = ocm.capture(*arguments)
        drawn = draw(3)
    torch.cuda.synchronize()
    torch.testing.assert_close(drawn, ocm.sample(*arguments, seed=3), rtol=1e-3, atol=1e-3)


def test_seeds_of_a_capture_are_checked():
    denoiser = small_denoiser("cuda")
    draw = ocm.capture(denoiser, ocm.Beta(denoiser), SHAPE, [500, 1000])
    with pytest.raises(ValueError, match=r"seed must lie in \[0, 2\*\*64\), got -1"):
        draw(-1)


def test_samples_are_those_of_the_cpu():
    images = []
    for device in ("cpu", "cuda"):
        denoiser = small_denoiser(device)
        covariance = ocm.Hutchinson(denoiser, num_probes=2)
        timesteps = 4
        images.append(ocm.sample(denoiser, covariance, SHAPE, timesteps, seed=1).cpu())
    assert (images[1] - images[0]).norm() < 1e-2 * images[0].norm()


@pytest.mark.parametrize("name", ["Full", "Lanczos", "CosineDiagonal"])
def test_samples_of_other_bases_are_those_of_the_cpu(name):
    images = []
    for device in ("cpu", "cuda"):
        denoiser = small_denoiser(device)
        covariance = getattr(ocm, name)(denoiser)
        images.append(ocm.sample(denoiser, covariance, (2, 2, 8, 8), [1, 400, 1000], seed=1).cpu())
    assert (images[1] - images[0]).norm() < 2e-2 * images[0].norm()


def test_a_head_is_calibrated():
    denoiser = small_denoiser("cuda")
    covariance = ocm.OptimalCovarianceMatching(denoiser, small_head("cuda"))
    images = torch.rand(16, 2, 8, 8) * 2 - 1
    calibrated = ocm.calibrate(denoiser, covariance, images, [1, 500, 1000])
    samples = ocm.sample(denoiser, calibrated, (2, 2, 8, 8), [1, 500, 1000])
    assert torch.isfinite(samples).all()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_head_is_trained(precision):
    pytest.importorskip("diffusers", reason="training averages weights by diffusers' EMAModel")
    denoiser = small_denoiser("cuda")
    head = small_head("cuda").requires_grad_(True)
    before = head.head.conv.weight.detach().clone()
    covariance = ocm.OptimalCovarianceMatching(denoiser, head, ocm.Parameterisation(0.5))
    images = torch.rand(16, 2, 8, 8) * 2 - 1
    settings = ocm.TrainingSettings(num_steps=5, batch_size=8, mixed_precision=precision)
    losses = ocm.train_head(covariance, images, settings, progress=False)
    assert all(math.isfinite(loss) for loss in losses)
    assert not torch.equal(head.head.conv.weight, before)
