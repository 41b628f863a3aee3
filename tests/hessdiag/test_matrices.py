"""Jacobians, diagonal blocks, traces and XDiag against matrices that are known."""

import pytest
import torch
from torch import nn

import hessdiag

MODES = ["vjp", "jvp"]


def linear(A):
    return lambda x: (x.flatten(1) @ A.to(x).T).reshape(x.shape)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)
    ).double()
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    J = torch.stack([torch.func.jacrev(lambda z: module(z[None])[0])(z).reshape(36, 36) for z in x])
    return module, x, J.detach()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", ["auto", 5])
def test_jacobian(network, mode, chunk_size):
    module, x, J = network
    result = hessdiag.jacobian(module, x, mode=mode, chunk_size=chunk_size)
    torch.testing.assert_close(result, J)


def test_a_coupled_batch_is_refused():
    for function in (hessdiag.exact, hessdiag.jacobian, hessdiag.block_diagonal):
        with pytest.raises(ValueError, match="score_fn must act on each sample alone"):
            function(lambda x: x - x.mean(dim=0), torch.randn(2, 2, 3))


SIGNS = hessdiag.Rademacher()
ONE_BLOCK = torch.zeros(3, dtype=torch.int64)


class TestBlockDiagonal:
    def expected(self, J, x):
        """Pixels in order, then output channel, then input channel."""
        batch, channels = x.shape[:2]
        J = J.reshape(batch, channels, 12, channels, 12)
        return torch.einsum("bcpdp->bpcd", J)

    @pytest.mark.parametrize("mode", MODES)
    def test_exact_per_pixel_over_channels(self, network, mode):
        module, x, J = network
        result = hessdiag.block_diagonal(module, x, mode=mode)
        assert result.blocks.shape == (2, 12, 3, 3)
        assert result.num_probes.tolist() == [36, 36]
        torch.testing.assert_close(result.blocks, self.expected(J, x))
        assert (result.stderr == 0).all()

    @pytest.mark.parametrize("mode", MODES)
    def test_mean_variance_and_standard_error(self, network, mode):
        _, x, J = network
        J, count = J[0], 3000
        result = hessdiag.block_diagonal(
            linear(J), x[:1].expand(count, -1, -1, -1), probes=SIGNS, max_probes=17, mode=mode
        )
        assert (result.num_probes == 15).all()  # five sign vectors of three probes
        expected = self.expected(J[None], x[:1])[0]
        M = J if mode == "jvp" else J.T
        energy = M.square().reshape(3, 12, 3, 12)  # output c, p; input d, q
        rest = energy.sum(dim=3) - torch.einsum("cpdp->cpd", energy)
        variance = rest.permute(1, 0, 2) / 5
        variance = variance if mode == "jvp" else variance.mT
        values = result.blocks
        deviation = (values.mean(0) - expected).abs()
        assert (deviation <= 5 * (variance / count).sqrt() + 1e-12).all()
        assert ((values.var(0) - variance).abs() <= 0.15 * variance + 1e-12).all()
        reported = result.stderr.square().mean(0)
        assert ((reported - variance).abs() <= 0.15 * variance + 1e-12).all()

    @pytest.mark.parametrize("mode", MODES)
    def test_any_partition(self, mode):
        A = torch.randn(6, 6)
        partition = torch.tensor([2, 0, 1, 0, 2, 2])
        result = hessdiag.block_diagonal(
            linear(A), torch.zeros(1, 6), partition=partition, mode=mode
        )
        for label in range(3):
            members = (partition == label).nonzero().flatten()
            block = torch.zeros(3, 3)
            block[: len(members), : len(members)] = A[members][:, members]
            torch.testing.assert_close(result.blocks[0, label], block)

    def test_blocks_of_one_feature_are_the_diagonal(self):
        A, x = torch.randn(5, 5), torch.zeros(2, 5)
        result = hessdiag.block_diagonal(
            linear(A), x, partition=torch.arange(5), probes=SIGNS, max_probes=8, seed=3
        )
        plain = hessdiag.estimate(linear(A), x, max_probes=8, seed=3)
        torch.testing.assert_close(result.blocks.flatten(1), plain.diagonal)
        torch.testing.assert_close(result.stderr.flatten(1), plain.stderr)

    def test_one_sign_vector_leaves_the_error_unknown(self, network):
        _, x, J = network
        result = hessdiag.block_diagonal(linear(J[0]), x, probes=SIGNS, max_probes=5)
        assert (result.num_probes == 3).all()
        assert result.stderr.isinf().all()

    def test_chunks_and_continued_estimates_add_up(self, network):
        _, x, J = network
        function, options = linear(J[0]), {"probes": SIGNS, "seed": 4}
        whole = hessdiag.block_diagonal(function, x, max_probes=12, chunk_size=12, **options)
        by_chunks = hessdiag.block_diagonal(function, x, max_probes=12, chunk_size=5, **options)
        torch.testing.assert_close(by_chunks.blocks, whole.blocks)
        torch.testing.assert_close(by_chunks.stderr, whole.stderr)
        one, other = (
            hessdiag.block_diagonal(
                function, x, max_probes=6, chunk_size=4, probe_offset=offset, **options
            ).blocks
            for offset in (0, 2)  # in sign vectors, of three probes each
        )
        torch.testing.assert_close((one + other) / 2, whole.blocks)
        second = hessdiag.block_diagonal(function, x[1:], max_probes=12, sample_offset=1, **options)
        torch.testing.assert_close(second.blocks, whole.blocks[1:])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"partition": torch.zeros(2)}, "partition must be an integer tensor of the shape"),
            ({"partition": torch.tensor([0, 2, 2])}, r"values 0 .. L - 1, each of them"),
            ({"partition": torch.tensor([0, -1, 1])}, r"values 0 .. L - 1, each of them"),
            ({"partition": "pixels"}, "partition must be a tensor or 'channels', got 'pixels'"),
            ({}, r"partition='channels' needs x of shape \(B, C, ...\)"),
            (
                {"partition": ONE_BLOCK, "probes": SIGNS, "max_probes": 2},
                "max_probes must be at least 3, the size of the largest block, got 2",
            ),
            (
                {"partition": ONE_BLOCK, "max_probes": 6},
                "max_probes must be left out for the exact blocks, got 6",
            ),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            hessdiag.block_diagonal(torch.sin, torch.zeros(1, 3), **arguments)


