"""Bad input of ocm: schedules, denoiser, covariances, samplers, likelihoods, inverse problems."""

import math
from functools import partial

import numpy as np
import torch
from bad_input import case, cases_of, cases_of_each, close, holds, run, shaped, table
from torch import nn

import hessdiag
import ocm
from ocm.covariances.operators import channel_blocks, cosine_diagonal, diagonal, full
from ocm.diffusion.tables import Table
from ocm.sampling.samplers import ReverseStep, starting_noise

NAN, INF = math.nan, math.inf
N = 1000
SHAPE = (2, 1, 2, 2)
X = torch.linspace(-1.0, 1.0, 8).reshape(SHAPE)
IMAGES = ocm.quantise(X)
LINEAR, FLOW = ocm.linear(), ocm.flow()


def noise_of_standard_normals(x, time):
    """The noise in x_t where the data are N(0, I): sigma x_t."""
    return LINEAR.sigma(time.long() + 1).reshape(-1, *[1] * (x.dim() - 1)).to(x) * x


DENOISER = ocm.Denoiser(noise_of_standard_normals, LINEAR)
BETA = ocm.Beta(DENOISER)
AT = DENOISER.predict(X, 500, s=400)
TIMESTEP = torch.tensor([5, 6])


def of(function):
    return ocm.Denoiser(function, LINEAR)


NANS = of(lambda x, time: x * NAN)

# Schedules and timesteps

paths = cases_of_each(
    {
        make.__name__: make
        for make in (ocm.linear, ocm.cosine, ocm.vp, ocm.flow, ocm.edm, ocm.trigflow)
    }
)
from_betas = cases_of(ocm.from_betas)
SCHEDULES = [
    *paths("0 steps", ValueError, "num_timesteps must be at least 1, got 0", num_timesteps=0),
    *paths("1 step", ValueError, "num_timesteps must be", num_timesteps=1),
    *paths("10.0 steps", TypeError, "num_timesteps must be an int, got 10.0", num_timesteps=10.0),
    *(
        from_betas(f"betas {betas}", ValueError, "betas must", betas=betas)
        for betas in ([], [0.0, 0.1], [1.0, 0.1], [0.1, 1.1], [-0.1], [NAN], [[0.1]])
    ),
    # alpha_bar is the product of 1 - beta, whatever the last beta is.
    case(
        "a last beta of 1",
        lambda: ocm.from_betas([0.1, 1.0]).alpha_bar,
        check=close(torch.tensor([1.0, 0.9, 0.0]).double()),
    ),
    case(
        "one beta",
        lambda: ocm.from_betas([0.5]).sigma(1),
        check=close(torch.tensor(0.5).double().sqrt()),
    ),
    case("betas from NaN", lambda: ocm.linear(10, beta_start=NAN), ValueError, "betas must be"),
    case("a vp without noise", lambda: ocm.vp(beta_min=0.0), ValueError, "beta_min"),
    case("an edm of NaN", lambda: ocm.edm(sigma_max=NAN), ValueError, "sigma_max"),
    case(
        "an edm of data 0", lambda: ocm.edm(data_std=0.0), ValueError, "data_std must be positive"
    ),
    case("a trigflow of NaN", lambda: ocm.trigflow(data_std=NAN), ValueError, "data_std must be"),
    *(
        case(
            f"{name} at t = {t!r}",
            lambda f=f, t=t: f(t),
            ValueError,
            "t must lie in [0, 1000]",
            repr(t),
        )
        for name, f in {
            "alpha": LINEAR.alpha,
            "sigma of a flow": FLOW.sigma,
            "log SNR": FLOW.log_snr,
            "x_t": lambda t: FLOW.diffuse(X, t, X),
        }.items()
        for t in (-1, N + 1, NAN, INF)
    ),
]

spaced = cases_of_each(
    {
        "even": ocm.even_timesteps,
        "trailing": ocm.trailing_timesteps,
        "leading": ocm.leading_timesteps,
        "quadratic": ocm.quadratic_timesteps,
        "optimal": partial(ocm.optimal_timesteps, variances=torch.ones(N)),
    },
    schedule=LINEAR,
)
leading = cases_of(ocm.leading_timesteps, schedule=LINEAR, K=3)
optimal = cases_of(ocm.optimal_timesteps, schedule=LINEAR, K=3)
at_sigmas = cases_of(ocm.timesteps_at, schedule=FLOW)
shifted = cases_of(ocm.shifted, sigmas=[1.0], shift=3.0)
dynamic = cases_of(ocm.dynamic_shift)
SPACINGS = [
    *spaced("K = 0", ValueError, "K must be at least 1, got 0", K=0),
    *spaced("K = N + 1", ValueError, "K must lie in 1 .. 1000, got 1001", K=N + 1),
    *spaced("K = 2.0", TypeError, "K must be an int, got 2.0", K=2.0),
    *spaced("K = True", TypeError, "K must be an int, got True", K=True),
    case(
        "all timesteps",
        lambda: ocm.even_timesteps(LINEAR, N),
        check=lambda found: holds(found == list(range(1, N + 1))),
    ),
    leading("half an offset", ValueError, "offset must", offset=0.5),
    leading("an offset too far", ValueError, "offset must", offset=N),
    *(
        optimal(
            f"variances {name}",
            ValueError,
            "variances must be 1000 finite numbers of at least 0",
            variances=variances,
        )
        for name, variances in {
            "below 0": -torch.ones(N),
            "of NaN": torch.full((N,), NAN),
            "without end": torch.full((N,), INF),
            "of five timesteps": torch.ones(5),
        }.items()
    ),
    *(
        at_sigmas(f"timesteps at {name}", ValueError, "sigmas must", sigmas=sigmas)
        for name, sigmas in {
            "no sigma": [],
            "0": [0.0],
            "-1": [-1.0],
            "NaN": [NAN],
            "2": [2.0],
        }.items()
    ),
    at_sigmas("sigmas of a discrete path", ValueError, "continuous", schedule=LINEAR, sigmas=[0.5]),
    *(
        shifted(f"a shift of {s}", ValueError, "shift must be positive", shift=s)
        for s in (0.0, -1.0, NAN, INF)
    ),
    *(
        shifted(f"a sigma of {s} shifted", ValueError, "in [0, 1]", sigmas=[s])
        for s in (-0.1, 1.1, NAN)
    ),
    *(
        dynamic(f"an image of {n} tokens", ValueError, "num_tokens must", num_tokens=n)
        for n in (0, -5, NAN)
    ),
    dynamic(
        "shifts between equal ends",
        ValueError,
        "base_tokens below max_tokens",
        num_tokens=7,
        base_tokens=7,
        max_tokens=7,
    ),
]

