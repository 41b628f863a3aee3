"""Bad input of the estimators of hessdiag, over what they share and what each takes alone."""

import math

import numpy as np
import torch
from bad_input import Case, run, table
from expectations import close, holds, shaped
from torch import nn

import hessdiag
from hessdiag import Jacobian

NAN, INF = math.nan, math.inf
X = torch.tensor([[0.5, 1.0], [2.0, -1.0]])
COS = X.cos()
MATRIX = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
HALVES = torch.tensor([0, 1])


def squares(x):
    return x.pow(2).sum()


# Every public function that takes a function and x, by the sine, or by its Hessian.
FUNCTIONS = {
    "estimate": lambda f, x, **k: hessdiag.estimate(f, x, max_probes=4, **k).diagonal,
    "hutchinson": lambda f, x, **k: hessdiag.hutchinson(f, x, 4, **k),
    "exact": hessdiag.exact,
    "jacobian": hessdiag.jacobian,
    "trace": lambda f, x, **k: hessdiag.trace(f, x, max_probes=4, **k).trace,
    "xdiag": lambda f, x, **k: hessdiag.xdiag(f, x, num_probes=4, **k),
    "block_diagonal": lambda f, x, **k: hessdiag.block_diagonal(f, x, partition=HALVES, **k).blocks,
    "Jacobian": lambda f, x, **k: Jacobian(f, x, **k).products(torch.ones(1, 2, 2)),
    "hessian_diagonal": lambda f, x, **k: (
        hessdiag.hessian_diagonal(f, x, max_probes=4, **k).diagonal
    ),
}
JACOBIANS = [name for name in FUNCTIONS if name != "hessian_diagonal"]

POINTS = {
    "of no dimension": (torch.tensor(1.0), ValueError, "x must have shape (B, ...)"),
    "of integers": (X.long(), TypeError, "x must be a real floating-point tensor, got torch.int64"),
    "of booleans": (X > 0, TypeError, "x must be a real floating-point tensor, got torch.bool"),
    "of complex numbers": (X.cfloat(), TypeError, "got torch.complex64"),
    "of 8 bits": (X.to(torch.float8_e4m3fn), TypeError, "at least 16 bits"),
    "that is sparse": (X.to_sparse(), TypeError, "x must be a dense tensor"),
    "without data": (X.to("meta"), ValueError, "x must hold data"),
    "of NumPy": (X.numpy(), TypeError, "x must be a torch.Tensor, got ndarray"),
    "that is a list": ([[1.0]], TypeError, "x must be a torch.Tensor, got list"),
    "with a NaN": (X.where(X < 2, NAN), ValueError, "x must be finite, got 1 NaN or infinite of 4"),
    "with infinity": (X.where(X < 2, -INF), ValueError, "x must be finite, got 1 NaN"),
}
BAD_POINTS = [
    Case(f"{name} at x {what}", lambda _, f=f, x=x: f(torch.sin, x), error, (says,))
    for name, f in FUNCTIONS.items()
    for what, (x, error, says) in POINTS.items()
]

# Whatever x is made of, the diagonal is the cosine.
UNUSUAL = {
    "of float16": (X.half(), 1e-3),
    "of bfloat16": (X.bfloat16(), 1e-2),
    "with a graph": (X.clone().requires_grad_(), 1e-6),
    "expanded": (X[:1].expand(2, 2), 1e-6),
    "transposed": (X.T, 1e-6),
    "of every second column": (torch.arange(8.0).reshape(2, 4)[:, ::2], 1e-6),
    "negated by a conjugate": (torch.complex(X, X).conj().imag, 1e-6),
    "that is a parameter": (nn.Parameter(X), 1e-6),
    "without samples": (X[:0], 0.0),
    "without features": (X[:, :0], 0.0),
}


def inference():
    with torch.inference_mode():
        return X.clone()


UNUSUAL["of inference mode"] = (inference(), 1e-6)


def under(context):
    def call(_):
        with context():
            return [hessdiag.exact(torch.sin, X), hessdiag.exact(torch.sin, X, mode="jvp")]

    return call


