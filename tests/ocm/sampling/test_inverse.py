"""Samples given a measurement, against the posterior of Gaussian data, which is known."""

import math

import pytest
import torch
from path_denoiser import SHAPE, gaussian, path_denoiser

import ocm
from ocm.covariances.operators import diagonal, full
from ocm.diffusion.tables import Table

NOISE_STD = 0.2
COUNT = 4000


def problem(path="flow", kind="sample"):
    """A denoiser of Gaussian data, A as a matrix and as a function, and y."""
    data = gaussian()
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(3, data.means.shape[1], generator=generator, dtype=torch.float64) / 2
    y = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    return data, path_denoiser(data, path, kind), A, (lambda x0: x0.flatten(1) @ A.T), y


def posterior(data, A, y):
    """Mean and covariance of x0 given y."""
    C = data.covariance
    gain = C @ A.T @ torch.linalg.inv(A @ C @ A.T + NOISE_STD**2 * torch.eye(len(A)))
    return data.mean + (y[0] - A @ data.mean) @ gain.T, C - gain @ A @ C


def draw(denoiser, covariance, y, measure, steps=3, count=COUNT, **options):
    options = {"x0_range": None, "tolerance": 1e-9, "dtype": torch.float64} | options
    return ocm.sample_given_measurement(
        denoiser,
        covariance,
        y.expand(count, -1),
        measure,
        noise_std=NOISE_STD,
        shape=(count, *SHAPE),
        steps=steps,
        **options,
    ).flatten(1)


def check_moments(samples, mean, covariance):
    """Within five standard errors, those of a Gaussian's moments."""
    count, variances = len(samples), covariance.diagonal()
    assert ((samples.mean(0) - mean).abs() < 5 * (variances / count).sqrt()).all()
    of_entries = ((variances.outer(variances) + covariance**2) / count).sqrt()
    assert ((samples.T.cov() - covariance).abs() < 5 * of_entries).all()


@pytest.mark.parametrize("sampler", [ocm.ddpm, ocm.ddim, ocm.renoised])
@pytest.mark.parametrize(("path", "kind"), [("flow", "flow_prediction"), ("vp", "epsilon")])
def test_samples_have_the_posterior_of_a_gaussian_in_three_steps(path, kind, sampler):
    data, denoiser, A, measure, y = problem(path, kind)
    samples = draw(denoiser, ocm.Full(denoiser), y, measure, sampler=sampler)
    check_moments(samples, *posterior(data, A, y))


def test_products_alone_will_do():
    """Lanczos from as many products as there are features, and an adjoint that is given."""
    data, denoiser, A, measure, y = problem()
    adjoint = lambda u: (u @ A).reshape(-1, *SHAPE)  # noqa: E731
    covariance = ocm.Lanczos(denoiser, math.prod(SHAPE))
    samples = draw(denoiser, covariance, y, measure, adjoint=adjoint, count=2000)
    check_moments(samples, *posterior(data, A, y))


def test_means_in_the_place_of_draws_spread_too_little():
    data, denoiser, A, measure, y = problem()
    samples = draw(denoiser, ocm.Full(denoiser), y, measure, draw_x0=False)
    mean, covariance = posterior(data, A, y)
    assert samples.var(0).sum() < 0.7 * covariance.trace()
    assert ((samples.mean(0) - mean).abs() < 5 * (covariance.diagonal() / COUNT).sqrt()).all()


def test_with_another_weighting_draws_have_the_covariance_of_its_error():
    """Joseph's form, (I - K A) C (I - K A)^T + noise_std^2 K K^T, from one step at t = N."""
    data, denoiser, A, measure, y = problem()
    samples = draw(denoiser, ocm.Full(denoiser), y, measure, steps=1, weighting=ocm.Beta(denoiser))
    C, identity = data.covariance, torch.eye(len(data.mean))
    K = C @ A.T @ torch.linalg.inv(A @ A.T + NOISE_STD**2 * torch.eye(3))  # beta_bar = 1
    rest = identity - K @ A
    check_moments(
        samples,
        data.mean + (y[0] - A @ data.mean) @ K.T,
        rest @ C @ rest.T + NOISE_STD**2 * K @ K.T,
    )


