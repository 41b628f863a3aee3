"""Faults of probes, products, estimates and what is done with parameters."""

from __future__ import annotations

from faults.fault import Fault

OF_BLOCKS = ("tests/hessdiag/test_matrices.py", "-k", "BlockDiagonal")
OF_XDIAG = ("tests/hessdiag/test_matrices.py", "-k", "XDiag")
OF_INTERVALS = ("tests/hessdiag/test_intervals.py",)
OF_MERGING = ("tests/hessdiag/test_results.py", "-k", "Merging")
OF_LATTICES = ("tests/hessdiag/test_lattices.py",)
OF_LANCZOS = ("tests/hessdiag/test_lanczos.py",)
OF_STREAMING = ("tests/hessdiag/test_streaming.py",)
OF_STOPPING = ("tests/hessdiag/test_estimate.py", "-k", "each_sample_stops or depend_on_chunks")
OF_DESIGNS = (
    "tests/hessdiag/test_estimate.py",
    "-k",
    "TestDesigns or matches_scipy or another_basis",
)
OF_CHOICE = ("tests/hessdiag/test_estimate.py", "-k", "TestChoice")
OF_WAYS = ("tests/hessdiag/test_estimate.py", "-k", "TestReproducibility or memory_running_out")
OF_BLOCKS_CHOSEN = ("tests/hessdiag/test_choosing.py",)
OF_CELLS = ("tests/hessdiag/test_cells.py", "-k", "begin_anywhere or by_chance and shape2")
OF_PLANS = ("tests/hessdiag/test_piloting.py", "-k", "sets_of_a_plan or heard or cost_too_much")
OF_TRACES = ("tests/hessdiag/test_edges.py", "-k", "both_sides")
OF_COUPLING = ("tests/hessdiag/test_silent_errors.py", "-k", "Coupling")
OF_GUARDS = ("tests/hessdiag/test_silent_errors.py", "-k", "TestVmap or scatter or unpooling")
OF_JACOBIANS = ("tests/hessdiag/test_jacobian.py",)
OF_ROOTS = ("tests/hessdiag/test_curvature.py", "tests/hessdiag/test_losses.py")
OF_DATA = (
    "tests/hessdiag/test_over_data.py",
    "-k",
    "against_the_matrix or averages_over or test_modules or which_layers or looks_up",
)
OF_DATA_ESTIMATES = (
    "tests/hessdiag/test_over_data.py",
    "-k",
    "variance_it_states or plain_signs or whatever_batch or later_batch",
)
OF_PARAMETERS = (
    "tests/hessdiag/test_parameters.py",
    "-k",
    "the_contract or in_parts or by_luck or agree_are_not or the_matrix",
)
OF_GAUSS_NEWTON = ("tests/hessdiag/test_gauss_newton.py",)
OF_DOCTESTS = ("tests/project/test_doctests.py", "-k", "hessdiag.intervals")

BLOCKS = "hessdiag/blocks.py"
INTERVALS = "hessdiag/intervals.py"
LATTICES = "hessdiag/lattices.py"
LANCZOS = "hessdiag/lanczos.py"
STREAMING = "hessdiag/streaming.py"
XDIAG = "hessdiag/xdiag.py"
HADAMARD = "hessdiag/hadamard.py"
CELLS = "hessdiag/cells.py"
CHOOSING = "hessdiag/choosing.py"
PROBES = "hessdiag/probes.py"
PRODUCTS = "hessdiag/products.py"
COUPLING = "hessdiag/coupling.py"
CURVATURE = "hessdiag/curvature.py"
LOSSES = "hessdiag/losses.py"
LAYERS = "hessdiag/layers.py"
PER_SAMPLE = "hessdiag/per_sample.py"
OVER_DATA = "hessdiag/over_data.py"
PARAMETERS = "hessdiag/parameters.py"
PARAMETER_VECTORS = "hessdiag/parameter_vectors.py"
GAUSS_NEWTON = "hessdiag/gauss_newton.py"
BASES = "hessdiag/bases.py"
PILOTING = "hessdiag/piloting.py"

