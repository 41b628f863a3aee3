"""Faults of log-likelihoods by the probability-flow ODE."""

from __future__ import annotations

from faults.fault import in_file

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

FAULTS = [
    *in_file(
        LOG_LIKELIHOOD,
        OF_DRAWS,
        (
            "draws share their dequantisation noise",
            "step = draws.DEQUANTISATION + draw",
            "step = draws.DEQUANTISATION",
        ),
        ("weighed draws by their sum", "logs.logsumexp(0) - math.log(R)", "logs.logsumexp(0)"),
        ("draws' variance not by R", "variances.sum(0) / R**2", "variances.sum(0) / R"),
        (
            "draws' spread with that of probes",
            "(logs.detach().var(0) / R - variance).clamp(min=0)",
            "(logs.detach().var(0) / R)",
        ),
        ("a single draw is certain", "0.0 if is_continuous else torch.inf", "0.0"),
    ),
    *in_file(
        LOG_LIKELIHOOD,
        OF_PROBES,
        (
            "dequantisation noise of the first sample",
            "x.shape, seed, step=step, sample_offset=sample_offset, device=x.device",
            "x.shape, seed, step=step, sample_offset=0, device=x.device",
        ),
        (
            "draws share their probes",
            "number = 0 if settings.importance_weighted else draw",
            "number = 0",
        ),
        (
            "weighed draws have their own probes",
            "number = 0 if settings.importance_weighted else draw",
            "number = draw",
        ),
    ),
    *in_file(
        LOG_LIKELIHOOD,
        OF_DEQUANTISATION,
        (
            "the decoder's bits for a dimension",
            "bits * math.prod(shape) * math.log(2)",
            "bits * math.log(2)",
        ),
        (
            "the first timestep's std of its square",
            "math.exp(-0.5 * denoiser.schedule.log_snr(first_timestep).item())",
            "math.exp(-denoiser.schedule.log_snr(first_timestep).item())",
        ),
    ),
    *in_file(
        INTEGRAL,
        OF_CLOSED_FORMS,
        (
            "the volume of y forgotten",
            "log_prior + integral.mean + D * math.log(cosine)",
            "log_prior + integral.mean",
        ),
    ),
    *in_file(
        INTEGRAL,
        OF_PROBES,
        (
            "the same probes at every evaluation",
            "self.probe_offset + k * self.max_probes",
            "self.probe_offset",
        ),
        (
            "evaluations share all but one probe",
            "self.probe_offset + k * self.max_probes",
            "self.probe_offset + k",
        ),
        (
            "kept probes of the first sample",
            "sample_offset=probing.sample_offset",
            "sample_offset=0",
        ),
    ),
    *in_file(
        INTEGRAL,
        OF_ERRORS,
        (
            "weights of evaluations not squared",
            "(weight * place.scale * place.of_output * stderr).square()",
            "weight.__abs__() * (place.scale * place.of_output * stderr).square()",
        ),
        (
            "variances without the scale of z",
            "(weight * place.scale * place.of_output * stderr)",
            "(weight * place.of_output * stderr)",
        ),
        (
            "kept groups' variance of one",
            "integrals.detach().var(0) / n",
            "integrals.detach().var(0)",
        ),
    ),
    *in_file(
        "ocm/likelihoods/probability_flow.py",
        OF_FLOW,
        ("noise is asked for too early", "_LEAST_LOG_SNR = -10.2", "_LEAST_LOG_SNR = -5.1"),
        ("radii between timesteps of the first", "at(radii, place)", "radii[0]"),
    ),
    *in_file(
        "ocm/likelihoods/dequantisation.py",
        OF_DEQUANTISATION,
        ("uniform's weight of half a bin", "math.log(2 * half_bin)", "math.log(half_bin)"),
        ("truncated normals' mass forgotten", "math.log(std) + log_mass", "math.log(std)"),
    ),
    *in_file(
        "ocm/likelihoods/settings.py",
        OF_ERRORS,
        ("intervals by one side", "(1 + level) / 2", "level"),
    ),
    *in_file(
        "ocm/likelihoods/budget.py",
        OF_BUDGETS,
        (
            "the solver may err by four times its share",
            "_enough_steps(taken, allowed / 2, D)",
            "_enough_steps(taken, allowed * 2, D)",
        ),
    ),
]