def test_samples_do_not_depend_on_the_batch():
    _, denoiser, _, measure, y = problem()
    together = draw(denoiser, ocm.Full(denoiser), y, measure, count=4)
    parts = [
        draw(denoiser, ocm.Full(denoiser), y, measure, count=2, sample_offset=k) for k in (0, 2)
    ]
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-6, atol=1e-6)


def step_without_noise(**options):
    """x_s of one DDIM step from t = 600 to 0, for two samples, and what it was made from."""
    _, denoiser, A, measure, y = problem()
    options = {"sampler": ocm.ddim, "draw_x0": False, "steps": [600.0], "count": 2} | options
    x = ocm.sampling.samplers.starting_noise(denoiser, (2, *SHAPE), 600.0, 0, 0).double()
    covariance = ocm.Lanczos(denoiser, math.prod(SHAPE))
    return draw(denoiser, covariance, y, measure, **options), x, denoiser, A, y


@pytest.mark.parametrize("which", ["MMPS", "TMPD", "PiGDM"])
def test_the_steps_of_the_papers_are_a_gradient_away(which):
    """x0_hat + sigma^2 / alpha times the gradient for x_t of u^T A x0_hat, u solved densely."""
    data, denoiser, *_ = problem()
    weighting = {"MMPS": None, "TMPD": "row_sums", "PiGDM": ocm.Beta(denoiser)}[which]
    found, x, denoiser, A, y = step_without_noise(weighting=weighting)
    alpha, sigma = 0.4, 0.6
    x.requires_grad_()
    x0_hat = denoiser.x0_hat(x, 600.0, denoiser.output(x, 600.0))
    scales = torch.tensor([[alpha] * 2, [sigma] * 2], dtype=torch.float64)
    _, C = data.posterior(x.flatten(1), *scales)
    inner = {
        "MMPS": C,
        "TMPD": C,
        "PiGDM": sigma**2 / (alpha**2 + sigma**2) * torch.eye(C.shape[-1]).expand_as(C).double(),
    }[which]
    r = y - x0_hat.flatten(1) @ A.T
    M = A @ inner @ A.T + NOISE_STD**2 * torch.eye(3)
    if which == "TMPD":
        M = torch.diag_embed((A @ C @ A.T).sum(2) + NOISE_STD**2)
    u = torch.linalg.solve(M, r[..., None])[..., 0].detach()
    (gradient,) = torch.autograd.grad((u * (x0_hat.flatten(1) @ A.T)).sum(), x)
    expected = x0_hat + sigma**2 / alpha * gradient
    torch.testing.assert_close(found, expected.detach().flatten(1), rtol=1e-5, atol=1e-6)


def test_a_number_takes_the_steps_of_dps():
    """x_s less that number times the gradient of |y - A x0_hat|, here for s = 0."""
    found, x, denoiser, A, y = step_without_noise(weighting=0.7)
    x.requires_grad_()
    x0_hat = denoiser.x0_hat(x, 600.0, denoiser.output(x, 600.0))
    distance = (y - x0_hat.flatten(1) @ A.T).norm(dim=1).sum()
    (gradient,) = torch.autograd.grad(distance, x)
    torch.testing.assert_close(
        found, (x0_hat - 0.7 * gradient).detach().flatten(1), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"draw_x0 must be False .* got weighting = 0.7"):
        step_without_noise(weighting=0.7, draw_x0=True)
    with pytest.raises(ValueError, match="weighting must be 'row_sums' if it is a name"):
        step_without_noise(weighting="rows")


def test_without_a_tolerance_the_iterations_are_those_asked_for():
    """One is the step of least error along the first direction, and warns of nothing."""
    C = ocm.covariances.operators.diagonal(torch.tensor([[1.0, 50.0]]), torch.Size([1, 2]))
    r = torch.tensor([[1.0, 2.0]])
    found = ocm.posterior_mean_given_measurement(
        torch.zeros(1, 2), C, r, lambda x: x, noise_std=1.0, tolerance=None, max_iterations=1
    )
    M = torch.tensor([2.0, 51.0])
    u = r * (r**2).sum() / (r**2 * M).sum()
    torch.testing.assert_close(found, u * torch.tensor([1.0, 50.0]))
    at_once = ocm.posterior_mean_given_measurement(
        torch.zeros(1, 2), C, 0 * r, lambda x: x, noise_std=1.0, tolerance=None
    )
    assert torch.equal(at_once, torch.zeros(1, 2))