GOOD_POINTS = [
    *(
        Case(
            f"{name} at x {what}",
            lambda _, x=x, name=name: FUNCTIONS[name](torch.sin, x),
            check=close(x.detach().cos(), atol=error, rtol=0.0, check_dtype=name != "estimate"),
        )
        for name in ("estimate", "hutchinson", "exact")
        for what, (x, error) in UNUSUAL.items()
    ),
    *(
        Case(
            f"under {context.__name__}",
            under(context),
            check=lambda found: [close(COS)(diagonal) for diagonal in found],
        )
        for context in (torch.no_grad, torch.inference_mode)
    ),
]


def raises(_):
    raise KeyError("the network is offline")


def constant_in_inference_mode(x):
    with torch.inference_mode():
        return x.sin()


OUTPUTS = {
    "a tuple": (lambda x: (x.sin(),), TypeError, "score_fn must return a torch.Tensor, got tuple"),
    "a list": (lambda x: [x.sin()], TypeError, "got list; take the tensor out of it"),
    "None": (lambda x: None, TypeError, "score_fn must return a torch.Tensor, got NoneType"),
    "a number": (lambda x: 1.0, TypeError, "score_fn must return a torch.Tensor, got float"),
    "another shape": (lambda x: x[:, :1].sin(), ValueError, "the shape of x, (2, 2), got (2, 1)"),
    "another batch": (lambda x: x[:1].sin(), ValueError, "the shape of x, (2, 2), got (1, 2)"),
    "one dimension more": (lambda x: x.sin()[None], ValueError, "got (1, 2, 2)"),
    "a sum": (lambda x: x.sin().sum(), ValueError, "the shape of x, (2, 2), got ()"),
    "float64": (lambda x: x.sin().double(), TypeError, "the dtype of x, torch.float32"),
    "float16": (lambda x: x.sin().half(), TypeError, "the dtype of x, torch.float32"),
    "integers": (lambda x: x.long(), TypeError, "got torch.int64; convert inside score_fn"),
    "complex numbers": (lambda x: torch.complex(x, x), TypeError, "got torch.complex64"),
    "another device": (lambda x: x.to("meta"), ValueError, "the device of x, cpu, got meta"),
    "what is detached": (lambda x: x.detach().sin(), ValueError, "no backward graph to x"),
    "a constant": (torch.ones_like, ValueError, "does not depend on x"),
    "what inference mode made": (constant_in_inference_mode, ValueError, "does not depend on x"),
    "an index": (lambda x: x.argmax(1, keepdim=True).expand_as(x).to(x), ValueError, "depend on x"),
    "what NumPy computed": (
        lambda x: torch.from_numpy(np.sin(x.detach().numpy())),
        ValueError,
        "outside of PyTorch",
    ),
    "an error": (raises, KeyError, "the network is offline"),
}
BAD_OUTPUTS = [
    Case(f"{name} of a function that returns {what}", lambda _, g=g, f=f: g(f, X), error, (says,))
    for name, g in FUNCTIONS.items()
    if name in ("estimate", "jacobian", "trace", "Jacobian")
    for what, (f, error, says) in OUTPUTS.items()
] + [
    Case(
        f"{name} of no function", lambda _, f=f: f(3, X), TypeError, ("score_fn must be callable",)
    )
    for name, f in FUNCTIONS.items()
    if name in JACOBIANS
]

