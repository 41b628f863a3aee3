"""Faults of samplers, the likelihood bound, any noise level and inverse problems."""

from __future__ import annotations

from faults.fault import Fault

OF_STEPS = (
    "tests/ocm/sampling/test_samplers.py",
    "-k",
    "eta or independent_gau or any_batch or last_no or not_allow or starts_at or share_of",
)
OF_FORMULAS = ("tests/ocm/sampling/test_samplers.py", "-k", "formulas and linear")
OF_TRANSITIONS = (
    "tests/ocm/sampling/test_transitions.py",
    "-k",
    "of_torch or draw_is_the_step or trajectory",
)
OF_BOUNDS = ("tests/ocm/sampling/test_likelihood.py",)
OF_ANY_SIGMA = (
    "tests/ocm/sampling/test_any_sigma.py",
    "-k",
    "exploding or of_bayes or between_ or prediction_type or differentiable or not_mix or own_sam",
)
OF_EXTRAPOLATION = (
    "tests/ocm/sampling/test_extrapolation.py",
    "-k",
    "dpm_solver or variance_of_the_data or follows_the_ode or any_batch or clipped or bounded",
)
OF_INVERSE = ("tests/ocm/sampling/test_inverse.py",)

SAMPLERS = "ocm/sampling/samplers.py"
TRANSITIONS = "ocm/sampling/transitions.py"
LIKELIHOOD = "ocm/sampling/likelihood.py"
ANY_SIGMA = "ocm/sampling/any_sigma.py"
EXTRAPOLATION = "ocm/sampling/extrapolation.py"
INVERSE = "ocm/sampling/inverse.py"

