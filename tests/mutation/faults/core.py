"""Faults of probes, products, estimates and what is done with parameters."""

from __future__ import annotations

from faults.fault import Fault, in_file

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

INTERVALS = "hessdiag/intervals.py"
STREAMING = "hessdiag/streaming.py"
CHOOSING = "hessdiag/choosing.py"
PRODUCTS = "hessdiag/products.py"
PER_SAMPLE = "hessdiag/per_sample.py"
OVER_DATA = "hessdiag/over_data.py"

FAULTS = [
    # Blocks, and the error of few.
    *in_file(
        INTERVALS,
        OF_BLOCKS,
        (
            "a single block's error is zero",
            "torch.full_like(squared_deviations, torch.inf)",
            "torch.zeros_like(squared_deviations)",
        ),
    ),
    *in_file(
        "hessdiag/blocks.py",
        OF_BLOCKS,
        (
            "blocks transposed in forward mode too",
            'blocks.mT if mode == "vjp" else blocks',
            "blocks.mT",
        ),
        (
            "probe offset of blocks ignored",
            "probe_offset=probe_offset + int(vector[0])",
            "probe_offset=int(vector[0])",
        ),
        (
            "ranks that shift with chunks",
            "moments[(first + offset) % size]",
            "moments[offset % size]",
        ),
    ),
    *in_file(
        INTERVALS,
        OF_INTERVALS,
        (
            "variance over n squared",
            "squared_deviations / (n * (n - 1))",
            "squared_deviations / (n * n)",
        ),
        (
            "the floor of intervals forgotten",
            "torch.maximum(stderr.square(), part * _over_entries(stderr.square())).sqrt()",
            "stderr",
        ),
        (
            "degrees of freedom of n blocks",
            "student_quantile(level, n - 1)",
            "student_quantile(level, n)",
        ),
        ("the expansion's second term", "second / degrees**2", "second / degrees"),
        ("the smaller root of Paulson's", "((half + root) / square)", "((half - root) / square)"),
    ),
    *in_file(
        INTERVALS,
        OF_DOCTESTS,
        (
            "the stand-in of lucky entries doubled",
            "min(1.0, 2.0 ** (3 - num_blocks))",
            "min(1.0, 2.0 ** (4 - num_blocks))",
        ),
    ),
    *in_file(
        INTERVALS,
        OF_MERGING,
        (
            "merged errors without the means' distance",
            "deviations += within + weight *",
            "deviations += within + 0.0 * weight *",
        ),
    ),
    # Lattices and cells.
    *in_file(
        "hessdiag/lattices.py",
        OF_LATTICES,
        ("the lattice's exponent", "2**30 // distance**3", "2**30 // distance**2"),
        (
            "the lattice's pair count",
            "weights = pairs * (2**30 // distance**3)",
            "weights = 2**30 // distance**3",
        ),
        ("channels as far as positions", "(offsets[:, 0] != 0)", "offsets[:, 0].square()"),
        ("opposite offsets once", ".index_add_(0, -place % num_colors, weights)", ""),
        ("turned lattices mirror no axis", "(-1 if word % 2 else 1)", "1"),
        ("turned lattices keep their axes", "taken.get(axis, axis)", "axis"),
        ("turned lattices start at color 0", "torch.tensor(first % num_colors)", "torch.tensor(0)"),
    ),
    Fault(
        "Paley's matrix transposed",
        "hessdiag/hadamard.py",
        "(index[:, None] - index) % p",
        "(index - index[:, None]) % p",
        OF_DESIGNS,
        equivalent=(
            "The transposed characters give a Hadamard matrix too, whose first column is 1 "
            "as well, and nothing is said of which one it is."
        ),
    ),
    *in_file(
        "hessdiag/cells.py",
        OF_CELLS,
        ("cells begin at one place", "int(words[0]) % num_colors", "0"),
        ("tiles not shifted", "shift = word % side if side < shape[axis] else 0", "shift = 0"),
        ("cells deal colors in one order", "dealt[cells, place]", "dealt[0][place]"),
        (
            "the cells of every block alike",
            "(purpose, block, STREAM_DESIGNS)",
            "(purpose, 0 * block, STREAM_DESIGNS)",
        ),
    ),
    # The Lanczos recurrence.
    *in_file(
        "hessdiag/lanczos.py",
        OF_LANCZOS,
        (
            "orthogonal to the last two vectors alone",
            "((basis @ w[..., None]).mT @ basis)",
            "((basis[:, -2:] @ w[..., None]).mT @ basis[:, -2:])",
        ),
        ("made orthogonal once", "range(2)", "range(1)"),
        ("the exhausted part not cut off", "torch.where(exhausted, T[:, 0, 0], alpha)", "alpha"),
        ("exhaustion never seen", "100 * tiny * size", "0 * tiny * size"),
    ),
    # Chunks, moments and tolerances.
    *in_file(
        STREAMING,
        OF_STREAMING,
        (
            "the weight of a block forgotten",
            "self._sum if self._weight == 1.0 else self._weight * self._sum",
            "self._sum",
        ),
        (
            "products summed in bfloat16",
            "torch.promote_types(products.dtype, torch.float32)",
            "products.dtype",
        ),
        ("unknown errors converge", " & torch.isfinite(reach)", ""),
        (
            "probes beyond the last of a lane",
            "probes[: total - first], taken[: total - first]",
            "probes, taken",
        ),
    ),
    *in_file(
        STREAMING,
        OF_STOPPING,
        (
            "samples stop at the last look",
            "finished = ~done if lane.samples is None",
            "finished = torch.ones_like(done) if lane.samples is None",
        ),
        ("a tolerance without what is subtracted", "(size - reach).clamp(min=0.0)", "size"),
        ("looks at every probe", "-(-_PROBES_PER_TILE // size)", "1"),
    ),
    *in_file(
        STREAMING,
        OF_WAYS,
        (
            "what memory ran out for left out",
            "self.size = max(1, count // 2)\n",
            "self.size = max(1, count // 2)\n                first += count\n",
        ),
    ),
    # Designs, and which of them is taken.
    *in_file(
        "hessdiag/probes.py",
        OF_DESIGNS,
        (
            "balanced colors of the first samples",
            "first, len(z), sample_offset, shape[1], features",
            "first, len(z), 0, shape[1], features",
        ),
        (
            "balanced colors of the first block",
            "first, len(z), sample_offset, shape[1], features",
            "0, len(z), sample_offset, shape[1], features",
        ),
        (
            "balanced colors in runs of too many",
            "(ranks % self.num_colors)",
            "(ranks // -(-features // self.num_colors))",
        ),
        (
            "signs of blocks by numbers of probes",
            "probe_offset=first,\n        sample_offset=sample_offset",
            "probe_offset=probe_offset,\n        sample_offset=sample_offset",
        ),
        (
            "unit vectors that start over in a chunk",
            "torch.arange(probe_offset, probe_offset + num_probes, device=device) % features",
            "torch.arange(num_probes, device=device) % features",
        ),
        (
            "a dense coloring's weight by its colors",
            "1.0 / self.block_size(sample_shape) if self.dense",
            "1.0 / self.num_colors if self.dense",
        ),
    ),
    *in_file(
        STREAMING,
        OF_CHOICE,
        (
            "the first probes taken twice",
            "first = 0 if begun is None else len(begun[0])",
            "first = 0",
        ),
    ),
    *in_file(
        CHOOSING,
        OF_TRACES,
        (
            "the variance of a trace without its pairs",
            "(2 * request.x[0].numel() if request.total else 1)",
            "(request.x[0].numel() if request.total else 1)",
        ),
    ),
    *in_file(
        CHOOSING,
        OF_CHOICE,
        ("one block may do with a tolerance", "[1 if design.is_exact else 2 for", "[1 for"),
        ("the diagonal in the energy of a row", "squares[:, i] = 0.0", "pass"),
        (
            "products that measured not counted",
            "rest = request.max_probes - NUM_PILOTS",
            "rest = request.max_probes",
        ),
    ),
    *in_file(
        CHOOSING,
        OF_BLOCKS_CHOSEN,
        (
            "pilots of the first block for all",
            "probe_offset=request.probe_offset + first",
            "probe_offset=first",
        ),
        ("sets of the first block for all", "request.probe_offset // max_probes", "0"),
    ),
    *in_file(
        "hessdiag/piloting.py",
        OF_PLANS,
        ("pilots have all of a class", "-(-len(members) * tenths // 10)", "len(members)"),
        (
            "what is far speaks for the lattice alone",
            "torch.maximum(expected, energies.heard)",
            "expected",
        ),
    ),
    *in_file(
        "hessdiag/xdiag.py",
        OF_XDIAG,
        (
            "XDiag's columns normalised across",
            "S.norm(dim=-2, keepdim=True)",
            "S.norm(dim=-1, keepdim=True)",
        ),
        (
            "XDiag adds what it should take out",
            "(omega * residual - QS * ZS)",
            "(omega * residual + QS * ZS)",
        ),
        (
            "XDiag's first samples for all",
            "        sample_offset=sample_offset,\n        dtype=dtype",
            "        sample_offset=0,\n        dtype=dtype",
        ),
    ),
    # Products, and what they must not depend on.
    *in_file(
        PRODUCTS,
        OF_WAYS,
        (
            "copies of a sample side by side",
            "x.detach().repeat(copies, *[1] * (x.dim() - 1))",
            "x.detach().repeat_interleave(copies, dim=0)",
        ),
    ),
    *in_file(
        PRODUCTS,
        OF_JACOBIANS,
        ("other dropout for every probe", "generator.set_state(first)", "pass"),
        ("random numbers not put back", "generator.set_state(current)", "pass"),
    ),
    *in_file(
        PRODUCTS,
        OF_GUARDS,
        (
            "wrong batched products within rounding",
            "_MOST_ROUNDING_ELSEWHERE = 0.05",
            "_MOST_ROUNDING_ELSEWHERE = 5.0",
        ),
    ),
    *in_file(
        "hessdiag/coupling.py",
        OF_COUPLING,
        (
            "coupling where all samples couple",
            "(error > rounding * size).any()",
            "(error > rounding * size).all()",
        ),
        ("too few sets of samples", "comb(n, n // 2) >= batch", "2**n >= batch"),
    ),
    *in_file(
        "hessdiag/bases.py",
        OF_DESIGNS,
        (
            "the basis on the wrong side",
            "basis.analyse(products(basis.synthesise(probes)))",
            "basis.synthesise(products(basis.analyse(probes)))",
        ),
    ),
    # Losses, and sums over parameters.
    *in_file(
        "hessdiag/curvature.py",
        OF_ROOTS,
        ("a column of the softmax's root too many", "terms.cumsum(-1) - terms", "terms.cumsum(-1)"),
        (
            "the softmax's weight not rooted",
            "scale = w.movedim(axis, -1).sqrt()",
            "scale = w.movedim(axis, -1)",
        ),
        (
            "negative curvature left out",
            "for sign in (1.0, -1.0) if bool((sign * h > 0).any())",
            "for sign in (1.0,) if bool((sign * h > 0).any())",
        ),
        (
            "one sample's scale for all",
            "bool((difference <= tolerance * size).all())",
            "bool((difference <= tolerance * size.max()).all())",
        ),
    ),
    *in_file(
        "hessdiag/losses.py",
        OF_ROOTS,
        (
            "a mean over all outputs of a batch",
            "1.0 / outputs[0].numel() if mean",
            "1.0 / outputs.numel() if mean",
        ),
    ),
    *in_file(
        "hessdiag/layers.py",
        OF_DATA,
        (
            "groups of a convolution in one",
            "columns = _patches(module, a).chunk(module.groups, dim=1)",
            "columns = [_patches(module, a).chunk(module.groups, dim=1)[0]] * module.groups",
        ),
        (
            "a looked-up row squared at each place",
            "torch.unique(samples * rows + a, return_inverse=True)",
            "(samples * rows + a).flatten(), torch.arange(a.numel())",
        ),
        ("the padding of an embedding learns", "weight[module.padding_idx] = 0.0", "pass"),
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
    *in_file(
        PER_SAMPLE,
        OF_DATA,
        ("samples that meet in a layer not seen", "vectors[:, 1::2] = 0.0", "pass"),
    ),
    *in_file(
        OVER_DATA,
        OF_DATA,
        (
            "a batch's mean taken for its sum",
            "roots(lambda v: scale * curvature(v), points)",
            "roots(lambda v: curvature(v), points)",
        ),
        ("negative parts of a curvature added", "weight = root.sign * (", "weight = 1.0 * ("),
    ),
    *in_file(
        OVER_DATA,
        OF_DATA_ESTIMATES,
        ("signs of the place in a batch", "sample_offset=start,", "sample_offset=0,"),
        (
            "plain signs not averaged",
            "1.0 / count if isinstance(design, Rademacher) else 1.0",
            "1.0",
        ),
    ),
    *in_file(
        "hessdiag/parameters.py",
        OF_PARAMETERS,
        ("probes over parameters start over", "signs(probe_offset + m)", "signs(m)"),
        (
            "a look after every probe over parameters",
            "moments.count % PROBES_PER_SIGN_TILE == 0 or",
            "True or",
        ),
    ),
    *in_file(
        "hessdiag/parameter_vectors.py",
        OF_PARAMETERS,
        (
            "bytes of signs in another order",
            "packed[4 * place + byte, first:last]",
            "packed[4 * byte + place, first:last]",
        ),
        (
            "deviations over parameters from the old mean",
            "addcmul_(delta, y.sub_(mean))",
            "addcmul_(delta, delta)",
        ),
    ),
    *in_file(
        "hessdiag/gauss_newton.py",
        OF_GAUSS_NEWTON,
        (
            "the Gauss-Newton matrix without its loss",
            "used], retain_graph=True)\n        found = torch.autograd.grad(\n            "
            "outputs, leaves, curvature(change)",
            "used], retain_graph=True)\n        found = torch.autograd.grad(\n            "
            "outputs, leaves, change",
        ),
        (
            "other dropout in the transpose",
            "with forward_mode_operators(), torch.no_grad(), random_numbers.same():",
            "with forward_mode_operators(), torch.no_grad():",
        ),
    ),
]