# Options that estimators share: the value, the error, and what it says.
COUNTS = [
    (0, ValueError, "must be at least 1, got 0"),
    (-3, ValueError, "must be at least 1, got -3"),
    (2.0, TypeError, "must be an int, got 2.0 of type float"),
    (True, TypeError, "must be an int, got True of type bool"),
    ("4", TypeError, "must be an int, got '4' of type str"),
    (torch.tensor(4), TypeError, "must be an int, got tensor(4)"),
]
TAKE_COUNTS = {
    "max_probes": lambda n: hessdiag.estimate(torch.sin, X, max_probes=n),
    "M": lambda n: hessdiag.hutchinson(torch.sin, X, n),
    "max_probes of a trace": lambda n: hessdiag.trace(torch.sin, X, max_probes=n),
    "max_probes of parameters": lambda n: hessdiag.parameter_hessian_diagonal(
        squares, X, max_probes=n
    ),
    "max_probes that are kept": lambda n: hessdiag.fixed_probes(X, n),
    "max_probes over data": lambda n: hessdiag.gauss_newton_over_data(
        LINEAR, nn.functional.mse_loss, [(X, X)], max_probes=n
    ),
    "num_probes of Lanczos": lambda n: hessdiag.lanczos(lambda v: v @ MATRIX, X, n),
    "num_colors": hessdiag.Coloring,
    "num_colors in balance": hessdiag.BalancedColoring,
    "num_axes": hessdiag.dct,
}
TAKE_CHUNKS = {
    "chunk_size": lambda n: hessdiag.estimate(torch.sin, X, max_probes=4, chunk_size=n),
    "chunk_size of exact": lambda n: hessdiag.exact(torch.sin, X, chunk_size=n),
    "chunk_size of parameters": lambda n: hessdiag.parameter_hessian_diagonal(
        squares, X, max_probes=4, chunk_size=n
    ),
    "chunk_size of a Gauss-Newton": lambda n: hessdiag.gauss_newton_diagonal(
        lambda w: X @ w, squares, torch.ones(2), max_probes=4, chunk_size=n
    ),
}
LINEAR = nn.Linear(2, 2)
BAD_COUNTS = [
    Case(
        f"{option}: {value!r}",
        lambda _, call=call, value=value: call(value),
        error,
        (f"{option.split()[0]} {says}",),
    )
    for option, call in TAKE_COUNTS.items()
    for value, error, says in COUNTS
] + [
    Case(
        f"{option}: {value!r}",
        lambda _, call=call, value=value: call(value),
        TypeError if isinstance(value, str) else error,
        (
            "chunk_size must be an int or 'auto'"
            if isinstance(value, str)
            else f"chunk_size {says}",
        ),
    )
    for option, call in TAKE_CHUNKS.items()
    for value, error, says in COUNTS
]


def estimate(name, error, *says, check=None, f=torch.sin, x=X, **arguments):
    given = {"max_probes": 4, **arguments}
    return Case(name, lambda _: hessdiag.estimate(f, x, **given).diagonal, error, says, check)


