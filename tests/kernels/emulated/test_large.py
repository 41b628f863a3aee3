"""Tensors beyond int32 in every way: more groups than 2**31, and samples of more features.

The tensors are sparse, and of each launch only the first and the last programs run.
"""

import importlib

import emulator
import numpy as np
import numpy_contract
import pytest
import torch

moments = importlib.import_module("hessdiag.kernels.probe_moments")
loss = importlib.import_module("hessdiag.kernels.ocm_loss")
normals = importlib.import_module("hessdiag.kernels.normal")
signs = importlib.import_module("hessdiag.kernels.rademacher")
steps = importlib.import_module("hessdiag.kernels.gaussian_step")

SEED = 77
# How many elements at the end are compared; two programs make more than 128 groups.
LAST = 400
# Samples and features of each: more than 2**31 groups, of which one sample has one, whole or not;
# one sample of more than 2**31 features, whole groups or not; and few samples and groups, but more
# than 2**31 features in all.
SIZES = [
    (2**31 + 300, 8),
    (2**31 + 300, 3),
    (1, 2**31 + 2**12),
    (1, 2**31 + 4099),
    (3, 2**30 + 3),
]

sizes = pytest.mark.parametrize(("batch", "features"), SIZES)


def first_and_last(grid):
    """Numbers of the first program and of the last two of each row."""
    x, y, z = grid
    chosen = sorted({0, max(x - 2, 0), x - 1})
    return [row * x + program for row in range(y * z) for program in chosen]


