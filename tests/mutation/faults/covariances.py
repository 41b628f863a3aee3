"""Faults of paths, what networks predict, who draws which numbers, and covariances."""

from __future__ import annotations

from faults.fault import Fault

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

SCHEDULES = "ocm/diffusion/schedules.py"
TIMESTEPS = "ocm/diffusion/timesteps.py"
PREDICTIONS = "ocm/diffusion/predictions.py"
DRAWS = "ocm/diffusion/draws.py"
NOISE = "ocm/diffusion/noise.py"
TABLES = "ocm/diffusion/tables.py"
CONDITIONS = "ocm/diffusion/conditions.py"
DENOISER = "ocm/diffusion/denoiser.py"
HUTCHINSON = "ocm/covariances/hutchinson.py"
CHANNELS = "ocm/covariances/channels.py"
COSINE = "ocm/covariances/cosine.py"
LANCZOS = "ocm/covariances/lanczos.py"
ANALYTIC = "ocm/covariances/analytic.py"
CALIBRATED = "ocm/covariances/calibrated.py"
OPERATORS = "ocm/covariances/operators.py"
BASE = "ocm/covariances/learned/base.py"
OPTIMAL = "ocm/covariances/learned/optimal.py"
IMPROVED_DDPM = "ocm/covariances/learned/improved_ddpm.py"
NPR = "ocm/covariances/learned/npr.py"
SN = "ocm/covariances/learned/sn.py"
MAXIMUM_LIKELIHOOD = "ocm/covariances/learned/maximum_likelihood.py"
FREQUENCIES = "ocm/covariances/learned/frequencies.py"

