"""Weights from disk, exactly those of their model; nothing is unpickled and nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# As diffusers' save_pretrained names them: one file, or several and an index.
_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not of the model it is asked for."""


def load_model(kind: Any, path: str | Path) -> Any:
    """Return a model of diffusers from its folder, strictly.

    Its own ``from_pretrained`` would warn, and leave weights that it does not find at their random
    start.

    Args:
        kind: The class of the model.
        path: The folder, as ``save_pretrained`` writes it.

    Raises:
        CheckpointError: A ValueError that names the folder, if it cannot be read, lacks a weight
            or has one too many, or holds NaN or infinite weights.
    """
    from huggingface_hub import load_torch_model
    from safetensors import SafetensorError

    if not (Path(path) / "config.json").is_file():
        raise CheckpointError(
            f"path must be the folder of {kind.__name__}, with config.json and weights, got {path}"
        )
    try:
        model = kind.from_config(kind.load_config(path))
        load_torch_model(model, path, strict=True, safe=True, filename_pattern=_PATTERN)
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} holds no {kind.__name__} that fits: {error}") from error
    _check_finite(path, model)
    return model


def load_weights(module: nn.Module, file: Path) -> None:
    """Load a safetensors file into a module, strictly.

    Raises:
        CheckpointError: A ValueError that names the file, if it cannot be read, is that of another
            module, or holds NaN or infinite weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(file)
        module.load_state_dict(tensors)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except RuntimeError as error:
        raise CheckpointError(f"{file} is of another model: {error}") from error
    _check_finite(file, module)


def _check_finite(path: str | Path, module: nn.Module) -> None:
    if not all(bool(torch.isfinite(weight).all()) for weight in module.parameters()):
        raise CheckpointError(f"{path} holds NaN or infinite weights")
