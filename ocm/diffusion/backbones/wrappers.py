"""What a backbone may be wrapped in, and where and in which type it computes."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def unwrapped(backbone: Any) -> Any:
    """Return the module inside of ``torch.compile``, DistributedDataParallel or peft's model.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> unwrapped(torch.compile(layer)) is layer
        True
    """
    while True:
        if isinstance(backbone, nn.parallel.DistributedDataParallel):
            backbone = backbone.module
        elif "_orig_mod" in getattr(backbone, "_modules", ()):  # of torch.compile
            backbone = backbone._orig_mod
        elif hasattr(type(backbone), "get_base_model"):  # of peft
            backbone = backbone.get_base_model()
        else:
            return backbone


def is_part(tensor: Tensor) -> bool:
    """Return whether each process holds a part of a tensor, as ``fully_shard`` leaves it.

    Example:
        >>> is_part(torch.zeros(1))
        False
    """
    # A DTensor, whose module takes a second to import.
    return hasattr(tensor, "full_tensor")


def is_sharded(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` has spread its weights over processes.

    Example:
        >>> is_sharded(nn.Linear(1, 1))
        False
    """
    return any(map(is_part, module.parameters()))


def class_of(backbone: Any) -> type:
    """Return the class of the module inside, as it was before ``fully_shard`` made it another.

    Example:
        >>> class_of(torch.compile(nn.Linear(1, 1))).__name__
        'Linear'
    """
    kind = type(unwrapped(backbone))
    bases = [base.__name__ for base in kind.__mro__]
    return kind.__mro__[2] if bases[1:2] == ["FSDPModule"] else kind


def device_of(backbone: nn.Module) -> torch.device:
    """Return where a backbone computes: where hooks take its weights, if it is offloaded.

    Example:
        >>> device_of(nn.Identity())
        device(type='cpu')
    """
    module = unwrapped(backbone)
    device = _device_of_hook(module)
    if device is None and hasattr(module, "_diffusers_hook"):  # its own offloading, by groups
        device = module.device
    if device is None:
        first = next(chain(module.parameters(), module.buffers()), None)
        device = torch.device("cpu") if first is None else first.device
    if device.type == "meta":
        device = next(filter(None, map(_device_of_hook, module.modules())), device)
    return device


def _device_of_hook(module: nn.Module) -> torch.device | None:
    hook = getattr(module, "_hf_hook", None)
    devices = (getattr(part, "execution_device", None) for part in getattr(hook, "hooks", [hook]))
    return next((torch.device(device) for device in devices if device is not None), None)


def in_type_of(backbone: nn.Module, x: Tensor) -> Tensor:
    """Return x in the type in which the backbone computes, if one of them is half precision.

    Example:
        >>> in_type_of(nn.Linear(1, 1).bfloat16(), torch.zeros(1)).dtype
        torch.bfloat16
    """
    # Models of diffusers know it, where some of their weights stay in float32 or are stored in 8
    # bits.
    stated = getattr(unwrapped(backbone), "dtype", None)
    if not isinstance(stated, torch.dtype):
        weights = (p.dtype for p in backbone.parameters() if p.is_floating_point())
        stated = next(weights, x.dtype)
    half = (torch.float16, torch.bfloat16)
    return x.to(stated) if stated in half or x.dtype in half else x


def has_adapters(backbone: nn.Module) -> bool:
    """Return whether peft's layers (LoRA and its kin) stand in place of some of its own.

    Example:
        >>> has_adapters(nn.Linear(1, 1))
        False
    """
    return any("base_layer" in module._modules for module in backbone.modules())