# The denoiser

OUTPUTS = {
    "a tuple": (lambda x, t: (x,), TypeError, "backbone must put out a floating-point tensor"),
    "None": (lambda x, t: None, TypeError, "backbone must put out a floating-point tensor"),
    "a number": (lambda x, t: 1.0, TypeError, "backbone must put out", "got float"),
    "integers": (lambda x, t: x.long(), TypeError, "got torch.int64"),
    "complex numbers": (lambda x, t: x.cfloat(), TypeError, "got torch.complex64"),
    "another shape": (lambda x, t: x[..., :1], ValueError, "the shape of x_t", "(2, 1, 2, 1)"),
    "fewer samples": (lambda x, t: x[:1], ValueError, "the shape of x_t", "(1, 1, 2, 2)"),
    "three channels": (lambda x, t: x.repeat(1, 3, 1, 1), ValueError, "twice its channels"),
    "an error": (lambda x, t: [][0], IndexError, "list index out of range"),
}

REAL, AXES = "x_t must be a real floating-point tensor", "x_t must have shape (B, channels, ...)"
EACH = "one for each of 2 samples"
INSIDE, WHOLE = "t must lie in 1 .. 1000", "t must be whole on the discrete schedule 'linear'"
FLOWS = {"schedule": FLOW, "prediction_type": "flow_prediction"}
made = cases_of(ocm.Denoiser, backbone=noise_of_standard_normals, schedule=LINEAR)
predicted = cases_of(DENOISER.predict, x_t=X, t=500)
output = cases_of_each(
    {
        "the output": lambda backbone: of(backbone).predict(X, 500).output,
        "the Jacobian": lambda backbone: ocm.Exact(of(backbone)).at(of(backbone).predict(X, 500)),
    }
)
DENOISERS = [
    made("no backbone", TypeError, "backbone must be a module or a function", backbone=None),
    made("no schedule", TypeError, "schedule must be an ocm.Schedule", "NoneType", schedule=None),
    made("the name of a schedule", TypeError, "schedule must be an", schedule="linear"),
    made("a prediction of no name", ValueError, "prediction_type must be", prediction_type="x0"),
    made("noise of a flow", ValueError, "prediction_type must not be 'epsilon'", schedule=FLOW),
    made("data of variance -1", ValueError, "at least 0", data_covariance=-1.0, **FLOWS),
    made("data of variance NaN", ValueError, "data_covariance must", data_covariance=NAN, **FLOWS),
    made("data of a word", TypeError, "data_covariance must be", data_covariance="1", **FLOWS),
    predicted("x_t of integers", TypeError, REAL, x_t=X.long()),
    predicted("x_t of booleans", TypeError, REAL, x_t=X > 0),
    predicted("x_t of complex numbers", TypeError, REAL, x_t=X.cfloat()),
    predicted("x_t of NumPy", TypeError, f"{REAL}, got ndarray", x_t=X.numpy()),
    predicted("x_t that is None", TypeError, f"{REAL}, got NoneType", x_t=None),
    predicted("x_t of no dimension", ValueError, AXES, x_t=torch.tensor(1.0)),
    predicted("x_t of one dimension", ValueError, f"{AXES}, got (3,)", x_t=torch.ones(3)),
    predicted("a timestep of 0", ValueError, f"{INSIDE}, got 0", t=0),
    predicted("a timestep below 0", ValueError, f"{INSIDE}, got -1", t=-1),
    predicted("a timestep of N + 1", ValueError, f"{INSIDE}, got 1001", t=N + 1),
    predicted("a timestep of NaN", TypeError, f"{WHOLE}, got nan", t=NAN),
    predicted("a timestep without end", TypeError, f"{WHOLE}, got inf", t=INF),
    predicted("half a timestep", TypeError, f"{WHOLE}, got 0.5", t=0.5),
    predicted("a word", TypeError, "t must be a number or a tensor, got str", t="500"),
    predicted("a list", TypeError, "t must be a number or a tensor, got list", t=[500]),
    predicted("three timesteps", ValueError, f"{EACH}, got shape (3,)", t=torch.arange(5, 8)),
    predicted("a column of timesteps", ValueError, "got shape (2, 1)", t=TIMESTEP[:, None]),
    predicted("timesteps with a 0", ValueError, INSIDE, t=torch.tensor([0, 5])),
    predicted("timesteps with a NaN", TypeError, WHOLE, t=torch.tensor([NAN, 5.0])),
    *(
        predicted(f"a step from 500 to {s}", ValueError, "s must lie in [0, t)", s=s)
        for s in (500, 501, -1, NAN)
    ),
    *(
        row
        for name, (f, error, *says) in OUTPUTS.items()
        for row in output(f"a backbone that returns {name}", error, *says, backbone=f)
    ),
    case(
        "a prediction of no samples",
        lambda: DENOISER.predict(X[:0], 500).x0_hat,
        check=shaped(0, 1, 2, 2),
    ),
    case(
        "a timestep for each sample",
        lambda: DENOISER.predict(X, torch.tensor([500, 500])).x0_hat,
        check=close(LINEAR.alpha(500).float() * X),
    ),
    case("the mean of N(0, I)", lambda: AT.x0_hat, check=close(LINEAR.alpha(500).float() * X)),
    case(
        "x_t that is NaN for a covariance of products",
        lambda: ocm.Exact(DENOISER).at(DENOISER.predict(X * NAN, 500)),
        ValueError,
        "x must be finite, got 8 NaN",
    ),
]


