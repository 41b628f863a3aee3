"""Faults of paths, what networks predict, who draws which numbers, and covariances."""

from __future__ import annotations

from faults.fault import in_file

OF_SCHEDULES = (
    "tests/ocm/diffusion/test_schedules.py",
    "-k",
    "definitions or diffusers or relations or edm",
)
OF_FAMILIES = (
    "tests/ocm/diffusion/test_paths.py",
    "-k",
    "of_the_family or by_their_noise or of_diffusers or told_apart or path_of_functions",
)
OF_CLOSED_FORMS = ("tests/ocm/diffusion/test_paths.py", "-k", "closed_form and mixture")
OF_TIMESTEPS = ("tests/ocm/diffusion/test_timesteps.py",)
OF_TARGETS = ("tests/ocm/training/test_objectives.py", "-k", "knows_the_data")
OF_CLASSES = ("tests/ocm/covariances/test_calibration.py", "-k", "own_class or other_noise")
OF_FITS = (
    "tests/ocm/covariances/test_calibration.py",
    "-k",
    "batches or bounded_first or clip or by_steps or shift_finds or few_samples",
)
OF_ANALYTIC = (
    "tests/ocm/covariances/test_fitted_on_paths.py",
    "-k",
    "analytic_variances or calibrations_find",
)
OF_PROBES = ("tests/ocm/covariances/test_probes_of_timesteps.py",)
OF_FLOORS = ("tests/ocm/covariances/test_covariances.py", "-k", "floor_is_the or leaves_positive")
OF_OPERATORS = ("tests/ocm/covariances/test_operators.py",)
OF_HEADS = ("tests/ocm/covariances/test_learned.py",)
OF_HEADS_OF_PATHS = ("tests/ocm/covariances/test_fitted_on_paths.py", "-k", "heads")
OF_LIKELIHOOD_HEADS = (
    "tests/ocm/covariances/test_maximum_likelihood.py",
    "-k",
    "even-linear or even-trigflow or torch_distr or same_chains or clipped or intervals",
)
OF_FREQUENCIES = ("tests/ocm/covariances/test_frequencies.py",)
OF_NULLS = (
    "tests/ocm/training/test_objectives.py",
    "-k",
    "condition_of_any_kind or conditions_and_without",
)
OF_GUIDANCE = ("tests/ocm/sampling/test_any_sigma.py", "-k", "guidance")

TIMESTEPS = "ocm/diffusion/timesteps.py"
PREDICTIONS = "ocm/diffusion/predictions.py"
DRAWS = "ocm/diffusion/draws.py"
NOISE = "ocm/diffusion/noise.py"
HUTCHINSON = "ocm/covariances/hutchinson.py"
ANALYTIC = "ocm/covariances/analytic.py"
CALIBRATED = "ocm/covariances/calibrated.py"
OPTIMAL = "ocm/covariances/learned/optimal.py"

