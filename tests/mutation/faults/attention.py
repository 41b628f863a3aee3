"""Faults of attention with tangents, and of where it is taken."""

from __future__ import annotations

from faults.fault import in_file

_OP = "tests/kernels/test_attention_jvp.py"
_CHOICE = ("tests/hessdiag/test_attention.py", "-k")
KERNEL = (
    _OP,
    "-k",
    "masks and not vmap or tails or strides or grouped or head_sizes or probes_at_once",
)
REFERENCE = (_OP, "-k", "rows_without or grouped or TestTemp and not grow or tangents_that")
VMAP = (_OP, "-k", "vmap")
AUTOCAST = (_OP, "-k", "autocast")

REFERENCE_FILE = "hessdiag/kernels/attention_reference.py"
CHOICE = "hessdiag/attention.py"

FAULTS = [
    *in_file(
        "hessdiag/kernels/attention_triton.py",
        KERNEL,
        (
            "scores a hundredth too large",
            "        scores = scores * scale\n",
            "        scores = scores * scale * 1.01\n",
        ),
        (
            "slopes of the scores unscaled",
            "product = (weights * (slopes[i] * scale))",
            "product = (weights * slopes[i])",
        ),
        (
            "causal without the diagonal",
            "first + rows[:, None] >= start + columns[None, :]",
            "first + rows[:, None] > start + columns[None, :]",
        ),
        (
            "causal from the other corner",
            "first + rows[:, None] >= start + columns[None, :]",
            "first + rows[:, None] + num_keys - num_queries >= start + columns[None, :]",
        ),
        (
            "causal blocks left out",
            "end = tl.minimum(num_keys, first + QUERIES)",
            "end = tl.minimum(num_keys, first)",
        ),
        (
            "one key too many",
            "allowed = (columns < num_keys - start)[None, :]",
            "allowed = (columns <= num_keys - start)[None, :]",
        ),
        (
            "keys beyond the last",
            "allowed = (columns < num_keys - start)[None, :]",
            "allowed = (columns < KEYS)[None, :]",
        ),
        (
            "the mask of the next key",
            "place = mask_ptr + tl.cast(start, tl.int64) * mask_column",
            "place = mask_ptr + tl.cast(start + 1, tl.int64) * mask_column",
        ),
        (
            "rows of the mask by its columns",
            "mask_ptr += first.to(tl.int64) * mask_row",
            "mask_ptr += first.to(tl.int64) * mask_column",
        ),
        (
            "one mask for all samples",
            "(sample % mask_batch) * mask_sample",
            "sample * mask_sample * 0",
        ),
        (
            "tangents not rescaled",
            "tangent = tangents[i] * shrink[:, None]",
            "tangent = tangents[i]",
        ),
        (
            "the change not rescaled",
            "change = change * shrink + tl.sum(",
            "change = change + tl.sum(",
        ),
        (
            "the total not rescaled",
            "total = total * shrink + tl.sum(weights, axis=1)",
            "total = total + tl.sum(weights, axis=1)",
        ),
        (
            "the output not rescaled",
            "out = _add_product(rounded, value, out * shrink[:, None], UPCAST)",
            "out = _add_product(rounded, value, out, UPCAST)",
        ),
        (
            "the change of the total dropped",
            "tangent = (tangents[i] - changes[i][:, None] * out) / total[:, None]",
            "tangent = tangents[i] / total[:, None]",
        ),
        (
            "the change of the total added",
            "tangent = (tangents[i] - changes[i][:, None] * out) / total[:, None]",
            "tangent = (tangents[i] + changes[i][:, None] * out) / total[:, None]",
        ),
        (
            "rows without keys are NaN",
            'shift = tl.where(new_top == float("-inf"), 0.0, new_top)',
            "shift = new_top",
        ),
        (
            "rows without keys divide by 0",
            "total = tl.where(total == 0.0, 1.0, total)",
            "total = total",
        ),
        (
            "keys of another head",
            "key_head = head // heads_per_key",
            "key_head = head % heads_per_key",
        ),
        (
            "probes of another program",
            "probe = (index // batch) * PROBES",
            "probe = index // batch",
        ),
        ("probes beyond the last written", "mask=inside & (probe + i < num_probes)", "mask=inside"),
        (
            "one query too many",
            "inside = (rows < tl.where(exists, length - first, 0))[:, None]",
            "inside = (rows <= tl.where(exists, length - first, 0))[:, None]",
        ),
        (
            "the last columns of a head left out",
            "for column in range(0, HEAD, CHUNK):",
            "for column in range(0, HEAD - CHUNK, CHUNK):",
        ),
        (
            "columns beyond the head",
            "inside = inside & (columns < SIZE - column)[None, :]",
            "inside = inside & (columns < SIZE)[None, :]",
        ),
        (
            "the mask scaled",
            "scores += mask.to(tl.float32)",
            "scores += mask.to(tl.float32) * scale",
        ),
        (
            "strides in other units",
            "strides = [stride // unit for stride in strides]",
            "strides = [stride // vector for stride in strides]",
        ),
    ),
    *in_file(
        REFERENCE_FILE,
        REFERENCE,
        (
            "scores of the reference unscaled",
            "baddbmm(_nothing(outs, dtype), part.query, part.key.mT, beta=0, alpha=scale)",
            "baddbmm(_nothing(outs, dtype), part.query, part.key.mT, beta=0, alpha=1.0)",
        ),
        ("causal reference without its diagonal", "later.triu_(first + 1)", "later.triu_(first)"),
        ("causal reference from the first row", "later.triu_(first + 1)", "later.triu_(1)"),
        (
            "the last key of causal reference left out",
            "some_keys = min(num_keys, last) if is_causal",
            "some_keys = min(num_keys, last - 1) if is_causal",
        ),
        ("rows without keys in the reference", "weights.masked_fill_(none, 0.0)", "pass"),
        ("the reference's change dropped", ".addcmul_(total, attended, value=-1.0)", ""),
        (
            "the reference's keys of another head",
            "heads // heads_per_key)",
            "heads % heads_per_key)",
        ),
        (
            "masks of the reference by samples",
            "rows[index // heads % len(rows), index % heads]",
            "rows[index // heads % len(rows), index // heads % len(rows)]",
        ),
        (
            "the boolean mask turned round",
            "scores.masked_fill_(~mask, -torch.inf)",
            "scores.masked_fill_(mask, -torch.inf)",
        ),
    ),
    *in_file(
        "hessdiag/kernels/attention_jvp.py",
        VMAP,
        (
            "vmapped probes in another order",
            "return (out, tangent.unflatten(0, (size, len(tangent) // size))), (None, 0)",
            "return (out, tangent.unflatten(0, (len(tangent) // size, size))), (None, 1)",
        ),
        (
            "vmapped samples in another order",
            "tangent.unflatten(1, (size, batch))), (0, 1)",
            "tangent.unflatten(1, (batch, size))), (0, 2)",
        ),
        (
            "the mask of vmapped samples",
            "mask = mask.unsqueeze(1).expand(size, repeats, *mask.shape[1:]).flatten(0, 2)",
            "mask = mask.flatten(0, 1)",
        ),
    ),
    *in_file(
        CHOICE,
        (*_CHOICE, "vmap_inside or forward_over"),
        (
            "nested jvp taken by the op",
            "return innermost == kinds.Jvp and all(kind == kinds.Vmap for kind in outer)",
            "return innermost == kinds.Jvp",
        ),
    ),
    *in_file(
        CHOICE,
        (*_CHOICE, "parameters_that"),
        ("graphs cut", "        or _has_graph([*points, *tangents, mask])\n", ""),
    ),
    *in_file(
        CHOICE,
        (*_CHOICE, "masks_that"),
        ("a mask's tangent lost", "        or not _constant(mask)\n", ""),
    ),
    *in_file(
        CHOICE, (*_CHOICE, "dropout"), ("dropout ignored", "        and dropout_p == 0.0\n", "")
    ),
    *in_file(
        CHOICE,
        (*_CHOICE, "products_are and causal"),
        (
            "causal forgotten",
            "        is_causal=is_causal,\n        scale=scale",
            "        is_causal=False,\n        scale=scale",
        ),
    ),
    *in_file(
        CHOICE,
        (*_CHOICE, "other_threads"),
        (
            "other threads' attention taken",
            "_by_op(*args, **kwargs) if threading.get_ident() == here else None",
            "_by_op(*args, **kwargs)",
        ),
    ),
    *in_file(
        CHOICE,
        (*_CHOICE, "own_function"),
        (
            "attention not put back",
            "    try:\n        yield\n    finally:\n        functional."
            "scaled_dot_product_attention = original",
            "    yield\n    functional.scaled_dot_product_attention = original",
        ),
    ),
    *in_file(
        CHOICE,
        (*_CHOICE, "counted_over"),
        (
            "rows counted without probes",
            "rows = _innermost(tangent).numel()",
            "rows = tangent.numel()",
        ),
    ),
    *in_file(
        CHOICE,
        (*_CHOICE, "small_scores"),
        ("small scores by the op", "        or not takes_op(query, key, given)\n", ""),
    ),
    *in_file(
        REFERENCE_FILE,
        AUTOCAST,
        (
            "autocast inside of the reference",
            "with torch.autocast(query.device.type, enabled=False):",
            "with torch.autocast(query.device.type, enabled=torch.is_autocast_enabled('cpu')):",
        ),
    ),
]