class Labelled(nn.Module):
    """Adds the number of the class, from an embedding of five."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.arange(5.0)[:, None])
        self.last = nn.Identity()

    def forward(self, x, time, labels=None):
        return self.last(x) + (0.0 if labels is None else self.embedding(labels)[..., None, None])


LABELLED = ocm.Denoiser(
    Labelled(),
    LINEAR,
    architecture=ocm.Architecture(
        "Labelled", "last", lambda n, x, t, labels: n(x, t, labels), num_classes=lambda n: 5
    ),
).freeze()
CLASSES = torch.tensor([1, 2])
COLUMN = CLASSES.reshape(2, 1, 1, 1)


def output_under(**given):
    return LABELLED.predict(X, 500, condition=LABELLED.condition(**given)).output


condition = cases_of(output_under, labels=CLASSES)
guided = cases_of(lambda scale: output_under(labels=CLASSES, guidance_scale=scale, null_label=0))
OF_INT64 = "labels must be a tensor of int64"
WITHIN = "labels must lie in 0 .. 4"
CONDITIONS = [
    condition("three labels", ValueError, "one for each sample", "3", labels=torch.arange(1, 4)),
    condition("no labels in a tensor", ValueError, "one for each sample", labels=CLASSES[:0]),
    condition("labels of floats", TypeError, OF_INT64, labels=CLASSES.float()),
    condition("labels of booleans", TypeError, OF_INT64, labels=CLASSES > 1),
    condition("labels in a list", TypeError, OF_INT64 + ", got list", labels=[1, 2]),
    condition("a label that is a number", TypeError, "labels must be a tensor", labels=1),
    condition(
        "a label of no dimension", ValueError, "labels must have shape (B,)", labels=CLASSES[0]
    ),
    condition("a column of labels", ValueError, "labels must have shape", labels=CLASSES[:, None]),
    condition("a class below 0", ValueError, WITHIN, labels=torch.tensor([-1, 0])),
    condition("a class too many", ValueError, WITHIN + ", got 0 .. 5", labels=torch.tensor([0, 5])),
    condition(
        "neither labels nor tensors", ValueError, "labels or tensors must be given", labels=None
    ),
    condition("guidance without null", ValueError, "null_label must be given", guidance_scale=2.0),
    guided("guidance of NaN", ValueError, "guidance_scale must be finite, got nan", scale=NAN),
    guided("guidance without end", ValueError, "guidance_scale must be finite", scale=INF),
    guided("guidance that is a word", TypeError, "guidance_scale must be a number", scale="2"),
    condition(
        "null tensors of nothing", ValueError, "null_tensors must be named", null_tensors={"a": 1}
    ),
    condition("labels of 32 bits", labels=CLASSES.int(), check=close(X + COLUMN)),
    condition("one label for all", labels=CLASSES[:1], check=close(X + 1)),
    # (1 - w) x + w (x + label), with class 0 for none
    guided("negative guidance", scale=-1.0, check=close(X - COLUMN)),
    case(
        "labels in place of a condition",
        lambda: LABELLED.predict(X, 500, condition=CLASSES),
        TypeError,
        "condition must be made by Denoiser.condition(...), or None, got Tensor",
    ),
]

# Covariances

FOUR = torch.Size(SHAPE)
FLAT = DENOISER.predict(X.flatten(1), 5)
TWOS = {
    "diagonal": diagonal(torch.full(SHAPE, 2.0), FOUR),
    "full": full(2 * torch.eye(4).expand(2, 4, 4), FOUR),
    "blocks": channel_blocks(2 * torch.ones(2, 4, 1, 1), FOUR),
    "cosines": cosine_diagonal(torch.full(SHAPE, 2.0), FOUR),
}
VECTORS = {
    "of one sample": X[:1],
    "of three samples": X.repeat(2, 1, 1, 1)[:3],
    "that is flat": X.flatten(1),
    "without a batch": X[0],
    "that is None": None,
}


def calibrated(weights=(1.0, 0.0)):
    return ocm.Calibrated((BETA,), Table({5: weights}))


by_products = cases_of_each(
    {
        "Hutchinson": ocm.Hutchinson,
        "Lanczos": ocm.Lanczos,
        "CosineDiagonal": ocm.CosineDiagonal,
    },
    denoiser=DENOISER,
)
times = cases_of_each({name: C.multiply for name, C in TWOS.items()})
bounded = cases_of_each({name: C.bounded for name, C in TWOS.items()})
clamped = cases_of_each({name: C.clamped for name, C in TWOS.items()})
stated = cases_of(lambda covariance, prediction=AT: covariance.at(prediction))
probed = cases_of(lambda **given: ocm.Hutchinson(DENOISER, 2, **given).at(AT))
weighted = cases_of(calibrated)
of_matrix = cases_of(full, shape=FOUR)
COVARIANCES = [
    *by_products("0 products", ValueError, "num_probes must be at least 1, got 0", num_probes=0),
    *by_products("2.5 products", TypeError, "num_probes must be an int, got 2.5", num_probes=2.5),
    *(
        stated(
            f"{make.__name__} of no denoiser",
            TypeError,
            "denoiser of a covariance must be an ocm.Denoiser",
            covariance=make(None),
        )
        for make in (ocm.Beta, ocm.Exact, ocm.Full, ocm.ChannelBlocks)
    ),
    *(
        stated(
            f"{name} of a timestep for each sample",
            TypeError,
            "prediction.t must be one timestep",
            covariance=C,
            prediction=DENOISER.predict(X, TIMESTEP),
        )
        for name, C in {
            "probes": ocm.Hutchinson(DENOISER, 2),
            "blocks": ocm.ChannelBlocks(DENOISER),
            "a calibration": calibrated(),
        }.items()
    ),
    probed("a floor of no name", ValueError, "floor must be 'error' or None", floor="none"),
    probed("a seed below 0", ValueError, "seed must lie in [0, 2**64), got -1", seed=-1),
    probed(
        "fewer probes than colors",
        ValueError,
        "max_probes must be at least 3",
        probes=hessdiag.Coloring(3),
    ),
    *(
        stated(f"{name} of flat samples", ValueError, says, covariance=C, prediction=FLAT)
        for name, C, says in (
            ("cosines", ocm.CosineDiagonal(DENOISER), "two axes of positions"),
            ("channels", ocm.ChannelBlocks(DENOISER), "(B, C, ...)"),
        )
    ),
    case(
        "no variance beside the output",
        lambda: ocm.VarianceChannels(DENOISER).at(AT).diagonal(),
        ValueError,
        "2 channels, got 1",
    ),
    *(
        case(
            f"the eigenvalues of a network that returns NaN, {make.__name__}",
            lambda make=make: make(NANS).at(NANS.predict(X, 500)).noise(X),
            ValueError,
            "covariance must be finite to have eigenvalues",
        )
        for make in (ocm.Full, ocm.Lanczos)
    ),
    weighted(
        "weights below 0", ValueError, "weights must be at least 0, got -1", weights=[-1.0, 0.0]
    ),
    weighted(
        "weights of two covariances", ValueError, "weights must have 2 columns", weights=[1.0]
    ),
    stated(
        "a calibration of another timestep",
        ValueError,
        "t must lie in 5 .. 5, where this was fitted, got 500",
        covariance=calibrated(),
    ),
    *(
        row
        for what, v in VECTORS.items()
        for row in times(
            f"a vector {what}", ValueError, "a vector must have the shape of the covariance", v=v
        )
    ),
    *bounded("a range to -1", ValueError, "x0_range must be (low, high)", x0_range=(1.0, -1.0)),
    *bounded("a range from NaN", ValueError, "x0_range must be (low, high)", x0_range=(NAN, 1.0)),
    *bounded("one number", TypeError, "x0_range must be (low, high)", x0_range=(1.0,)),
    *clamped("bounds out of order", ValueError, "low <= high", low=1.0, high=0.0),
    # C = 2 I in every basis, in any precision of the vector.
    *times("float64", v=X.double(), check=close(2 * X, check_dtype=False)),
    *times("float16", v=X.half(), check=close(2 * X, check_dtype=False, atol=1e-2, rtol=0.0)),
    case(
        "one sample of a covariance for all",
        lambda: full(2 * torch.eye(4)[None], torch.Size((1, 1, 2, 2))).multiply(X),
        check=close(2 * X),
    ),
    of_matrix(
        "a matrix of one sample",
        ValueError,
        "matrix must have shape (2, 4, 4)",
        matrix=torch.eye(4)[None],
    ),
    of_matrix(
        "a matrix of three features",
        ValueError,
        "(2, 4, 4), got (2, 3, 3)",
        matrix=torch.eye(3).expand(2, 3, 3),
    ),
    case(
        "variances of three samples",
        lambda: diagonal(torch.ones(3, 1, 2, 2), FOUR),
        ValueError,
        "variances must broadcast",
    ),
]

calibrate = partial(ocm.calibrate, covariances=BETA)
FITTED = {
    "fit_analytic": ocm.fit_analytic,
    "fit_analytic_from_data": ocm.fit_analytic_from_data,
    "calibrate": calibrate,
}
fitted = cases_of_each(FITTED, denoiser=DENOISER, x0=IMAGES, timesteps=[500])
calibration = cases_of(calibrate, "a calibration of ", denoiser=DENOISER, x0=X, timesteps=[5])
FITS = [
    *fitted("data that are NaN", ValueError, "x0 must be finite, got 8 NaN", x0=X * NAN),
    *fitted("data of integers", TypeError, "x0 must be a real floating-point", x0=X.long()),
    *fitted("data of bytes", TypeError, "x0 must be a real floating-point", x0=X.byte()),
    *fitted("data of NumPy", TypeError, "x0 must be a real floating-point", x0=X.numpy()),
    *fitted("no data", ValueError, "x0 must hold at least one sample", x0=X[:0]),
    *fitted("one dimension", ValueError, "x0 must have shape (B, channels, ...)", x0=torch.ones(3)),
    *fitted("no timesteps", ValueError, "timesteps must hold at least one", timesteps=[]),
    *fitted("one timestep", TypeError, "timesteps must be a sequence of numbers", timesteps=500),
    *fitted("timestep 0", ValueError, "t must lie in 1 .. 1000, got 0", timesteps=[0]),
    *fitted("timestep N + 1", ValueError, "t must lie in 1 .. 1000, got 1001", timesteps=[N + 1]),
    *fitted("timestep NaN", TypeError, "t must be whole", timesteps=[NAN]),
    *fitted("half a timestep", TypeError, "t must be whole", timesteps=[0.5]),
    *fitted("one label", ValueError, "labels must be", "(1,)", labels=torch.tensor([1])),
    *fitted("more labels than data", ValueError, "each of 2 samples", labels=torch.arange(9)),
    *fitted("batches of 0", ValueError, "batch_size must be at least 1, got 0", batch_size=0),
    *fitted("batches of -1", ValueError, "batch_size must be at least 1", batch_size=-1),
    *fitted("batches of 2.5", TypeError, "batch_size must be an int", batch_size=2.5),
    *fitted("a seed below 0", ValueError, "seed must lie in [0, 2**64)", seed=-1),
    *(
        case(
            f"{f.__name__} in a range that is reversed",
            lambda f=f, a=a: f(*a, X, [500], x0_range=(1, -1)),
            ValueError,
            "x0_range must be (low, high)",
        )
        for f, a in ((ocm.calibrate, (DENOISER, BETA)), (ocm.fit_analytic_from_data, (DENOISER,)))
    ),
    calibration("nothing", ValueError, "covariances must hold at least one", covariances=[]),
    *(
        calibration(name, TypeError, "covariance must state Cov[x0 | x_t]", covariances=C)
        for name, C in {"a name": "beta", "a class": ocm.Beta}.items()
    ),
    calibration(
        "what has no density", TypeError, "must have a density", covariances=ocm.Lanczos(DENOISER)
    ),
    calibration(
        "two that do not mix", TypeError, "must be diagonal", covariances=[BETA, ocm.Full(DENOISER)]
    ),
    calibration("a step backwards", ValueError, "s must lie in [0, t)", timesteps=[(10, 5)]),
]

# Samplers

SAMPLED = {"denoiser": DENOISER, "covariance": BETA, "shape": SHAPE, "steps": 2}
sampled = cases_of(ocm.sample, **SAMPLED)
trajectory = cases_of(ocm.sample_trajectory, **SAMPLED)
loops = cases_of_each({"sample": ocm.sample, "trajectory": ocm.sample_trajectory}, **SAMPLED)
ddim = cases_of(ocm.ddim, schedule=LINEAR, s=1, t=5)
renoised = cases_of(ocm.renoised, schedule=LINEAR, s=1, t=5)
second_order = cases_of(ocm.SecondOrder)


def step_of(*numbers):
    return lambda schedule, s, t: ReverseStep(*numbers)


SAMPLERS = [
    *(
        case(
            f"{f.__name__} from {t} to {s}",
            lambda f=f, s=s, t=t: f(LINEAR, s, t),
            ValueError,
            "timesteps must satisfy 0 <= s < t <= 1000",
        )
        for f in (ocm.ddpm, ocm.ddim, ocm.renoised)
        for s, t in ((5, 5), (6, 5), (-1, 5), (0, N + 1), (NAN, 5), (0, NAN))
    ),
    *(
        ddim(f"eta {eta}", ValueError, "eta must lie in [0, 1]", eta=eta)
        for eta in (-0.1, 1.1, NAN, INF)
    ),
    *(
        renoised(f"{noise} of the noise", ValueError, "noise must lie in [0, 1]", noise=noise)
        for noise in (-0.1, 1.1, NAN)
    ),
    *(
        second_order(f"second order of eta {eta}", ValueError, "eta must lie in [0, 1]", eta=eta)
        for eta in (-0.1, 1.1, NAN)
    ),
    *loops("no steps", ValueError, "K must be at least 1, got 0", steps=0),
    *loops("more steps than timesteps", ValueError, "K must lie in 1 .. 1000", steps=N + 1),
    *loops("steps that are a float", TypeError, "steps must be an int, or a sequence", steps=2.0),
    *loops("steps that are None", TypeError, "steps must be an int, or a sequence", steps=None),
    *loops("steps that are a word", TypeError, "steps must be an int, or a sequence", steps="2"),
    *loops("steps of NumPy", TypeError, "steps must be an int", "int64(3)", steps=np.int64(3)),
    *loops("steps in a tensor of no dimension", TypeError, "steps must be", steps=torch.tensor(3)),
    *loops("no timesteps", ValueError, "timesteps must increase from above 0, got []", steps=[]),
    *loops("a timestep of 0", ValueError, "timesteps must increase from above 0", steps=[0, 5]),
    *loops("timesteps that fall", ValueError, "timesteps must increase", steps=[9, 5]),
    *loops("a timestep of NaN", ValueError, "timesteps must increase", "nan", steps=[5, NAN]),
    *loops("a timestep beyond N", ValueError, "t must lie in 1 .. 1000", steps=[5, N + 1]),
    *loops("a timestep of a half", TypeError, "t must be whole", steps=[0.5]),
    *loops("a shape of no batch", ValueError, "shape must be (B, ...)", shape=()),
    *loops("a shape without channels", ValueError, "x_t must have shape (B, channels", shape=(2,)),
    *loops("a shape below 0", ValueError, "at least 0", shape=(-1, 1, 2, 2)),
    *loops("a shape of floats", TypeError, "shape must hold integers", shape=(2.0, 1, 2, 2)),
    *loops("a range that is reversed", ValueError, "x0_range must be", x0_range=(1.0, -1.0)),
    *loops("a range to NaN", ValueError, "x0_range must be (low, high)", x0_range=(-1.0, NAN)),
    *loops("a range that is a number", TypeError, "x0_range must be (low, high)", x0_range=1.0),
    *loops("a seed below 0", ValueError, "seed must lie in [0, 2**64), got -1", seed=-1),
    *loops("a seed that is a float", TypeError, "seed must be an int", seed=1.5),
    *loops("a sample below 0", ValueError, "sample_offset must be at least 0", sample_offset=-1),
    *loops("samples of integers", TypeError, "dtype must be a floating", dtype=torch.int64),
    *loops("samples of a name", TypeError, "dtype must be a floating-point", dtype="float32"),
    *loops("no covariance", TypeError, "covariance must state Cov[x0 | x_t]", covariance=None),
    *loops("the name of a covariance", TypeError, "covariance must state", covariance="beta"),
    *loops("a class of covariances", TypeError, "covariance must state", covariance=ocm.Beta),
    *loops("no denoiser", TypeError, "denoiser must be an ocm.Denoiser", denoiser=None),
    *loops(
        "the name of a sampler", TypeError, "sampler must be ocm.ddpm", "'ddpm'", sampler="ddpm"
    ),
    *loops("a class of samplers", TypeError, "sampler must be", sampler=ocm.SecondOrder),
    *loops("a sampler that returns nothing", TypeError, "ReverseStep", sampler=lambda *_: None),
    *loops("a sampler that returns NaN", ValueError, "finite", sampler=step_of(NAN, 1.0, 0.0)),
    *loops("a variance below 0", ValueError, "lambda^2 >= 0", sampler=step_of(0.5, 0.5, -1.0)),
    *loops(
        "labels for three",
        ValueError,
        "one for each sample",
        condition=DENOISER.condition(torch.tensor([1, 2, 3])),
    ),
    *loops("a condition that is a word", TypeError, "condition must be made by", condition="cat"),
    trajectory(
        "a sampler of second order",
        TypeError,
        "sampler must look at x_t alone",
        sampler=ocm.SecondOrder(),
    ),
    trajectory(
        "a trajectory without density",
        TypeError,
        "must have a density",
        covariance=ocm.Lanczos(DENOISER),
    ),
    *(
        sampled(
            f"last noise of {noise} from {name}",
            ValueError,
            "max_last_noise must be at least 0",
            max_last_noise=noise,
            **how,
        )
        for noise in (-1.0, NAN)
        for name, how in {
            "a diagonal": {},
            "a matrix": {"covariance": ocm.Full(DENOISER)},
            "second order": {"sampler": ocm.SecondOrder(1.0)},
        }.items()
    ),
    case(
        "a capture on the CPU", lambda: ocm.capture(**SAMPLED), ValueError, "CUDA device, got cpu"
    ),
    sampled("no samples", shape=(0, 1, 2, 2), check=shaped(0, 1, 2, 2)),
    sampled("no pixels", shape=(2, 1, 0, 2), check=shaped(2, 1, 0, 2)),
    # x0_hat = alpha_N x_N, which is far inside of the range
    sampled(
        "one step",
        steps=1,
        check=lambda found: close(
            LINEAR.alpha(N).float() * starting_noise(DENOISER, SHAPE, N, 0, 0)
        )(found),
    ),
    sampled("a range of one number", x0_range=(0.25, 0.25), check=close(torch.full(SHAPE, 0.25))),
    sampled(
        "a network that returns NaN",
        FloatingPointError,
        "backbone must put out finite numbers",
        denoiser=NANS,
    ),
]

STEP = ocm.ddpm(LINEAR, 400, 500)
LAW = ocm.transition(AT, BETA, STEP)
transition = cases_of(ocm.transition, "a transition of ", prediction=AT, covariance=BETA, step=STEP)
at_points = cases_of_each(
    {"a draw": lambda point: LAW.draw(point), "the density": lambda point: LAW.log_prob(point)}
)
TRANSITIONS = [
    *(
        row
        for what, z in VECTORS.items()
        for row in at_points(
            what, ValueError, "must have the shape of the mean, (2, 1, 2, 2)", point=z
        )
    ),
    transition("no step", TypeError, "ReverseStep, got None", step=None),
    transition("two numbers", TypeError, "ReverseStep", step=(1.0, 2.0)),
    transition("no covariance", TypeError, "covariance must state", covariance=None),
    case(
        "the density of a step without noise",
        lambda: ocm.transition(AT, ocm.BetaTilde(DENOISER), ocm.ddim(LINEAR, 400, 500)).log_prob(X),
        ValueError,
        "covariance must be positive for log p",
    ),
]

# Inverse problems

C = diagonal(torch.tensor([[1.0, 4.0]]), torch.Size([1, 2]))
MEASURED = torch.tensor([[5.0]])
EXPECTED = torch.tensor([[5 / 6, 20 / 6]])  # C A^T (A C A^T + 1)^-1 y
ONE = torch.ones(1, 2)


def total(x):
    return x.sum(dim=1, keepdim=True)


inverse = cases_of(
    ocm.posterior_mean_given_measurement,
    mean=torch.zeros(1, 2),
    covariance=C,
    measurement=MEASURED,
    operator=total,
    noise_std=1.0,
)
restored = cases_of(
    ocm.sample_given_measurement,
    "in a loop: ",
    denoiser=DENOISER,
    covariance=BETA,
    measurement=X[:, :, :1],
    operator=lambda v: v[:, :, :1],
    noise_std=0.1,
    shape=SHAPE,
    steps=2,
)
INVERSE = [
    inverse(
        "a measurement of NaN", ValueError, "must be finite, got NaN", measurement=MEASURED * NAN
    ),
    inverse("a measurement without end", ValueError, "must be finite", measurement=MEASURED * INF),
    inverse("a measurement of two numbers", ValueError, "shape of operator(mean)", measurement=ONE),
    inverse(
        "two measurements", ValueError, "shape of operator(mean)", measurement=torch.ones(2, 1)
    ),
    inverse("no measurement", TypeError, "measurement must be a tensor", measurement=None),
    inverse("a mean of NaN", ValueError, "operator(mean) must be finite", mean=ONE * NAN),
    inverse("a mean of integers", TypeError, "mean must be a real floating", mean=ONE.long()),
    inverse("a mean of no batch", ValueError, "mean must have shape", mean=ONE[0]),
    inverse("no covariance", TypeError, "covariance must be one of a posterior", covariance=None),
    inverse("what states a covariance", TypeError, "covariance must be one of", covariance=BETA),
    inverse(
        "a covariance of three samples",
        ValueError,
        "a vector must have the shape",
        covariance=diagonal(torch.ones(3, 2), torch.Size([3, 2])),
    ),
    inverse(
        "a covariance below 0", ValueError, "positive semi-definite", covariance=C.affine(-1.0, 0.0)
    ),
    inverse(
        "an operator with an offset",
        ValueError,
        "maps 0 to values up to 1",
        operator=lambda x: total(x) + 1,
    ),
    inverse(
        "an operator that is no tensor",
        TypeError,
        "operator must return a",
        operator=lambda x: None,
    ),
    *(
        inverse(
            f"an operator that is {name}",
            ValueError,
            "operator must be linear",
            mean=ONE,
            operator=lambda x, power=power: total(x**power),
        )
        for name, power in {"a square": 2, "a cube": 3}.items()
    ),
    inverse("an adjoint to another shape", ValueError, "adjoint must map", adjoint=lambda u: u),
    inverse(
        "an adjoint that returns nothing", ValueError, "adjoint must map", adjoint=lambda u: None
    ),
    *(
        inverse(
            f"an adjoint {name}",
            ValueError,
            "adjoint its transpose",
            mean=ONE,
            adjoint=lambda u, factor=factor: factor * u.expand(1, 2),
        )
        for name, factor in {"of the other sign": -1, "twice as large": 2}.items()
    ),
    inverse("noise below 0", ValueError, "noise_std must be at least 0, got -1", noise_std=-1.0),
    inverse("noise of NaN", ValueError, "noise_std must be at least 0, got nan", noise_std=NAN),
    inverse("noise that is a word", TypeError, "noise_std must be a number or a", noise_std="1"),
    inverse("complex noise", TypeError, "noise_std must be a number or a tensor", noise_std=1j),
    inverse(
        "noise of two measurements", ValueError, "noise_std must broadcast", noise_std=torch.ones(2)
    ),
    inverse("a weighting of no name", ValueError, "weighting must be 'row_sums'", weighting="rows"),
    inverse("a length of NaN", ValueError, "weighting must be finite, got nan", weighting=NAN),
    inverse("a length below 0", ValueError, "weighting must be at least 0", weighting=-1.0),
    inverse("a length that is a boolean", TypeError, "weighting must be a number", weighting=True),
    inverse("what states a weighting", TypeError, "weighting must be a number", weighting=BETA),
    *(
        inverse(f"a tolerance of {tolerance}", ValueError, says, tolerance=tolerance)
        for tolerance, says in (
            (-0.1, "tolerance must lie in [0, 1), got -0.1"),
            (1.0, "tolerance must lie in [0, 1), got 1.0"),
            (NAN, "tolerance must be finite, got nan"),
            (INF, "tolerance must be finite, got inf"),
        )
    ),
    inverse("no iterations", ValueError, "max_iterations must be at least 1", max_iterations=0),
    inverse("half an iteration", TypeError, "max_iterations must be an int", max_iterations=0.5),
    inverse("a measurement of integers", measurement=MEASURED.long(), check=close(EXPECTED)),
    inverse(
        "a measurement in float64",
        measurement=MEASURED.double(),
        check=close(EXPECTED, check_dtype=False),
    ),
    inverse("a tolerance of 0", tolerance=0.0, check=close(EXPECTED)),
    inverse("without a tolerance", tolerance=None, max_iterations=2, check=close(EXPECTED)),
    inverse("no noise", noise_std=0.0, check=close(torch.tensor([[1.0, 4.0]]))),
    inverse("a covariance of 0", covariance=C.affine(0.0, 0.0), check=close(torch.zeros(1, 2))),
    restored("a measurement of NaN", ValueError, "must be finite", measurement=X[:, :, :1] * NAN),
    restored(
        "a measurement of one sample", ValueError, "shape of operator", measurement=X[:1, :, :1]
    ),
    restored("noise below 0", ValueError, "noise_std must be at least 0", noise_std=-1.0),
    restored("noise of three", ValueError, "noise_std must broadcast", noise_std=torch.ones(3)),
    restored("draws by a length", ValueError, "draw_x0 must be False", weighting=1.0),
    restored("a length below 0", ValueError, "weighting must be", weighting=-1.0, draw_x0=False),
    restored("a length of NaN", ValueError, "weighting must be", weighting=NAN, draw_x0=False),
    restored("a posterior as weighting", TypeError, "covariance must state", weighting=C),
    restored("a range that is reversed", ValueError, "x0_range must be", x0_range=(1.0, -1.0)),
    restored("samples of integers", TypeError, "dtype must be a floating", dtype=torch.int64),
    restored("no steps", ValueError, "K must be at least 1", steps=0),
    restored(
        "a network that returns NaN",
        FloatingPointError,
        "backbone must put out finite numbers",
        denoiser=NANS,
        covariance=ocm.Beta(NANS),
    ),
]

K = ocm.KDiffusionDenoiser(DENOISER)
at_sigma = cases_of_each(
    {
        "x0 at a sigma": partial(ocm.x0_given, DENOISER, BETA, X),
        "k-diffusion at a sigma": partial(K, X),
    }
)
given = cases_of(ocm.x0_given, denoiser=DENOISER, covariance=BETA, x=X, sigma=1.0)
ANY_SIGMA = [
    *at_sigma("0", ValueError, "sigma must lie in (0, 314.8]", sigma=0.0),
    *at_sigma("-1", ValueError, "sigma must lie in (0, 314.8]", sigma=-1.0),
    *at_sigma("NaN", ValueError, "sigma must lie in (0, 314.8]", sigma=NAN),
    *at_sigma("infinity", ValueError, "sigma must lie in (0, 314.8]", sigma=INF),
    *at_sigma("a word", TypeError, "sigma must be a number or a tensor, got str", sigma="1"),
    *at_sigma("three", ValueError, "one for each of 2 samples, got 3", sigma=torch.ones(3)),
    *at_sigma("one NaN", ValueError, "sigma must lie in", sigma=torch.tensor([NAN, 1.0])),
    given("x0 given integers", TypeError, "x must be a real floating-point tensor", x=X.long()),
    given("x0 given one dimension", ValueError, "x must have shape", x=X[0, 0, 0]),
    given("x0 in a range that is reversed", ValueError, "x0_range must be", x0_range=(1, -1)),
    given("x0 of no covariance", TypeError, "covariance must state", covariance=None),
    case(
        "k-diffusion in a range that is reversed",
        lambda: ocm.KDiffusionDenoiser(DENOISER, (1, -1)),
        ValueError,
        "x0_range must be",
    ),
    case("no sigmas", lambda: K.get_sigmas(0), ValueError, "n must be at least 1, got 0"),
    case("half a sigma", lambda: K.get_sigmas(0.5), TypeError, "n must be an int, got 0.5"),
    case(
        "one sigma",
        lambda: K.get_sigmas(1),
        check=close(torch.tensor([K.sigma_max, 0.0]), check_dtype=False),
    ),
    # N(0, 1) beside noise of sigma: x / (1 + sigma^2)
    case(
        "a sigma for each sample",
        lambda: K(X, torch.tensor([1.0, 2.0])),
        check=close(X / torch.tensor([2.0, 5.0]).reshape(2, 1, 1, 1), atol=5e-3, rtol=0.0),
    ),
]

# Likelihoods

bound = cases_of(
    lambda **given: ocm.bits_per_dim(**given).total,
    "a bound: ",
    denoiser=DENOISER,
    covariance=BETA,
    x0=IMAGES,
    steps=2,
)
likelihood = cases_of(
    lambda **given: ocm.log_likelihood(DENOISER, **given).value,
    "a likelihood: ",
    x=X.double(),
    settings=ocm.LikelihoodSettings(num_steps=2),
)
settings = cases_of(ocm.LikelihoodSettings, "settings: ")
settings_by = cases_of(
    ocm.likelihood_settings, "settings by ", denoiser=DENOISER, x=X, tolerance=0.1
)
quantised = cases_of(ocm.quantise, x0=X)
LIKELIHOODS = [
    bound("no steps", ValueError, "K must be at least 1, got 0", steps=0),
    bound("timesteps that miss N", ValueError, "steps must end at N = 1000", steps=[5, 10]),
    bound("values off the grid", ValueError, "must lie on the grid", x0=X * 0.99),
    bound("values beyond 1", ValueError, "x0 must lie in [-1, 1], got values up to 2", x0=X * 2),
    bound("images of NaN", ValueError, "x0 must be finite", x0=X * NAN),
    bound("images of bytes", TypeError, "x0 must be a real floating", x0=X.byte()),
    bound("images of no channels", ValueError, "shape (B, channels", x0=torch.ones(3)),
    bound("one level", ValueError, "levels must be at least 2, got 1", levels=1),
    bound("levels of NaN", TypeError, "levels must be an int, got nan", levels=NAN),
    bound("half a level", TypeError, "levels must be an int, got 256.5", levels=256.5),
    bound("a decoder of no name", ValueError, "decoder must be 'stated'", decoder="x"),
    bound("a range that is reversed", ValueError, "x0_range must be", x0_range=(1.0, -1.0)),
    bound("no covariance", TypeError, "covariance must state", covariance=None),
    bound("no density", TypeError, "must have a density", covariance=ocm.Lanczos(DENOISER)),
    bound("a network that returns NaN", FloatingPointError, "backbone must put", denoiser=NANS),
    bound("no images", x0=IMAGES[:0], check=shaped(0)),
    # A density of variance 0 is 0 but at its mean.
    bound(
        "certainty about continuous data",
        FloatingPointError,
        "where BetaTilde states variances of 0 .. 0",
        levels=None,
        covariance=ocm.BetaTilde(DENOISER),
    ),
    *(
        quantised(f"{levels!r} levels", error, says, levels=levels)
        for levels, error, says in (
            (1, ValueError, "levels must be at least 2, got 1"),
            (2.5, TypeError, "levels must be an int, got 2.5"),
            ("256", TypeError, "levels must be an int, got '256'"),
        )
    ),
    quantised("levels of bytes", TypeError, "x0 must be a real", x0=X.byte()),
    likelihood("data of NaN", ValueError, "x must be finite", x=X * NAN),
    likelihood("data of integers", TypeError, "x must be a real floating-point", x=X.long()),
    likelihood("no data", ValueError, "x must hold at least one sample", x=X[:0]),
    likelihood("data of one dimension", ValueError, "x must have shape", x=torch.ones(3)),
    likelihood("settings that are none", TypeError, "settings must be", settings=3),
    likelihood("images off the grid", ValueError, "must lie on the grid", levels=256),
    likelihood("noise for continuous data", ValueError, "left out", dequantisation="uniform"),
    likelihood(
        "a decoder without a variance",
        ValueError,
        "covariance must be given",
        x=IMAGES,
        levels=256,
        dequantisation="decoder",
    ),
    likelihood(
        "a covariance that is a name",
        TypeError,
        "covariance must state",
        x=IMAGES,
        levels=256,
        covariance="x",
    ),
    *(
        likelihood(f"from timestep {t} on", ValueError, "first_timestep must", first_timestep=t)
        for t in (0, N, -1, NAN)
    ),
    likelihood("a seed below 0", ValueError, "seed must lie in [0, 2**64)", seed=-1),
    likelihood("a sample below 0", ValueError, "sample_offset must be", sample_offset=-1),
    settings("a solver of no name", ValueError, "solver must be one of", solver="rk5"),
    settings("no steps", ValueError, "num_steps must be at least 1", num_steps=0),
    settings("a tolerance of NaN", ValueError, "tolerance must be finite", tolerance=NAN),
    settings("a tolerance of 1", ValueError, "tolerance must lie between 0 and 1", tolerance=1.0),
    settings("a tolerance that is a word", TypeError, "tolerance must be a number", tolerance="1"),
    settings("probes of no name", ValueError, "probes must be a design or one of", probes="x"),
    settings("no probes", TypeError, "probes must be a design", probes=None),
    settings("a class of probes", TypeError, "probes must be", probes=hessdiag.Rademacher),
    *(
        settings_by(f"a tolerance of {t!r}", error, "tolerance must be", tolerance=t)
        for t, error in (
            (0.0, ValueError),
            (-1.0, ValueError),
            (NAN, ValueError),
            (INF, ValueError),
            ("1", TypeError),
        )
    ),
    settings_by("no samples", ValueError, "x must hold samples", x=X[:0]),
]

# Maps, and the training interface

mapped = cases_of(
    lambda **given: ocm.uncertainty(**given).std, "a map: ", model=DENOISER, t=500, image=X
)
denoising = cases_of(
    ocm.denoising_loss, "a loss: ", denoiser=DENOISER, x0=X, t=TIMESTEP, seed=0, sample_offset=0
)
SETTINGS = ocm.TrainingSettings(num_steps=1, batch_size=2)
MAPS = [
    mapped("neither image nor x_t", ValueError, "must be given, got neither", image=None),
    mapped("both image and x_t", ValueError, "must be given, got both", x_t=X),
    mapped("an image of NaN", ValueError, "image must be finite", image=X * NAN),
    mapped("an image of bytes", TypeError, "image must be a real", image=X.byte()),
    mapped("an image of one dimension", ValueError, "must have shape", image=torch.ones(3)),
    mapped("timestep 0", ValueError, "t must lie in 1 .. 1000, got 0", t=0),
    mapped("timestep N + 1", ValueError, "t must lie in 1 .. 1000, got 1001", t=N + 1),
    mapped("timestep NaN", TypeError, "t must be whole", t=NAN),
    mapped("a timestep for each sample", TypeError, "t must be one timestep", t=TIMESTEP),
    mapped("a covariance that is a name", TypeError, "covariance must state", covariance="ocm"),
    mapped("a covariance beside one", ValueError, "model must be", model=BETA, covariance=BETA),
    mapped("a way of no name", ValueError, "way must be one of draws, products", way="x"),
    mapped("one draw", ValueError, "at least 2 num_draws", num_draws=1),
    mapped("no draws", ValueError, "num_draws must be at least 1, got 0", num_draws=0),
    mapped("a range that is reversed", ValueError, "x0_range must be", x0_range=(1.0, -1.0)),
    mapped("a seed below 0", ValueError, "seed must lie in [0, 2**64)", seed=-1),
    mapped("no model", TypeError, "model must be a denoiser, a covariance", model=None),
    mapped("no images", image=X[:0], check=shaped(0, 1, 2, 2)),
    # Var[x0 | x_t] = sigma^2 for N(0, I)
    mapped("four dimensions", check=close(LINEAR.sigma(500).float().expand(SHAPE))),
    denoising("timestep 0", ValueError, "t must lie in 1 .. 1000", t=torch.tensor([0, 5])),
    denoising("three timesteps", ValueError, "each of 2 samples", t=torch.tensor([5, 6, 7])),
    denoising("a seed below 0", ValueError, "seed must lie in [0, 2**64)", seed=-1),
    denoising("a sample below 0", ValueError, "sample_offset must be", sample_offset=-1),
    case(
        "training: three labels",
        lambda: ocm.train_denoiser(LABELLED, X, SETTINGS, labels=torch.tensor([1, 2, 3])),
        ValueError,
        "labels must be int64 of shape (2,), one for each image",
    ),
]


@table([*SCHEDULES, *SPACINGS])
def test_bad_schedules(case, tmp_path):
    run(case, tmp_path)


@table([*DENOISERS, *CONDITIONS])
def test_bad_input_of_denoisers(case, tmp_path):
    run(case, tmp_path)


@table([*COVARIANCES, *FITS])
def test_bad_input_of_covariances(case, tmp_path):
    run(case, tmp_path)


@table([*SAMPLERS, *TRANSITIONS])
def test_bad_input_of_samplers(case, tmp_path):
    run(case, tmp_path)


@table([*INVERSE, *ANY_SIGMA])
def test_bad_input_of_inverse_problems(case, tmp_path):
    run(case, tmp_path)


@table(LIKELIHOODS)
def test_bad_input_of_likelihoods(case, tmp_path):
    run(case, tmp_path)


@table(MAPS)
def test_bad_input_of_maps_and_training(case, tmp_path):
    run(case, tmp_path)
