"""What is written is read again, and what is taken apart is disjoint and whole."""

import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, TENSOR_SEEDS, schedules, tables, tensor

import ocm
from ocm import checkpoints, data
from ocm.checkpoints.held_back import held_back
from ocm.training.batches import MicroBatches, batch_of_step, derived_seed
from ocm.training.small_unet import small_unet

FITTED = st.sampled_from(["analytic", "analytic_data"])
NAMES = st.sampled_from(["analytic", "analytic_data", "ocm", "beta"])
UNITS = st.builds(
    ocm.Parameterisation, st.floats(1e-3, 1e3) | st.just(float("inf")), positive=st.booleans()
)


BACKBONE = small_unet((1, 4, 4), width=8).eval()


def head_of(denoiser, seed):
    head = ocm.make_head(denoiser, "simple", seed=seed).requires_grad_(False)
    for i, parameter in enumerate(head.parameters()):
        parameter.copy_(tensor(parameter.shape, seed + i, torch.float32))
    return head


def rows_of(tables):
    return {name: dict(table.rows) for name, table in tables.items()}


@given(
    schedules(),
    st.dictionaries(FITTED, tables(width=1, by_step=False), max_size=2),
    st.dictionaries(NAMES, tables(width=2, least=0.0), max_size=2),
    UNITS,
    st.none() | st.tuples(st.floats(-9.0, -0.1), st.floats(0.1, 9.0)),
    st.integers(0, 10**6),
    st.integers(2, 65536),
    TENSOR_SEEDS,
)
def test_a_checkpoint_comes_back_from_the_disk(
    schedule, variances, weights, units, x0_range, num_calibration, levels, seed
):
    denoiser = ocm.Denoiser(BACKBONE, schedule, "v_prediction", data_covariance=0.3).freeze()
    original = checkpoints.Checkpoint(
        denoiser,
        (1, 4, 4),
        levels,
        "digits",
        {"npr": ocm.NPR(denoiser, head_of(denoiser, seed), units)},
        {name: ocm.Analytic(denoiser, table) for name, table in variances.items()},
        weights,
        x0_range,
        num_calibration,
        {"limit": 3},
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(original, folder)
        loaded = checkpoints.load(folder)
        again = Path(folder) / "again"
        checkpoints.save(loaded, again)
        # Of a discrete schedule of betas they are rounded once more.
        if schedule.name != "betas":
            for file in ("ocm.json", "tables.json"):
                assert (again / file).read_bytes() == (Path(folder) / file).read_bytes()
    for field in ("image_shape", "levels", "data", "x0_range", "num_calibration", "data_options"):
        assert getattr(loaded, field) == getattr(original, field)
    assert rows_of(loaded.calibrations) == rows_of(weights)
    fitted = {name: covariance.scaled_variances for name, covariance in loaded.analytic.items()}
    assert rows_of(fitted) == rows_of(variances)
    assert loaded.learned["npr"].parameterisation == units
    for one, other in (
        (original.denoiser.backbone, loaded.denoiser.backbone),
        (original.learned["npr"].head, loaded.learned["npr"].head),
    ):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def different(images):
    return {image.numpy().tobytes() for image in images}


@lru_cache(maxsize=1)
def twice_in_the_data():
    whole = data.digits()
    return different(whole.train) & different(whole.test)


@given(st.integers(1, 1500), st.integers(0, 400), st.integers(1, 400))
def test_splits_of_the_data_share_no_image(limit, kept, count):
    images = data.digits(limit)
    train, test = (different(split) for split in (images.train, images.test))
    assert train & test <= twice_in_the_data()
    assert (len(images.train), len(images.test)) == (min(limit, 1500), min(limit, 297))
    kept = min(kept, len(images.train))
    denoiser = ocm.Denoiser(lambda x, time: x, ocm.linear())
    checkpoint = checkpoints.Checkpoint(denoiser, (1, 8, 8), 17, "digits", num_calibration=kept)
    chosen, _ = held_back(checkpoint, images, count)
    if kept:
        trained = images.first(len(images.train) - kept).train
        assert len(trained) + kept == len(images.train)
        assert torch.equal(torch.cat([trained, chosen]), images.train[: len(trained) + len(chosen)])
    assert len(chosen) <= count


@given(
    SEEDS.map(lambda seed: seed % 2**63),
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.booleans(),
)
def test_processes_and_parts_take_a_batch_apart(seed, step, processes, parts, each, continuous):
    settings = ocm.TrainingSettings(
        num_steps=10**7,
        batch_size=processes * parts * each,
        seed=seed,
        gradient_accumulation_steps=parts,
    )
    images = torch.arange(50.0).reshape(-1, 1, 1, 1)
    whole = batch_of_step(step, settings, len(images), 1000, continuous)
    taken = [
        MicroBatches(images, {"labels": images[:, 0, 0, 0]}, 1000, settings, rank, processes,
                     continuous)[step * parts + part]
        for rank in range(processes)
        for part in range(parts)
    ]  # fmt: skip
    assert torch.equal(torch.cat([one.t for one in taken]), whole.timesteps)
    assert torch.equal(torch.cat([one.x0 for one in taken]), images[whole.indices])
    assert torch.equal(
        torch.cat([one.conditions["labels"] for one in taken]), whole.indices.float()
    )
    first = step * settings.batch_size
    assert [one.sample_offset for one in taken] == [
        first + k * each for k in range(processes * parts)
    ]
    assert bool(((whole.timesteps > 0) & (whole.timesteps <= 1000)).all())


@given(st.lists(st.integers(0, 3), min_size=2, max_size=3), st.integers(0, 2))
def test_derived_seeds_differ_where_a_part_does(parts, which):
    changed = list(parts)
    changed[which % len(parts)] += 1
    assert derived_seed(*parts) != derived_seed(*changed)
    assert 0 <= derived_seed(*parts) < 2**63


@pytest.mark.parametrize("path", [ocm.flow, ocm.linear])
@pytest.mark.parametrize("change", [{"data_std": 0.5}, {"time": lambda t: t / 7}])
def test_a_schedule_is_not_written_without_what_its_network_is_told(tmp_path, path, change):
    """It was written by its name, and read with data_std = 1: another network."""
    denoiser = ocm.Denoiser(BACKBONE, replace(path(), **change), "edm")
    with pytest.raises(ValueError, match=r"schedule must .*data_std"):
        checkpoints.save(checkpoints.Checkpoint(denoiser, (1, 4, 4), 17, "digits"), tmp_path)