OPTIONS = [
    estimate("a seed below 0", ValueError, "seed must lie in [0, 2**64), got -1", seed=-1),
    estimate("a seed of 65 bits", ValueError, "seed must lie in [0, 2**64)", seed=2**64),
    estimate("a seed that is a float", TypeError, "seed must be an int", seed=1.5),
    estimate("a seed that is a boolean", TypeError, "seed must be an int", seed=True),
    estimate("two seeds", ValueError, "seed must have one element", seed=torch.tensor([1, 2])),
    estimate("the last seed", None, seed=2**64 - 1, check=close(COS)),
    estimate("a seed of NumPy", None, seed=np.int64(3), check=close(COS)),
    estimate("a generator", None, seed=torch.Generator().manual_seed(0), check=close(COS)),
    estimate("a sample below 0", ValueError, "sample_offset must be at least 0", sample_offset=-1),
    estimate("a sample of 33 bits", ValueError, "at most 2**32", sample_offset=2**32 - 1),
    estimate("probes of 33 bits", ValueError, "at most 2**32", max_probes=2**33, probes="auto"),
    estimate("half a probe", TypeError, "probe_offset must be an int", probe_offset=0.5),
    estimate("a tolerance of 0", ValueError, "rtol or atol must be positive", rtol=0),
    estimate("a tolerance below 0", ValueError, "rtol must be at least 0, got -0.1", rtol=-0.1),
    estimate("a tolerance of NaN", ValueError, "atol must be at least 0, got nan", atol=NAN),
    estimate("a tolerance without end", ValueError, "rtol must be finite, got inf", rtol=INF),
    estimate("a tolerance that is a word", TypeError, "rtol must be a number", rtol="0.1"),
    estimate("a tolerance that is a boolean", TypeError, "rtol must be a number", rtol=True),
    estimate("an absolute tolerance of False", TypeError, "atol must be a number", atol=False),
    estimate("probes of another name", ValueError, "probes must be one of", "'h'", probes="h"),
    estimate("no probes", TypeError, "probes must be a name or a design", probes=None),
    estimate(
        "a class of probes",
        TypeError,
        "probes must be an object, got the class Rademacher: call it",
        probes=hessdiag.Rademacher,
    ),
    estimate("colors of flat samples", ValueError, "spatial axis", probes="coloring"),
    estimate(
        "more colors than features",
        ValueError,
        "num_colors must be at most the number of features, 2, got 3",
        probes=hessdiag.BalancedColoring(3),
        max_probes=3,
    ),
    estimate(
        "half a block", ValueError, "multiple", probes=hessdiag.BalancedColoring(2), probe_offset=1
    ),
    estimate("a mode in capitals", ValueError, "mode must be one of auto, vjp, jvp", mode="VJP"),
    estimate("another batching", ValueError, "batching must be one of", batching="map"),
    estimate("autocast to float32", TypeError, "autocast must be", autocast=torch.float32),
    estimate("compiled forward mode", ValueError, "compile=True", compile=True, mode="jvp"),
    estimate("an option of no name", TypeError, "unknown", unknown=1),
    estimate("a basis that is none", TypeError, "basis must be a hessdiag.Basis", basis=2),
    estimate(
        "cosines that would mix the samples",
        ValueError,
        "basis must mix at most the 1 axes of a sample of x, got one of 2: dct(1) say",
        basis=hessdiag.dct(),
    ),
    # F diag(cos) F^T of two features: both entries are the mean.
    estimate(
        "cosines of each sample",
        None,
        basis=hessdiag.dct(1),
        probes="auto",
        check=close(COS.mean(1, keepdim=True).expand(2, 2)),
    ),
    Case(
        "no further tensors",
        lambda _: Jacobian(torch.sin, X, has_aux=True).output,
        TypeError,
        ("score_fn must return (output, further tensors)", "Tensor"),
    ),
    Case(
        "a diagonal of what is not square",
        lambda _: hessdiag.exact(Jacobian(lambda x: x[:, :1], X, rectangular=True)),
        ValueError,
        ("the Jacobian must be square",),
    ),
    Case(
        "x beside a Jacobian",
        lambda _: hessdiag.exact(Jacobian(torch.sin, X), X),
        ValueError,
        ("x must be left out with a hessdiag.Jacobian",),
    ),
    Case("no x", lambda _: hessdiag.exact(torch.sin), TypeError, ("x must be given",)),
    Case(
        "an operator in cosines of the batch",
        lambda _: Jacobian(torch.sin, X).in_basis(hessdiag.dct(2)),
        ValueError,
        ("basis must mix at most the 1 axes",),
    ),
]


def nan_in_the_last_sample(x):
    return torch.where(x > 1.5, NAN, 1.0) * x.sin()


# A NaN of one sample says nothing about the others, by any probes.
NANS = [
    Case(
        f"{probes} probes of a function that is NaN in one entry",
        lambda _, probes=probes, tolerance=tolerance: hessdiag.estimate(
            nan_in_the_last_sample, X, max_probes=64, probes=probes, rtol=tolerance
        ),
        check=lambda found: (
            close(COS[0])(found.diagonal[0]),
            holds(bool(found.diagonal[1].isnan().any())),
            holds(found.converged is None or found.converged.tolist() == [True, False]),
        ),
    )
    for probes, tolerance in (
        ("rademacher", None),
        ("rademacher", 0.1),
        ("orthogonal", None),
        ("auto", None),
    )
    if not (probes == "rademacher" and tolerance)
] + [
    Case(
        "a tolerance of a function that is NaN in one entry",
        lambda _: hessdiag.estimate(nan_in_the_last_sample, X, max_probes=64, rtol=0.1),
        check=lambda found: holds(found.converged.tolist() == [True, False]),
    ),
    Case(
        "an infinite derivative",
        lambda _: hessdiag.exact(torch.sqrt, torch.tensor([[0.0, 4.0]])),
        check=close(torch.tensor([[INF, 0.25]])),
    ),
]


def products(name, probes, error, *says):
    return [
        Case(
            f"{name}, {mode} by {batching}",
            lambda _, m=mode, b=batching: Jacobian(torch.sin, X, mode=m, batching=b).products(
                probes
            ),
            error,
            says,
            shaped(0, 2, 2),
        )
        for mode in ("vjp", "jvp")
        for batching in ("loop", "vmap", "fold")
    ]


