"""The table of bounds of `ocm evaluate` against one bound at a time."""

import pytest
import torch
from gaussian_denoiser import gaussian_denoiser
from plain_heads import Affine
from two_classes import images_of, two_classes

import ocm
from ocm.checkpoints.catalogue import build_covariance
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.checkpoints.fitting import fitted
from ocm.evaluation.scores import likelihood_table, steps_of

COVARIANCE = torch.tensor([[0.06, 0.03, 0.0], [0.03, 0.05, -0.01], [0.0, -0.01, 0.02]])
NAMES = ["beta", "analytic", "analytic_data", "iddpm", "hutchinson", "exact", "cosine", "full"]


@pytest.fixture(scope="module")
def checkpoint():
    denoiser = gaussian_denoiser(torch.zeros(3), COVARIANCE, ocm.linear())
    plain = Checkpoint(
        denoiser,
        (1, 1, 3),
        256,
        "gaussian",
        learned={"iddpm": ocm.ImprovedDDPM(denoiser, Affine())},
    )
    factor = torch.linalg.cholesky(COVARIANCE)
    x0 = (torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) @ factor.T)[:, None, None]
    return fitted(plain, x0, NAMES, steps_of(ocm.linear(), [3, 5]), calibrated=NAMES)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return ocm.quantise((torch.randn(10, 1, 1, 3, generator=generator) / 4).clamp(-1, 1))


@pytest.mark.parametrize("decoder", ["stated", "beta_tilde"])
def test_the_table_is_that_of_one_bound_at_a_time(checkpoint, images, decoder):
    how = {"decoder": decoder, "seed": 7}
    table = likelihood_table(
        checkpoint, images, NAMES, [3, 5], calibrated=NAMES, batch_size=4, **how
    )
    assert set(table) == {*NAMES, *(f"{name}_calibrated" for name in NAMES)}
    for name, row in table.items():
        covariance = build_covariance(name, checkpoint)
        for K, cell in row.items():
            timesteps = ocm.even_timesteps(ocm.linear(), K)
            bound = ocm.bits_per_dim(checkpoint.denoiser, covariance, images, timesteps, **how)
            assert cell.mean == pytest.approx(bound.total.mean().item(), rel=1e-5)
            error = bound.total.std().item() / 10**0.5
            assert cell.standard_error == pytest.approx(error, rel=1e-4)


def test_every_image_is_scored_with_its_own_class():
    """Whatever the batch it is in."""
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1, 1])
    x0 = ocm.quantise(images_of(labels))
    known = Checkpoint(two_classes(), (1, 2, 2), 256, "two classes")
    table = likelihood_table(known, x0, ["beta"], [3], labels=labels, batch_size=4)
    bound = ocm.bits_per_dim(
        known.denoiser,
        ocm.Beta(known.denoiser),
        x0,
        3,
        condition=known.denoiser.condition(labels),
    )
    assert table["beta"][3].mean == pytest.approx(bound.total.mean().item(), rel=1e-5)


def test_calibration_of_a_step_is_that_of_its_own_end(checkpoint):
    """I-DDPM's variance at t = 1000 differs between steps to 500 and 750, and so its weights."""
    weights = checkpoint.calibrations["iddpm"]
    assert not torch.equal(weights.at(500, 1000), weights.at(750, 1000))
    with pytest.raises(ValueError, match="step from t = 1000 to s = 600 must be one of"):
        weights.at(600, 1000)


def test_a_covariance_without_density_has_no_row(checkpoint, images):
    with pytest.raises(ValueError, match="'lanczos' has no density"):
        likelihood_table(checkpoint, images, ["lanczos"], [3])


@pytest.mark.parametrize("name", ["ocm", "ocm_calibrated", "exact_", "beta_tilde_calibrated"])
def test_what_a_checkpoint_lacks(checkpoint, name):
    with pytest.raises(ValueError, match="covariance"):
        build_covariance(name, checkpoint)


def test_the_catalogue_names_every_covariance_of_the_command_line():
    from ocm.cli.options import CovarianceName, HeadName
    from ocm.covariances import names

    assert {name.value for name in CovarianceName} == set(names.NAMES)
    assert {name.value for name in HeadName} == set(names.LEARNED)
    assert len({names.label(name) for name in names.NAMES}) == len(names.NAMES)
