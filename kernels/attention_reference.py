"""Attention and its directional derivatives in PyTorch, a block of queries at a time.

The formulas are in :mod:`hessdiag.kernels.attention_jvp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# What is held at a time: scores, and what is made of them. On a processor they stay in its cache; a
# GPU needs many to be busy.
TEMPORARY_BYTES = {"cpu": 2**22, "cuda": 2**28}


def attention_jvp_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tangent: Tensor | None,
    key_tangent: Tensor | None,
    value_tangent: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the same in PyTorch; the arguments are those of :func:`attention_jvp_triton`."""
    changes = (query_tangent, key_tangent, value_tangent)
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    tangent = query.new_empty(num_probes_of(*changes), *out.shape)
    flat = _Flat(
        *(tensor.flatten(0, 1) for tensor in (query, key, value)),
        *(None if change is None else change.flatten(1, 2) for change in changes),
    )
    # Autocast would lower the precision of the products.
    with torch.autocast(query.device.type, enabled=False):
        _attend(
            flat,
            out.flatten(0, 1),
            tangent.flatten(1, 2),
            attn_mask,
            query.shape[1],
            key.shape[1],
            is_causal,
            scale,
        )
    return out, tangent


def _attend(
    flat: _Flat,
    outs: Tensor,
    tangents: Tensor,
    attn_mask: Tensor | None,
    heads: int,
    key_heads: int,
    is_causal: bool,
    scale: float,
) -> None:
    """Write o (N, L, Ev) and do (M, N, L, Ev), a block of queries after the other."""
    num_queries, num_keys = flat.query.shape[1], flat.key.shape[1]
    dtype = torch.promote_types(outs.dtype, torch.float32)
    most = TEMPORARY_BYTES.get(outs.device.type, TEMPORARY_BYTES["cuda"])
    for group, first, last in _blocks(len(outs), num_queries, num_keys * dtype.itemsize, most):
        some_keys = min(num_keys, last) if is_causal else num_keys
        part = flat.part(group, first, last, some_keys, heads // key_heads, dtype)
        scores = torch.baddbmm(_nothing(outs, dtype), part.query, part.key.mT, beta=0, alpha=scale)
        if attn_mask is not None:
            _add_mask(scores, _mask_of(attn_mask, group, heads, first, last, some_keys))
        if is_causal:
            # PyTorch counts queries and keys from the same end, also where there are more keys.
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device)
            scores.masked_fill_(later.triu_(first + 1), -torch.inf)
        weights = scores.softmax(dim=-1)
        if attn_mask is not None and some_keys:
            none = scores.amax(dim=-1, keepdim=True) == -torch.inf
            weights.masked_fill_(none, 0.0)
        attended = torch.bmm(weights, part.value)
        outs[group, first:last] = attended.to(outs.dtype)
        # In the place of the scores, which nobody needs any more.
        for probe, row in enumerate(tangents):
            row[group, first:last] = part.change(probe, weights, attended, scores, scale)


class _Flat(NamedTuple):
    """Inputs of attention with samples and heads in one dimension, or a part of them.

    Attributes:
        query: Shape (N, L, E).
        key: Shape (N', S, E).
        value: Shape (N', S, Ev).
        query_tangent: Shape (M, N, L, E), or None.
        key_tangent: Shape (M, N', S, E), or None.
        value_tangent: Shape (M, N', S, Ev), or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_tangent: Tensor | None
    key_tangent: Tensor | None
    value_tangent: Tensor | None

    def part(
        self,
        group: slice,
        first: int,
        last: int,
        num_keys: int,
        heads_per_key: int,
        dtype: torch.dtype,
    ) -> _Flat:
        """Return queries [first, last) of a group of heads, and the keys they look at."""

        def keys_of(tensor: Tensor) -> Tensor:
            if heads_per_key == 1:
                return tensor[..., group, :num_keys, :].to(dtype)
            heads = torch.arange(group.start, group.stop, device=tensor.device)
            chosen = tensor[..., :num_keys, :].index_select(-3, heads // heads_per_key)
            return chosen.to(dtype)

        query, dq = self.query[group, first:last].to(dtype), self.query_tangent
        return _Flat(
            query,
            keys_of(self.key),
            keys_of(self.value),
            None if dq is None else dq[:, group, first:last].to(dtype),
            None if self.key_tangent is None else keys_of(self.key_tangent),
            None if self.value_tangent is None else keys_of(self.value_tangent),
        )

    def change(
        self, probe: int, weights: Tensor, attended: Tensor, slope: Tensor, scale: float
    ) -> Tensor:
        """Return do of one probe from P and o; ``slope`` is overwritten."""
        result = torch.zeros_like(attended)
        if self.query_tangent is not None:
            torch.bmm(self.query_tangent[probe], self.key.mT, out=slope)
        if self.key_tangent is not None:
            beta = 0 if self.query_tangent is None else 1
            slope.baddbmm_(self.query, self.key_tangent[probe].mT, beta=beta)
        if self.query_tangent is not None or self.key_tangent is not None:
            slope.mul_(weights)
            total = slope.sum(dim=-1, keepdim=True)
            result = torch.bmm(slope, self.value).addcmul_(total, attended, value=-1.0)
        if self.value_tangent is not None:
            result.baddbmm_(weights, self.value_tangent[probe], beta=scale)
        else:
            result.mul_(scale)
        return result


def _blocks(
    num_heads: int, num_queries: int, row_bytes: int, most_bytes: int
) -> Iterator[tuple[slice, int, int]]:
    """Return groups of heads and ranges of their queries whose scores fit the temporary memory."""
    # Scores and weights, and as much again for the elementwise functions between them.
    rows = max(1, most_bytes // max(1, 3 * row_bytes))
    heads = max(1, rows // max(1, num_queries))
    for head in range(0, num_heads, heads):
        group = slice(head, min(head + heads, num_heads))
        for first in range(0, num_queries, rows):
            yield group, first, min(first + rows, num_queries)


def _nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what ``baddbmm`` asks for and, with beta = 0, does not read."""
    return like.new_empty((1, 1, 1), dtype=dtype)


def _mask_of(
    attn_mask: Tensor, group: slice, heads: int, first: int, last: int, num_keys: int
) -> Tensor:
    """Return the part of a mask (B', H, L, S) that belongs to a group of heads, (N or 1, L, S)."""
    rows = attn_mask[:, :, first:last, :num_keys]
    if len(rows) == 1 and (rows.stride(1) == 0 or heads == 1):
        return rows[:, 0]
    index = torch.arange(group.start, group.stop, device=attn_mask.device)
    return rows[index // heads % len(rows), index % heads]


def _add_mask(scores: Tensor, mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores.add_(mask)


def num_probes_of(*tangents: Tensor | None) -> int:
    """Return M, the number of directions; 1 without tangents."""
    return next((len(tangent) for tangent in tangents if tangent is not None), 1)
