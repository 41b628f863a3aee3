"""On a CUDA device: samples against those of the CPU, captured and not (``pytest -m gpu``)."""

import math

import pytest
import torch
from small_backbone import small_denoiser, small_head

import ocm
from ocm.covariances.names import LEARNED

pytestmark = pytest.mark.gpu

SHAPE = (3, 2, 8, 8)


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