FAULTS = [
    # Paths.
    Fault(
        "beta by the noise of s",
        SCHEDULES,
        "lost(s, t) * self.level(t).sigma ** 2",
        "lost(s, t) * self.level(s).sigma ** 2",
        OF_SCHEDULES,
    ),
    Fault(
        "a cosine's betas up to nearly 1",
        SCHEDULES,
        ".clamp(max=max_beta)",
        ".clamp(max=0.9999)",
        OF_SCHEDULES,
    ),
    Fault(
        "EDM's sigmas from t = 0",
        SCHEDULES,
        "((t - 1) / (num_timesteps - 1)).clamp(min=0)",
        "(t / num_timesteps).clamp(min=0)",
        OF_SCHEDULES,
    ),
    Fault(
        "quadratic timesteps that are even",
        TIMESTEPS,
        "(k / (K - 1)) ** 2)",
        "(k / (K - 1)))",
        OF_TIMESTEPS,
    ),
    Fault(
        "optimal timesteps by the variance at s",
        TIMESTEPS,
        "clamp(min=0) * variances.double().cpu()",
        "clamp(min=0) * variances.double().cpu()[:, None]",
        OF_TIMESTEPS,
    ),
    Fault(
        "a shift turned round",
        TIMESTEPS,
        "(1 + (shift - 1) * sigmas)",
        "(1 + (1 / shift - 1) * sigmas)",
        OF_FAMILIES,
    ),
    # What networks predict.
    Fault(
        "v without its radius", PREDICTIONS, "-sigma / squared.sqrt()", "-sigma", OF_CLOSED_FORMS
    ),
    Fault(
        "EDM's input in other units",
        PREDICTIONS,
        "c.sqrt() / data_std)",
        "c.sqrt())",
        OF_CLOSED_FORMS,
    ),
    Fault(
        "TrigFlow's target with EDM's sign",
        PREDICTIONS,
        'return -v if prediction_type == "edm" else v',
        "return -v if prediction_type in PRECONDITIONED else v",
        OF_TARGETS,
    ),
    Fault(
        "the prediction of another network taken",
        DENOISER,
        "denoiser.backbone is own.backbone",
        "True",
        OF_PROBES,
    ),
    Fault(
        "numbers of samples lost on the way to another network",
        DENOISER,
        "condition=self.condition, sample_offset=self.sample_offset",
        "condition=self.condition",
        OF_PROBES,
    ),
    Fault(
        "guidance towards no condition",
        CONDITIONS,
        "(1.0 - guidance_scale) * without + guidance_scale * conditional",
        "(1.0 - guidance_scale) * conditional + guidance_scale * without",
        OF_GUIDANCE,
    ),
    # Whose random numbers are whose.
    Fault(
        "timesteps between others share their numbers",
        DRAWS,
        "2**20 + int(t * _FRACTIONS)",
        "int(t)",
        OF_FAMILIES,
    ),
    Fault("fits on the noise that is scored", DRAWS, "FITTING = 2**31", "FITTING = 0", OF_CLASSES),
    Fault(
        "half of the samples without a condition",
        NOISE,
        "_UPPER_TENTH = 1.2815515655446004",
        "_UPPER_TENTH = 0.0",
        OF_NULLS,
    ),
    Fault(
        "labels that restart in every batch",
        NOISE,
        "labels[first : first + count]",
        "labels[:count]",
        OF_CLASSES,
    ),
    Fault(
        "noise of the first samples for all",
        NOISE,
        "normal(x0.shape, seed, step=step, sample_offset=sample_offset, device=x0.device).to(x0)",
        "normal(x0.shape, seed, step=step, sample_offset=0, device=x0.device).to(x0)",
        OF_FITS,
    ),
    Fault(
        "the same probes at every timestep",
        HUTCHINSON,
        "draws.of_level(prediction.timestep) * self.num_probes",
        "0",
        OF_PROBES,
    ),
    Fault(
        "neighbouring timesteps share probes",
        HUTCHINSON,
        "draws.of_level(prediction.timestep) * self.num_probes",
        "draws.of_level(prediction.timestep)",
        OF_PROBES,
    ),
    Fault(
        "the same signs of blocks at every timestep",
        CHANNELS,
        "draws.of_level(prediction.timestep) * vectors",
        "0",
        OF_PROBES,
    ),
    Fault(
        "the same probes of cosines at every timestep",
        COSINE,
        "draws.of_level(prediction.timestep) * num_probes",
        "0",
        OF_PROBES,
    ),
    Fault(
        "every sample has the first one's probes",
        HUTCHINSON,
        "sample_offset=prediction.sample_offset",
        "sample_offset=0",
        OF_PROBES,
    ),
    # Covariances that are stated.
    Fault(
        "a floor by all estimates",
        HUTCHINSON,
        "(negative < 0.0).sum(dim=1).clamp(min=1)",
        "negative.shape[1]",
        OF_FLOORS,
    ),
    Fault(
        "one floor for the batch",
        HUTCHINSON,
        "error.reshape(-1, *[1] * (variance.dim() - 1))",
        "error.mean()",
        OF_FLOORS,
    ),
    Fault(
        "Lanczos without the other half",
        LANCZOS,
        "+ taken(forward, v)",
        "+ taken(backward, v)",
        OF_OPERATORS,
    ),
    Fault(
        "Lanczos by the square of the norm",
        LANCZOS,
        "v.flatten(1).norm(dim=1, keepdim=True)",
        "v.flatten(1).square().sum(dim=1, keepdim=True)",
        OF_OPERATORS,
    ),
    Fault(
        "Lanczos bounded by its largest eigenvalue",
        LANCZOS,
        "mean = (weights * values).sum(dim=1, keepdim=True)",
        "mean = values.amax(dim=1, keepdim=True)",
        OF_OPERATORS,
    ),
    Fault(
        "the bound of a variance twice as large",
        OPERATORS,
        "((high - low) / 2.0) ** 2",
        "(high - low) ** 2 / 2.0",
        OF_OPERATORS,
    ),
    Fault(
        "S C in place of S C S",
        OPERATORS,
        "s[..., None] * matrix * s[..., None, :]",
        "s[..., None] * matrix",
        OF_OPERATORS,
    ),
    Fault(
        "positions and channels exchanged",
        OPERATORS,
        "lambda v: v.flatten(2).mT, lambda b: b.mT.reshape(",
        "lambda v: v.reshape(len(v), -1, v.shape[1]), lambda b: b.reshape(",
        OF_OPERATORS,
    ),
    Fault(
        "the cosines of rows for columns",
        OPERATORS,
        "values @ F_columns.square()",
        "values @ F_rows.square()",
        OF_OPERATORS,
    ),
    Fault(
        "the determinant of a single dimension",
        OPERATORS,
        "logs = logs.expand(self.shape)",
        "pass",
        OF_OPERATORS,
    ),
    Fault(
        "the largest variance of a batch bounds all",
        OPERATORS,
        "variances.flatten(1).amax(dim=1).clamp(min=bound)",
        "variances.amax().clamp(min=bound).expand(len(variances))",
        OF_OPERATORS,
    ),
    # What is fitted.
    Fault(
        "analytic variances without their control variate",
        ANALYTIC,
        "1.0 - predicted.mean() + weight * (drawn.mean() - 1.0)",
        "1.0 - predicted.mean()",
        OF_FITS,
    ),
    Fault(
        "a control variate of the wrong sign",
        ANALYTIC,
        "predicted.mean() + weight * (drawn.mean() - 1.0)",
        "predicted.mean() - weight * (drawn.mean() - 1.0)",
        OF_ANALYTIC,
    ),
    Fault(
        "analytic variances from an unclipped mean",
        ANALYTIC,
        "prediction.x0_hat if x0_range is None else prediction.x0_hat.clamp(*x0_range)",
        "prediction.x0_hat",
        OF_FITS,
    ),
    Fault(
        "analytic variances interpolated as they are",
        ANALYTIC,
        "[variance(t) / denoiser.schedule.level(t).beta_bar]",
        "[variance(t)]",
        OF_ANALYTIC,
    ),
    Fault(
        "a calibration from an unclipped mean",
        CALIBRATED,
        "prediction.x0_hat if x0_range is None else prediction.x0_hat.clamp(*x0_range)",
        "prediction.x0_hat",
        OF_FITS,
    ),
    Fault(
        "a calibration of what is not bounded",
        CALIBRATED,
        "spectral(c.at(prediction).bounded(x0_range))",
        "spectral(c.at(prediction))",
        OF_FITS,
    ),
    Fault(
        "a calibration on the noise that is scored",
        CALIBRATED,
        "condition=condition, draw=FITTING",
        "condition=condition",
        OF_CLASSES,
    ),
    Fault(
        "batches of a calibration share their noise",
        CALIBRATED,
        "denoiser, batch, t, seed, first, s=s",
        "denoiser, batch, t, seed, 0, s=s",
        OF_FITS,
    ),
    Fault(
        "the shift of a calibration scaled",
        CALIBRATED,
        "parts[0].affine(scales[0], shift)",
        "parts[0].affine(scales[0], shift * scales[0])",
        OF_ANALYTIC,
    ),
    Fault(
        "a table of steps by s = t",
        TABLES,
        "(t - 1 if s is None else s, t)",
        "(t if s is None else s, t)",
        OF_FITS,
    ),
    # Heads.
    Fault(
        "errors that are not amplified weigh less too",
        BASE,
        "(amplification - 1.0).clamp(min=0.0)",
        "(amplification - 1.0)",
        OF_HEADS,
    ),
    Fault(
        "the weight of x0_hat without p",
        BASE,
        "schedule.sigma(t) * denoiser.coefficients(t).p.clamp(min=1.0)",
        "schedule.sigma(t)",
        OF_HEADS,
    ),
    Fault(
        "the weight of the batch's first",
        BASE,
        "weight = weight.reshape(-1, *[1] * (target.dim() - 1))",
        "weight = weight[:1].reshape(-1, *[1] * (target.dim() - 1))",
        OF_HEADS,
    ),
    Fault(
        "OCM's probes by the place in a batch",
        OPTIMAL,
        "probe_offset=0,\n            sample_offset=sample_offset",
        "probe_offset=0,\n            sample_offset=0",
        OF_HEADS,
    ),
    Fault(
        "OCM's targets without the design's weight",
        OPTIMAL,
        "(weight * size / self.num_probes)",
        "(size / self.num_probes)",
        OF_HEADS,
    ),
    Fault(
        "OCM's targets of one block in M",
        OPTIMAL,
        "(weight * size / self.num_probes)",
        "(weight / self.num_probes)",
        OF_HEADS,
    ),
    Fault(
        "OCM asks for a Jacobian without signal",
        OPTIMAL,
        "t = t.clamp(max=schedule.num_timesteps - 1)",
        "pass",
        OF_HEADS_OF_PATHS,
    ),
    Fault(
        "OCM's own head in place of the wrapped one",
        OPTIMAL,
        "(head or self.head)(denoiser.features_in(J.aux))",
        "self.head(denoiser.features_in(J.aux))",
        OF_HEADS,
    ),
    Fault(
        "I-DDPM's limit doubled",
        IMPROVED_DDPM,
        "rounded(level.beta_bar, ",
        "rounded(2.0 * level.beta_bar, ",
        OF_HEADS,
    ),
    Fault(
        "I-DDPM trained on the step to 0",
        IMPROVED_DDPM,
        "t = t.clamp(min=2)",
        "t = t.clamp(min=1)",
        OF_HEADS,
    ),
    Fault(
        "I-DDPM's variance never below zero in training",
        IMPROVED_DDPM,
        "floor = -0.99 / snr_difference",
        "floor = 0.0 / snr_difference",
        OF_HEADS,
    ),
    Fault(
        "NPR without the network's error",
        NPR,
        "self.denoiser, t, self.network_error",
        "self.denoiser, t",
        OF_HEADS,
    ),
    Fault(
        "SN's moments around x_t",
        SN,
        "target = (x0 - self.parameterisation.gaussian_mean(schedule, t, x_t)).square()",
        "target = (x0 - x_t).square()",
        OF_HEADS,
    ),
    Fault(
        "chains of many steps weigh no more",
        MAXIMUM_LIKELIHOOD,
        "(per_sample(K, x_t) * terms).mean()",
        "terms.mean()",
        OF_LIKELIHOOD_HEADS,
    ),
    Fault(
        "likelihood heads with an unclipped mean",
        MAXIMUM_LIKELIHOOD,
        "x0_hat = x0_hat.clamp(*self.x0_range)",
        "pass",
        OF_LIKELIHOOD_HEADS,
    ),
    Fault(
        "chains by the place in a batch",
        MAXIMUM_LIKELIHOOD,
        "step=draws.CHAINS, sample_offset=sample_offset",
        "step=draws.CHAINS, sample_offset=0",
        OF_LIKELIHOOD_HEADS,
    ),
    Fault(
        "the last chain is never taken",
        MAXIMUM_LIKELIHOOD,
        "* len(chains)).long()",
        "* (len(chains) - 1)).long()",
        OF_LIKELIHOOD_HEADS,
    ),
    Fault(
        "steps of a chain in reverse",
        MAXIMUM_LIKELIHOOD,
        "chain[-1 - int(u * len(chain))]",
        "chain[int(u * len(chain))]",
        OF_LIKELIHOOD_HEADS,
    ),
    Fault(
        "whole timesteps half a step late",
        MAXIMUM_LIKELIHOOD,
        "half = 0.0 if schedule.is_continuous else 0.5",
        "half = 0.0",
        OF_LIKELIHOOD_HEADS,
    ),
    Fault(
        "frequencies in the unit of pixels",
        FREQUENCIES,
        "sigma.square() / variances",
        "sigma.square()",
        OF_FREQUENCIES,
    ),
    Fault(
        "grey levels by the variance of coefficients",
        FREQUENCIES,
        "variance = basis.diagonal(variance)",
        "pass",
        OF_FREQUENCIES,
    ),
    Fault(
        "energies in no unit",
        FREQUENCIES,
        "self._analysed(x0_hat).square() / self.variances",
        "self._analysed(x0_hat).square()",
        OF_FREQUENCIES,
    ),
]