def test_products_of_lanczos_itself_take_one_product():
    calls = []
    A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])

    def products(v):
        calls.append(v)
        return v @ A

    v = torch.tensor([[1.0, 2.0]])
    C = ocm.covariances.lanczos.LanczosCovariance(products, v, 2)
    torch.testing.assert_close(C.multiply(v), v @ A)
    assert len(calls) == 1
    torch.testing.assert_close(C.bounded(None).multiply(v), v @ A)


def test_row_sums_below_zero_count_by_their_size():
    matrix = torch.tensor([[[1.0, -3.0], [-3.0, 10.0]]])
    C, y = full(matrix, torch.Size([1, 2])), torch.tensor([[1.0, 2.0]])
    found = ocm.posterior_mean_given_measurement(
        torch.zeros(1, 2), C, y, lambda x: x, noise_std=1.0, weighting="row_sums"
    )
    u = torch.tensor([1 / (2 + 1), 2 / (7 + 1)])
    torch.testing.assert_close(found[0], matrix[0] @ u)


def test_rows_that_measure_nothing_have_no_weight():
    mask, y = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[1.0, 0.0, 2.0]])
    C = full(torch.eye(3)[None], torch.Size([1, 3]))
    found = ocm.posterior_mean_given_measurement(
        torch.zeros(1, 3), C, y, lambda x: x * mask, noise_std=0.0, weighting="row_sums"
    )
    torch.testing.assert_close(found, y)


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (-1.0, "weighting must be at least 0 if it is a length, got -1.0"),
        ("rows", "weighting must be 'row_sums' if it is a name, got 'rows'"),
    ],
)
def test_a_weighting_is_checked_as_it_was_given(weighting, message):
    denoiser = ocm.Denoiser(lambda x, time: 0.5 * x, ocm.linear(), "sample")
    with pytest.raises(ValueError, match=message):
        ocm.sample_given_measurement(
            denoiser, ocm.Beta(denoiser), torch.zeros(1, 3), lambda x: x, noise_std=0.5,
            shape=(1, 3), steps=2, weighting=weighting, draw_x0=False,
        )  # fmt: skip


def test_another_weighting_is_bounded_as_the_covariance_is():
    """A variance of 9 counts as 1, the largest that data in [-1, 1] have."""
    denoiser = ocm.Denoiser(lambda x, time: 0.5 * x, ocm.linear(), "sample")
    steps = [100, 1000]

    def drawn(variance):
        at = {t: [variance / denoiser.schedule.level(t).beta_bar] for t in steps}
        return ocm.sample_given_measurement(
            denoiser, ocm.Beta(denoiser), torch.full((2, 3), 0.4), lambda x: x, noise_std=0.5,
            shape=(2, 3), steps=steps, weighting=ocm.Analytic(denoiser, Table(at)),
        )  # fmt: skip

    torch.testing.assert_close(drawn(9.0), drawn(1.0))
    assert (drawn(0.2) - drawn(1.0)).abs().max() > 1e-3


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 0.001])
def test_the_residual_is_within_the_tolerance_for_each_sample(tolerance):
    """Of (C + noise_std^2 I) u = y - x0_hat, whose eigenvalues conjugate gradients find in turn."""
    C = torch.logspace(-3, 3, 60).double().expand(2, 60) * torch.tensor([[1.0], [0.01]])
    y = torch.randn(2, 60, generator=torch.Generator().manual_seed(0)).double()
    mean = torch.zeros(2, 60).double()
    found = ocm.posterior_mean_given_measurement(
        mean, diagonal(C, C.shape), y, lambda x: x, noise_std=0.1, tolerance=tolerance
    )
    residual = y - (C + 0.01) * (found / C)
    assert (residual.norm(dim=1) <= tolerance * y.norm(dim=1) * (1 + 1e-9)).all()
    assert (residual.norm(dim=1) > 1e-3 * tolerance * y.norm(dim=1)).any()