def tail(batch, features):
    """The last elements: how many samples and features, and the number of the first of each."""
    if features > LAST:
        return (1, LAST), batch - 1, features - LAST
    return (LAST // features, features), batch - LAST // features, 0


def filled(sparse, shape, dtype, seed=0):
    """A sparse tensor (..., B, D) with random numbers in its last elements, and those."""
    (batch, features), _, _ = tail(*shape[-2:])
    whole = sparse(shape, dtype)
    generator = torch.Generator().manual_seed(seed)
    part = torch.randn((*shape[:-2], batch, features), generator=generator).to(dtype)
    whole[..., shape[-2] - batch :, shape[-1] - features :] = part
    return whole, part


def last_of(tensor):
    (batch, features), _, _ = tail(*tensor.shape[-2:])
    return tensor[..., tensor.shape[-2] - batch :, tensor.shape[-1] - features :]


@sizes
def test_signs(sparse, batch, features):
    shape, sample, feature = tail(batch, features)
    with emulator.only_programs(first_and_last):
        made = signs.rademacher_triton(
            torch.tensor(SEED), (3, batch, features), 15, 5, torch.bfloat16
        )
    expected = numpy_contract.rademacher(3, *shape, SEED, 15, 5 + sample, feature)
    np.testing.assert_array_equal(last_of(made).double(), expected)
    beginning = numpy_contract.rademacher(3, 1, 3, SEED, 15, 5)
    np.testing.assert_array_equal(made[:, :1, :3].double(), beginning)


@sizes
def test_normals(sparse, batch, features):
    shape, sample, feature = tail(batch, features)
    with emulator.only_programs(first_and_last):
        made = normals.normal_triton(torch.tensor(SEED), (1, batch, features), 1, 3, 9)[0]
    expected = numpy_contract.normal(*shape, SEED, 1, 3, 9 + sample, feature)
    np.testing.assert_allclose(last_of(made), expected, rtol=5e-7, atol=5e-7)


@sizes
@pytest.mark.parametrize("per_sample", [False, True])
def test_step(sparse, batch, features, per_sample):
    dtype = torch.float32
    (x_t, x), (prediction, y) = (filled(sparse, (batch, features), dtype, i) for i in range(2))
    shape, sample, feature = tail(batch, features)
    coefficients, rows = [1.3, -0.4, 0.6, 0.5, 0.01, 0.3], None
    variance, v = filled(sparse, (batch, features), dtype, 2)
    p, q, a, b, c, k = coefficients
    if per_sample:
        variance, v = sparse((batch, 1), dtype), torch.linspace(0, 1, shape[0])[:, None]
        variance[-shape[0] :] = v
        rows = sparse((batch, 6), dtype)
        last = torch.stack([torch.linspace(n, n + 1, shape[0]) for n in coefficients], dim=1)
        rows[-shape[0] :] = last
        p, q, a, b, c, k = (column[:, None] for column in last.double().unbind(1))
    with emulator.only_programs(first_and_last):
        made = steps.gaussian_step_triton(
            x_t,
            prediction,
            variance,
            rows,
            coefficients,
            steps.Clamps(-1.0, 1.0),
            torch.tensor(SEED),
            7,
            2,
        )
    z = torch.from_numpy(numpy_contract.normal(*shape, SEED, 2, 7, 2 + sample, feature))
    x, y, v = x.double(), y.double(), v.double()
    noise = torch.sqrt((c + k * v).clamp(min=0))
    expected = a * x + b * (p * x + q * y).clamp(-1, 1) + noise * z
    torch.testing.assert_close(last_of(made).double(), expected, rtol=1e-5, atol=1e-5)


@sizes
def test_moments(sparse, batch, features):
    products, part = filled(sparse, (2, batch, features), torch.bfloat16)
    shape, sample, feature = tail(batch, features)
    with emulator.only_programs(first_and_last):
        mean, deviations = moments.probe_moments_triton(
            products, torch.tensor(SEED), None, None, 0, 2**31 + 1, 4
        )
    v = numpy_contract.rademacher(2, *shape, SEED, 2**31 + 1, 4 + sample, feature)
    y = torch.from_numpy(v) * part.double()
    torch.testing.assert_close(last_of(mean).double(), y.mean(0), rtol=1e-5, atol=1e-5)
    expected = ((y - y.mean(0)) ** 2).sum(0)
    torch.testing.assert_close(last_of(deviations).double(), expected, rtol=1e-5, atol=1e-5)


@sizes
def test_loss_and_gradient(sparse, batch, features):
    (head, h), (products, part) = (
        filled(sparse, shape, torch.float32, i)
        for i, shape in enumerate([(batch, features), (2, batch, features)])
    )
    shape, sample, feature = tail(batch, features)
    # The weight makes up for the mean over more elements than float32 can add up.
    numbers = [float(batch * features), 0.5, 0.0]
    rest = (None, numbers, torch.tensor(SEED), 2**31 + 1, 4)
    with emulator.only_programs(first_and_last):
        made = loss.ocm_loss_triton(head, products, *rest)
        gradient = loss.ocm_loss_backward_triton(torch.tensor(1.0), head, products, *rest)
    v = torch.from_numpy(numpy_contract.rademacher(2, *shape, SEED, 2**31 + 1, 4 + sample, feature))
    difference = h.double() - 0.5 * (v * part.double()).mean(0)
    torch.testing.assert_close(last_of(gradient).double(), 2 * difference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.double(), (difference**2).sum(), rtol=1e-4, atol=0)


def last_program(grid):
    x, y, z = grid
    return [x * y * z - 1]


def test_as_many_samples_as_there_are_numbers_for(sparse):
    with emulator.only_programs(last_program):
        made = signs.rademacher_triton(torch.tensor(SEED), (1, 2**32, 1), 0, 0, torch.bfloat16)
    expected = numpy_contract.rademacher(1, LAST, 1, SEED, 0, 2**32 - LAST)
    np.testing.assert_array_equal(made[:, -LAST:].double(), expected)


def test_as_many_probes_as_there_are_numbers_for(sparse):
    """Beyond 65,535 tiles, the most that CUDA takes in one direction of a grid."""
    last_tile = 2**28 - 1
    with emulator.only_programs(lambda grid: [last_tile]):
        made = signs.rademacher_triton(torch.tensor(SEED), (2**32, 1, 1), 0, 0, torch.bfloat16)
    expected = numpy_contract.rademacher(16, 1, 1, SEED, 2**32 - 16, 0)
    np.testing.assert_array_equal(made[-16:].double(), expected)
    with emulator.only_programs(last_program):
        made = normals.normal_triton(torch.tensor(SEED), (65_535**2, 1, 1), 1, 0, 0)
    expected = numpy_contract.normal(1, 1, SEED, 1, 65_535**2 - 1, 0)
    np.testing.assert_allclose(made[-1], expected, rtol=5e-7, atol=5e-7)


@pytest.mark.parametrize("num_probes", [16 * 65_536, 16 * 65_536 - 3])
def test_programs_that_only_fill_the_grid_write_nothing(num_probes):
    """Two layers of 65,535 tiles, of which the second layer has one."""

    def around_the_end(grid):
        x, y, z = grid
        assert (x, y, z) == (1, 65_535, 2)
        return [y - 1, y, y + 1, 2 * y - 1]

    with emulator.only_programs(around_the_end):
        made = signs.rademacher_triton(torch.tensor(SEED), (num_probes, 1, 3), 0, 0, torch.float32)
    expected = numpy_contract.rademacher(num_probes - 16 * 65_534, 1, 3, SEED, 16 * 65_534, 0)
    np.testing.assert_array_equal(made[16 * 65_534 :].double(), expected)


def test_steps_that_only_fill_the_grid_write_nothing():
    def around_the_end(grid):
        x, y, z = grid
        assert (x, y, z) == (1, 65_535, 2)
        return [y - 1, y, y + 1, 2 * y - 1]

    with emulator.only_programs(around_the_end):
        made = normals.normal_triton(torch.tensor(SEED), (65_536, 1, 3), 1, 0, 0)
    for step in (65_534, 65_535):
        expected = numpy_contract.normal(1, 3, SEED, 1, step, 0)
        np.testing.assert_allclose(made[step], expected, rtol=5e-7, atol=5e-7)
