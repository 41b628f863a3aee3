"""The backbones of diffusers: how each family is called, and where its features are.

Each is called as the family's pipeline calls it. ``time`` is the timestep of the family's
scheduler: 0 .. N - 1 of betas, 1000 sigma of flow matching.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ocm.diffusion.backbones.architecture import (
    Architecture,
    FunctionBackbone,
    grid_of,
    packed,
    unpacked,
)
from ocm.diffusion.backbones.wrappers import class_of, unwrapped

_TEXT = ("encoder_hidden_states",)
_POOLED = (*_TEXT, "pooled_projections")
# LTX-Video's positions are seconds and pixels: its autoencoder takes 8 frames, of 25 a second, and
# 32 pixels each way together.
_LTX_SCALE = (8 / 25, 32, 32)


def _call_unet(
    unet: Any, x_t: Tensor, time: Tensor, labels: Tensor | None, **conditions: Any
) -> Tensor:
    if labels is not None:
        conditions["class_labels"] = labels
    output: Tensor = unet(x_t, time, **conditions).sample
    return output


def _call_dit(dit: Any, x_t: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError(
            "DiTTransformer2DModel needs a class label for each sample: pass "
            "condition=denoiser.condition(labels)"
        )
    if x_t.shape[-1] != x_t.shape[-2]:
        raise ValueError(
            f"x_t must be square for DiTTransformer2DModel, got the shape {tuple(x_t.shape)}"
        )
    first_block = unwrapped(dit).transformer_blocks[0]
    if type(first_block) is not class_of(first_block):
        raise ValueError(
            "DiTTransformer2DModel must be sharded as a whole, by fully_shard(dit): it looks into "
            "its first block from outside"
        )
    return _call_unet(dit, x_t, time, labels)


def _call_with_text(
    backbone: Any,
    x_t: Tensor,
    time: Tensor,
    labels: Tensor | None,
    needs: tuple[str, ...] = _TEXT,
    **conditions: Any,
) -> Tensor:
    _check(backbone, conditions, needs)
    if labels is not None:
        conditions["class_labels"] = labels
    # By name, since some take the text second.
    output: Tensor = backbone(x_t, timestep=time, **conditions).sample
    return output


def _call_sana(
    sana: Any, x_t: Tensor, time: Tensor, labels: Tensor | None, **conditions: Any
) -> Tensor:
    if is_distilled(sana):
        return _call_sana_sprint(sana, x_t, time, labels, **conditions)
    scale = unwrapped(sana).config.timestep_scale
    return _call_with_text(sana, x_t, time if scale == 1.0 else scale * time, labels, **conditions)


def _call_sana_sprint(
    sana: Any, x_t: Tensor, time: Tensor, labels: Tensor | None, **conditions: Any
) -> Tensor:
    """Return TrigFlow's output of a network that was trained on a flow, at the angle ``time``."""
    tau = (time.sin() / (time.cos() + time.sin())).reshape(-1, *[1] * (x_t.dim() - 1)).to(x_t)
    norm = (tau**2 + (1 - tau) ** 2).sqrt()
    shown = norm * x_t
    output = _call_with_text(sana, shown, tau.flatten(), labels, **conditions)
    return ((1 - 2 * tau) * shown + (1 - 2 * tau + 2 * tau**2) * output) / norm


def _call_packed(
    geometry: Callable[[tuple[int, ...], Tensor, Mapping[str, Any]], dict[str, Any]],
    backbone: Any,
    x_t: Tensor,
    time: Tensor,
    labels: Tensor | None,
    needs: tuple[str, ...] = _TEXT,
    **conditions: Any,
) -> Tensor:
    """Call a backbone with tokens, and with ``geometry``: where in a sample they are."""
    _check(backbone, conditions, needs)
    patch = architecture_of(backbone).patch(unwrapped(backbone)) or ()
    grid = grid_of(x_t.shape, patch)
    given = {**geometry(grid, x_t, conditions), **conditions}
    output = backbone(packed(x_t, patch), timestep=time, **given).sample
    return unpacked(output, grid, patch)


def _call_flux(
    flux: Any, x_t: Tensor, time: Tensor, labels: Tensor | None, **conditions: Any
) -> Tensor:
    return _call_packed(_ids, flux, x_t, time / 1000, labels, _POOLED, **conditions)


def _ids(grid: tuple[int, ...], x_t: Tensor, conditions: Mapping[str, Any]) -> dict[str, Any]:
    rows, columns = (torch.arange(n, device=x_t.device, dtype=x_t.dtype) for n in grid)
    places = torch.cartesian_prod(rows, columns)
    text = conditions["encoder_hidden_states"]
    return {
        "img_ids": torch.cat([places.new_zeros(len(places), 1), places], dim=1),
        "txt_ids": places.new_zeros(text.shape[1], 3),
    }