ONES = torch.ones(3, 2, 2)
PRODUCTS = [
    *products("probes without their number", ONES[0], ValueError, "probes must have shape (m, 2"),
    *products("probes of three features", torch.ones(1, 2, 3), ValueError, "got (1, 2, 3)"),
    *products("probes in float64", ONES.double(), TypeError, "probes must be a tensor of"),
    *products("probes of integers", ONES.long(), TypeError, "as x is, got torch.int64"),
    *products("complex probes", ONES.cfloat(), TypeError, "as x is, got torch.complex64"),
    *products("probes without data", ONES.to("meta"), ValueError, "probes must be on cpu"),
    *products("no probes at all", None, TypeError, "probes must be a tensor of", "NoneType"),
    *products("an empty set of probes", ONES[:0], None),
]


def block(name, error, *says, x=X, check=None, **arguments):
    given = {"partition": HALVES, **arguments}
    return Case(
        name, lambda _: hessdiag.block_diagonal(torch.sin, x, **given).blocks, error, says, check
    )


RADEMACHER = hessdiag.Rademacher()
BLOCKS = [
    block("a partition of floats", ValueError, "integer tensor", partition=torch.zeros(2)),
    block("a partition of booleans", ValueError, "integer", partition=torch.tensor([True, False])),
    block("a complex partition", ValueError, "integer tensor", partition=HALVES.cfloat()),
    block("a partition without data", ValueError, "on meta", partition=HALVES.to("meta")),
    block("a partition of three", ValueError, "(2,), got", partition=torch.tensor([0, 1, 0])),
    block("a partition of each sample", ValueError, "(2,), got", partition=HALVES.expand(2, 2)),
    block("a block below 0", ValueError, "values 0 .. L - 1", partition=torch.tensor([-1, 0])),
    block("a block that is empty", ValueError, "each of them", partition=torch.tensor([0, 2])),
    block("a partition that is a list", ValueError, "a tensor or 'channels'", partition=[0, 1]),
    block("channels of flat samples", ValueError, "(B, C, ...), got (2, 2)", partition="channels"),
    block("probes of another design", TypeError, "probes must be", probes=hessdiag.Normal()),
    block("probes by name", TypeError, "probes must be hessdiag.UnitV", probes="rademacher"),
    block("a class of probes", TypeError, "probes must be", probes=hessdiag.Rademacher),
    block("no number of probes", TypeError, "max_probes must be an int", probes=RADEMACHER),
    block("a number of exact probes", ValueError, "max_probes must be left out", max_probes=2),
    block(
        "fewer probes than a block",
        ValueError,
        "max_probes must be at least 2, the size of the largest block, got 1",
        partition=torch.tensor([0, 0]),
        probes=RADEMACHER,
        max_probes=1,
    ),
    block(
        "8 bits number the blocks", None, partition=HALVES.to(torch.uint8), check=shaped(2, 2, 1, 1)
    ),
    block(
        "no samples",
        None,
        x=torch.zeros(0, 3, 2),
        partition="channels",
        check=shaped(0, 2, 3, 3),
    ),
]


def lanczos(name, error, *says, f=lambda v: v @ MATRIX, start=X, k=2, check=None):
    return Case(name, lambda _: hessdiag.lanczos(f, start, k)[1], error, says, check)


def tridiagonal(found):
    """From k = D on the eigenvalues are those of the matrix."""
    expected = torch.linalg.eigvalsh(MATRIX)
    for T in found:
        torch.testing.assert_close(torch.linalg.eigvalsh(T[:2, :2]), expected)


