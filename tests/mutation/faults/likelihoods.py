"""Faults of log-likelihoods by the probability-flow ODE."""

from __future__ import annotations

from faults.fault import Fault

OF_CLOSED_FORMS = (
    "tests/ocm/likelihoods/test_closed_forms.py",
    "-k",
    "first_timestep or correlated_gaussian or parts_add_up or discrete_path",
)
OF_PROBES = ("tests/ocm/likelihoods/test_probes_drawn.py",)
OF_DRAWS = (
    "tests/ocm/likelihoods/test_draws.py",
    "-k",
    "by_draws_and_probes or single_draw or rise_to_the_mass or once_more",
)
OF_ERRORS = ("tests/ocm/likelihoods/test_standard_errors.py",)
OF_DEQUANTISATION = ("tests/ocm/likelihoods/test_dequantisation.py",)
OF_FLOW = ("tests/ocm/likelihoods/test_probability_flow.py",)
OF_BUDGETS = ("tests/ocm/likelihoods/test_budget.py", "-k", "solver_errs")

LOG_LIKELIHOOD = "ocm/likelihoods/log_likelihood.py"
INTEGRAL = "ocm/likelihoods/integral.py"
PROBABILITY_FLOW = "ocm/likelihoods/probability_flow.py"
DEQUANTISATION = "ocm/likelihoods/dequantisation.py"
SETTINGS = "ocm/likelihoods/settings.py"
BUDGET = "ocm/likelihoods/budget.py"

FAULTS = [
    Fault(
        "draws share their dequantisation noise",
        LOG_LIKELIHOOD,
        "step = draws.DEQUANTISATION + draw",
        "step = draws.DEQUANTISATION",
        OF_DRAWS,
    ),
    Fault(
        "dequantisation noise of the first sample",
        LOG_LIKELIHOOD,
        "x.shape, seed, step=step, sample_offset=sample_offset, device=x.device",
        "x.shape, seed, step=step, sample_offset=0, device=x.device",
        OF_PROBES,
    ),
    Fault(
        "draws share their probes",
        LOG_LIKELIHOOD,
        "number = 0 if settings.importance_weighted else draw",
        "number = 0",
        OF_PROBES,
    ),
    Fault(
        "weighed draws have their own probes",
        LOG_LIKELIHOOD,
        "number = 0 if settings.importance_weighted else draw",
        "number = draw",
        OF_PROBES,
    ),
    Fault(
        "weighed draws by their sum",
        LOG_LIKELIHOOD,
        "logs.logsumexp(0) - math.log(R)",
        "logs.logsumexp(0)",
        OF_DRAWS,
    ),
    Fault(
        "draws' variance not by R",
        LOG_LIKELIHOOD,
        "variances.sum(0) / R**2",
        "variances.sum(0) / R",
        OF_DRAWS,
    ),
    Fault(
        "draws' spread with that of probes",
        LOG_LIKELIHOOD,
        "(logs.detach().var(0) / R - variance).clamp(min=0)",
        "(logs.detach().var(0) / R)",
        OF_DRAWS,
    ),
    Fault(
        "a single draw is certain",
        LOG_LIKELIHOOD,
        "0.0 if is_continuous else torch.inf",
        "0.0",
        OF_DRAWS,
    ),
    Fault(
        "the decoder's bits for a dimension",
        LOG_LIKELIHOOD,
        "bits * math.prod(shape) * math.log(2)",
        "bits * math.log(2)",
        OF_DEQUANTISATION,
    ),
    Fault(
        "the first timestep's std of its square",
        LOG_LIKELIHOOD,
        "math.exp(-0.5 * denoiser.schedule.log_snr(first_timestep).item())",
        "math.exp(-denoiser.schedule.log_snr(first_timestep).item())",
        OF_DEQUANTISATION,
    ),
    Fault(
        "the volume of y forgotten",
        INTEGRAL,
        "log_prior + integral.mean + D * math.log(cosine)",
        "log_prior + integral.mean",
        OF_CLOSED_FORMS,
    ),
    Fault(
        "the same probes at every evaluation",
        INTEGRAL,
        "self.probe_offset + k * self.max_probes",
        "self.probe_offset",
        OF_PROBES,
    ),
    Fault(
        "evaluations share all but one probe",
        INTEGRAL,
        "self.probe_offset + k * self.max_probes",
        "self.probe_offset + k",
        OF_PROBES,
    ),
    Fault(
        "weights of evaluations not squared",
        INTEGRAL,
        "(weight * place.scale * place.of_output * stderr).square()",
        "weight.__abs__() * (place.scale * place.of_output * stderr).square()",
        OF_ERRORS,
    ),
    Fault(
        "variances without the scale of z",
        INTEGRAL,
        "(weight * place.scale * place.of_output * stderr)",
        "(weight * place.of_output * stderr)",
        OF_ERRORS,
    ),
    Fault(
        "kept groups' variance of one",
        INTEGRAL,
        "integrals.detach().var(0) / n",
        "integrals.detach().var(0)",
        OF_ERRORS,
    ),
    Fault(
        "kept probes of the first sample",
        INTEGRAL,
        "sample_offset=probing.sample_offset",
        "sample_offset=0",
        OF_PROBES,
    ),
    Fault(
        "noise is asked for too early",
        PROBABILITY_FLOW,
        "_LEAST_LOG_SNR = -10.2",
        "_LEAST_LOG_SNR = -5.1",
        OF_FLOW,
    ),
    Fault(
        "radii between timesteps of the first",
        PROBABILITY_FLOW,
        "at(radii, place)",
        "radii[0]",
        OF_FLOW,
    ),
    Fault(
        "uniform's weight of half a bin",
        DEQUANTISATION,
        "math.log(2 * half_bin)",
        "math.log(half_bin)",
        OF_DEQUANTISATION,
    ),
    Fault(
        "truncated normals' mass forgotten",
        DEQUANTISATION,
        "math.log(std) + log_mass",
        "math.log(std)",
        OF_DEQUANTISATION,
    ),
    Fault("intervals by one side", SETTINGS, "(1 + level) / 2", "level", OF_ERRORS),
    Fault(
        "the solver may err by four times its share",
        BUDGET,
        "_enough_steps(taken, allowed / 2, D)",
        "_enough_steps(taken, allowed * 2, D)",
        OF_BUDGETS,
    ),
]