FAULTS = [
    # Blocks, and the error of few.
    Fault(
        "a single block's error is zero",
        INTERVALS,
        "torch.full_like(squared_deviations, torch.inf)",
        "torch.zeros_like(squared_deviations)",
        OF_BLOCKS,
    ),
    Fault(
        "blocks transposed in forward mode too",
        BLOCKS,
        'blocks.mT if mode == "vjp" else blocks',
        "blocks.mT",
        OF_BLOCKS,
    ),
    Fault(
        "probe offset of blocks ignored",
        BLOCKS,
        "probe_offset=probe_offset + int(vector[0])",
        "probe_offset=int(vector[0])",
        OF_BLOCKS,
    ),
    Fault(
        "ranks that shift with chunks",
        BLOCKS,
        "moments[(first + offset) % size]",
        "moments[offset % size]",
        OF_BLOCKS,
    ),
    Fault(
        "variance over n squared",
        INTERVALS,
        "squared_deviations / (n * (n - 1))",
        "squared_deviations / (n * n)",
        OF_INTERVALS,
    ),
    Fault(
        "the stand-in of lucky entries doubled",
        INTERVALS,
        "min(1.0, 2.0 ** (3 - num_blocks))",
        "min(1.0, 2.0 ** (4 - num_blocks))",
        OF_DOCTESTS,
    ),
    Fault(
        "the floor of intervals forgotten",
        INTERVALS,
        "torch.maximum(stderr.square(), part * _over_entries(stderr.square())).sqrt()",
        "stderr",
        OF_INTERVALS,
    ),
    Fault(
        "degrees of freedom of n blocks",
        INTERVALS,
        "student_quantile(level, n - 1)",
        "student_quantile(level, n)",
        OF_INTERVALS,
    ),
    Fault(
        "merged errors without the means' distance",
        INTERVALS,
        "deviations += within + weight *",
        "deviations += within + 0.0 * weight *",
        OF_MERGING,
    ),
    Fault(
        "the expansion's second term",
        INTERVALS,
        "second / degrees**2",
        "second / degrees",
        OF_INTERVALS,
    ),
    Fault(
        "the smaller root of Paulson's",
        INTERVALS,
        "((half + root) / square)",
        "((half - root) / square)",
        OF_INTERVALS,
    ),
    # Lattices and cells.
    Fault(
        "the lattice's exponent",
        LATTICES,
        "2**30 // distance**3",
        "2**30 // distance**2",
        OF_LATTICES,
    ),
    Fault(
        "the lattice's pair count",
        LATTICES,
        "weights = pairs * (2**30 // distance**3)",
        "weights = 2**30 // distance**3",
        OF_LATTICES,
    ),
    Fault(
        "channels as far as positions",
        LATTICES,
        "(offsets[:, 0] != 0)",
        "offsets[:, 0].square()",
        OF_LATTICES,
    ),
    Fault(
        "opposite offsets once",
        LATTICES,
        ".index_add_(0, -place % num_colors, weights)",
        "",
        OF_LATTICES,
    ),
    Fault("turned lattices mirror no axis", LATTICES, "(-1 if word % 2 else 1)", "1", OF_LATTICES),
    Fault(
        "turned lattices keep their axes", LATTICES, "taken.get(axis, axis)", "axis", OF_LATTICES
    ),
    Fault(
        "turned lattices start at color 0",
        LATTICES,
        "torch.tensor(first % num_colors)",
        "torch.tensor(0)",
        OF_LATTICES,
    ),
    Fault(
        "Paley's matrix transposed",
        HADAMARD,
        "(index[:, None] - index) % p",
        "(index - index[:, None]) % p",
        OF_DESIGNS,
        equivalent=(
            "The transposed characters give a Hadamard matrix too, whose first column is 1 "
            "as well, and nothing is said of which one it is."
        ),
    ),
    Fault("cells begin at one place", CELLS, "int(words[0]) % num_colors", "0", OF_CELLS),
    Fault(
        "tiles not shifted",
        CELLS,
        "shift = word % side if side < shape[axis] else 0",
        "shift = 0",
        OF_CELLS,
    ),
    Fault(
        "cells deal colors in one order", CELLS, "dealt[cells, place]", "dealt[0][place]", OF_CELLS
    ),
    Fault(
        "the cells of every block alike",
        CELLS,
        "(purpose, block, STREAM_DESIGNS)",
        "(purpose, 0 * block, STREAM_DESIGNS)",
        OF_CELLS,
    ),
    # The Lanczos recurrence.
    Fault(
        "orthogonal to the last two vectors alone",
        LANCZOS,
        "((basis @ w[..., None]).mT @ basis)",
        "((basis[:, -2:] @ w[..., None]).mT @ basis[:, -2:])",
        OF_LANCZOS,
    ),
    Fault("made orthogonal once", LANCZOS, "range(2)", "range(1)", OF_LANCZOS),
    Fault(
        "the exhausted part not cut off",
        LANCZOS,
        "torch.where(exhausted, T[:, 0, 0], alpha)",
        "alpha",
        OF_LANCZOS,
    ),
    Fault("exhaustion never seen", LANCZOS, "100 * tiny * size", "0 * tiny * size", OF_LANCZOS),
    # Chunks, moments and tolerances.
    Fault(
        "the weight of a block forgotten",
        STREAMING,
        "self._sum if self._weight == 1.0 else self._weight * self._sum",
        "self._sum",
        OF_STREAMING,
    ),
    Fault(
        "products summed in bfloat16",
        STREAMING,
        "torch.promote_types(products.dtype, torch.float32)",
        "products.dtype",
        OF_STREAMING,
    ),
    Fault("unknown errors converge", STREAMING, " & torch.isfinite(reach)", "", OF_STREAMING),
    Fault(
        "probes beyond the last of a lane",
        STREAMING,
        "probes[: total - first], taken[: total - first]",
        "probes, taken",
        OF_STREAMING,
    ),
    Fault(
        "samples stop at the last look",
        STREAMING,
        "finished = ~done if lane.samples is None",
        "finished = torch.ones_like(done) if lane.samples is None",
        OF_STOPPING,
    ),
    Fault(
        "a tolerance without what is subtracted",
        STREAMING,
        "(size - reach).clamp(min=0.0)",
        "size",
        OF_STOPPING,
    ),
    Fault("looks at every probe", STREAMING, "-(-_PROBES_PER_TILE // size)", "1", OF_STOPPING),
    Fault(
        "what memory ran out for left out",
        STREAMING,
        "self.size = max(1, count // 2)\n",
        "self.size = max(1, count // 2)\n                first += count\n",
        OF_WAYS,
    ),
    # Designs, and which of them is taken.
    Fault(
        "balanced colors of the first samples",
        PROBES,
        "first, len(z), sample_offset, shape[1], features",
        "first, len(z), 0, shape[1], features",
        OF_DESIGNS,
    ),
    Fault(
        "balanced colors of the first block",
        PROBES,
        "first, len(z), sample_offset, shape[1], features",
        "0, len(z), sample_offset, shape[1], features",
        OF_DESIGNS,
    ),
    Fault(
        "balanced colors in runs of too many",
        PROBES,
        "(ranks % self.num_colors)",
        "(ranks // -(-features // self.num_colors))",
        OF_DESIGNS,
    ),
    Fault(
        "signs of blocks by numbers of probes",
        PROBES,
        "probe_offset=first,\n        sample_offset=sample_offset",
        "probe_offset=probe_offset,\n        sample_offset=sample_offset",
        OF_DESIGNS,
    ),
    Fault(
        "unit vectors that start over in a chunk",
        PROBES,
        "torch.arange(probe_offset, probe_offset + num_probes, device=device) % features",
        "torch.arange(num_probes, device=device) % features",
        OF_DESIGNS,
    ),
    Fault(
        "a dense coloring's weight by its colors",
        PROBES,
        "1.0 / self.block_size(sample_shape) if self.dense",
        "1.0 / self.num_colors if self.dense",
        OF_DESIGNS,
    ),
    Fault(
        "the first probes taken twice",
        STREAMING,
        "first = 0 if begun is None else len(begun[0])",
        "first = 0",
        OF_CHOICE,
    ),
    Fault(
        "the variance of a trace without its pairs",
        CHOOSING,
        "(2 * request.x[0].numel() if request.total else 1)",
        "(request.x[0].numel() if request.total else 1)",
        OF_TRACES,
    ),
    Fault(
        "one block may do with a tolerance",
        CHOOSING,
        "[1 if design.is_exact else 2 for",
        "[1 for",
        OF_CHOICE,
    ),
    Fault(
        "the diagonal in the energy of a row", CHOOSING, "squares[:, i] = 0.0", "pass", OF_CHOICE
    ),
    Fault(
        "pilots of the first block for all",
        CHOOSING,
        "probe_offset=request.probe_offset + first",
        "probe_offset=first",
        OF_BLOCKS_CHOSEN,
    ),
    Fault(
        "sets of the first block for all",
        CHOOSING,
        "request.probe_offset // max_probes",
        "0",
        OF_BLOCKS_CHOSEN,
    ),
    Fault(
        "products that measured not counted",
        CHOOSING,
        "rest = request.max_probes - NUM_PILOTS",
        "rest = request.max_probes",
        OF_CHOICE,
    ),
    Fault(
        "pilots have all of a class",
        PILOTING,
        "-(-len(members) * tenths // 10)",
        "len(members)",
        OF_PLANS,
    ),
    Fault(
        "what is far speaks for the lattice alone",
        PILOTING,
        "torch.maximum(expected, energies.heard)",
        "expected",
        OF_PLANS,
    ),
    Fault(
        "XDiag's columns normalised across",
        XDIAG,
        "S.norm(dim=-2, keepdim=True)",
        "S.norm(dim=-1, keepdim=True)",
        OF_XDIAG,
    ),
    Fault(
        "XDiag adds what it should take out",
        XDIAG,
        "(omega * residual - QS * ZS)",
        "(omega * residual + QS * ZS)",
        OF_XDIAG,
    ),
    Fault(
        "XDiag's first samples for all",
        XDIAG,
        "        sample_offset=sample_offset,\n        dtype=dtype",
        "        sample_offset=0,\n        dtype=dtype",
        OF_XDIAG,
    ),
    # Products, and what they must not depend on.
    Fault(
        "copies of a sample side by side",
        PRODUCTS,
        "x.detach().repeat(copies, *[1] * (x.dim() - 1))",
        "x.detach().repeat_interleave(copies, dim=0)",
        OF_WAYS,
    ),
    Fault(
        "other dropout for every probe",
        PRODUCTS,
        "generator.set_state(first)",
        "pass",
        OF_JACOBIANS,
    ),
    Fault(
        "random numbers not put back",
        PRODUCTS,
        "generator.set_state(current)",
        "pass",
        OF_JACOBIANS,
    ),
    Fault(
        "wrong batched products within rounding",
        PRODUCTS,
        "_MOST_ROUNDING_ELSEWHERE = 0.05",
        "_MOST_ROUNDING_ELSEWHERE = 5.0",
        OF_GUARDS,
    ),
    Fault(
        "coupling where all samples couple",
        COUPLING,
        "(error > rounding * size).any()",
        "(error > rounding * size).all()",
        OF_COUPLING,
    ),
    Fault(
        "too few sets of samples",
        COUPLING,
        "comb(n, n // 2) >= batch",
        "2**n >= batch",
        OF_COUPLING,
    ),
    Fault(
        "the basis on the wrong side",
        BASES,
        "basis.analyse(products(basis.synthesise(probes)))",
        "basis.synthesise(products(basis.analyse(probes)))",
        OF_DESIGNS,
    ),
    # Losses, and sums over parameters.
    Fault(
        "a column of the softmax's root too many",
        CURVATURE,
        "terms.cumsum(-1) - terms",
        "terms.cumsum(-1)",
        OF_ROOTS,
    ),
    Fault(
        "the softmax's weight not rooted",
        CURVATURE,
        "scale = w.movedim(axis, -1).sqrt()",
        "scale = w.movedim(axis, -1)",
        OF_ROOTS,
    ),
    Fault(
        "negative curvature left out",
        CURVATURE,
        "for sign in (1.0, -1.0) if bool((sign * h > 0).any())",
        "for sign in (1.0,) if bool((sign * h > 0).any())",
        OF_ROOTS,
    ),
    Fault(
        "one sample's scale for all",
        CURVATURE,
        "bool((difference <= tolerance * size).all())",
        "bool((difference <= tolerance * size.max()).all())",
        OF_ROOTS,
    ),
    Fault(
        "a mean over all outputs of a batch",
        LOSSES,
        "1.0 / outputs[0].numel() if mean",
        "1.0 / outputs.numel() if mean",
        OF_ROOTS,
    ),
    Fault(
        "groups of a convolution in one",
        LAYERS,
        "columns = _patches(module, a).chunk(module.groups, dim=1)",
        "columns = [_patches(module, a).chunk(module.groups, dim=1)[0]] * module.groups",
        OF_DATA,
    ),
    Fault(
        "a looked-up row squared at each place",
        LAYERS,
        "torch.unique(samples * rows + a, return_inverse=True)",
        "(samples * rows + a).flatten(), torch.arange(a.numel())",
        OF_DATA,
    ),
    Fault(
        "the padding of an embedding learns",
        LAYERS,
        "weight[module.padding_idx] = 0.0",
        "pass",
        OF_DATA,
    ),
    Fault(
        "a layer that is called twice taken for known",
        PER_SAMPLE,
        "if len(found) == 1 and",
        "if len(found) >= 1 and",
        OF_DATA,
        equivalent=(
            "The check against autograd refuses it anyhow: a call alone has another gradient "
            "than all of them."
        ),
    ),
    Fault(
        "samples that meet in a layer not seen",
        PER_SAMPLE,
        "vectors[:, 1::2] = 0.0",
        "pass",
        OF_DATA,
    ),
    Fault(
        "a batch's mean taken for its sum",
        OVER_DATA,
        "roots(lambda v: scale * curvature(v), points)",
        "roots(lambda v: curvature(v), points)",
        OF_DATA,
    ),
    Fault(
        "negative parts of a curvature added",
        OVER_DATA,
        "weight = root.sign * (",
        "weight = 1.0 * (",
        OF_DATA,
    ),
    Fault(
        "signs of the place in a batch",
        OVER_DATA,
        "sample_offset=start,",
        "sample_offset=0,",
        OF_DATA_ESTIMATES,
    ),
    Fault(
        "plain signs not averaged",
        OVER_DATA,
        "1.0 / count if isinstance(design, Rademacher) else 1.0",
        "1.0",
        OF_DATA_ESTIMATES,
    ),
    Fault(
        "probes over parameters start over",
        PARAMETERS,
        "signs(probe_offset + m)",
        "signs(m)",
        OF_PARAMETERS,
    ),
    Fault(
        "a look after every probe over parameters",
        PARAMETERS,
        "moments.count % PROBES_PER_SIGN_TILE == 0 or",
        "True or",
        OF_PARAMETERS,
    ),
    Fault(
        "bytes of signs in another order",
        PARAMETER_VECTORS,
        "packed[4 * place + byte, first:last]",
        "packed[4 * byte + place, first:last]",
        OF_PARAMETERS,
    ),
    Fault(
        "deviations over parameters from the old mean",
        PARAMETER_VECTORS,
        "addcmul_(delta, y.sub_(mean))",
        "addcmul_(delta, delta)",
        OF_PARAMETERS,
    ),
    Fault(
        "the Gauss-Newton matrix without its loss",
        GAUSS_NEWTON,
        "outputs, leaves, curvature(change), retain_graph=True, allow_unused=True\n"
        "        )\n"
        "        return tree.zeros_for_missing(found)\n"
        "\n"
        "    return product\n"
        "\n"
        "\n"
        "def _by_forward_mode",
        "outputs, leaves, change, retain_graph=True, allow_unused=True\n"
        "        )\n"
        "        return tree.zeros_for_missing(found)\n"
        "\n"
        "    return product\n"
        "\n"
        "\n"
        "def _by_forward_mode",
        OF_GAUSS_NEWTON,
    ),
    Fault(
        "other dropout in the transpose",
        GAUSS_NEWTON,
        "with forward_mode_operators(), torch.no_grad(), random_numbers.same():",
        "with forward_mode_operators(), torch.no_grad():",
        OF_GAUSS_NEWTON,
    ),
]
