"""Noisy samples x_t for training and for scores, by the random-number contract.

The noise of a sample is a pure function of (seed, sample number, step), whatever the batch: in
training, ``sample_offset`` counts the samples that were seen before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hessdiag.kernels import normal
from ocm.diffusion import draws
from ocm.diffusion.checks import check_batch
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.schedules import Schedule

# Standard normal numbers exceed it with probability 1/10.
_UPPER_TENTH = 1.2815515655446004


def chosen(count: int, seed: int, sample_offset: int, device: torch.device) -> Tensor:
    """Return which of the training samples ``sample_offset`` onwards are in a random tenth, bool.

    Example:
        >>> 80 < int(chosen(1000, 0, 0, torch.device("cpu")).sum()) < 120
        True
    """
    z = normal((count, 1), seed, step=draws.CLASSES, sample_offset=sample_offset, device=device)
    return z[:, 0] > _UPPER_TENTH


def noisy(
    schedule: Schedule, x0: Tensor, t: Tensor, seed: int, sample_offset: int
) -> tuple[Tensor, Tensor]:
    """Return x_t and its noise for the training samples ``sample_offset`` onwards.

    Raises:
        TypeError: If x0 is no floating-point tensor.
        ValueError: If there is not one timestep for each sample.
    """
    check_batch("x0", x0)
    if t.shape != x0.shape[:1]:
        raise ValueError(
            f"t must be one timestep for each of {len(x0)} samples, got shape {tuple(t.shape)}"
        )
    noise = normal(
        x0.shape, seed, step=draws.TRAINING, sample_offset=sample_offset, device=x0.device
    ).to(x0)
    return schedule.diffuse(x0, t, noise), noise


def condition_of(
    denoiser: Denoiser,
    rows: Mapping[str, Tensor],
    nulls: Mapping[str, Tensor] | None = None,
    guidance_scale: float = 1.0,
) -> Condition | None:
    """Return the condition of a batch from its rows by name, or None without any.

    Args:
        denoiser: The denoiser.
        rows: "labels", and arguments of the backbone, of shape (b, ...); a name with a dot is an
            entry of a dictionary: "added_cond_kwargs.text_embeds".
        nulls: What takes their place without a condition, of shape (1, ...), by name.
        guidance_scale: As in :meth:`ocm.Denoiser.condition`.

    Example:
        >>> import ocm
        >>> denoiser = Denoiser(lambda x, time: x, ocm.linear())
        >>> condition_of(denoiser, {"text": torch.ones(2), "sizes.height": torch.ones(2)}).tensors
        {'text': tensor([1., 1.]), 'sizes': {'height': tensor([1., 1.])}}
    """
    if not rows:
        return None
    nulls = nulls or {}
    null_label = int(nulls["labels"]) if "labels" in nulls else None
    branches = [
        _by_argument({name: x for name, x in branch.items() if name != "labels"})
        for branch in (rows, {**rows, **nulls} if nulls.keys() - {"labels"} else {})
    ]
    return denoiser.condition(
        rows.get("labels"),
        guidance_scale,
        null_label,
        tensors=branches[0],
        null_tensors=branches[1],
    )


def _by_argument(values: Mapping[str, Tensor]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        argument, _, entry = name.partition(".")
        if entry:
            arguments.setdefault(argument, {})[entry] = value
        else:
            arguments[argument] = value
    return arguments


def labelled(denoiser: Denoiser, labels: Tensor | None, first: int, count: int) -> Condition | None:
    """Return the condition of the ``count`` samples of a data set from number ``first`` on.

    Args:
        denoiser: The denoiser.
        labels: Class of every sample of the data set, or None for a denoiser without classes.
        first: Number of the first sample.
        count: Number of samples.
    """
    return None if labels is None else denoiser.condition(labels[first : first + count])


def noisy_prediction(
    denoiser: Denoiser,
    x0: Tensor,
    t: float,
    seed: int,
    sample_offset: int = 0,
    *,
    s: float | None = None,
    condition: Condition | None = None,
    draw: int = 0,
) -> Prediction:
    """Return the backbone's prediction at x_t drawn from q(x_t | x_0), on its device.

    Args:
        denoiser: The frozen denoiser.
        x0: A batch of the data.
        t: Timestep.
        seed: Seed of the noise.
        sample_offset: Number of the first sample.
        s: As in :meth:`ocm.Denoiser.predict`.
        condition: As in :meth:`ocm.Denoiser.predict`.
        draw: 0 for scores, :data:`ocm.diffusion.draws.FITTING` for what is fitted before.
    """
    check_batch("x0", x0)
    if isinstance(t, Tensor):
        raise TypeError(f"t must be one timestep, got a tensor of shape {tuple(t.shape)}")
    denoiser.schedule.check(t)
    x0 = x0.to(denoiser.device)
    step = draw + draws.of_level(t)
    noise = normal(x0.shape, seed, step=step, sample_offset=sample_offset, device=x0.device).to(x0)
    x_t = denoiser.schedule.diffuse(x0, t, noise)
    return denoiser.predict(x_t, t, s=s, condition=condition, sample_offset=sample_offset)
