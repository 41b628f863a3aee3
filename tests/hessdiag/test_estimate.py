"""estimate: variances, coverage, tolerances, choice of probes, reproducibility, errors."""

import gc
import itertools
import math
import weakref

import pytest
import torch
from one_device import one_device
from scipy import stats
from torch import nn

import hessdiag
from hessdiag.hadamard import hadamard, next_order
from hessdiag.probes import BalancedColoring, Coloring, Normal, Rademacher, UnitVectors
from hessdiag.streaming import chunk_of

IMAGE = (2, 4, 4)
D = math.prod(IMAGE)


def linear(A):
    return lambda x: (x.flatten(1) @ A.to(x).T).reshape(x.shape)


def random_matrix(size=D, seed=1):
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def decaying_matrix(shape, rate=1.5, seed=2):
    """A random matrix whose entries fall off with the distance between pixels."""
    channels, height, width = shape
    rows = torch.arange(height).repeat_interleave(width).repeat(channels)
    columns = torch.arange(width).repeat(height * channels)
    distance = ((rows[:, None] - rows).square() + (columns[:, None] - columns).square()).sqrt()
    return random_matrix(len(rows), seed) * torch.exp(-rate * distance)


def neighbours(shape, rate=1.5):
    """A function that couples pixels near one another, whose Jacobian varies with x.

    Products of single numbers and shifts alone, which round the same in any chunk and batch.
    """
    shifts = list(itertools.product((-2, -1, 0, 1, 2), repeat=2))
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(len(shifts), *shape, generator=generator)
    weights *= torch.tensor([math.exp(-rate * math.hypot(*s)) for s in shifts])[:, None, None, None]

    def score_fn(z):
        w = z - z * z * z / 6
        parts = [torch.roll(w, s, dims=(-2, -1)) for s in shifts]
        return sum(weight * part for weight, part in zip(weights, parts, strict=True))

    return score_fn


