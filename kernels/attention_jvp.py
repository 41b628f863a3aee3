"""Scaled dot product attention and its directional derivatives, without its matrix of weights.

With S = scale q k^T + mask, P = softmax(S) over keys and o = P v, tangents dq, dk and dv give

    dS = scale (dq k^T + q dk^T),
    do = P dv + (P * dS) v - r o,        r = sum over keys of P * dS,

the derivative of the softmax, dP = P * dS - P r, taken through o. A mask has no tangent here.

The kernel goes over the keys once, a block at a time, with the online softmax of FlashAttention
(Dao et al., 2022, algorithm 1; Dao, 2023), which never holds more than a block of S. It keeps for
each query the largest score t so far, and sums of terms scaled by exp(-t),

    l = sum exp(S - t),      a = sum exp(S - t) v,
    c = sum exp(S - t) dS,   b = sum exp(S - t) (dS v + dv).

When a block raises t to t', the four are multiplied by exp(t - t') before its terms are added.
At the end o = a / l and do = (b - c o) / l. t needs no tangent: o does not depend on it.

A block of S and exp(S - t) serves several probes in one program, which keeps c and b for each.
Beyond inputs and outputs the kernel takes no memory. The reference holds the scores of a block of
queries at a time, at most ``TEMPORARY_BYTES`` of them for the type of the device, or one row where
that alone is more.

A query that may look at no key has o = 0 and do = 0, as in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessdiag.kernels._checks import FLOAT_TYPES
from hessdiag.kernels._launch import way
from hessdiag.kernels._triton import on_device_of, tl, triton

# What the reference holds at a time: scores, and what is made of them. On a processor they stay in
# its cache; a GPU needs many to be busy.
TEMPORARY_BYTES = {"cpu": 2**22, "cuda": 2**28}
# Head sizes above take the reference.
_LARGEST_HEAD = 128


@triton.jit
def _load_tile(
    pointer,
    first,
    length,
    stride,
    exists,
    column,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return rows [first, first + ROWS) of ``length``, and columns of SIZE; 0 outside."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < tl.where(exists, length - first, 0))[:, None]
    if SIZE % COLUMNS != 0:
        inside = inside & (columns < SIZE - column)[None, :]
    if WIDE:
        rows = rows.to(tl.int64)
    start = pointer + (tl.cast(first, tl.int64) * stride + column)
    return tl.load(start + (rows[:, None] * stride + columns[None, :]), mask=inside, other=0.0)


@triton.jit
def _no_tiles():
    # By a function, whose result type checkers take for a tuple of any length.
    return ()


@triton.jit
def _add_product(a, b, total, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit(do_not_specialize=["num_probes", "batch", "mask_batch"])
def _attention_jvp_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    query_tangent_ptr,
    key_tangent_ptr,
    value_tangent_ptr,
    mask_ptr,
    out_ptr,
    tangent_ptr,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    dq_probe,
    dq_batch,
    dq_head,
    dq_row,
    dk_probe,
    dk_batch,
    dk_head,
    dk_row,
    dv_probe,
    dv_batch,
    dv_head,
    dv_row,
    mask_sample,
    mask_head,
    mask_row,
    mask_column,
    mask_batch,
    num_probes,
    batch,
    heads,
    heads_per_key,
    num_queries,
    num_keys,
    scale,
    HEAD: tl.constexpr,
    VALUE_HEAD: tl.constexpr,
    QUERY_TANGENT: tl.constexpr,
    KEY_TANGENT: tl.constexpr,
    VALUE_TANGENT: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    CHUNK: tl.constexpr,
    PROBES: tl.constexpr,
    UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # A program: a block of queries of one head of one sample, and PROBES tangents. MASK: 0 for
    # none, 1 for one of what takes part, 2 for one that is added.
    index = tl.program_id(0)
    num_blocks = tl.cdiv(num_queries, QUERIES)
    first = (index % num_blocks) * QUERIES
    index = index // num_blocks
    head = (index % heads).to(tl.int64)
    index = index // heads
    sample = (index % batch).to(tl.int64)
    probe = (index // batch) * PROBES
    key_head = head // heads_per_key

    # Strides of rows are in units of 16 bytes where they can be, which lets the compiler load so
    # many at a time.
    query_ptr += (sample * q_batch + head * q_head) * UNIT
    key_ptr += (sample * k_batch + key_head * k_head) * UNIT
    value_ptr += (sample * v_batch + key_head * v_head) * UNIT
    first_probe = probe.to(tl.int64)
    query_tangent_ptr += (first_probe * dq_probe + sample * dq_batch + head * dq_head) * UNIT
    key_tangent_ptr += (first_probe * dk_probe + sample * dk_batch + key_head * dk_head) * UNIT
    value_tangent_ptr += (first_probe * dv_probe + sample * dv_batch + key_head * dv_head) * UNIT
    mask_ptr += (sample % mask_batch) * mask_sample + head * mask_head
    mask_ptr += first.to(tl.int64) * mask_row

    # Half types keep whole rows of queries in shared memory. Products of float32 go through
    # registers, which hold CHUNK columns at a time.
    query_tangents = _no_tiles()
    if CHUNK == BLOCK_HEAD:
        query = _load_tile(
            query_ptr, first, num_queries, q_row * UNIT, True, 0, HEAD, QUERIES, BLOCK_HEAD, WIDE
        )
        if QUERY_TANGENT:
            for i in tl.static_range(PROBES):
                query_tangents += (
                    _load_tile(
                        query_tangent_ptr + i * (dq_probe * UNIT),
                        first,
                        num_queries,
                        dq_row * UNIT,
                        probe + i < num_probes,
                        0,
                        HEAD,
                        QUERIES,
                        BLOCK_HEAD,
                        WIDE,
                    ),
                )
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, BLOCK_VALUE], tl.float32)
    tangents = _no_tiles()
    changes = _no_tiles()
    for _ in tl.static_range(PROBES):
        tangents += (tl.zeros([QUERIES, BLOCK_VALUE], tl.float32),)
        changes += (tl.zeros([QUERIES], tl.float32),)
    rows = tl.arange(0, QUERIES)
    columns = tl.arange(0, KEYS)

    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, first + QUERIES)
    for start in range(0, end, KEYS):
        # S and dS, without their scale.
        scores = tl.zeros([QUERIES, KEYS], tl.float32)
        slopes = _no_tiles()
        for _ in tl.static_range(PROBES):
            slopes += (tl.zeros([QUERIES, KEYS], tl.float32),)
        if CHUNK == BLOCK_HEAD:
            key = tl.trans(
                _load_tile(
                    key_ptr, start, num_keys, k_row * UNIT, True, 0, HEAD, KEYS, BLOCK_HEAD, WIDE
                )
            )
            scores = _add_product(query, key, scores, UPCAST)
            sums = _no_tiles()
            for i in tl.static_range(PROBES):
                slope = slopes[i]
                if QUERY_TANGENT:
                    slope = _add_product(query_tangents[i], key, slope, UPCAST)
                if KEY_TANGENT:
                    key_tangent = _load_tile(
                        key_tangent_ptr + i * (dk_probe * UNIT),
                        start,
                        num_keys,
                        dk_row * UNIT,
                        probe + i < num_probes,
                        0,
                        HEAD,
                        KEYS,
                        BLOCK_HEAD,
                        WIDE,
                    )
                    slope = _add_product(query, tl.trans(key_tangent), slope, UPCAST)
                sums += (slope,)
            slopes = sums
        else:
            for column in range(0, HEAD, CHUNK):
                query = _load_tile(
                    query_ptr,
                    first,
                    num_queries,
                    q_row * UNIT,
                    True,
                    column,
                    HEAD,
                    QUERIES,
                    CHUNK,
                    WIDE,
                )
                key = tl.trans(
                    _load_tile(
                        key_ptr,
                        start,
                        num_keys,
                        k_row * UNIT,
                        True,
                        column,
                        HEAD,
                        KEYS,
                        CHUNK,
                        WIDE,
                    )
                )
                scores = _add_product(query, key, scores, UPCAST)
                sums = _no_tiles()
                for i in tl.static_range(PROBES):
                    slope = slopes[i]
                    if QUERY_TANGENT:
                        query_tangent = _load_tile(
                            query_tangent_ptr + i * (dq_probe * UNIT),
                            first,
                            num_queries,
                            dq_row * UNIT,
                            probe + i < num_probes,
                            column,
                            HEAD,
                            QUERIES,
                            CHUNK,
                            WIDE,
                        )
                        slope = _add_product(query_tangent, key, slope, UPCAST)
                    if KEY_TANGENT:
                        key_tangent = _load_tile(
                            key_tangent_ptr + i * (dk_probe * UNIT),
                            start,
                            num_keys,
                            dk_row * UNIT,
                            probe + i < num_probes,
                            column,
                            HEAD,
                            KEYS,
                            CHUNK,
                            WIDE,
                        )
                        slope = _add_product(query, tl.trans(key_tangent), slope, UPCAST)
                    sums += (slope,)
                slopes = sums

        scores = scores * scale
        allowed = (columns < num_keys - start)[None, :]
        if CAUSAL:
            allowed = allowed & (first + rows[:, None] >= start + columns[None, :])
        if MASK > 0:
            row, column = rows, columns
            if WIDE:
                row, column = rows.to(tl.int64), columns.to(tl.int64)
            inside = (rows < num_queries - first)[:, None] & (columns < num_keys - start)[None, :]
            place = mask_ptr + tl.cast(start, tl.int64) * mask_column
            place += row[:, None] * mask_row + column[None, :] * mask_column
            mask = tl.load(place, mask=inside, other=0)
            if MASK == 1:
                allowed = allowed & (mask != 0)
            else:
                scores += mask.to(tl.float32)
        scores = tl.where(allowed, scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # -inf - -inf is no number: where no key took part yet, 0 stands for the largest score.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - shift)
        top = new_top
        weights = tl.exp(scores - shift[:, None])

        # The sums are over what the products of half types see, rounded: so what is constant over
        # keys cancels.
        value = _load_tile(
            value_ptr, start, num_keys, v_row * UNIT, True, 0, VALUE_HEAD, KEYS, BLOCK_VALUE, WIDE
        )
        rounded = weights.to(value.dtype)
        weights = rounded.to(tl.float32)
        total = total * shrink + tl.sum(weights, axis=1)
        out = _add_product(rounded, value, out * shrink[:, None], UPCAST)
        new_tangents = _no_tiles()
        new_changes = _no_tiles()
        for i in tl.static_range(PROBES):
            tangent = tangents[i] * shrink[:, None]
            change = changes[i]
            if VALUE_TANGENT:
                value_tangent = _load_tile(
                    value_tangent_ptr + i * (dv_probe * UNIT),
                    start,
                    num_keys,
                    dv_row * UNIT,
                    probe + i < num_probes,
                    0,
                    VALUE_HEAD,
                    KEYS,
                    BLOCK_VALUE,
                    WIDE,
                )
                tangent = _add_product(rounded, value_tangent, tangent, UPCAST)
            if QUERY_TANGENT or KEY_TANGENT:
                product = (weights * (slopes[i] * scale)).to(value.dtype)
                change = change * shrink + tl.sum(product.to(tl.float32), axis=1)
                tangent = _add_product(product, value, tangent, UPCAST)
            new_tangents += (tangent,)
            new_changes += (change,)
        tangents = new_tangents
        changes = new_changes

    total = tl.where(total == 0.0, 1.0, total)
    out = out / total[:, None]
    columns_of_out = tl.arange(0, BLOCK_VALUE)
    inside = (rows < num_queries - first)[:, None] & (columns_of_out < VALUE_HEAD)[None, :]
    offset = rows[:, None] * VALUE_HEAD + columns_of_out[None, :]
    place = ((sample * heads + head) * num_queries + first) * VALUE_HEAD
    tl.store(out_ptr + place + offset, out.to(out_ptr.dtype.element_ty), mask=inside & (probe == 0))
    size = (tl.zeros_like(sample) + batch) * heads * num_queries * VALUE_HEAD
    for i in tl.static_range(PROBES):
        tangent = (tangents[i] - changes[i][:, None] * out) / total[:, None]
        tl.store(
            tangent_ptr + (first_probe + i) * size + place + offset,
            tangent.to(tangent_ptr.dtype.element_ty),
            mask=inside & (probe + i < num_probes),
        )


class Tile(NamedTuple):
    """What one program of the kernel does, and with how many threads.

    Attributes:
        queries: Queries of a program.
        keys: Keys of a block.
        probes: Most tangents of a program.
        chunk: Columns of queries and keys that are multiplied at a time.
        num_warps: Threads / 32.
        num_stages: Blocks of keys and values that are on their way.
    """

    queries: int
    keys: int
    probes: int
    chunk: int
    num_warps: int
    num_stages: int


def tile_of(dtype: torch.dtype, block_head: int, masked: bool) -> Tile:
    """Return the largest tile whose numbers fit the 255 registers of a thread on an H100.

    The accumulators of a program grow with the head size and the probes. They must not spill into
    local memory: ``benchmarks/suites/machine_code.py`` counts what does.
    """
    if dtype == torch.float32:
        return Tile(32, 16, 2 if block_head <= 64 else 1, 16, 8, 1)
    if block_head <= 32:
        return Tile(64, 32, 2, block_head, 4, 2)
    if block_head <= 64:
        return Tile(64, 16 if masked else 32, 2, block_head, 4, 2)
    return Tile(64, 16, 1, block_head, 4, 2)


def attention_jvp_triton(
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
    """Compute attention and its derivatives with the Triton kernel.

    float64, and heads of more than 128, take the reference.

    Args:
        query: Shape (B, H, L, E).
        key: Shape (B, H', S, E), H' a divisor of H.
        value: Shape (B, H', S, Ev).
        query_tangent: Shape (M, B, H, L, E), or None for zero.
        key_tangent: Shape (M, B, H', S, E), or None.
        value_tangent: Shape (M, B, H', S, Ev), or None.
        attn_mask: Shape (B', H, L, S), expanded where it is broadcast, B' a divisor of B: sample b
            has the mask b mod B'. Boolean, or what is added to the scores.
        is_causal: Whether query i looks at keys up to i alone.
        scale: Factor of the scores.

    Returns:
        o of shape (B, H, L, Ev) and do of shape (M, B, H, L, Ev), M = 1 without tangents.
    """
    batch, heads, num_queries, head_size = query.shape
    key_heads, num_keys, value_size = value.shape[1:]
    if query.dtype == torch.float64 or max(head_size, value_size) > _LARGEST_HEAD:
        return attention_jvp_reference(
            query,
            key,
            value,
            query_tangent,
            key_tangent,
            value_tangent,
            attn_mask,
            is_causal,
            scale,
        )
    num_probes = _num_probes(query_tangent, key_tangent, value_tangent)
    out = query.new_empty(batch, heads, num_queries, value_size)
    tangent = query.new_empty(num_probes, *out.shape)
    if tangent.numel() == 0:
        return out, tangent
    rows = [_with_whole_rows(tensor) for tensor in (query, key, value)]
    changes = [
        None if tensor is None else _with_whole_rows(tensor)
        for tensor in (query_tangent, key_tangent, value_tangent)
    ]
    strides = [stride for tensor in rows for stride in tensor.stride()[:-1]]
    for change in changes:
        strides += [0] * 4 if change is None else change.stride()[:-1]
    vector = 16 // query.itemsize
    unit = vector if all(stride % vector == 0 for stride in strides) else 1
    strides = [stride // unit for stride in strides]
    strides += [0] * 4 if attn_mask is None else attn_mask.stride()
    if attn_mask is None:
        mask_kind, mask = 0, query
    elif attn_mask.dtype == torch.bool:
        mask_kind, mask = 1, attn_mask.view(torch.uint8)
    else:
        mask_kind, mask = 2, attn_mask
    block_head, block_value = (_power_of_two(size) for size in (head_size, value_size))
    tile = tile_of(query.dtype, max(block_head, block_value), attn_mask is not None)
    probes = min(tile.probes, num_probes)
    programs = (
        triton.cdiv(num_queries, tile.queries) * heads * batch * triton.cdiv(num_probes, probes)
    )
    with on_device_of(query):
        _attention_jvp_kernel[(programs,)](
            *rows,
            *(query if change is None else change for change in changes),
            mask,
            out,
            tangent,
            *strides,
            1 if attn_mask is None else len(attn_mask),
            num_probes,
            batch,
            heads,
            heads // key_heads,
            num_queries,
            num_keys,
            scale,
            HEAD=head_size,
            VALUE_HEAD=value_size,
            QUERY_TANGENT=query_tangent is not None,
            KEY_TANGENT=key_tangent is not None,
            VALUE_TANGENT=value_tangent is not None,
            MASK=mask_kind,
            CAUSAL=is_causal,
            # Offsets inside of a tile: at most 64 rows, of strides of at most 8 elements a unit.
            WIDE=max(strides) >= 2**20,
            QUERIES=tile.queries,
            KEYS=tile.keys,
            BLOCK_HEAD=block_head,
            BLOCK_VALUE=block_value,
            CHUNK=min(tile.chunk, block_head),
            PROBES=probes,
            UNIT=unit,
            # Triton's interpreter multiplies the bits of bfloat16, as integers.
            UPCAST=not isinstance(_attention_jvp_kernel, triton.JITFunction),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out, tangent


def _power_of_two(size: int) -> int:
    """Return the least power of two from 16 on that is not below ``size``."""
    return max(16, 1 << (size - 1).bit_length())


def _with_whole_rows(tensor: Tensor) -> Tensor:
    """Return a tensor whose last dimension lies without gaps."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _num_probes(*tangents: Tensor | None) -> int:
    return next((len(tangent) for tangent in tangents if tangent is not None), 1)


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
    tangent = query.new_empty(_num_probes(*changes), *out.shape)
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


@torch.library.custom_op("hessdiag::attention_jvp", mutates_args=())
def _attention_jvp(
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
    return attention_jvp_reference(
        query,
        key,
        value,
        query_tangent,
        key_tangent,
        value_tangent,
        attn_mask,
        is_causal,
        scale,
    )


_attention_jvp.register_kernel("cuda")(attention_jvp_triton)


@_attention_jvp.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    return out, query.new_empty(_num_probes(*rest[:3]), *out.shape)


@_attention_jvp.register_vmap
def _(
    info: Any, in_dims: Sequence[int | None], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int]]:
    """Take what is batched as further probes where only tangents are, else as further samples."""
    size: int = info.batch_size
    points, changes, mask, rest = arguments[:3], arguments[3:6], arguments[6], arguments[7:]
    dims_of_points, dims_of_changes, dim_of_mask = in_dims[:3], in_dims[3:6], in_dims[6]

    def folded(tensor: Tensor | None, dim: int | None, place: int) -> Tensor | None:
        """Return a tensor with what is batched in front of dimension ``place``, and part of it."""
        return (
            None
            if tensor is None
            else _in_front(tensor, dim, place, size).flatten(place, place + 1)
        )

    if all(dim is None for dim in (*dims_of_points, dim_of_mask)):
        batched = [folded(*change, 0) for change in zip(changes, dims_of_changes, strict=True)]
        out, tangent = _attention_jvp(*points, *batched, mask, *rest)
        return (out, tangent.unflatten(0, (size, len(tangent) // size))), (None, 0)

    # Sample b takes mask b modulo their number: one that is not batched stays as it is.
    if dim_of_mask is not None:
        mask = mask.movedim(dim_of_mask, 0)
        batch = _in_front(points[0], dims_of_points[0], 0, size).shape[1]
        repeats = batch // mask.shape[1]
        mask = mask.unsqueeze(1).expand(size, repeats, *mask.shape[1:]).flatten(0, 2)
    out, tangent = _attention_jvp(
        *(folded(*point, 0) for point in zip(points, dims_of_points, strict=True)),
        *(folded(*change, 1) for change in zip(changes, dims_of_changes, strict=True)),
        mask,
        *rest,
    )
    batch = len(out) // size
    return (out.unflatten(0, (size, batch)), tangent.unflatten(1, (size, batch))), (0, 1)


def _in_front(tensor: Tensor, dim: int | None, place: int, size: int) -> Tensor:
    """Return a tensor with its batched dimension at ``place``; one without is expanded."""
    if dim is not None:
        return tensor.movedim(dim, place)
    shape = tensor.shape
    return tensor.unsqueeze(place).expand(*shape[:place], size, *shape[place:])


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tangent: Tensor | None = None,
    key_tangent: Tensor | None = None,
    value_tangent: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return attention and its derivative in the direction of tangents, without a matrix of scores.

    The first is :func:`torch.nn.functional.scaled_dot_product_attention` of the same arguments,
    softmax(scale q k^T + mask) v, the second its derivative; formulas and sources are at the top of
    this module. Sums are in float32 for the types below it, and in the type of ``query`` else.
    Memory beyond inputs and outputs does not grow with L x S.

    Args:
        query: Shape (B, H, L, E), in any of float32, float64, bfloat16 and float16.
        key: Shape (B, H, S, E), or (B, H', S, E) with ``enable_gqa``, H' a divisor of H.
        value: Shape (B, H, S, Ev), or (B, H', S, Ev).
        query_tangent: Change of ``query``: in its shape, or with a probe dimension in front,
            (M, B, H, L, E), for M directions at once. None for zero.
        key_tangent: Change of ``key``; all tangents have M, or none has.
        value_tangent: Change of ``value``.
        attn_mask: Broadcast to (B, H, L, S), in any strides: boolean, where True takes part, or
            floating-point, added to the scores. It is taken as constant. A query that may look at
            no key has zero for both results.
        dropout_p: Must be 0.
        is_causal: Query i looks at keys 0 to i, also where L and S differ.
        scale: Factor of q k^T, 1 / sqrt(E) if None.
        enable_gqa: Several heads of queries may share one of keys.

    Returns:
        o of shape (B, H, L, Ev) and do of that shape, or (M, B, H, L, Ev), in the type of
        ``query``.

    Raises:
        TypeError: If a tensor is of no type above or differs from ``query`` in it, takes part in
            forward-mode differentiation, or is a mask of integers.
        ValueError: If shapes or devices do not fit, a mask requires gradients, or ``dropout_p`` is
            not 0.

    Example:
        >>> q, k, v = torch.eye(2).expand(3, 1, 1, 2, 2)
        >>> _, tangent = attention_jvp(q, k, v, value_tangent=torch.ones(1, 1, 2, 2))
        >>> tangent    # weights sum to 1
        tensor([[[[1., 1.],
                  [1., 1.]]]])
    """
    tangents = {
        "query_tangent": (query_tangent, query),
        "key_tangent": (key_tangent, key),
        "value_tangent": (value_tangent, value),
    }
    _check_points(query, key, value, enable_gqa)
    has_probes = _check_tangents(tangents)
    if dropout_p != 0.0:
        raise ValueError(
            f"dropout_p must be 0, got {dropout_p}: the op draws no random numbers; put the module "
            "in eval mode"
        )
    mask = None if attn_mask is None else _full_mask(attn_mask, query, key)
    dq, dk, dv = (
        change if change is None or has_probes else change[None] for change, _ in tangents.values()
    )
    if scale is None:
        scale = 1.0 / math.sqrt(max(query.shape[-1], 1))
    tensors = (query, key, value, dq, dk, dv, mask)
    compute = way(_attention_jvp, attention_jvp_triton, attention_jvp_reference, *tensors)
    out, tangent = compute(*tensors, is_causal, float(scale))
    return out, tangent if has_probes else tangent[0]


def _check_points(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor, query)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape (B, H, L, E), got {tuple(tensor.shape)}")
    heads, key_heads = query.shape[1], key.shape[1]
    if not (
        key.shape[:3] == value.shape[:3]
        and len(key) == len(query)
        and key.shape[-1] == query.shape[-1]
    ):
        raise ValueError(
            "query, key and value must have shapes (B, H, L, E), (B, H, S, E) and (B, H, S, Ev), "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if heads != key_heads and not (enable_gqa and key_heads > 0 and heads % key_heads == 0):
        raise ValueError(
            "key and value must have as many heads as query, or with enable_gqa=True a divisor of "
            f"them, got {key_heads} for {heads}"
        )


def _check_tangents(tangents: dict[str, tuple[Tensor | None, Tensor]]) -> bool:
    """Return whether the tangents have a probe dimension, which all must have, or none."""
    numbers: dict[str, int | None] = {}
    for name, (tangent, point) in tangents.items():
        if tangent is None:
            continue
        _check_tensor(name, tangent, point)
        if tangent.shape == point.shape:
            numbers[name] = None
        elif tangent.shape[1:] == point.shape:
            numbers[name] = len(tangent)
        else:
            raise ValueError(
                f"{name} must have shape {tuple(point.shape)}, or (M, *{tuple(point.shape)}), got "
                f"{tuple(tangent.shape)}"
            )
    if len(set(numbers.values())) > 1:
        raise ValueError(
            "all tangents must have the same number M of probes, or none a probe dimension, got "
            + ", ".join(f"{name}: {number}" for name, number in numbers.items())
        )
    return any(number is not None for number in numbers.values())


def _check_tensor(name: str, tensor: object, like: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_TYPES:
        raise TypeError(
            f"{name} must be a float32, float64, bfloat16 or float16 tensor, got {tensor.dtype}"
        )
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must be of {like.dtype} as query is, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    _check_no_tangent(name, tensor)


def _check_no_tangent(name: str, tensor: Tensor) -> None:
    while torch._C._functorch.is_batchedtensor(tensor):  # unpack_dual has no rule for vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        raise TypeError(
            f"{name} carries a tangent of forward-mode differentiation, for which this op has no "
            "rule; pass its tangent as an argument"
        )


def _full_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the mask as (B or 1, H, L, S), expanded and not copied."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype not in (torch.bool, *FLOAT_TYPES):
        raise TypeError(f"attn_mask must be boolean or floating-point, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on {query.device}, got {attn_mask.device}")
    _check_no_tangent("attn_mask", attn_mask)
    if attn_mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("attn_mask must not require gradients; pass attn_mask.detach()")
    sizes = (*query.shape[:3], key.shape[2])
    shape = tuple(attn_mask.shape)
    if len(shape) > 4 or any(
        size not in (1, full) for size, full in zip(shape[::-1], sizes[::-1], strict=False)
    ):
        raise ValueError(f"attn_mask must broadcast to {sizes}, got {shape}")
    shape = (1,) * (4 - len(shape)) + shape
    return attn_mask.reshape(shape).expand(shape[0], *sizes[1:])
