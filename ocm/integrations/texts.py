"""Texts as what a text-to-image backbone is conditioned on, by the encoders of its pipeline.

    texts = ocm.integrations.texts.encode_texts(pipeline, captions)
    conditions, nulls = ocm.integrations.texts.without_null(texts)
    ocm.train_head(covariance, latents, settings, conditions=conditions, null_conditions=nulls)

``safetensors.torch.save_file(texts, FILE)`` writes what ``ocm train --conditions FILE`` reads.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ocm.checkpoints.reading import pipeline_parts
from ocm.diffusion.backbones.wrappers import class_of
from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.denoiser import Denoiser

_NULL = "null."
_TEXT = "encoder_hidden_states"
_MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")
_MASKED = (_TEXT, _MASKS[0])
# What ``encode_prompt`` returns, by the class of the backbone, as arguments of that; None for what
# is no condition. "null.NAME" belongs to an empty text; without it the prompt is the empty one.
RETURNED: dict[str, tuple[str | None, ...]] = {
    "UNet2DConditionModel": (_TEXT, _NULL + _TEXT),
    "PixArtTransformer2DModel": (*_MASKED, *(_NULL + name for name in _MASKED)),
    "SanaTransformer2DModel": (*_MASKED, *(_NULL + name for name in _MASKED)),
    "LTXVideoTransformer3DModel": (*_MASKED, *(_NULL + name for name in _MASKED)),
    "WanTransformer3DModel": (_TEXT, _NULL + _TEXT),
    "SD3Transformer2DModel": (
        *(_TEXT, _NULL + _TEXT),
        *("pooled_projections", _NULL + "pooled_projections"),
    ),
    "FluxTransformer2DModel": (_TEXT, "pooled_projections", None),
    "QwenImageTransformer2DModel": (_TEXT, _MASKS[1]),
}


def takes_texts(denoiser: Denoiser) -> bool:
    """Return whether the backbone is one of those that need the embedding of a text."""
    assert denoiser.architecture is not None  # set by the denoiser
    return denoiser.architecture.class_name in RETURNED


@torch.no_grad()
def encode_texts(
    pipeline: Any, texts: Sequence[str], *, backbone: str | None = None, batch_size: int = 16
) -> dict[str, Tensor]:
    """Return the conditions of texts and of an empty one, as the pipeline's own call makes them.

    Args:
        pipeline: A text-to-image pipeline of diffusers.
        texts: The n texts.
        backbone: Class of its backbone, where that was not loaded.
        batch_size: Texts at a time.

    Returns:
        On the CPU, by name: arguments of the backbone of shape (n, ...), and "null.NAME" of shape
        (1, ...), those of the empty text. Shorter sequences are filled up with zeros that a mask
        leaves out.

    Raises:
        ValueError: If there are no texts, or the pipeline is of another backbone or has conditions
            beside the text.
    """
    check_positive_int("batch_size", batch_size)
    if len(texts) == 0:
        raise ValueError("texts must be at least one, got none")
    if backbone is None:
        model = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
        backbone = class_of(getattr(model, "backbone", model)).__name__
    if backbone not in RETURNED:
        raise ValueError(f"backbone must be one of {', '.join(RETURNED)}, got {backbone}")
    asked = inspect.signature(pipeline.encode_prompt).parameters
    called = inspect.signature(type(pipeline).__call__).parameters
    usual = {name: called[name].default for name in asked if name in called}
    options = {name: value for name, value in usual.items() if value not in (None, inspect._empty)}
    options |= {"prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1}
    options |= {"device": pipeline._execution_device}
    names = RETURNED[backbone]

    def encoded(batch: list[str], *, is_null: bool = False) -> dict[str, Tensor]:
        given = {"prompt": batch, "do_classifier_free_guidance": is_null, **options}
        values = pipeline.encode_prompt(**{k: v for k, v in given.items() if k in asked})
        if len(values) != len(names):
            raise ValueError(
                f"pipeline must condition on texts alone, and {type(pipeline).__name__} returns "
                f"{len(values)} embeddings for {len(names)}: those of SDXL belong to sizes too. "
                "Compute encoder_hidden_states, added_cond_kwargs.text_embeds and "
                "added_cond_kwargs.time_ids yourself"
            )
        found = {}
        for name, value in zip(names, values, strict=True):
            if value is None and name in _MASKS:  # nothing is left out
                value = torch.ones(values[0].shape[:2], dtype=torch.int64)
            if value is not None and name is not None:
                found[name] = value.cpu()
        return found

    batches = [
        encoded(list(texts[first : first + batch_size]))
        for first in range(0, len(texts), batch_size)
    ]
    if _NULL + _TEXT in names:
        nulls = {k: v for k, v in encoded([""], is_null=True).items() if k.startswith(_NULL)}
    else:
        nulls = {_NULL + name: value for name, value in encoded([""]).items()}
    joined: dict[str, Tensor] = {}
    for name in batches[0]:
        parts = [*(batch[name] for batch in batches), nulls[_NULL + name]]
        longest = max(part.shape[1] for part in parts)
        *rows, null = (_filled_up(part, longest) for part in parts)
        joined |= {name: torch.cat(rows), _NULL + name: null}
    return joined


def _filled_up(part: Tensor, length: int) -> Tensor:
    missing = part.new_zeros(len(part), length - part.shape[1], *part.shape[2:])
    return torch.cat([part, missing], dim=1)


def without_null(texts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the conditions of texts, and those of the empty one by the same names.

    Example:
        >>> without_null({"text": torch.ones(2), "null.text": torch.zeros(1)})
        ({'text': tensor([1., 1.])}, {'text': tensor([0.])})
    """
    nulls = {name.removeprefix(_NULL): x for name, x in texts.items() if name.startswith(_NULL)}
    return {name: x for name, x in texts.items() if not name.startswith(_NULL)}, nulls


def encode_by(path: Path, texts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
    """Return :func:`encode_texts` by the pipeline in a folder, of which the encoders are loaded.

    Raises:
        CheckpointError: A ValueError, if it is no pipeline, or a part is missing.
        ValueError: As :func:`encode_texts`.
    """
    from diffusers import DiffusionPipeline

    folder, _, _ = pipeline_parts(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config.get("backbone_class", config["_class_name"])  # of an attached model
    config |= config.get("backbone_config", {})
    others = ("unet", "transformer", "transformer_2", "vae")
    parts = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    left_out = [name for name in parts if name in others or parts[name] == [None, None]]
    pipeline = DiffusionPipeline.from_pretrained(path, **dict.fromkeys(left_out)).to(device)
    # Without one of its encoders, a pipeline asks the backbone how wide its embeddings would be.
    setattr(pipeline, folder.name, SimpleNamespace(config=SimpleNamespace(**config)))
    return encode_texts(pipeline, texts, backbone=name)