FAULTS = [
    # Paths.
    *in_file(
        "ocm/diffusion/schedules.py",
        OF_SCHEDULES,
        (
            "beta by the noise of s",
            "lost(s, t) * self.level(t).sigma ** 2",
            "lost(s, t) * self.level(s).sigma ** 2",
        ),
        ("a cosine's betas up to nearly 1", ".clamp(max=max_beta)", ".clamp(max=0.9999)"),
        (
            "EDM's sigmas from t = 0",
            "((t - 1) / (num_timesteps - 1)).clamp(min=0)",
            "(t / num_timesteps).clamp(min=0)",
        ),
    ),
    *in_file(
        TIMESTEPS,
        OF_TIMESTEPS,
        ("quadratic timesteps that are even", "(k / (K - 1)) ** 2)", "(k / (K - 1)))"),
        (
            "optimal timesteps by the variance at s",
            "clamp(min=0) * variances.double().cpu()",
            "clamp(min=0) * variances.double().cpu()[:, None]",
        ),
    ),
    *in_file(
        TIMESTEPS,
        OF_FAMILIES,
        ("a shift turned round", "(1 + (shift - 1) * sigmas)", "(1 + (1 / shift - 1) * sigmas)"),
    ),
    # What networks predict.
    *in_file(
        PREDICTIONS,
        OF_CLOSED_FORMS,
        ("v without its radius", "-sigma / squared.sqrt()", "-sigma"),
        ("EDM's input in other units", "c.sqrt() / data_std)", "c.sqrt())"),
    ),
    *in_file(
        PREDICTIONS,
        OF_TARGETS,
        (
            "TrigFlow's target with EDM's sign",
            'return -v if prediction_type == "edm" else v',
            "return -v if prediction_type in PRECONDITIONED else v",
        ),
    ),
    *in_file(
        "ocm/diffusion/denoiser.py",
        OF_PROBES,
        ("the prediction of another network taken", "denoiser.backbone is own.backbone", "True"),
        (
            "numbers of samples lost on the way to another network",
            "condition=self.condition, sample_offset=self.sample_offset",
            "condition=self.condition",
        ),
    ),
    *in_file(
        "ocm/diffusion/conditions.py",
        OF_GUIDANCE,
        (
            "guidance towards no condition",
            "(1.0 - guidance_scale) * without + guidance_scale * conditional",
            "(1.0 - guidance_scale) * conditional + guidance_scale * without",
        ),
    ),
    # Whose random numbers are whose.
    *in_file(
        DRAWS,
        OF_FAMILIES,
        ("timesteps between others share their numbers", "2**20 + int(t * _FRACTIONS)", "int(t)"),
    ),
    *in_file(
        DRAWS, OF_CLASSES, ("fits on the noise that is scored", "FITTING = 2**31", "FITTING = 0")
    ),
    *in_file(
        NOISE,
        OF_NULLS,
        (
            "half of the samples without a condition",
            "_UPPER_TENTH = 1.2815515655446004",
            "_UPPER_TENTH = 0.0",
        ),
    ),
    *in_file(
        NOISE,
        OF_CLASSES,
        ("labels that restart in every batch", "labels[first : first + count]", "labels[:count]"),
    ),
    *in_file(
        NOISE,
        OF_FITS,
        (
            "noise of the first samples for all",
            "normal(x0.shape, seed, step=step, sample_offset=sample_offset, device=x0.device)"
            ".to(x0)",
            "normal(x0.shape, seed, step=step, sample_offset=0, device=x0.device).to(x0)",
        ),
    ),
    *in_file(
        HUTCHINSON,
        OF_PROBES,
        (
            "the same probes at every timestep",
            "draws.of_level(prediction.timestep) * self.num_probes",
            "0",
        ),
        (
            "neighbouring timesteps share probes",
            "draws.of_level(prediction.timestep) * self.num_probes",
            "draws.of_level(prediction.timestep)",
        ),
        (
            "every sample has the first one's probes",
            "sample_offset=prediction.sample_offset",
            "sample_offset=0",
        ),
    ),
    *in_file(
        "ocm/covariances/channels.py",
        OF_PROBES,
        (
            "the same signs of blocks at every timestep",
            "draws.of_level(prediction.timestep) * vectors",
            "0",
        ),
    ),
    *in_file(
        "ocm/covariances/cosine.py",
        OF_PROBES,
        (
            "the same probes of cosines at every timestep",
            "draws.of_level(prediction.timestep) * num_probes",
            "0",
        ),
    ),
    # Covariances that are stated.
    *in_file(
        HUTCHINSON,
        OF_FLOORS,
        (
            "a floor by all estimates",
            "(negative < 0.0).sum(dim=1).clamp(min=1)",
            "negative.shape[1]",
        ),
        (
            "one floor for the batch",
            "error.reshape(-1, *[1] * (variance.dim() - 1))",
            "error.mean()",
        ),
    ),
    *in_file(
        "ocm/covariances/lanczos.py",
        OF_OPERATORS,
        ("Lanczos without the other half", "+ taken(forward, v)", "+ taken(backward, v)"),
        (
            "Lanczos by the square of the norm",
            "v.flatten(1).norm(dim=1, keepdim=True)",
            "v.flatten(1).square().sum(dim=1, keepdim=True)",
        ),
        (
            "Lanczos bounded by its largest eigenvalue",
            "mean = (weights * values).sum(dim=1, keepdim=True)",
            "mean = values.amax(dim=1, keepdim=True)",
        ),
    ),
    *in_file(
        "ocm/covariances/operators.py",
        OF_OPERATORS,
        (
            "the bound of a variance twice as large",
            "((high - low) / 2.0) ** 2",
            "(high - low) ** 2 / 2.0",
        ),
        (
            "S C in place of S C S",
            "s[..., None] * matrix * s[..., None, :]",
            "s[..., None] * matrix",
        ),
        (
            "positions and channels exchanged",
            "lambda v: v.flatten(2).mT, lambda b: b.mT.reshape(",
            "lambda v: v.reshape(len(v), -1, v.shape[1]), lambda b: b.reshape(",
        ),
        (
            "the cosines of columns transposed",
            "values @ F_columns.square()",
            "values @ F_columns.square().T",
        ),
        (
            "the determinant of a single dimension",
            "logs = logs.expand(self.shape)",
            "per_entry = logs[0].numel()",
        ),
        (
            "the largest variance of a batch bounds all",
            "variances.flatten(1).amax(dim=1).clamp(min=bound)",
            "variances.amax().clamp(min=bound).expand(len(variances))",
        ),
    ),
    # What is fitted.
    *in_file(
        ANALYTIC,
        OF_FITS,
        (
            "analytic variances without their control variate",
            "1.0 - predicted.mean() + weight * (drawn.mean() - 1.0)",
            "1.0 - predicted.mean()",
        ),
        (
            "analytic variances from an unclipped mean",
            "prediction.x0_hat if x0_range is None else prediction.x0_hat.clamp(*x0_range)",
            "prediction.x0_hat",
        ),
    ),
    *in_file(
        ANALYTIC,
        OF_ANALYTIC,
        (
            "a control variate of the wrong sign",
            "predicted.mean() + weight * (drawn.mean() - 1.0)",
            "predicted.mean() - weight * (drawn.mean() - 1.0)",
        ),
        (
            "analytic variances interpolated as they are",
            "[variance(t) / denoiser.schedule.level(t).beta_bar]",
            "[variance(t)]",
        ),
    ),
    *in_file(
        CALIBRATED,
        OF_FITS,
        (
            "a calibration from an unclipped mean",
            "prediction.x0_hat if x0_range is None else prediction.x0_hat.clamp(*x0_range)",
            "prediction.x0_hat",
        ),
        (
            "a calibration of what is not bounded",
            "spectral(c.at(prediction).bounded(x0_range))",
            "spectral(c.at(prediction))",
        ),
        (
            "batches of a calibration share their noise",
            "denoiser, batch, t, seed, first, s=s",
            "denoiser, batch, t, seed, 0, s=s",
        ),
    ),
    *in_file(
        CALIBRATED,
        OF_CLASSES,
        (
            "a calibration on the noise that is scored",
            "condition=condition, draw=FITTING",
            "condition=condition",
        ),
    ),
    *in_file(
        CALIBRATED,
        OF_ANALYTIC,
        (
            "the shift of a calibration scaled",
            "parts[0].affine(scales[0], shift)",
            "parts[0].affine(scales[0], shift * scales[0])",
        ),
    ),
    *in_file(
        "ocm/diffusion/tables.py",
        OF_FITS,
        (
            "a table of steps by s = t",
            "(t - 1 if s is None else s, t)",
            "(t if s is None else s, t)",
        ),
    ),
    # Heads.
    *in_file(
        "ocm/covariances/learned/base.py",
        OF_HEADS,
        (
            "errors that are not amplified weigh less too",
            "(amplification - 1.0).clamp(min=0.0)",
            "(amplification - 1.0)",
        ),
        (
            "the weight of x0_hat without p",
            "schedule.sigma(t) * denoiser.coefficients(t).p.clamp(min=1.0)",
            "schedule.sigma(t)",
        ),
        (
            "the weight of the batch's first",
            "weight = weight.reshape(-1, *[1] * (target.dim() - 1))",
            "weight = weight[:1].reshape(-1, *[1] * (target.dim() - 1))",
        ),
    ),
    *in_file(
        OPTIMAL,
        OF_HEADS,
        (
            "OCM's probes by the place in a batch",
            "probe_offset=0,\n            sample_offset=sample_offset",
            "probe_offset=0,\n            sample_offset=0",
        ),
        (
            "OCM's targets without the design's weight",
            "(weight * size / self.num_probes)",
            "(size / self.num_probes)",
        ),
        (
            "OCM's targets of one block in M",
            "(weight * size / self.num_probes)",
            "(weight / self.num_probes)",
        ),
        (
            "OCM's own head in place of the wrapped one",
            "(head or self.head)(denoiser.features_in(J.aux))",
            "self.head(denoiser.features_in(J.aux))",
        ),
    ),
    *in_file(
        OPTIMAL,
        OF_HEADS_OF_PATHS,
        (
            "OCM asks for a Jacobian without signal",
            "t = t.clamp(max=schedule.num_timesteps - 1)",
            "pass",
        ),
    ),
    *in_file(
        "ocm/covariances/learned/improved_ddpm.py",
        OF_HEADS,
        ("I-DDPM's limit doubled", "rounded(level.beta_bar, ", "rounded(2.0 * level.beta_bar, "),
        ("I-DDPM trained on the step to 0", "t = t.clamp(min=2)", "t = t.clamp(min=1)"),
        (
            "I-DDPM's variance never below zero in training",
            "floor = -0.99 / snr_difference",
            "floor = 0.0 / snr_difference",
        ),
    ),
    *in_file(
        "ocm/covariances/learned/npr.py",
        OF_HEADS,
        (
            "NPR without the network's error",
            "self.denoiser, t, self.network_error",
            "self.denoiser, t",
        ),
    ),
    *in_file(
        "ocm/covariances/learned/sn.py",
        OF_HEADS,
        (
            "SN's moments around x_t",
            "target = (x0 - self.parameterisation.gaussian_mean(schedule, t, x_t)).square()",
            "target = (x0 - x_t).square()",
        ),
    ),
    *in_file(
        "ocm/covariances/learned/maximum_likelihood.py",
        OF_LIKELIHOOD_HEADS,
        (
            "chains of many steps weigh no more",
            "(per_sample(K, x_t) * terms).mean()",
            "terms.mean()",
        ),
        (
            "likelihood heads with an unclipped mean",
            "x0_hat = x0_hat.clamp(*self.x0_range)",
            "pass",
        ),
        (
            "chains by the place in a batch",
            "step=draws.CHAINS, sample_offset=sample_offset",
            "step=draws.CHAINS, sample_offset=0",
        ),
        ("the last chain is never taken", "* len(chains)).long()", "* (len(chains) - 1)).long()"),
        (
            "steps of a chain in reverse",
            "chain[-1 - int(u * len(chain))]",
            "chain[int(u * len(chain))]",
        ),
        (
            "whole timesteps half a step late",
            "half = 0.0 if schedule.is_continuous else 0.5",
            "half = 0.0",
        ),
    ),
    *in_file(
        "ocm/covariances/learned/frequencies.py",
        OF_FREQUENCIES,
        ("frequencies in the unit of pixels", "sigma.square() / variances", "sigma.square()"),
        (
            "grey levels by the variance of coefficients",
            "variance = basis.diagonal(variance)",
            "variance = variance.reshape(x0.shape)",
        ),
        (
            "energies in no unit",
            "self._analysed(x0_hat).square() / self.variances",
            "self._analysed(x0_hat).square()",
        ),
    ),
]