@pytest.fixture(scope="module")
def network():
    """A small convolutional network, and its exact Jacobian at one image."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 3, padding=1)
    ).requires_grad_(False)
    x = torch.randn(1, *IMAGE)
    return module, x, hessdiag.jacobian(module, x)[0].double()


def same_color(colors):
    colors = colors.flatten()
    return (colors[:, None] == colors).double()


def balanced_factor(num_colors):
    sizes = [len(range(c, D, num_colors)) for c in range(num_colors)]
    return sum(n * (n - 1) for n in sizes) / (D * (D - 1))


# Design, and the variance of one block from the squares J_ij^2 off the diagonal and on it.
DESIGNS = {
    "rademacher": (Rademacher(), lambda off, own: off.sum(1)),
    "normal": (Normal(), lambda off, own: off.sum(1) + 2 * own),
    "coloring 2": (
        Coloring(2),
        lambda off, own: (off * same_color(Coloring(2).colors(IMAGE, "cpu"))).sum(1),
    ),
    "coloring 7": (
        Coloring(7),
        lambda off, own: (off * same_color(Coloring(7).colors(IMAGE, "cpu"))).sum(1),
    ),
    "coloring 9, dense": (
        Coloring(9, dense=True),
        lambda off, own: (off * same_color(Coloring(9).colors(IMAGE, "cpu"))).sum(1),
    ),
    "balanced 8": (BalancedColoring(8), lambda off, own: off.sum(1) * balanced_factor(8)),
    "balanced 5": (BalancedColoring(5), lambda off, own: off.sum(1) * balanced_factor(5)),
}


class TestStatistics:
    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    @pytest.mark.parametrize("name", DESIGNS)
    @pytest.mark.parametrize("where", ["random matrix", "network"])
    def test_mean_and_variance(self, network, where, name, mode):
        """Two blocks for each of 6,000 samples, which have random numbers of their own."""
        design, formula = DESIGNS[name]
        module, x, J = network
        if where == "random matrix":
            J = random_matrix().double()
            module = linear(J)
        count, size = 6000, design.block_size(IMAGE)
        result = hessdiag.estimate(
            module, x.expand(count, *IMAGE), probes=design, max_probes=2 * size, mode=mode
        )
        assert result.num_probes.tolist() == [2 * size] * count
        values = result.diagonal.flatten(1).double()
        squares = J.square() if mode == "jvp" else J.T.square()
        off = squares - torch.diag(squares.diagonal())
        expected = formula(off, squares.diagonal()) / 2
        tiny = 1e-10 * squares.sum()
        errors = (expected / count).sqrt() + 1e-6 * J.diagonal().abs()
        assert ((values.mean(0) - J.diagonal()).abs() < 5 * errors).all()
        assert ((values.var(0) - expected).abs() < 0.1 * expected + tiny).all()
        # The mean of the squared standard errors is that variance too, and more where few others
        # disturb an entry, whose two blocks then may agree by luck.
        reported = result.stderr.flatten(1).double().square().mean(0)
        assert (reported > 0.9 * expected - tiny).all()
        if "coloring" not in name:
            assert (reported < 1.1 * expected + tiny).all()
        assert reported.mean() < 1.5 * expected.mean()

    @pytest.mark.parametrize(
        ("design", "max_probes", "blocks"),
        [(Rademacher(), 64, 64), (Normal(), 64, 64), (Coloring(16), 64, 4)],
    )
    def test_standard_errors_cover(self, design, max_probes, blocks):
        shape = (1, 16, 16)
        A, x = random_matrix(256), torch.zeros(1, *shape)
        quantile = 1.96 if blocks > 30 else stats.t.ppf(0.975, blocks - 1)
        inside = []
        for seed in range(400):
            result = hessdiag.estimate(
                linear(A), x, probes=design, max_probes=max_probes, seed=seed, mode="jvp"
            )
            assert result.num_blocks.item() == blocks
            difference = (result.diagonal.flatten() - A.diagonal()).abs()
            inside.append((difference <= quantile * result.stderr.flatten()).double().mean())
        assert 0.93 <= torch.stack(inside).mean() <= 0.97

    def test_the_standard_error_is_that_of_the_mean(self):
        """Not divided by the square root of M twice, nor not at all."""
        A, x, M = random_matrix(), torch.zeros(1, *IMAGE), 50
        result = hessdiag.estimate(linear(A), x, max_probes=M, mode="jvp")
        v = hessdiag.kernels.rademacher((M, 1, *IMAGE), 0).flatten(1)
        y = v * (v @ A.T)
        torch.testing.assert_close(result.diagonal.flatten(), y.mean(0), rtol=1e-4, atol=1e-5)
        expected = y.std(0) / M**0.5
        torch.testing.assert_close(result.stderr.flatten(), expected, rtol=1e-4, atol=1e-6)

    def test_one_block_has_no_standard_error(self):
        result = hessdiag.estimate(linear(random_matrix()), torch.zeros(1, *IMAGE), max_probes=1)
        assert torch.isinf(result.stderr).all()

    def test_unit_vectors_are_exact(self):
        A = random_matrix()
        result = hessdiag.estimate(
            linear(A), torch.zeros(2, *IMAGE), probes=UnitVectors(), max_probes=D
        )
        torch.testing.assert_close(result.diagonal.flatten(1), A.diagonal().expand(2, -1))
        assert (result.stderr == 0).all()

    def test_more_probes_than_an_exact_block_are_not_taken(self):
        taken = []

        def score_fn(x):
            taken.append(len(x))
            return torch.sin(x)

        result = hessdiag.estimate(
            score_fn, torch.zeros(1, 5), probes=UnitVectors(), max_probes=50, batching="loop",
            mode="jvp",
        )  # fmt: skip
        assert result.num_probes.tolist() == [5]
        assert sum(taken) < 10


class TestDesigns:
    @pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 32, 48, 60, 64, 192])
    def test_hadamard(self, order):
        H = hadamard(order).int()
        assert torch.equal(H @ H.T, order * torch.eye(order, dtype=torch.int32))
        assert next_order(order) == order
        assert next_order(order - 1) == order or order < 4

    def test_hadamard_of_no_order(self):
        with pytest.raises(ValueError, match=r"order must be .*, got 6"):
            hadamard(6)

    @pytest.mark.parametrize("num_colors", [2, 3, 5, 8])
    @pytest.mark.parametrize("shape", [(2, 4, 5), (1, 6, 6), (3, 7)])
    def test_the_lattice_is_the_best_of_all(self, num_colors, shape):
        """Against the energy of pairs of features of one color, by loops over all lattices."""
        features = list(itertools.product(*map(range, shape)))

        def energy(colors):
            total = 0
            for p, q in itertools.combinations(features, 2):
                if colors[p] == colors[q]:
                    distance = sum((i - j) ** 2 for i, j in zip(p[1:], q[1:], strict=True))
                    total += 2**30 // (distance + (p[0] != q[0])) ** 3
            return total

        best = min(
            energy(
                {p: (g * p[0] + p[1] + sum(b * i for i in p[2:])) % num_colors for p in features}
            )
            for g in range(num_colors)
            for b in range(num_colors)
        )
        colors = Coloring(num_colors).colors(shape, "cpu")
        assert energy({p: int(colors[p]) for p in features}) == best

    @pytest.mark.parametrize("num_colors", [12, 48, 192, 500])
    def test_many_colors_keep_features_far_apart(self, num_colors):
        colors = Coloring(num_colors).colors((3, 16, 16), "cpu")
        assert colors.min() >= 0
        assert colors.max() < num_colors
        assert all(len(set(pixel.tolist())) == 3 for pixel in colors.flatten(1).T)
        places = [(colors == color).nonzero()[:, 1:].double() for color in range(num_colors)]
        nearest = min(torch.nn.functional.pdist(p).min() for p in places if len(p) > 1)
        # A square lattice of that many colors in one channel has this distance.
        assert nearest >= 0.7 * (num_colors / 3) ** 0.5

    def test_both_forms_are_the_same_estimate(self):
        """With the same sign vectors the dense form is the one-color form, rotated."""
        A, x = random_matrix(), torch.zeros(3, *IMAGE)
        one, dense = (
            hessdiag.estimate(linear(A), x, probes=Coloring(8, dense=dense), max_probes=16)
            for dense in (False, True)
        )
        torch.testing.assert_close(one.diagonal, dense.diagonal, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.stderr, dense.stderr, rtol=1e-4, atol=1e-4)

    def test_balanced_colors_are_balanced(self):
        v = BalancedColoring(5).draw(
            (10, 3, *IMAGE),
            torch.tensor(0),
            probe_offset=0,
            sample_offset=0,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        counts = v.abs().flatten(2).sum(2)
        assert set(counts.flatten().tolist()) == {D // 5, D // 5 + 1}
        assert torch.equal(v[:5].abs().sum(0), torch.ones(3, *IMAGE))
        assert not torch.equal(v[:5].abs(), v[5:].abs())

    @pytest.mark.parametrize("name", DESIGNS)
    def test_probes_do_not_depend_on_how_they_are_drawn(self, name):
        design = DESIGNS[name][0]

        def draw(count, batch, probe_offset, sample_offset):
            return design.draw(
                (count, batch, *IMAGE),
                torch.tensor(7),
                probe_offset=probe_offset,
                sample_offset=sample_offset,
                dtype=torch.float32,
                device=torch.device("cpu"),
            )

        whole = draw(70, 4, 0, 10)
        assert torch.equal(draw(30, 4, 40, 10), whole[40:])
        assert torch.equal(draw(70, 1, 0, 12), whole[:, 2:3])

    def test_a_design_of_ones_own(self):
        class EveryOther(hessdiag.ProbeDesign):
            """The even features first, then the odd ones."""

            def block_size(self, sample_shape):
                return 2

            def weight(self, sample_shape):
                return 1.0

            def draw(self, shape, seed, *, probe_offset, sample_offset, dtype, device):
                z = hessdiag.kernels.rademacher(
                    shape, seed, probe_offset=probe_offset, sample_offset=sample_offset
                )
                place = torch.arange(probe_offset, probe_offset + shape[0]) % 2
                parity = torch.arange(math.prod(shape[2:])) % 2
                return z * (parity == place[:, None]).reshape(shape[0], 1, *shape[2:])

        A = random_matrix(6)
        A[0::2, 0::2] = torch.diag(A[0::2, 0::2].diagonal())
        A[1::2, 1::2] = torch.diag(A[1::2, 1::2].diagonal())
        result = hessdiag.estimate(
            linear(A), torch.zeros(2, 6), probes=EveryOther(), max_probes=5, mode="jvp"
        )
        torch.testing.assert_close(result.diagonal, A.diagonal().expand(2, -1))
        assert result.num_probes.tolist() == [4, 4]
        assert result.num_blocks.tolist() == [2, 2]


class TestTolerance:
    @pytest.fixture
    def scaled(self):
        """Samples whose off-diagonal energy differs by powers of ten."""
        A = random_matrix(40)
        off = A - torch.diag(A.diagonal())
        scale = torch.tensor([0.0, 0.01, 0.1, 1.0])
        x = torch.zeros(4, 40)

        def score_fn(z):
            return z * A.diagonal() + scale[-len(z) :, None] * (z @ off.T)

        return score_fn, x

    def test_each_sample_stops_on_its_own(self, scaled):
        score_fn, x = scaled
        result = hessdiag.estimate(score_fn, x, rtol=0.05, max_probes=1000)
        assert result.num_probes[0] == 16
        assert (result.num_probes.diff() >= 0).all()
        assert result.num_probes[2] < result.num_probes[3] == 1000
        for sample in range(3):
            M = int(result.num_probes[sample])
            alone = hessdiag.estimate(score_fn, x, max_probes=M)
            # The matrix product may round differently in chunks of another size.
            for field in ("diagonal", "stderr"):
                ours, theirs = (getattr(r, field)[sample] for r in (result, alone))
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
            assert self.reached(result, sample, 0.05)
            if M > 16:
                before = hessdiag.estimate(score_fn, x, max_probes=M - 16)
                assert not self.reached(before, sample, 0.05)
        assert result.converged.tolist() == [True, True, True, False]

    def reached(self, result, sample, rtol):
        """With 40 entries, of which every eighth errs on its own: F with 5 and 5 (M - 1)."""
        degrees = int(result.num_blocks[sample]) - 1
        quantile = stats.f.ppf(0.95, 5, 5 * degrees) ** 0.5
        reach = quantile * result.stderr[sample].square().mean().sqrt()
        return reach <= rtol * (result.diagonal[sample].square().mean().sqrt() - reach)

    @pytest.mark.parametrize(("probes", "rtol"), [("rademacher", 0.08), (Coloring(4), 0.05)])
    def test_stopping_does_not_depend_on_chunks_or_batches(self, probes, rtol):
        x = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(3))
        score_fn = neighbours((1, 6, 6))

        def run(x, **arguments):
            return hessdiag.estimate(
                score_fn, x, probes=probes, rtol=rtol, max_probes=300, **arguments
            )

        whole = run(x)
        assert 16 < whole.num_probes.min() < whole.num_probes.max() < 300
        for chunk_size in (1, 7, 300):
            result = run(x, chunk_size=chunk_size)
            assert torch.equal(result.diagonal, whole.diagonal)
            assert torch.equal(result.num_probes, whole.num_probes)
        parts = [run(x[:1]), run(x[1:], sample_offset=1)]
        for field in ("diagonal", "stderr", "num_probes", "num_blocks"):
            joined = torch.cat([getattr(part, field) for part in parts])
            assert torch.equal(joined, getattr(whole, field)), field

    def test_it_never_exceeds_max_probes(self):
        A = random_matrix(40)
        for max_probes in (1, 5, 16, 17, 50):
            result = hessdiag.estimate(
                linear(A), torch.zeros(2, 40), rtol=1e-9, max_probes=max_probes
            )
            assert result.num_probes.tolist() == [max_probes] * 2

    def test_absolute_tolerance(self):
        A = random_matrix(40)
        result = hessdiag.estimate(linear(A), torch.zeros(1, 40), atol=1.0, max_probes=10_000)
        assert result.num_probes.item() < 100
        assert result.stderr.square().mean().sqrt() <= 1.0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rtol": -0.1}, "rtol must be at least 0, got -0.1"),
            ({"atol": float("nan")}, "atol must be at least 0, got nan"),
            ({"rtol": 0.0}, "rtol or atol must be positive"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            hessdiag.estimate(torch.sin, torch.zeros(1, 2), max_probes=3, **arguments)

    def test_a_tolerance_that_is_no_number(self):
        with pytest.raises(TypeError, match=r"rtol must be a number, got '0\.1' of type str"):
            hessdiag.estimate(torch.sin, torch.zeros(1, 2), max_probes=3, rtol="0.1")


class TestChoice:
    """probes="coloring" and "auto"."""

    shape = (1, 16, 16)

    def choose(self, A, max_probes, probes="auto", x=None, **arguments):
        x = torch.zeros(2, *self.shape) if x is None else x
        return hessdiag.estimate(linear(A), x, probes=probes, max_probes=max_probes, **arguments)

    def test_a_fast_decay_takes_one_block(self):
        A = decaying_matrix(self.shape, rate=2.0)
        result = self.choose(A, 70, probes="coloring")
        assert result.num_probes.tolist() == [70, 70]  # 2 to measure, one block of 68
        assert result.num_blocks.tolist() == [1, 1]
        assert "Coloring(num_colors=68, dense=False) for 2" in result.note

    def test_a_slow_decay_takes_smaller_blocks(self):
        """Features are coupled that share a color in every coloring of 68 colors."""
        A = same_color(Coloring(68).colors(self.shape, "cpu")).float()
        result = self.choose(A, 70, probes="coloring")
        assert "Coloring(num_colors=34, dense=False) for 2" in result.note
        assert result.num_probes.tolist() == [70, 70]
        assert result.num_blocks.tolist() == [2, 2]

    def test_a_fast_decay_takes_a_lattice(self):
        A = decaying_matrix(self.shape, rate=2.0)
        result = self.choose(A, 30)
        assert result.num_probes.tolist() == [30, 30]
        assert result.num_blocks.tolist() == [1, 1]
        assert torch.isinf(result.stderr).all()
        assert "for 2, random cells for 0" in result.note

    def test_pilots_come_in_chunks(self):
        most = []

        def products(x):
            most.append(len(x))
            return x.sin()

        x = torch.zeros(1, 3, 16, 16)
        hessdiag.estimate(products, x, max_probes=48, probes="auto", chunk_size=1, batching="fold")
        assert max(most) == 1

    def test_no_structure_takes_random_cells(self):
        result = self.choose(random_matrix(256), 30)
        assert "for 0, random cells for 2" in result.note
        assert result.num_probes.tolist() == [30, 30]

    @pytest.mark.parametrize("chunk_size", [1, 7, "auto"])
    def test_each_sample_has_its_own_choice(self, chunk_size):
        fast, dense = decaying_matrix(self.shape, rate=2.0), random_matrix(256)
        matrices = [fast, dense, fast]

        def score_fn(x):
            pairs = zip(x, which, strict=True)
            return torch.stack([(matrices[k] @ z.flatten()).reshape(z.shape) for z, k in pairs])

        def run(count, sample_offset):
            x = torch.zeros(count, *self.shape)
            return hessdiag.estimate(
                score_fn,
                x,
                probes="auto",
                max_probes=30,
                sample_offset=sample_offset,
                chunk_size=chunk_size,
                batching="loop",
            )

        which = [0, 1, 2]
        whole = run(3, 0)
        assert "for 2, random cells for 1" in whole.note
        which = [0, 1]
        first = run(2, 0)
        which = [2]
        last = run(1, 2)
        assert torch.equal(torch.cat([first.diagonal, last.diagonal]), whole.diagonal)
        for sample, matrix in enumerate(matrices):
            difference = whole.diagonal[sample].flatten() - matrix.diagonal()
            bound = 0.1 if sample != 1 else 1.5 * (255 / 30) ** 0.5
            assert difference.norm() < bound * matrix.diagonal().norm()

    def test_a_sequence_of_blocks_is_continued(self):
        """Each block of 30 has a lattice and signs of its own; the mean of two is what it says."""
        A = decaying_matrix(self.shape, rate=1.0)
        parts = [self.choose(A, 30, probe_offset=30 * block).diagonal for block in range(40)]
        errors = torch.stack(parts).flatten(2) - A.diagonal()
        alone, together = errors.square().mean(), errors.mean(0).square().mean()
        assert 0.5 < 40 * together / alone < 1.5

    @pytest.mark.parametrize("max_probes", [1, 3, 4, 16, 39])
    def test_few_probes_are_not_spent_on_measuring(self, max_probes):
        A = decaying_matrix(self.shape, rate=2.0)
        given = self.choose(A, max_probes, probes=Coloring(max_probes))
        result = self.choose(A, max_probes, probes="coloring")
        assert torch.equal(result.diagonal, given.diagonal)
        assert result.num_probes.tolist() == [max_probes] * 2

    @pytest.mark.parametrize(("max_probes", "num_probes"), [(5, 5), (7, 7), (14, 14)])
    def test_no_probe_of_a_vector_is_lost_where_that_costs(self, max_probes, num_probes):
        result = self.choose(random_matrix(15), max_probes, x=torch.zeros(2, 15))
        assert result.num_probes.tolist() == [num_probes] * 2

    def test_few_probes_with_a_tolerance_are_signs(self):
        result = self.choose(decaying_matrix(self.shape), 39, rtol=0.1)
        signs = self.choose(decaying_matrix(self.shape), 39, rtol=0.1, probes="rademacher")
        assert torch.equal(result.diagonal, signs.diagonal)

    def test_a_tolerance_takes_two_blocks_of_a_stride_that_reaches_it(self):
        A = decaying_matrix(self.shape, rate=1.0)
        result = self.choose(A, 1000, rtol=0.03)
        assert (result.num_probes < 256).all()
        assert (result.num_blocks >= 2).all()
        error = result.stderr.flatten(1).square().mean(1).sqrt()
        assert (error <= 0.03 * result.diagonal.flatten(1).square().mean(1).sqrt()).all()
        assert result.converged.all()
        plain = self.choose(A, 1000, rtol=0.03, probes="rademacher")
        assert (result.num_probes < plain.num_probes).all()

    def test_a_tight_tolerance_takes_the_exact_diagonal(self):
        result = self.choose(random_matrix(256), 1000, rtol=1e-3)
        assert result.num_probes.tolist() == [258, 258]
        assert (result.stderr == 0).all()

    def test_enough_probes_are_exact(self):
        A = random_matrix(256)
        result = self.choose(A, 256)
        torch.testing.assert_close(result.diagonal.flatten(1), A.diagonal().expand(2, -1))
        assert "exact" in result.note

    @pytest.mark.parametrize(
        ("max_probes", "blocks", "num_probes"), [(1, 1, 1), (4, 4, 4), (20, 2, 20), (32, 1, 32)]
    )
    def test_features_without_geometry(self, max_probes, blocks, num_probes):
        result = self.choose(random_matrix(32), max_probes, x=torch.zeros(2, 32))
        assert result.num_blocks.tolist() == [blocks] * 2
        assert result.num_probes.tolist() == [num_probes] * 2

    def test_orthogonal(self):
        result = self.choose(random_matrix(32), 21, probes="orthogonal", x=torch.zeros(2, 32))
        given = self.choose(
            random_matrix(32), 21, probes=BalancedColoring(10), x=torch.zeros(2, 32)
        )
        assert torch.equal(result.diagonal, given.diagonal)

    @pytest.mark.parametrize(
        ("probes", "x", "max_probes", "error", "message"),
        [
            ("signs", torch.zeros(1, 2), 3, ValueError, "probes must be one of .*, got 'signs'"),
            (
                3,
                torch.zeros(1, 2),
                3,
                TypeError,
                "probes must be a name or a design, an object.*got int",
            ),
            ("coloring", torch.zeros(1, 2), 3, ValueError, r"\(B, channels, \.\.\.\).*orthogonal"),
            (Coloring(2), torch.zeros(1, 2), 8, ValueError, "coloring needs samples of shape"),
            (Coloring(4), torch.zeros(1, 1, 4, 4), 3, ValueError, "at least 4, a block of Colo"),
            (Coloring(9), torch.zeros(1, 2, 4), 9, ValueError, "at most the number of features, 8"),
            (BalancedColoring(5), torch.zeros(1, 4), 9, ValueError, "at most the number of feat"),
        ],
    )
    def test_errors(self, probes, x, max_probes, error, message):
        with pytest.raises(error, match=message):
            hessdiag.estimate(torch.sin, x, probes=probes, max_probes=max_probes)

    def test_a_continued_estimate_starts_at_a_block(self):
        x = torch.zeros(1, 1, 4, 4)
        with pytest.raises(ValueError, match="probe_offset must be a multiple of 4"):
            hessdiag.estimate(torch.sin, x, probes=Coloring(4), max_probes=8, probe_offset=6)


class TestReproducibility:
    @pytest.mark.parametrize("probes", ["rademacher", "normal", Coloring(5), BalancedColoring(7)])
    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    def test_chunks_and_batches_do_not_change_a_bit(self, probes, mode):
        torch.manual_seed(0)
        matrices = torch.randn(2, D, D, dtype=torch.float64)
        x = torch.randn(5, *IMAGE, dtype=torch.float64)

        def score_fn(x):
            # One row at a time, so that the matrix products round the same in any batch.
            rows = [matrices[1] @ (matrices[0] @ row.flatten()).tanh() for row in x]
            return torch.stack(rows).reshape(x.shape)

        def run(x, **arguments):
            return hessdiag.estimate(
                score_fn, x, probes=probes, max_probes=24, mode=mode, batching="loop", **arguments
            )

        whole = run(x)
        for chunk_size in (1, 5, 24):
            result = run(x, chunk_size=chunk_size)
            assert torch.equal(result.diagonal, whole.diagonal)
            assert torch.equal(result.stderr, whole.stderr)
        parts = [run(x[:2], chunk_size=3), run(x[2:], sample_offset=2)]
        assert torch.equal(torch.cat([part.diagonal for part in parts]), whole.diagonal)

    def test_every_way_is_the_same_estimate(self, unet):
        x = torch.randn(2, 2, 8, 8)
        for mode in ("vjp", "jvp"):
            results = [
                hessdiag.estimate(
                    lambda x: unet.eval()(x, 9).sample,
                    x,
                    max_probes=6,
                    chunk_size=4,
                    mode=mode,
                    batching=batching,
                )
                for batching in ("loop", "fold", "auto")
            ]
            for result in results[1:]:
                difference = result.diagonal - results[0].diagonal
                assert difference.norm() < 1e-5 * results[0].diagonal.norm()


class TestPasses:
    @pytest.mark.parametrize("design", [Normal(), Rademacher()])
    def test_all_probes_of_a_chunk_are_one_launch(self, design):
        seed, device = torch.zeros((), dtype=torch.int64, device="meta"), torch.device("meta")
        options = {"probe_offset": 3, "sample_offset": 0, "dtype": torch.float32, "device": device}
        with one_device() as operators:
            assert design.draw((64, 2, 5), seed, **options).shape == (64, 2, 5)
        assert len(operators.launches) == 1

    def test_memory_running_out_halves_the_chunk(self, monkeypatch):
        A, x, sizes = random_matrix(40), torch.zeros(2, 40), []

        def limited(z):
            sizes.append(len(z))
            if len(z) > 3 * 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return linear(A)(z)

        with pytest.warns(UserWarning, match="memory does not hold 16 probes") as warned:
            result = hessdiag.estimate(
                limited, x, max_probes=20, batching="fold", mode="jvp", chunk_size=16
            )
        (warning,) = warned
        assert "it is 2 now, which changes no result; chunk_size=2 saves" in str(warning.message)
        expected = hessdiag.estimate(linear(A), x, max_probes=20, mode="jvp")
        torch.testing.assert_close(result.diagonal, expected.diagonal)
        assert max(sizes[3:]) <= 6
        assert "out of memory with 16 probes at a time, now 8" in result.note
        assert "now 2" in result.note

    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    def test_nothing_of_a_chunk_is_left_when_the_next_is_made(self, mode):
        """Whether it ran out of memory or not: no more than one chunk is held."""
        drawn, alive = [], []

        class Watched(Normal):
            def draw(self, *arguments, **options):
                alive.append(sum(probes() is not None for probes in drawn))
                probes = super().draw(*arguments, **options)
                drawn.append(weakref.ref(probes))
                return probes

        def run_out(gradient=None):
            if len(drawn) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

        def limited(z):
            y = z.sin()
            if mode == "vjp":
                y.register_hook(run_out)
            else:
                run_out()
            return y

        arguments = {"max_probes": 24, "chunk_size": 8, "mode": mode, "batching": "loop"}
        gc.disable()  # what is freed is freed at once
        try:
            with pytest.warns(UserWarning, match="does not hold 8 probes at a time: it is 4 now"):
                result = hessdiag.estimate(
                    limited, torch.zeros(2, 4), probes=Watched(), **arguments
                )
        finally:
            gc.enable()
        assert "out of memory with 8 probes at a time, now 4" in result.note
        assert alive == [0] * 6
        expected = hessdiag.estimate(torch.sin, torch.zeros(2, 4), probes=Normal(), **arguments)
        assert torch.equal(result.diagonal, expected.diagonal)

    def test_memory_that_pytorch_keeps_is_free(self, monkeypatch):
        class OnGPU:
            is_cuda, device = True, torch.device("cuda", 1)

            def numel(self):
                return 4096

            def element_size(self):
                return 4

        asked = []

        def bytes_of(number):
            return lambda device: asked.append(device) or number

        chunk = 64 * 4096 * 4  # of one probe
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * chunk, 0))
        monkeypatch.setattr(torch.cuda, "memory_reserved", bytes_of(50 * chunk))
        monkeypatch.setattr(torch.cuda, "memory_allocated", bytes_of(10 * chunk))
        assert chunk_of("auto", OnGPU()) == 43
        assert asked == [OnGPU.device] * 2

    def test_memory_that_holds_no_probe_raises(self):
        def hungry(z):
            raise torch.OutOfMemoryError("CUDA out of memory")

        message = "does not hold the products with one probe, which is the least chunk_size; give a"
        for chunk_size in (1, 4, "auto"):
            with pytest.raises(torch.OutOfMemoryError, match=f"{message} .*CUDA out of memory"):
                hessdiag.estimate(
                    hungry, torch.zeros(1, 2), max_probes=4, mode="jvp", chunk_size=chunk_size
                )

    @pytest.mark.parametrize(("chunk_size", "first"), [("auto", 12), (7, 7)])
    def test_a_halved_chunk_is_said_where_the_result_has_no_note(self, chunk_size, first):
        A, x = random_matrix(12), torch.zeros(1, 12)

        def limited(z):
            if len(z) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return linear(A)(z)

        options = {"batching": "fold", "mode": "jvp", "chunk_size": chunk_size}
        with pytest.warns(UserWarning, match=f"does not hold {first} .* chunk_size=3 saves"):
            found = hessdiag.jacobian(limited, x, **options)
        torch.testing.assert_close(found[0], A)

    def test_a_graph_that_does_not_fit_leads_to_forward_mode(self):
        def deep(z):
            if torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory: the graph")
            return z.sin()

        result = hessdiag.estimate(deep, torch.zeros(1, 2), max_probes=4)
        assert (result.mode, result.batching) == ("jvp", "vmap")
        assert "not mode='vjp': CUDA out of memory: the graph" in result.note
        assert torch.equal(result.diagonal, torch.ones(1, 2))

    def test_what_vmap_lacks_is_looped_over(self):
        class Doubled(torch.autograd.Function):
            """With a forward-mode rule and none for vmap."""

            @staticmethod
            def forward(z):
                return 2 * z

            @staticmethod
            def setup_context(ctx, inputs, output):
                pass

            @staticmethod
            def jvp(ctx, tangent):
                return 2 * tangent

        result = hessdiag.estimate(Doubled.apply, torch.zeros(1, 2), max_probes=4, mode="jvp")
        assert torch.equal(result.diagonal, torch.full((1, 2), 2.0))
        assert result.batching == "loop"
        assert "batching='vmap'" in result.note

    def test_the_way_is_named(self, network):
        module, x, _ = network
        for count, batching in ((1, "vmap"), (200, "loop")):
            result = hessdiag.estimate(module, x.expand(count, *IMAGE), max_probes=2)
            assert (result.mode, result.batching, result.note) == ("vjp", batching, "")
        result = hessdiag.estimate(module, x, max_probes=2, mode="jvp", batching="fold")
        assert (result.mode, result.batching, result.note) == ("jvp", "fold", "")

    def test_channels_last_is_no_hindrance_to_vmap(self, network):
        module, x, J = network
        x = x.expand(3, *IMAGE).contiguous(memory_format=torch.channels_last)
        result = hessdiag.estimate(module, x, max_probes=D, probes="auto")
        assert (result.mode, result.batching) == ("vjp", "vmap")
        expected = J.diagonal().float().expand(3, -1)
        torch.testing.assert_close(result.diagonal.flatten(1), expected, rtol=1e-4, atol=1e-5)

    def test_compile(self, network):
        module, x, _ = network
        plain = hessdiag.estimate(module, x, max_probes=8)
        torch.compiler.reset()
        compiled = hessdiag.estimate(module, x, max_probes=8, compile=True)
        torch.testing.assert_close(compiled.diagonal, plain.diagonal, rtol=1e-4, atol=1e-5)
        assert compiled.mode == "vjp"
        with pytest.raises(ValueError, match="compile=True needs mode='vjp' or 'auto'"):
            hessdiag.estimate(module, x, max_probes=8, compile=True, mode="jvp")

    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    def test_autocast_lowers_the_passes_and_not_the_mean(self, network, mode):
        module, x, J = network
        types = set()

        def watched(z):
            output = module(z)
            types.add(output.dtype)
            return output

        result = hessdiag.estimate(
            watched, x, probes=UnitVectors(), max_probes=D, autocast=torch.bfloat16, mode=mode
        )
        assert types == {torch.bfloat16}
        assert result.diagonal.dtype == torch.float32
        relative = (result.diagonal.flatten() - J.diagonal()).norm() / J.diagonal().norm()
        assert 1e-4 < relative < 2e-2

    def test_low_precision_inputs_accumulate_in_float32(self):
        x = torch.zeros(2, 3, dtype=torch.bfloat16)
        result = hessdiag.estimate(torch.sin, x, max_probes=5)
        assert result.diagonal.dtype == result.stderr.dtype == torch.float32

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"max_probes": 0}, ValueError, "max_probes must be at least 1, got 0"),
            ({"batching": "wide"}, ValueError, "batching must be one of auto, loop, vmap, fold"),
            ({"chunk_size": "big"}, TypeError, "chunk_size must be an int or 'auto', got 'big'"),
            ({"autocast": torch.int8}, TypeError, "autocast must be torch.bfloat16"),
        ],
    )
    def test_errors(self, arguments, error, message):
        with pytest.raises(error, match=message):
            hessdiag.estimate(torch.sin, torch.zeros(1, 2), **{"max_probes": 2, **arguments})


class TestBasis:
    def test_dct_is_orthonormal_and_matches_scipy(self):
        from scipy.fft import dctn

        x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
        basis = hessdiag.dct()
        coefficients = basis.analyse(x)
        expected = dctn(x.numpy(), axes=(-2, -1), norm="ortho")
        torch.testing.assert_close(coefficients, torch.from_numpy(expected))
        torch.testing.assert_close(basis.synthesise(coefficients), x)

    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    def test_the_diagonal_in_another_basis(self, mode):
        A = random_matrix().double()
        units = torch.eye(D, dtype=torch.float64).reshape(D, *IMAGE)
        F = hessdiag.dct().analyse(units).reshape(D, D).T
        x = torch.zeros(1, *IMAGE, dtype=torch.float64)
        result = hessdiag.estimate(
            linear(A), x, max_probes=D, probes="auto", basis=hessdiag.dct(), mode=mode
        )
        torch.testing.assert_close(result.diagonal.flatten(), (F @ A @ F.T).diagonal())

    def test_a_jacobian_diagonal_in_the_basis_needs_one_probe(self):
        basis = hessdiag.dct()
        scale = torch.rand(IMAGE)

        def filtered(x):
            return basis.synthesise(scale * basis.analyse(x))

        result = hessdiag.estimate(filtered, torch.zeros(1, *IMAGE), max_probes=1, basis=basis)
        torch.testing.assert_close(result.diagonal[0], scale, rtol=1e-4, atol=1e-5)


def test_a_trace_of_samples_that_are_numbers():
    x = torch.linspace(0.0, 1.0, 3)
    for probes in ("rademacher", "auto"):
        result = hessdiag.trace(torch.sin, x, max_probes=2, probes=probes)
        torch.testing.assert_close(result.trace, x.cos())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 2, 4, 4), (2, 0)])
@pytest.mark.parametrize("probes", [Normal(), BalancedColoring(1), Rademacher()])
def test_designs_of_empty_batches(shape, probes):
    result = hessdiag.estimate(torch.sin, torch.zeros(shape), max_probes=3, probes=probes)
    assert result.diagonal.shape == result.stderr.shape == shape


@pytest.mark.parametrize("rtol", [None, 0.1])
@pytest.mark.parametrize("probe_offset", [0, 20])
@pytest.mark.parametrize("max_probes", [7, 14, 20])
def test_auto_takes_the_unit_vectors_once(max_probes, probe_offset, rtol):
    A = random_matrix(7)
    result = hessdiag.estimate(
        linear(A),
        torch.zeros(2, 7),
        max_probes=max_probes,
        probes="auto",
        probe_offset=probe_offset,
        rtol=rtol,
    )
    torch.testing.assert_close(result.diagonal, A.diagonal().expand(2, -1))
    assert result.num_probes.tolist() == [7, 7]
    assert result.converged is None or bool(result.converged.all())
    assert not bool(result.stderr.any())


def test_a_pilot_that_comes_alone_leaves_the_rest_to_vmap():
    score_fn = neighbours((1, 6, 6))
    results = [
        hessdiag.estimate(score_fn, torch.randn(1, 1, 6, 6), max_probes=12, probes=probes)
        for probes in ("rademacher", "auto")
    ]
    assert "1 of the products" in results[1].note
    assert [result.batching for result in results] == ["vmap", "vmap"]