def _call_qwen(
    qwen: Any, x_t: Tensor, time: Tensor, labels: Tensor | None, **conditions: Any
) -> Tensor:
    return _call_packed(_image_shapes, qwen, x_t, time / 1000, labels, **conditions)


def _image_shapes(grid: tuple[int, ...], x_t: Tensor, conditions: object) -> dict[str, Any]:
    return {"img_shapes": [[(1, *grid)]] * len(x_t)}


def _video_shape(grid: tuple[int, ...], x_t: Tensor, conditions: object) -> dict[str, Any]:
    shape = dict(zip(("num_frames", "height", "width"), grid, strict=True))
    return {"encoder_attention_mask": None, "rope_interpolation_scale": _LTX_SCALE, **shape}


def _check(backbone: Any, conditions: Mapping[str, Any], needs: tuple[str, ...]) -> None:
    model = unwrapped(backbone)
    if is_distilled(model):
        needs = (*needs, "guidance")
    missing = [name for name in needs if conditions.get(name) is None]
    if missing:
        raise ValueError(
            f"{class_of(model).__name__} needs {' and '.join(missing)} for each sample: pass "
            f"condition=denoiser.condition(tensors={{{missing[0]!r}: ..., }})"
        )


def is_distilled(backbone: Any) -> bool:
    """Return whether guidance is embedded: the output is that of a guided model, and no mean.

    Example:
        >>> is_distilled(nn.Linear(1, 1))
        False
    """
    config = getattr(unwrapped(backbone), "config", None)
    return bool(getattr(config, "guidance_embeds", False))


def _num_class_embeds(unet: Any) -> int | None:
    count: int | None = unet.config.num_class_embeds
    return count


def _num_embeds_ada_norm(dit: Any) -> int | None:
    count: int | None = dit.config.num_embeds_ada_norm
    return count


def _square(transformer: Any) -> tuple[int, int]:
    side: int = transformer.config.patch_size
    return side, side


def _wan_patch(wan: Any) -> tuple[int, ...]:
    return tuple(wan.config.patch_size)


def _ltx_patch(ltx: Any) -> tuple[int, ...]:
    return ltx.config.patch_size_t, ltx.config.patch_size, ltx.config.patch_size


def _two_by_two(transformer: Any) -> tuple[int, int]:
    return 2, 2


_LIST = (
    Architecture("UNet2DModel", "conv_norm_out", _call_unet, _num_class_embeds),
    Architecture("UNet2DConditionModel", "conv_norm_out", _call_with_text, _num_class_embeds),
    Architecture(
        *("DiTTransformer2DModel", "norm_out", _call_dit),
        *(_num_embeds_ada_norm, _num_embeds_ada_norm, _square),
    ),
    Architecture("PixArtTransformer2DModel", "norm_out", _call_with_text, patch=_square),
    Architecture("SanaTransformer2DModel", "norm_out", _call_sana, patch=_square),
    Architecture(
        "SD3Transformer2DModel", "norm_out", partial(_call_with_text, needs=_POOLED), patch=_square
    ),
    Architecture(
        "FluxTransformer2DModel", "norm_out", _call_flux, patch=_two_by_two, is_packed=True
    ),
    Architecture(
        "QwenImageTransformer2DModel", "norm_out", _call_qwen, patch=_two_by_two, is_packed=True
    ),
    Architecture("WanTransformer3DModel", "norm_out", _call_with_text, patch=_wan_patch),
    Architecture(
        *("LTXVideoTransformer3DModel", "norm_out", partial(_call_packed, _video_shape)),
        patch=_ltx_patch,
        is_packed=True,
    ),
)
# By class name.
ARCHITECTURES = {architecture.class_name: architecture for architecture in _LIST}
UNET = ARCHITECTURES["UNet2DModel"]
# Of a plain function (x_t, time), and no features.
FUNCTION = Architecture("function", None, lambda backbone, x_t, time, labels: backbone(x_t, time))


def architecture_of(backbone: nn.Module) -> Architecture:
    """Return the architecture of a backbone, wrapped or not.

    Raises:
        ValueError: If its class is none of :data:`ARCHITECTURES`.

    Example:
        >>> architecture_of(nn.Linear(1, 1))    # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: backbone must be one of UNet2DModel, ..., got Linear; ...
    """
    kind = class_of(backbone)
    if issubclass(kind, FunctionBackbone):
        return FUNCTION
    if kind.__name__ not in ARCHITECTURES:
        raise ValueError(
            f"backbone must be one of {', '.join(ARCHITECTURES)}, got {kind.__name__}; for another "
            "pass architecture=ocm.Architecture(...), which says how it is called"
        )
    return ARCHITECTURES[kind.__name__]