SOLVERS = [
    lanczos("a start of integers", TypeError, "start must be a floating-point", start=X.long()),
    lanczos("a start that is a list", TypeError, "start must be a floating", start=[1.0]),
    lanczos("a start of no dimension", TypeError, "shape (B, ...)", start=torch.tensor(1.0)),
    lanczos("products that are none", ValueError, "products must return", f=lambda v: None),
    lanczos("products without probes", ValueError, "shape (1, 2, 2), got (2, 2)", f=lambda v: v[0]),
    lanczos("products of one feature", ValueError, "products must", f=lambda v: v[..., :1]),
    lanczos("more products than features", None, k=5, check=tridiagonal),
    lanczos(
        "products in float64", None, f=lambda v: v.double() @ MATRIX.double(), check=tridiagonal
    ),
    lanczos("no start", None, start=X[:0], check=shaped(0, 2, 2)),
    lanczos("a start of 0", None, start=X * 0, check=close(torch.zeros(2, 2, 2))),
    *(
        Case(
            f"xdiag by {number} probes",
            lambda _, n=number: hessdiag.xdiag(torch.sin, X, num_probes=n),
            error,
            (says,),
        )
        for number, error, says in (
            (0, ValueError, "num_probes must be even, at least 4"),
            (3, ValueError, "num_probes must be even, at least 4 and at most 2 D = 4, got 3"),
            (6, ValueError, "at most 2 D = 4, got 6"),
            (4.0, TypeError, "num_probes must be an int"),
        )
    ),
]

TREE = [torch.ones(2, 1), torch.ones(2, 2)]


def ravel(name, tree, error, *says):
    return Case(name, lambda _: hessdiag.ravel(tree)[0], error, says)


TREES = [
    ravel("an empty tree", [], ValueError, "at least one tensor"),
    ravel("a tree of nothing", None, TypeError, "tensors only, got NoneType"),
    ravel("a tree of numbers", {"a": 1.0}, TypeError, "tensors only, got float"),
    ravel("a tree of two batches", [X, X[:1]], ValueError, "of one B"),
    ravel("a tree of no dimension", [torch.tensor(1.0)], ValueError, "shapes (B, ...)"),
    ravel("a tree of two types", [X, X.double()], TypeError, "one type on one device"),
    *(
        Case(
            f"values for a tree that are {name}",
            lambda _, values=values: hessdiag.ravel(TREE)[1](values),
            ValueError,
            ("values must be a tensor of shape (..., 3)",),
        )
        for name, values in {"too many": torch.ones(2, 4), "too few": X, "a list": [1]}.items()
    ),
]

KEPT = hessdiag.fixed_probes(X, 4, seed=5)


def kept(name, error, *says, x=X, check=None, **arguments):
    given = {"max_probes": 4, "probes": KEPT, **arguments}
    return Case(
        name, lambda _: hessdiag.estimate(torch.sin, x, **given).diagonal, error, says, check
    )


FIXED = [
    kept("kept probes for fewer samples", ValueError, "probes that are kept", x=X[:1]),
    kept("kept probes in float64", ValueError, "of torch.float64", x=X.double()),
    kept("more probes than are kept", ValueError, "at most 4", "got 5", max_probes=5),
    kept("kept probes from the second on", ValueError, "at most 3", probe_offset=1),
    kept("kept probes with another seed", ValueError, "or theirs, 5, got 6", seed=6),
    kept("kept probes of other samples", ValueError, "sample_offset must", sample_offset=3),
    kept("kept probes with their seed", None, seed=5, check=close(COS)),
    Case(
        "probes that wait for products",
        lambda _: hessdiag.fixed_probes(X, 4, "auto"),
        ValueError,
        ("probes must be a design or one of rademacher, normal, orthogonal", "'auto'"),
    ),
]

FOUND = hessdiag.estimate(torch.sin, X, max_probes=4)
TRACE = hessdiag.trace(torch.sin, X, max_probes=4)
EXACT = hessdiag.estimate(torch.sin, X, max_probes=4, probes="auto")
RESULTS = [
    *(
        Case(
            f"an interval of level {level!r}",
            lambda _, level=level, found=found: found.interval(level),
            error,
            ("level must",),
        )
        for found, level, error in (
            (FOUND, 0, ValueError),
            (FOUND, 95, ValueError),
            (FOUND, NAN, ValueError),
            (FOUND, "95%", TypeError),
            (FOUND, None, TypeError),
            (TRACE, 1.0, ValueError),
        )
    ),
    Case(
        "merged with another shape",
        lambda _: FOUND.merged(hessdiag.estimate(torch.sin, X[:1], max_probes=4)),
        ValueError,
        ("estimates to merge must have one shape", "(1, 2)"),
    ),
    Case("merged with what is exact", lambda _: FOUND.merged(EXACT), ValueError, ("is exact",)),
    Case("merged with nothing", lambda _: FOUND.merged(None), TypeError, ("other must be a",)),
    Case("a diagonal and a trace", lambda _: FOUND.merged(TRACE), TypeError, ("DiagonalEstimate",)),
    Case("a trace and a diagonal", lambda _: TRACE.merged(FOUND), TypeError, ("TraceEstimate",)),
]