class TestTrace:
    @pytest.mark.parametrize("mode", MODES)
    def test_mean_variance_and_standard_error(self, mode):
        A = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
        count, M = 4000, 5
        result = hessdiag.trace(linear(A), torch.zeros(count, 20), max_probes=M, mode=mode)
        assert result.trace.shape == result.stderr.shape == (count,)
        sums = (A + A.T).double()
        variance = sums.triu(1).square().sum() / M
        assert (result.trace.mean() - A.trace()).abs() < 5 * (variance / count).sqrt()
        assert (result.trace.double().var() / variance - 1).abs() < 0.1
        assert (result.stderr.double().square().mean() / variance - 1).abs() < 0.1

    def test_tolerance_and_exactness(self):
        A = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
        result = hessdiag.trace(linear(A), torch.zeros(2, 20), max_probes=5000, atol=1.0)
        assert (result.num_probes < 5000).all()
        assert (result.stderr <= 1.0).all()
        result = hessdiag.trace(linear(A), torch.zeros(2, 20), max_probes=20, probes="auto")
        torch.testing.assert_close(result.trace, A.trace().expand(2))
        assert (result.stderr == 0).all()


class TestXDiag:
    def low_rank(self, decay):
        g = torch.Generator().manual_seed(0)
        U, _ = torch.linalg.qr(torch.randn(40, 40, generator=g, dtype=torch.float64))
        V, _ = torch.linalg.qr(torch.randn(40, 40, generator=g, dtype=torch.float64))
        return U @ torch.diag(decay ** torch.arange(40.0, dtype=torch.float64)) @ V.T

    def test_against_the_definition(self):
        """Each leave-one-out estimate by its own QR decomposition."""
        A, k = self.low_rank(0.8), 6
        x = torch.zeros(3, 40, dtype=torch.float64)
        result = hessdiag.xdiag(linear(A), x, num_probes=2 * k, seed=5)
        omegas = hessdiag.kernels.rademacher((k, 3, 40), 5, dtype=torch.float64)
        for sample in range(3):
            omega = omegas[:, sample].T
            estimates = []
            for i in range(k):
                others = [j for j in range(k) if j != i]
                Q, _ = torch.linalg.qr(A @ omega[:, others])
                low = (Q @ Q.T @ A).diagonal()
                residual = A @ omega[:, i] - Q @ (Q.T @ (A @ omega[:, i]))
                estimates.append(low + omega[:, i] * residual)
            torch.testing.assert_close(result[sample], torch.stack(estimates).mean(0))

    def test_it_gains_where_singular_values_fall_off_and_only_there(self):
        x = torch.zeros(500, 40, dtype=torch.float64)
        gains = []
        for decay in (0.5, 1.0):
            A = self.low_rank(decay)
            A = A if decay < 1 else A + 3 * torch.eye(40, dtype=torch.float64)
            plain = hessdiag.hutchinson(linear(A), x, 16, mode="jvp") - A.diagonal()
            other = hessdiag.xdiag(linear(A), x, num_probes=16) - A.diagonal()
            assert (other.mean(0).abs() < 6 * other.std(0) / 500**0.5 + 1e-9).all()
            gains.append((plain.square().mean() / other.square().mean()).item())
        assert gains[0] > 50
        assert gains[1] < 1

    def test_symmetric_needs_reverse_mode_alone(self):
        A = self.low_rank(0.7)
        A, x = A + A.T, torch.zeros(2, 40, dtype=torch.float64)
        torch.testing.assert_close(
            hessdiag.xdiag(linear(A), x, num_probes=12, symmetric=True),
            hessdiag.xdiag(linear(A), x, num_probes=12),
        )

    def test_where_probes_meet_nothing(self):
        """A Jacobian that is zero, or has fewer directions than there are probes."""
        A = torch.zeros(3, 6, 6, dtype=torch.float64)
        A[1, 2, 2], A[2, 0, 0], A[2, 0, 1] = 5.0, 1.0, 2.0
        result = hessdiag.xdiag(
            lambda x: torch.einsum("bij,bj->bi", A, x),
            torch.zeros(3, 6, dtype=torch.float64),
            num_probes=8,
        )
        torch.testing.assert_close(result, A.diagonal(dim1=1, dim2=2), rtol=0, atol=1e-12)

    def test_a_part_of_a_batch_is_told_its_number(self):
        A, x = self.low_rank(0.9), torch.zeros(3, 40, dtype=torch.float64)
        whole = hessdiag.xdiag(linear(A), x, num_probes=8, seed=2)
        assert (whole[0] - whole[1]).abs().max() > 1e-3
        part = hessdiag.xdiag(linear(A), x[1:], num_probes=8, seed=2, sample_offset=1)
        torch.testing.assert_close(part, whole[1:])

    @pytest.mark.parametrize("number", [2, 5, 20])
    def test_errors(self, number):
        with pytest.raises(ValueError, match="num_probes must be even, at least 4 and at most"):
            hessdiag.xdiag(torch.sin, torch.zeros(1, 4), num_probes=number)