FAULTS = [
    # Steps and samples.
    Fault(
        "eta not squared",
        SAMPLERS,
        "eta**2 * schedule.beta_tilde(s, t)",
        "eta * schedule.beta_tilde(s, t)",
        OF_FORMULAS,
    ),
    Fault(
        "renoised by its variance",
        SAMPLERS,
        "(noise * schedule.level(s).sigma) ** 2",
        "noise * schedule.level(s).sigma ** 2",
        OF_STEPS,
    ),
    Fault(
        "the last noise in halves of a grey level",
        SAMPLERS,
        "levels * 2.0 / 255.0",
        "levels / 255.0",
        OF_STEPS,
    ),
    Fault(
        "the last noise's bound at every step",
        SAMPLERS,
        "max_last_noise if s == timesteps[0] else None",
        "max_last_noise",
        OF_STEPS,
    ),
    Fault(
        "the last noise's bound where there is no noise",
        SAMPLERS,
        "max_last_noise if s == timesteps[0] else None",
        "max_last_noise if s == 0 else None",
        OF_STEPS,
    ),
    Fault(
        "noise at the end always",
        SAMPLERS,
        "covariance.at(prediction) if s > 0 or noise_at_end else None",
        "covariance.at(prediction)",
        OF_STEPS,
    ),
    Fault(
        "samples start from noise of N",
        SAMPLERS,
        "z * math.hypot(*schedule.level(t)[:2])",
        "z * schedule.prior_std",
        OF_STEPS,
    ),
    Fault(
        "the same noise at every step",
        SAMPLERS,
        "draw = draws.of_level(prediction.timestep)",
        "draw = draws.of_level(1)",
        OF_STEPS,
    ),
    Fault(
        "variances of a step unbounded",
        SAMPLERS,
        "math.inf if x0_range is None else variance_bound(x0_range)",
        "math.inf",
        OF_STEPS,
    ),
    Fault(
        "the first samples' probes in every batch",
        SAMPLERS,
        "x, t, s=s, condition=condition, sample_offset=sample_offset",
        "x, t, s=s, condition=condition",
        OF_STEPS,
    ),
    Fault(
        "trajectories' densities of means",
        TRANSITIONS,
        "densities.append(law.density(x))",
        "densities.append(law.density(law.mean))",
        OF_TRANSITIONS,
    ),
    Fault(
        "trajectories' probes of the first sample",
        TRANSITIONS,
        "sample_offset=trajectory.sample_offset",
        "sample_offset=0",
        OF_TRANSITIONS,
    ),
    # The bound.
    Fault(
        "the prior without its trace",
        LIKELIHOOD,
        "alpha_bar * squares - alpha_bar - math.log1p(-alpha_bar)",
        "alpha_bar * squares - math.log1p(-alpha_bar)",
        OF_BOUNDS,
    ),
    Fault(
        "the prior a timestep early",
        LIKELIHOOD,
        "schedule.alpha_bar[-1].item()",
        "schedule.alpha_bar[-2].item()",
        OF_BOUNDS,
    ),
    Fault(
        "a step's SNR of neighbours",
        LIKELIHOOD,
        "schedule.log_snr(s).exp() - schedule.log_snr(t).exp()",
        "schedule.log_snr(t - 1).exp() - schedule.log_snr(t).exp()",
        OF_BOUNDS,
    ),
    Fault(
        "the bound's x0_hat unclipped",
        LIKELIHOOD,
        "prediction.x0_hat if x0_range is None else prediction.x0_hat.clamp(*x0_range)",
        "prediction.x0_hat",
        OF_BOUNDS,
    ),
    Fault(
        "the decoder's x0_hat unclipped",
        LIKELIHOOD,
        "prediction.x0_hat.clamp(*X0_RANGE).double()",
        "prediction.x0_hat.double()",
        OF_BOUNDS,
    ),
    Fault(
        "decoders by the last beta_tilde",
        LIKELIHOOD,
        "schedule.beta_tilde(1, 2)",
        "schedule.beta_tilde(0, 1)",
        OF_BOUNDS,
    ),
    Fault(
        "the bound's covariance unbounded",
        LIKELIHOOD,
        "covariance.at(prediction).bounded(x0_range)",
        "covariance.at(prediction)",
        OF_BOUNDS,
    ),
    Fault(
        "off the grid by a level",
        LIKELIHOOD,
        "off_grid > _GRID_TOLERANCE / (levels - 1)",
        "off_grid > 1.0 / (levels - 1)",
        OF_BOUNDS,
    ),
    Fault(
        "the bound on other samples' noise",
        LIKELIHOOD,
        "noisy_prediction(denoiser, x0, t, seed, sample_offset, s=s",
        "noisy_prediction(denoiser, x0, t, seed, 0, s=s",
        OF_BOUNDS,
    ),
    # Any noise level, second order and inverse problems.
    Fault(
        "x at any sigma unscaled",
        ANY_SIGMA,
        "per_sample(alpha, ",
        "per_sample(alpha / alpha, ",
        OF_ANY_SIGMA,
    ),
    Fault(
        "timesteps nearest in sigma",
        ANY_SIGMA,
        "(sigma.double().log()[..., None] - levels.log()).abs()",
        "(sigma.double()[..., None] - levels).abs()",
        OF_ANY_SIGMA,
    ),
    Fault(
        "the mean at the level of t",
        ANY_SIGMA,
        "alpha = (1.0 + levels**2).rsqrt()",
        "alpha = schedule.alpha(t)",
        OF_ANY_SIGMA,
    ),
    Fault(
        "any sigma's mean unclipped",
        ANY_SIGMA,
        "mean if x0_range is None else mean.clamp(*x0_range), stated",
        "mean, stated",
        OF_ANY_SIGMA,
    ),
    Fault(
        "any sigma's first sample number",
        ANY_SIGMA,
        "condition=condition, sample_offset=sample_offset)",
        "condition=condition)",
        OF_ANY_SIGMA,
    ),
    Fault(
        "extrapolation's w0 not halved",
        EXTRAPOLATION,
        "((L_s - L_t) / (L_t - L_p)).item() / 2",
        "((L_s - L_t) / (L_t - L_p)).item()",
        OF_EXTRAPOLATION,
    ),
    Fault(
        "extrapolation ignores eta",
        EXTRAPOLATION,
        "(past * (1 - eta**2 * left * (1 - q))).sqrt() if eta > 0 else past.sqrt()",
        "past.sqrt()",
        OF_EXTRAPOLATION,
    ),
    Fault(
        "extrapolation from an unclipped x0_hat",
        EXTRAPOLATION,
        "before, self.last = self.last, (x0_hat, t)",
        "before, self.last = self.last, (denoiser.x0_hat(x_t, t, "
        "full_precision(prediction.output)), t)",
        OF_EXTRAPOLATION,
    ),
    Fault(
        "extrapolation's last noise unbounded",
        EXTRAPOLATION,
        "math.inf if max_noise_std is None else max_noise_std",
        "math.inf",
        OF_EXTRAPOLATION,
    ),
    Fault(
        "extrapolation with the first samples' noise in every batch",
        EXTRAPOLATION,
        "sample_offset=offset, device=x_t.device",
        "sample_offset=0, device=x_t.device",
        OF_EXTRAPOLATION,
    ),
    Fault(
        "measurements' noise std not squared",
        INVERSE,
        "noise_variance = noise_std**2",
        "noise_variance = noise_std",
        OF_INVERSE,
    ),
    Fault(
        "DPS by the square norm",
        INVERSE,
        ".clamp(min=1e-30).rsqrt()",
        ".clamp(min=1e-30).reciprocal()",
        OF_INVERSE,
    ),
    Fault(
        "DPS without alpha",
        INVERSE,
        "(schedule.alpha(t) / schedule.sigma(t) ** 2).item() / b",
        "(1.0 / schedule.sigma(t) ** 2).item() / b",
        OF_INVERSE,
    ),
    Fault(
        "row sums without the noise",
        INVERSE,
        "weights = sums.abs() + noise_variance",
        "weights = sums.abs()",
        OF_INVERSE,
    ),
    Fault(
        "draws of y without noise",
        INVERSE,
        "y = y - noise_std * z(y, draws.MEASUREMENT + level)",
        "pass",
        OF_INVERSE,
    ),
    Fault(
        "PiGDM's weighting unbounded",
        INVERSE,
        "weighting.at(prediction).bounded(x0_range)",
        "weighting.at(prediction)",
        OF_INVERSE,
    ),
    Fault(
        "conjugate gradients of the whole batch",
        INVERSE,
        "(v * w).flatten(1).sum(dim=1).reshape(-1, *[1] * (v.dim() - 1))",
        "(v * w).sum().expand(len(v)).reshape(-1, *[1] * (v.dim() - 1))",
        OF_INVERSE,
    ),
    Fault(
        "a step's noise by its variance",
        INVERSE,
        "math.sqrt(noise_variance) * z(x, level)",
        "noise_variance * z(x, level)",
        OF_INVERSE,
    ),
    Fault(
        "the tolerance not squared",
        INVERSE,
        "tolerance**2 * squared",
        "tolerance * squared",
        OF_INVERSE,
    ),
]