def dct(name, x, error, *says, num_axes=1, check=None):
    return Case(name, lambda _: hessdiag.dct(num_axes).analyse(x), error, says, check)


COSINES = [
    dct("cosines of integers", X.long(), TypeError, "x must be a floating-point tensor"),
    dct("cosines of too few axes", X, TypeError, "3 axes or more", "(2, 2)", num_axes=3),
    dct("cosines of a list", [1.0], TypeError, "x must be a floating-point tensor", "list"),
    dct("cosines of nothing", X[:, :0], None, check=shaped(2, 0)),
]


def hessian(name, f, error, *says, check=None):
    return Case(
        name, lambda _: hessdiag.hessian_diagonal(f, X, max_probes=4).diagonal, error, says, check
    )


def of_parameters(name, error, *says, loss=squares, parameters=X, check=None, **arguments):
    given = {"max_probes": 4, **arguments}
    return Case(
        name,
        lambda _: hessdiag.parameter_hessian_diagonal(loss, parameters, **given).diagonal,
        error,
        says,
        check,
    )


def gauss_newton(name, error, *says, check=None, **arguments):
    given = {
        "model": lambda w: X @ w,
        "loss": squares,
        "parameters": torch.ones(2),
        "max_probes": 2,
        "probes": "auto",
        **arguments,
    }
    return Case(
        name, lambda _: hessdiag.gauss_newton_diagonal(**given).diagonal, error, says, check
    )


HESSIANS = [
    hessian("an energy that is None", lambda x: None, TypeError, "f must return a torch.Tensor"),
    hessian("an energy of entries", lambda x: x, ValueError, "shape (2,), or their sum"),
    hessian("an energy of one sample", lambda x: x.sum()[None], ValueError, "got (1,)"),
    hessian("a detached energy", lambda x: x.detach().sum(), ValueError, "does not depend on x"),
    hessian("a complex energy", lambda x: (x * 1j).sum(), TypeError, "f must return real"),
    hessian("a linear energy", lambda x: x.sum(), None, check=close(torch.zeros(2, 2))),
    hessian(
        "an energy in float64", lambda x: x.double().pow(2).sum(), None, check=close(0 * X + 2)
    ),
    of_parameters("a loss of entries", ValueError, "loss must return a 0-dim", loss=lambda p: p),
    of_parameters("no loss", ValueError, "loss must return", "NoneType", loss=lambda p: None),
    of_parameters("a complex loss", TypeError, "a real number", loss=lambda p: (p * 1j).sum()),
    of_parameters("a constant loss", ValueError, "no backward graph", loss=lambda p: X.sum()),
    of_parameters("no parameters", ValueError, "at least one tensor", parameters=[]),
    of_parameters("parameters of integers", TypeError, "parameters must", parameters=X.long()),
    of_parameters("parameters that are a module", TypeError, "tensors only", parameters=LINEAR),
    of_parameters("a parameter that is NaN", ValueError, "finite", parameters=X * NAN),
    of_parameters("parameters without data", ValueError, "hold data", parameters=X.to("meta")),
    of_parameters("a mode of no name", ValueError, "mode must be one of", mode="reverse"),
    of_parameters("a tolerance without errors", ValueError, "stderr must", rtol=0.1, stderr=False),
    of_parameters("parameters in float16", None, parameters=X.half(), check=close(0 * X + 2)),
    of_parameters("parameters of no entries", None, parameters=X[:0], check=shaped(0, 2)),
    gauss_newton("a model that returns a tuple", TypeError, "tuple", model=lambda w: (X @ w,)),
    gauss_newton("a complex model", TypeError, "real numbers", model=lambda w: X @ w * 1j),
    gauss_newton("a model without parameters", ValueError, "no backward graph", model=lambda w: X),
    gauss_newton("a loss of all outputs", ValueError, "loss must return", loss=lambda y: y),
    gauss_newton("a complex loss of outputs", TypeError, "real", loss=lambda y: (y * 1j).sum()),
    gauss_newton(
        "a linear loss of outputs", None, loss=lambda y: y.sum(), check=close(torch.zeros(2))
    ),
]

