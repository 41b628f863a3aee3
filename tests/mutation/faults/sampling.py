"""Faults of samplers, the likelihood bound, any noise level and inverse problems."""

from __future__ import annotations

from faults.fault import in_file

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

FAULTS = [
    # Steps and samples.
    *in_file(
        SAMPLERS,
        OF_FORMULAS,
        (
            "eta not squared",
            "eta**2 * schedule.beta_tilde(s, t)",
            "eta * schedule.beta_tilde(s, t)",
        ),
    ),
    *in_file(
        SAMPLERS,
        OF_STEPS,
        (
            "renoised by its variance",
            "(noise * schedule.level(s).sigma) ** 2",
            "noise * schedule.level(s).sigma ** 2",
        ),
        ("the last noise in halves of a grey level", "levels * 2.0 / 255.0", "levels / 255.0"),
        (
            "the last noise's bound at every step",
            "max_last_noise if s == timesteps[0] else None",
            "max_last_noise",
        ),
        (
            "the last noise's bound where there is no noise",
            "max_last_noise if s == timesteps[0] else None",
            "max_last_noise if s == 0 else None",
        ),
        (
            "noise at the end always",
            "covariance.at(prediction) if s > 0 or noise_at_end else None",
            "covariance.at(prediction)",
        ),
        (
            "samples start from noise of N",
            "z * math.hypot(*schedule.level(t)[:2])",
            "z * schedule.prior_std",
        ),
        (
            "the same noise at every step",
            "draw = draws.of_level(prediction.timestep)",
            "draw = draws.of_level(1)",
        ),
        (
            "variances of a step unbounded",
            "variance_bound(x0_range)",
            "math.inf",
        ),
        (
            "the first samples' probes in every batch",
            "x, t, s=s, condition=condition, sample_offset=sample_offset",
            "x, t, s=s, condition=condition",
        ),
    ),
    *in_file(
        "ocm/sampling/transitions.py",
        OF_TRANSITIONS,
        (
            "trajectories' densities of means",
            "densities.append(law.density(x))",
            "densities.append(law.density(law.mean))",
        ),
        (
            "trajectories' probes of the first sample",
            "sample_offset=trajectory.sample_offset",
            "sample_offset=0",
        ),
    ),
    # The bound.
    *in_file(
        "ocm/sampling/likelihood.py",
        OF_BOUNDS,
        (
            "the prior without its trace",
            "alpha_bar * squares - alpha_bar - math.log1p(-alpha_bar)",
            "alpha_bar * squares - math.log1p(-alpha_bar)",
        ),
        (
            "the prior a timestep early",
            "schedule.alpha_bar[-1].item()",
            "schedule.alpha_bar[-2].item()",
        ),
        (
            "a step's SNR of neighbours",
            "schedule.log_snr(s).exp() - schedule.log_snr(t).exp()",
            "schedule.log_snr(t - 1).exp() - schedule.log_snr(t).exp()",
        ),
        (
            "the bound's x0_hat unclipped",
            "prediction.x0_hat if x0_range is None else prediction.x0_hat.clamp(*x0_range)",
            "prediction.x0_hat",
        ),
        (
            "the decoder's x0_hat unclipped",
            "prediction.x0_hat.clamp(*X0_RANGE).double()",
            "prediction.x0_hat.double()",
        ),
        (
            "decoders by the last beta_tilde",
            "schedule.beta_tilde(1, 2)",
            "schedule.beta_tilde(0, 1)",
        ),
        (
            "the bound's covariance unbounded",
            "covariance.at(prediction).bounded(x0_range)",
            "covariance.at(prediction)",
        ),
        (
            "off the grid by a level",
            "off_grid > _GRID_TOLERANCE / (levels - 1)",
            "off_grid > 1.0 / (levels - 1)",
        ),
        (
            "the bound on other samples' noise",
            "noisy_prediction(denoiser, x0, t, seed, sample_offset, s=s",
            "noisy_prediction(denoiser, x0, t, seed, 0, s=s",
        ),
    ),
    # Any noise level, second order and inverse problems.
    *in_file(
        "ocm/sampling/any_sigma.py",
        OF_ANY_SIGMA,
        ("x at any sigma unscaled", "per_sample(alpha, ", "per_sample(alpha / alpha, "),
        (
            "timesteps nearest in sigma",
            "(sigma.double().log()[..., None] - levels.log()).abs()",
            "(sigma.double()[..., None] - levels).abs()",
        ),
        (
            "the mean at the level of t",
            "alpha = (1.0 + levels**2).rsqrt()",
            "alpha = schedule.alpha(t)",
        ),
        (
            "any sigma's mean unclipped",
            "mean if x0_range is None else mean.clamp(*x0_range), stated",
            "mean, stated",
        ),
        (
            "any sigma's first sample number",
            "condition=condition, sample_offset=sample_offset)",
            "condition=condition)",
        ),
    ),
    *in_file(
        "ocm/sampling/extrapolation.py",
        OF_EXTRAPOLATION,
        (
            "extrapolation's w0 not halved",
            "((L_s - L_t) / (L_t - L_p)).item() / 2",
            "((L_s - L_t) / (L_t - L_p)).item()",
        ),
        (
            "extrapolation ignores eta",
            "(past * (1 - eta**2 * left * (1 - q))).sqrt() if eta > 0 else past.sqrt()",
            "past.sqrt()",
        ),
        (
            "extrapolation from an unclipped x0_hat",
            "before, self.last = self.last, (x0_hat, t)",
            "before, self.last = self.last, (denoiser.x0_hat(x_t, t, "
            "full_precision(prediction.output)), t)",
        ),
        (
            "extrapolation's last noise unbounded",
            "math.inf if max_noise_std is None else max_noise_std",
            "math.inf",
        ),
        (
            "extrapolation with the first samples' noise in every batch",
            "sample_offset=offset, device=x_t.device",
            "sample_offset=0, device=x_t.device",
        ),
    ),
    *in_file(
        "ocm/sampling/inverse.py",
        OF_INVERSE,
        (
            "measurements' noise std not squared",
            "noise_variance = noise_std**2",
            "noise_variance = noise_std",
        ),
        ("DPS by the square norm", ".clamp(min=1e-30).rsqrt()", ".clamp(min=1e-30).reciprocal()"),
        (
            "DPS without alpha",
            "(schedule.alpha(t) / schedule.sigma(t) ** 2).item() / b",
            "(1.0 / schedule.sigma(t) ** 2).item() / b",
        ),
        (
            "row sums without the noise",
            "weights = sums.abs() + noise_variance",
            "weights = sums.abs()",
        ),
        ("draws of y without noise", "y = y - noise_std * z(y, draws.MEASUREMENT + level)", "pass"),
        (
            "PiGDM's weighting unbounded",
            "weighting.at(prediction).bounded(x0_range)",
            "weighting.at(prediction)",
        ),
        (
            "conjugate gradients of the whole batch",
            "(v * w).flatten(1).sum(dim=1).reshape(-1, *[1] * (v.dim() - 1))",
            "(v * w).sum().expand(len(v)).reshape(-1, *[1] * (v.dim() - 1))",
        ),
        (
            "a step's noise by its variance",
            "math.sqrt(noise_variance) * z(x, level)",
            "noise_variance * z(x, level)",
        ),
        ("the tolerance not squared", "tolerance**2 * squared", "tolerance * squared"),
    ),
]
