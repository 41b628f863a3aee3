"""Attention and its directional derivatives by a Triton kernel.

The formulas, and how the kernel goes over the keys, are in :mod:`hessdiag.kernels.attention_jvp`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hessdiag.kernels._triton import on_device_of, tl, triton
from hessdiag.kernels.attention_reference import attention_jvp_reference, num_probes_of

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
    num_probes = num_probes_of(query_tangent, key_tangent, value_tangent)
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
