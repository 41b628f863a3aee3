"""Texts as what a text-to-image backbone is conditioned on, by the encoders of its pipeline.

For example::

    texts = ocm.integrations.texts.encode_texts(pipeline, captions)
    conditions, nulls = ocm.integrations.texts.without_null(texts)
    ocm.train_head(covariance, latents, settings, conditions=conditions, null_conditions=nulls)

``safetensors.torch.save_file(texts, FILE)`` writes what ``ocm train --conditions FILE`` reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ocm.checkpoints.entries import TEXT, CheckpointError, check_entries, naming, read_json
from ocm.checkpoints.reading import pipeline_parts
from ocm.diffusion.backbones.wrappers import class_of
from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.denoiser import Denoiser

_LIBRARIES = ("diffusers", "transformers", "ocm")
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

    Nothing is downloaded, unpickled or run of what lies in the folder.

    Raises:
        CheckpointError: A ValueError, if it is no pipeline, a part or a weight is missing, or it
            holds code of its own.
        ValueError: As :func:`encode_texts`.
    """
    from diffusers import DiffusionPipeline

    folder, _, _ = pipeline_parts(path)
    config = read_json(folder / "config.json")
    with naming(folder / "config.json"):
        name = str(config.get("backbone_class", config["_class_name"]))  # of an attached model
        config |= config.get("backbone_config", {})
    parts = _parts_of(path)
    others = ("unet", "transformer", "transformer_2", "vae")
    given: dict[str, Any] = {
        part: None for part, kind in parts.items() if part in others or kind == [None, None]
    }
    try:
        for part, kind in parts.items():
            if part not in given and kind[0] == "transformers":
                given |= _encoder(path / part, part, kind[1])
        pipeline = DiffusionPipeline.from_pretrained(
            path, use_safetensors=True, local_files_only=True, **given
        ).to(device)
    # What is raised of damaged parts depends on the library that loads them.
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:400]}"
        raise CheckpointError(f"{path} holds no pipeline whose parts load: {reason}") from error
    # Without one of its encoders, a pipeline asks the backbone how wide its embeddings would be.
    setattr(pipeline, folder.name, SimpleNamespace(config=SimpleNamespace(**config)))
    return encode_texts(pipeline, texts, backbone=name)


def _parts_of(path: Path) -> dict[str, list[Any]]:
    """Return library and class of each part of a pipeline, none of which is code in its folder."""
    import diffusers

    file = path / "model_index.json"
    record = read_json(file)
    code = [*path.glob("*.py"), *path.glob("*/*.py")]
    if code:
        raise CheckpointError(f"{code[0]} is code, which is never run: remove it if it is not used")
    with naming(file):
        check_entries(record, {"_class_name": TEXT})
        kind = getattr(diffusers, record["_class_name"], None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
            raise ValueError(
                f"_class_name must be a pipeline of diffusers, got {record['_class_name'][:80]!r}"
            )
        parts = {name: part for name, part in record.items() if isinstance(part, list)}
        for name, part in parts.items():
            known = len(part) == 2 and part[0] in (*_LIBRARIES, None) and name.isidentifier()
            if not known or not isinstance(part[1], str | None):
                raise ValueError(
                    f"{name[:80]} must be a class of {', '.join(_LIBRARIES)}, got {part!r:.80}"
                )
    return parts


def _encoder(folder: Path, name: str, class_name: str) -> dict[str, Any]:
    """Return an encoder with all of its weights, by its name; nothing for a tokenizer."""
    import transformers

    kind: Any = getattr(transformers, class_name)
    if not issubclass(kind, transformers.PreTrainedModel):
        return {}
    model, info = kind.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking or not all(bool(torch.isfinite(x).all()) for x in model.parameters()):
        raise ValueError(f"{folder} lacks weights, or holds NaN or infinite ones: {lacking[:3]}")
    # In float32 as diffusers loads it, whatever it was stored in.
    return {name: model.float()}
