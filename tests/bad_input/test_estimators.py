"""Bad input of the estimators of hessdiag, over what they share and what each takes alone."""

import math
from functools import partial

import numpy as np
import torch
from bad_input import case, cases_of, cases_of_each, close, holds, run, shaped, table
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
    case(f"{name} at x {what}", lambda f=f, x=x: f(torch.sin, x), error, says)
    for name, f in FUNCTIONS.items()
    for what, (x, error, says) in POINTS.items()
]

with torch.inference_mode():
    OF_INFERENCE_MODE = X.clone()
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
    "of inference mode": (OF_INFERENCE_MODE, 1e-6),
    "without samples": (X[:0], 0.0),
    "without features": (X[:, :0], 0.0),
}


def under(context):
    with context():
        return [hessdiag.exact(torch.sin, X), hessdiag.exact(torch.sin, X, mode="jvp")]


GOOD_POINTS = [
    *(
        case(
            f"{name} at x {what}",
            lambda x=x, f=FUNCTIONS[name]: f(torch.sin, x),
            check=close(x.detach().cos(), atol=error, rtol=0.0, check_dtype=name != "estimate"),
        )
        for name in ("estimate", "hutchinson", "exact")
        for what, (x, error) in UNUSUAL.items()
    ),
    *(
        case(f"under {context.__name__}", lambda c=context: under(c), check=close([COS, COS]))
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
    case(
        f"{name} of a function that returns {what}",
        lambda g=FUNCTIONS[name], f=f: g(f, X),
        error,
        says,
    )
    for name in ("estimate", "jacobian", "trace", "Jacobian")
    for what, (f, error, says) in OUTPUTS.items()
] + [
    case(f"{name} of no function", lambda f=f: f(3, X), TypeError, "score_fn must be callable")
    for name, f in FUNCTIONS.items()
    if name != "hessian_diagonal"
]

# Options that estimators share: the value, the error, and what it says.
COUNTS = [
    (0, ValueError, "must be at least 1, got 0"),
    (-3, ValueError, "must be at least 1, got -3"),
    (2.0, TypeError, "must be an int, got 2.0 of type float"),
    (True, TypeError, "must be an int, got True of type bool"),
    (torch.tensor(4), TypeError, "must be an int, got tensor(4)"),
]
LINEAR = nn.Linear(2, 2)
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
BAD_COUNTS = [
    case(f"{option}: {value!r}", lambda f=f, n=value: f(n), error, f"{option.split()[0]} {says}")
    for takers, no_word in (
        (TAKE_COUNTS, "must be an int, got '4' of type str"),
        (TAKE_CHUNKS, "must be an int or 'auto', got '4'"),
    )
    for option, f in takers.items()
    for value, error, says in [*COUNTS, ("4", TypeError, no_word)]
]

estimate = cases_of(
    lambda f=torch.sin, x=X, **given: hessdiag.estimate(f, x, **given).diagonal, max_probes=4
)
exact = cases_of(hessdiag.exact, score_fn=torch.sin, x=X)
OPTIONS = [
    estimate("a seed below 0", ValueError, "seed must lie in [0, 2**64), got -1", seed=-1),
    estimate("a seed of 65 bits", ValueError, "seed must lie in [0, 2**64)", seed=2**64),
    estimate("a seed that is a float", TypeError, "seed must be an int", seed=1.5),
    estimate("a seed that is a boolean", TypeError, "seed must be an int", seed=True),
    estimate("two seeds", ValueError, "seed must have one element", seed=torch.tensor([1, 2])),
    estimate("the last seed", seed=2**64 - 1, check=close(COS)),
    estimate("a seed of NumPy", seed=np.int64(3), check=close(COS)),
    estimate("a generator", seed=torch.Generator().manual_seed(0), check=close(COS)),
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
    estimate(
        "cosines of samples without axes",
        ValueError,
        "basis must mix at most the 0 axes of a sample of x, got one of 2",
        x=X[0],
        basis=hessdiag.dct(),
    ),
    # F diag(cos) F^T of two features: both entries are the mean.
    estimate(
        "cosines of each sample",
        basis=hessdiag.dct(1),
        probes="auto",
        check=close(COS.mean(1, keepdim=True).expand(2, 2)),
    ),
    case(
        "no further tensors",
        lambda: Jacobian(torch.sin, X, has_aux=True).output,
        TypeError,
        "score_fn must return (output, further tensors)",
        "Tensor",
    ),
    exact(
        "a diagonal of what is not square",
        ValueError,
        "the Jacobian must be square",
        score_fn=Jacobian(lambda x: x[:, :1], X, rectangular=True),
        x=None,
    ),
    exact(
        "x beside a Jacobian",
        ValueError,
        "x must be left out with a hessdiag.Jacobian",
        score_fn=Jacobian(torch.sin, X),
    ),
    exact("no x", TypeError, "x must be given", x=None),
    case(
        "an operator in cosines of the batch",
        lambda: Jacobian(torch.sin, X).in_basis(hessdiag.dct(2)),
        ValueError,
        "basis must mix at most the 1 axes",
    ),
]


def nan_in_the_last_sample(x):
    return torch.where(x > 1.5, NAN, 1.0) * x.sin()


def nan_in_the_last_row(found):
    """A NaN of one sample says nothing about the others, by any probes."""
    close(COS[0])(found[0])
    assert found[1].isnan().any()


NANS = [
    *(
        estimate(
            f"{probes} probes of a function that is NaN in one entry",
            f=nan_in_the_last_sample,
            max_probes=64,
            probes=probes,
            check=nan_in_the_last_row,
        )
        for probes in ("rademacher", "orthogonal", "auto")
    ),
    case(
        "xdiag of a function that is NaN in one entry",
        lambda: hessdiag.xdiag(nan_in_the_last_sample, X, num_probes=4),
        check=lambda found: (
            close(hessdiag.xdiag(torch.sin, X, num_probes=4)[0])(found[0]),
            holds(bool(found[1].isnan().all())),
        ),
    ),
    case(
        "a tolerance of a function that is NaN in one entry",
        lambda: hessdiag.estimate(nan_in_the_last_sample, X, max_probes=64, rtol=0.1),
        check=lambda found: holds(found.converged.tolist() == [True, False]),
    ),
    exact(
        "an infinite derivative",
        score_fn=torch.sqrt,
        x=torch.tensor([[0.0, 4.0]]),
        check=close(torch.tensor([[INF, 0.25]])),
    ),
]


ONES = torch.ones(3, 2, 2)
products = cases_of_each(
    {
        f"{mode} by {batching}": Jacobian(torch.sin, X, mode=mode, batching=batching).products
        for mode in ("vjp", "jvp")
        for batching in ("loop", "vmap", "fold")
    }
)
PRODUCTS = [
    *products("no number", ValueError, "probes must have shape (m, 2", probes=ONES[0]),
    *products("three features", ValueError, "got (1, 2, 3)", probes=torch.ones(1, 2, 3)),
    *products("float64", TypeError, "probes must be a tensor of", probes=ONES.double()),
    *products("integers", TypeError, "as x is, got torch.int64", probes=ONES.long()),
    *products("complex", TypeError, "as x is, got torch.complex64", probes=ONES.cfloat()),
    *products("no data", ValueError, "probes must be on cpu", probes=ONES.to("meta")),
    *products("no probes", TypeError, "probes must be a tensor of", "NoneType", probes=None),
    *products("an empty set", probes=ONES[:0], check=shaped(0, 2, 2)),
]

block = cases_of(
    lambda x=X, **given: hessdiag.block_diagonal(torch.sin, x, **given).blocks, partition=HALVES
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
    block("8 bits number the blocks", partition=HALVES.byte(), check=shaped(2, 2, 1, 1)),
    block("no samples", x=torch.zeros(0, 3, 2), partition="channels", check=shaped(0, 2, 3, 3)),
]


def tridiagonal(found):
    """From k = D on the eigenvalues are those of the matrix."""
    expected = torch.linalg.eigvalsh(MATRIX)
    for T in found:
        torch.testing.assert_close(torch.linalg.eigvalsh(T[:2, :2]), expected)


lanczos = cases_of(lambda f=lambda v: v @ MATRIX, start=X, k=2: hessdiag.lanczos(f, start, k)[1])
SOLVERS = [
    lanczos("a start of integers", TypeError, "start must be a floating-point", start=X.long()),
    lanczos("a start that is a list", TypeError, "start must be a floating", start=[1.0]),
    lanczos("a start of no dimension", TypeError, "(B, ...)", "shape ()", start=torch.tensor(1.0)),
    lanczos("products that are none", ValueError, "products must return", f=lambda v: None),
    lanczos("products without probes", ValueError, "shape (1, 2, 2), got (2, 2)", f=lambda v: v[0]),
    lanczos("products of one feature", ValueError, "products must", f=lambda v: v[..., :1]),
    lanczos("more products than features", k=5, check=tridiagonal),
    lanczos("products in float64", f=lambda v: v.double() @ MATRIX.double(), check=tridiagonal),
    lanczos("no start", start=X[:0], check=shaped(0, 2, 2)),
    lanczos("a start of 0", start=X * 0, check=close(torch.zeros(2, 2, 2))),
    *(
        case(
            f"xdiag by {number} probes",
            lambda n=number: hessdiag.xdiag(torch.sin, X, num_probes=n),
            error,
            says,
        )
        for number, error, says in (
            (0, ValueError, "num_probes must be even, at least 4"),
            (3, ValueError, "num_probes must be even, at least 4 and at most 2 D = 4, got 3"),
            (6, ValueError, "at most 2 D = 4, got 6"),
            (4.0, TypeError, "num_probes must be an int"),
        )
    ),
]

ravel = cases_of(hessdiag.ravel)
restore = cases_of(hessdiag.ravel([torch.ones(2, 1), torch.ones(2, 2)])[1], "values for a tree ")
OF_THREE = "values must be a tensor of shape (..., 3)"
TREES = [
    ravel("an empty tree", ValueError, "at least one tensor", tree=[]),
    ravel("a tree of nothing", TypeError, "tensors only, got NoneType", tree=None),
    ravel("a tree of numbers", TypeError, "tensors only, got float", tree={"a": 1.0}),
    ravel("a tree of two batches", ValueError, "of one B", tree=[X, X[:1]]),
    ravel("a tree of no dimension", ValueError, "shapes (B, ...)", tree=[torch.tensor(1.0)]),
    ravel("a tree of two types", TypeError, "one type on one device", tree=[X, X.double()]),
    restore("that are too many", ValueError, OF_THREE, values=torch.ones(2, 4)),
    restore("that are too few", ValueError, OF_THREE, values=X),
    restore("that are a list", ValueError, OF_THREE, values=[1]),
]

KEPT = hessdiag.fixed_probes(X, 4, seed=5)
kept = partial(estimate, probes=KEPT)
FIXED = [
    kept("kept probes for fewer samples", ValueError, "probes that are kept", x=X[:1]),
    kept("kept probes in float64", ValueError, "of torch.float64", x=X.double()),
    kept("more probes than are kept", ValueError, "at most 4", "got 5", max_probes=5),
    kept("kept probes from the second on", ValueError, "at most 3", probe_offset=1),
    kept("kept probes with another seed", ValueError, "or theirs, 5, got 6", seed=6),
    kept("kept probes of other samples", ValueError, "sample_offset must", sample_offset=3),
    kept("kept probes with their seed", seed=5, check=close(COS)),
    case(
        "probes that wait for products",
        lambda: hessdiag.fixed_probes(X, 4, "auto"),
        ValueError,
        "probes must be a design or one of rademacher, normal, orthogonal",
        "'auto'",
    ),
]

FOUND = hessdiag.estimate(torch.sin, X, max_probes=4)
TRACE = hessdiag.trace(torch.sin, X, max_probes=4)
EXACT = hessdiag.estimate(torch.sin, X, max_probes=4, probes="auto")
merged = cases_of(lambda other, one=FOUND: one.merged(other))
RESULTS = [
    *(
        case(f"an interval of level {x!r}", lambda x=x, of=of: of.interval(x), error, "level must")
        for of, x, error in (
            (FOUND, 0, ValueError),
            (FOUND, 95, ValueError),
            (FOUND, NAN, ValueError),
            (FOUND, "95%", TypeError),
            (FOUND, None, TypeError),
            (TRACE, 1.0, ValueError),
        )
    ),
    merged(
        "merged with another shape",
        ValueError,
        "estimates to merge must have one shape",
        "(1, 2)",
        other=hessdiag.estimate(torch.sin, X[:1], max_probes=4),
    ),
    merged("merged with what is exact", ValueError, "is exact", other=EXACT),
    merged("merged with nothing", TypeError, "other must be a", other=None),
    merged("a diagonal and a trace", TypeError, "DiagonalEstimate", other=TRACE),
    merged("a trace and a diagonal", TypeError, "TraceEstimate", one=TRACE, other=FOUND),
]

cosines = cases_of(lambda x, num_axes=1: hessdiag.dct(num_axes).analyse(x), "cosines of ")
COSINES = [
    cosines("integers", TypeError, "x must be a floating-point tensor", x=X.long()),
    cosines("too few axes", TypeError, "3 axes or more", "(2, 2)", x=X, num_axes=3),
    cosines("a list", TypeError, "x must be a floating-point tensor", "list", x=[1.0]),
    cosines("nothing", x=X[:, :0], check=shaped(2, 0)),
]

hessian = cases_of(lambda f: hessdiag.hessian_diagonal(f, X, max_probes=4).diagonal)
of_parameters = cases_of(
    lambda **given: hessdiag.parameter_hessian_diagonal(**given).diagonal,
    loss=squares,
    parameters=X,
    max_probes=4,
)
gauss_newton = cases_of(
    lambda **given: hessdiag.gauss_newton_diagonal(**given).diagonal,
    model=lambda w: X @ w,
    loss=squares,
    parameters=torch.ones(2),
    max_probes=2,
    probes="auto",
)
HESSIANS = [
    hessian("an energy that is None", TypeError, "f must return a torch.Tensor", f=lambda x: None),
    hessian("an energy of entries", ValueError, "shape (2,), or their sum", f=lambda x: x),
    hessian("an energy of one sample", ValueError, "got (1,)", f=lambda x: x.sum()[None]),
    hessian("a detached energy", ValueError, "does not depend on x", f=lambda x: x.detach().sum()),
    hessian("a complex energy", TypeError, "f must return real", f=lambda x: (x * 1j).sum()),
    hessian("a linear energy", f=lambda x: x.sum(), check=close(torch.zeros(2, 2))),
    hessian("an energy in float64", f=lambda x: squares(x.double()), check=close(0 * X + 2)),
    of_parameters("a loss of entries", ValueError, "loss must return a 0-dim", loss=lambda p: p),
    of_parameters("no loss", ValueError, "loss must return", "NoneType", loss=lambda p: None),
    of_parameters("a complex loss", TypeError, "a real number", loss=lambda p: (p * 1j).sum()),
    of_parameters("a constant loss", ValueError, "no backward graph", loss=lambda p: X.sum()),
    of_parameters("no parameters", ValueError, "at least one tensor", parameters=[]),
    of_parameters("parameters of integers", TypeError, "parameters must", parameters=X.long()),
    of_parameters("parameters that are a module", TypeError, "tensors only", parameters=LINEAR),
    of_parameters("a parameter that is NaN", ValueError, "finite", parameters=X * NAN),
    of_parameters("sparse parameters", TypeError, "must be a dense", parameters=X.to_sparse()),
    of_parameters("parameters without data", ValueError, "hold data", parameters=X.to("meta")),
    of_parameters("a mode of no name", ValueError, "mode must be one of", mode="reverse"),
    of_parameters("a tolerance without errors", ValueError, "stderr must", rtol=0.1, stderr=False),
    of_parameters("parameters in float16", parameters=X.half(), check=close(0 * X + 2)),
    of_parameters("parameters of no entries", parameters=X[:0], check=shaped(0, 2)),
    gauss_newton("a model that returns a tuple", TypeError, "tuple", model=lambda w: (X @ w,)),
    gauss_newton("a complex model", TypeError, "real numbers", model=lambda w: X @ w * 1j),
    gauss_newton("a model without parameters", ValueError, "no backward graph", model=lambda w: X),
    gauss_newton("a loss of all outputs", ValueError, "loss must return", loss=lambda y: y),
    gauss_newton("a complex loss of outputs", TypeError, "real", loss=lambda y: (y * 1j).sum()),
    gauss_newton("a linear loss of outputs", loss=lambda y: y.sum(), check=close(torch.zeros(2))),
]

INPUTS, TARGETS = torch.eye(2), torch.tensor([0, 1])


over_data = cases_of_each(
    {
        "Gauss-Newton": hessdiag.gauss_newton_over_data,
        "Fisher": hessdiag.empirical_fisher_over_data,
    },
    model=LINEAR,
    loss=nn.functional.cross_entropy,
    data=[(INPUTS, TARGETS)],
)
numbered = cases_of(
    hessdiag.gauss_newton_over_data, model=LINEAR, loss=nn.functional.mse_loss, data=[(X, X)]
)
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
    numbered(
        "a data set from sample -1 on",
        ValueError,
        "sample_offset must be at least 0, got -1",
        sample_offset=-1,
    ),
    numbered(
        "a data set from no sample on",
        TypeError,
        "sample_offset must be an int, got NoneType",
        sample_offset=None,
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
