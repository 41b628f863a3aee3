"""The path and the prediction type of a scheduler of diffusers, or a refusal.

Nothing is taken on trust: what a scheduler tabulates must be what its path says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ocm.diffusion.schedules import Schedule, check_num_timesteps, edm, flow, from_betas, trigflow

_FLOW = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)
# The schedulers of ocm, and which of diffusers they extend.
_EXTENDED = {
    "OCMScheduler": "DDPMScheduler",
    "OCMDDIMScheduler": "DDIMScheduler",
    "OCMFlowScheduler": "FlowMatchEulerDiscreteScheduler",
}
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
# Of float32 tables; Euler's sets the last alpha_bar of a schedule without signal to 2^-24.
_RELATIVE, _ABSOLUTE = 2e-4, 2e-7


def from_scheduler(scheduler: Any) -> Schedule:
    """Return the path of a diffusers scheduler, or of its configuration.

    Schedulers of betas (``DDPMScheduler``, ``DDIMScheduler``, DPM-Solver, UniPC, Euler, ...) have
    discrete variance-preserving ones; those of flow matching the straight one, as have others with
    ``use_flow_sigmas``; EDM's and TrigFlow's (``SCMScheduler``) their own. Options that only choose
    which noise levels are visited, shifts or Karras' sigmas, play no part.

    Args:
        scheduler: An object with ``config``, or the configuration itself, a mapping. One that
            names no class must state its betas.

    Raises:
        ValueError: If the class is none of these, or its tables are not those of its path.

    Example:
        >>> import ocm
        >>> settings = {"num_train_timesteps": 10, "trained_betas": [0.1] * 10}
        >>> ocm.from_scheduler(settings).num_timesteps
        10
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> ocm.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0)).name
        'flow'
    """
    made = rebuilt(scheduler)
    return _maker(made)(made)


def prediction_type_of(scheduler: Any) -> str:
    """Return what a network that came with a scheduler predicts, by the names of this package.

    Args:
        scheduler: As in :func:`from_scheduler`.

    Raises:
        ValueError: As :func:`from_scheduler`.

    Example:
        >>> import ocm
        >>> from diffusers import EDMEulerScheduler
        >>> ocm.prediction_type_of(EDMEulerScheduler())
        'edm'
    """
    made = rebuilt(scheduler)
    maker = _maker(made)
    stated: str = made.config.get("prediction_type", "epsilon")
    if maker is _edm:
        return "edm" if stated == "epsilon" else "trigflow"
    return "flow_prediction" if maker is _flow else stated


def rebuilt(scheduler: Any) -> Any:
    """Return a scheduler's class of diffusers, made anew with all entries of its configuration.

    A scheduler of ocm becomes the one that it extends.

    Args:
        scheduler: As in :func:`from_scheduler`.

    Raises:
        ValueError: If it is no scheduler of diffusers, or cannot be made of its entries.
    """
    import diffusers

    config = getattr(scheduler, "config", scheduler)
    if not isinstance(config, Mapping):
        raise ValueError(
            f"scheduler must be one of diffusers or its configuration, got {type(scheduler)}"
        )
    name = str(config.get("_class_name", "DDPMScheduler"))
    if config is scheduler and "_class_name" not in config:
        has_betas = {"beta_start", "beta_end"} <= config.keys() or config.get("trained_betas")
        if not has_betas or config.get("snr_shift_scale", 1.0) != 1.0:  # CogVideoX
            raise ValueError(
                "scheduler must be one of diffusers, or a configuration that names its class or "
                "states its betas and nothing that alters them, got one of "
                f"{', '.join(config)}"
            )
    if config is not scheduler:
        bases = type(scheduler).__mro__
        name = next((b.__name__ for b in bases if b.__module__.startswith("diffusers.")), name)
    kind: Any = getattr(diffusers, _EXTENDED.get(name, name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"scheduler must be one of diffusers, got {name:.80}")
    if "num_train_timesteps" in config:
        check_num_timesteps(config["num_train_timesteps"])
    known = inspect.signature(kind).parameters
    config = {key: value for key, value in config.items() if key in known}
    try:
        return kind(**config)
    # What a class raises of entries that it does not expect is diffusers' affair.
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(f"scheduler has no configuration of a {name}: {reason}") from error


def _maker(made: Any) -> Callable[[Any], Schedule]:
    name, config = type(made).__name__, made.config
    has_betas = hasattr(made, "alphas_cumprod") and hasattr(made, "betas")
    flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if name in _FLOW or (has_betas and flows):
        return _flow
    if name in _EDM:
        return _edm
    if name == "SCMScheduler":
        return _trigflow
    if has_betas:
        return _betas
    raise ValueError(
        "scheduler must be one of betas (DDPMScheduler, DDIMScheduler, ...), of flow matching "
        f"({', '.join(_FLOW)}), of EDM ({', '.join(_EDM)}) or SCMScheduler, got {name}; another "
        "path is an ocm.Schedule of your own"
    )


def _betas(made: Any) -> Schedule:
    schedule = from_betas(made.betas)
    _check("alphas_cumprod", made.alphas_cumprod, schedule.alpha_bar[1:])
    return schedule


def _flow(made: Any) -> Schedule:
    if made.config.get("invert_sigmas"):
        raise ValueError("invert_sigmas must be False, got True: there sigma is the scale of data")
    schedule = flow(made.config.num_train_timesteps)
    if type(made).__name__ in _FLOW:
        # Of any sigma, shifted or not, the timestep must be what the network is told here.
        t = made.sigmas[: len(made.timesteps)].double() * schedule.num_timesteps
        _check("timesteps", made.timesteps, schedule.time(t))
    return schedule


def _edm(made: Any) -> Schedule:
    schedule = edm(
        made.config.num_train_timesteps,
        made.config.sigma_min,
        made.config.sigma_max,
        made.config.rho,
        made.config.sigma_data,
    )
    # Which sigmas are visited is no matter; their ends are, and what the network is told of them.
    sigmas = made.sigmas[: len(made.timesteps)].double()
    ends = torch.stack([sigmas.min(), sigmas.max()])
    _check("sigmas", ends, schedule.sigma(torch.tensor([1, schedule.num_timesteps])))
    _check("timesteps", made.timesteps, sigmas.log() / 4)
    return schedule


def _trigflow(made: Any) -> Schedule:
    if made.config.prediction_type != "trigflow":
        raise ValueError(f"prediction_type must be trigflow, got {made.config.prediction_type!r}")
    return trigflow(made.config.num_train_timesteps, made.config.sigma_data)


def _check(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    theirs = theirs.double().cpu()
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, _RELATIVE, _ABSOLUTE):
        raise ValueError(
            f"scheduler has {name} of its own that its path does not explain; give the path as an "
            "ocm.Schedule of your own"
        )
