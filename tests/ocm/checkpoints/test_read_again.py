"""What is read from a checkpoint is what was written, to the last option."""

import pytest
import torch

import ocm
from ocm import checkpoints
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.training.small_unet import small_unet

PATHS = {
    "vp": (ocm.vp(beta_max=12.0), "epsilon"),
    "edm": (ocm.edm(sigma_max=50.0, rho=5.0, data_std=0.3), "edm"),
    "trigflow": (ocm.trigflow(data_std=0.3), "trigflow"),
    "flow": (ocm.flow(500), "flow_prediction"),
}


def written_and_read(checkpoint, path):
    checkpoints.save(checkpoint, path)
    return checkpoints.load(path)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_with_its_options(path, tmp_path):
    schedule, kind = PATHS[path]
    denoiser = ocm.Denoiser(small_unet((1, 4, 4), width=8), schedule, kind)
    loaded = written_and_read(Checkpoint(denoiser, (1, 4, 4), 17, "made up"), tmp_path).denoiser
    assert (loaded.schedule.name, loaded.prediction_type) == (path, kind)
    t = torch.linspace(1, schedule.num_timesteps, 50)
    assert torch.equal(loaded.schedule.alpha(t), schedule.alpha(t))
    assert torch.equal(loaded.schedule.sigma(t), schedule.sigma(t))
    assert torch.equal(loaded.coefficients(t).q, denoiser.coefficients(t).q)


def test_the_covariance_of_the_data(tmp_path):
    """And none where there is none any more."""
    network, schedule = small_unet((1, 4, 4), width=8), ocm.flow()
    variances = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    for given in (variances, None):
        denoiser = ocm.Denoiser(network, schedule, "flow_prediction", data_covariance=given)
        made = Checkpoint(denoiser, (1, 4, 4), 17, "made up")
        loaded = written_and_read(made, tmp_path).denoiser.data_covariance
        assert loaded is None if given is None else torch.equal(loaded, given)


@pytest.mark.parametrize("x0_range", [(-1.0, 1.0), (-2.0, 3.0), None])
def test_heads_are_frozen_and_the_range_is_that_of_the_data(x0_range, tmp_path):
    denoiser = ocm.Denoiser(small_unet((1, 4, 4), width=8), ocm.cosine())
    units = ocm.Parameterisation(0.25, positive=False)
    npr = ocm.NPR(denoiser, ocm.make_head(denoiser).train(), units)
    made = Checkpoint(denoiser, (1, 4, 4), 17, "made up", {"npr": npr}, x0_range=x0_range)
    loaded = written_and_read(made, tmp_path)
    assert loaded.x0_range == x0_range
    learned = loaded.learned["npr"]
    assert learned.parameterisation == units
    for module in (learned.head, loaded.denoiser.backbone):
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