INPUTS, TARGETS = torch.eye(2), torch.tensor([0, 1])


def over_data(name, error, *says, data=((INPUTS, TARGETS),), check=None, **arguments):
    given = {"model": LINEAR, "loss": nn.functional.cross_entropy, **arguments}
    return [
        Case(
            f"{name}, {function.__name__}",
            lambda _, f=function: f(data=data, **given).diagonal["weight"],
            error,
            says,
            check,
        )
        for function in (hessdiag.gauss_newton_over_data, hessdiag.empirical_fisher_over_data)
    ]


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
OVER_DATA = [
    *over_data("no data", ValueError, "at least one sample", data=[]),
    *over_data("data that is None", TypeError, "data must yield batches", data=None),
    *over_data("empty batches", ValueError, "one sample", data=[(INPUTS[:0], TARGETS[:0])]),
    *over_data("one batch itself", TypeError, "be [(inputs, targets)]", data=(INPUTS, TARGETS)),
    *over_data("a batch of four", TypeError, "data must yield", data=[(INPUTS,) * 4]),
    *over_data("a batch of NumPy", TypeError, "inputs with a tensor", data=[(np.eye(2), TARGETS)]),
    *over_data(
        "numbers of other samples",
        ValueError,
        "numbers of data must be a tensor of shape (2,)",
        data=[(INPUTS, TARGETS, torch.arange(3))],
    ),
    *over_data(
        "numbers that are floats",
        TypeError,
        "numbers of data must be int64",
        data=[(INPUTS, TARGETS, torch.arange(2.0))],
    ),
    *over_data("inputs that are NaN", ValueError, "finite", data=[(INPUTS * NAN, TARGETS)]),
    *over_data(
        "a loss of each sample", ValueError, "loss must", loss=nn.CrossEntropyLoss(reduction="none")
    ),
    *over_data(
        "class weights",
        ValueError,
        "sum or the mean over the samples",
        loss=WEIGHTED,
        data=[(torch.ones(2, 2), TARGETS)],
    ),
    *over_data("a reduction of no name", ValueError, "reduction must be one of", reduction="max"),
    *over_data("a function without parameters", ValueError, "parameters must", model=torch.sin),
    *over_data(
        "parameters of another module",
        ValueError,
        "by the names of model.named_parameters()",
        parameters={"bias_of_another": torch.ones(2)},
    ),
    *over_data(
        "a module that is frozen",
        ValueError,
        "none of the module requires gradients",
        model=nn.Linear(2, 2).requires_grad_(False),
    ),
    *over_data(
        "layers where samples meet",
        ValueError,
        "BatchNorm layers of model must be in eval mode",
        model=nn.Sequential(LINEAR, nn.BatchNorm1d(2)),
    ),
    Case(
        "a data set from sample -1 on",
        lambda _: hessdiag.gauss_newton_over_data(
            LINEAR, nn.functional.mse_loss, [(X, X)], sample_offset=-1
        ),
        ValueError,
        ("sample_offset must be at least 0, got -1",),
    ),
    Case(
        "a data set from no sample on",
        lambda _: hessdiag.gauss_newton_over_data(
            LINEAR, nn.functional.mse_loss, [(X, X)], sample_offset=None
        ),
        TypeError,
        ("sample_offset must be an int, got NoneType",),
    ),
]


@table([*BAD_POINTS, *GOOD_POINTS])
def test_bad_points(case, tmp_path):
    run(case, tmp_path)


@table(BAD_OUTPUTS)
def test_bad_functions(case, tmp_path):
    run(case, tmp_path)


@table([*BAD_COUNTS, *OPTIONS, *NANS])
def test_bad_options(case, tmp_path):
    run(case, tmp_path)


@table([*PRODUCTS, *BLOCKS, *SOLVERS, *TREES, *FIXED, *RESULTS, *COSINES])
def test_bad_input_of_one_function(case, tmp_path):
    run(case, tmp_path)


@table([*HESSIANS, *OVER_DATA])
def test_bad_input_of_losses(case, tmp_path):
    run(case, tmp_path)
