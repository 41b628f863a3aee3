"""Results as objects: that they can be saved, sent and loaded."""

import copy
import io
import pickle

import pytest
import torch

import hessdiag


def results():
    x = torch.linspace(0, 1, 6).reshape(2, 3)

    def coupled(x):
        return torch.sin(x) * x.sum(dim=1, keepdim=True)

    parameters = {"w": torch.ones(2, 3), "b": torch.zeros(2)}
    return {
        "estimate": hessdiag.estimate(coupled, x, max_probes=64, rtol=0.5),
        "trace": hessdiag.trace(coupled, x, max_probes=4),
        "blocks": hessdiag.block_diagonal(coupled, x, partition=torch.tensor([0, 0, 1])),
        "parameters": hessdiag.parameter_hessian_diagonal(
            lambda p: p["w"].square().sum() * p["b"].exp().sum(), parameters, max_probes=3
        ),
    }


@pytest.mark.parametrize("name", ["estimate", "trace", "blocks", "parameters"])
@pytest.mark.parametrize("way", ["torch.load", "pickle", "deepcopy"])
def test_a_result_comes_back_as_it_was(name, way):
    result = results()[name]
    if way == "torch.load":
        file = io.BytesIO()
        torch.save(result, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    else:
        loaded = pickle.loads(pickle.dumps(result)) if way == "pickle" else copy.deepcopy(result)
    assert type(loaded) is type(result)
    assert vars(loaded).keys() == vars(result).keys()
    for field, value in vars(result).items():
        if isinstance(value, (torch.Tensor, dict)):
            torch.testing.assert_close(getattr(loaded, field), value, rtol=0, atol=0)
        else:
            assert getattr(loaded, field) == value


def coupled(x):
    return torch.sin(x) * x.sum(dim=1, keepdim=True) + x.roll(1, 1)


class TestMerging:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))

    def test_two_halves_are_the_whole(self):
        whole = hessdiag.estimate(coupled, self.x, max_probes=48)
        first = hessdiag.estimate(coupled, self.x, max_probes=16)
        rest = hessdiag.estimate(coupled, self.x, max_probes=32, probe_offset=16)
        for merged in (first.merged(rest), rest.merged(first)):
            torch.testing.assert_close(merged.diagonal, whole.diagonal)
            torch.testing.assert_close(merged.stderr, whole.stderr, rtol=1e-4, atol=1e-6)
            assert torch.equal(merged.num_probes, whole.num_probes)
            assert torch.equal(merged.num_blocks, whole.num_blocks)
            assert merged.converged is None

    def test_traces(self):
        whole = hessdiag.trace(coupled, self.x, max_probes=48)
        first = hessdiag.trace(coupled, self.x, max_probes=16)
        merged = first.merged(hessdiag.trace(coupled, self.x, max_probes=32, probe_offset=16))
        torch.testing.assert_close(merged.trace, whole.trace)
        torch.testing.assert_close(merged.stderr, whole.stderr, rtol=1e-4, atol=1e-6)

    def test_two_blocks_have_a_standard_error(self):
        x = torch.zeros(2, 1, 8, 8)
        A = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))

        def block(number):
            return hessdiag.estimate(
                lambda x: (x.flatten(1) @ A.T).reshape(x.shape),
                x,
                max_probes=12,
                probe_offset=12 * number,
                probes="auto",
            )

        assert torch.isinf(block(0).stderr).all()
        merged = block(0).merged(block(1))
        expected = (block(0).diagonal - block(1).diagonal).abs() / 2
        torch.testing.assert_close(merged.stderr, expected)

    def test_samples_that_stopped_at_different_times(self):
        scale = torch.tensor([0.0, 0.1, 1.0])[:, None]

        def score_fn(x):
            return x.sin() + scale * x.sum(dim=1, keepdim=True)

        first = hessdiag.estimate(score_fn, self.x, max_probes=200, rtol=0.1)
        assert len(first.num_blocks.unique()) > 1
        rest = hessdiag.estimate(score_fn, self.x, max_probes=50, probe_offset=208)
        merged = first.merged(rest)
        assert torch.equal(merged.num_blocks, first.num_blocks + 50)

    @pytest.mark.parametrize("of", [hessdiag.estimate, hessdiag.trace])
    def test_the_same_probes_again_are_no_further_ones(self, of):
        first, again = (of(coupled, self.x, max_probes=16) for _ in range(2))
        with pytest.raises(ValueError, match="of other probes, got two that are equal"):
            first.merged(again)

    def test_errors(self):
        estimate = hessdiag.estimate(coupled, self.x, max_probes=4)
        other = hessdiag.estimate(coupled, self.x[:2], max_probes=4)
        with pytest.raises(ValueError, match="must have one shape"):
            estimate.merged(other)
        exact = hessdiag.estimate(coupled, self.x, max_probes=8, probes=hessdiag.UnitVectors())
        with pytest.raises(ValueError, match="exact"):
            estimate.merged(exact)
