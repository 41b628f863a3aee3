"""Matrices of bases that are kept: the same one again, and never one of another context."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hessdiag import bases
from hessdiag.bases import dct_matrix

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(bases, "_KEPT", {})


def closed_form(length):
    k, n = torch.arange(length).double()[:, None], torch.arange(length).double()
    scale = torch.full((length, 1), (2 / length) ** 0.5).double()
    scale[0] = (1 / length) ** 0.5
    return scale * torch.cos(torch.pi * (n + 0.5) * k / length)


def test_it_is_made_once_for_each_length_type_and_device():
    F = dct_matrix(5, torch.float64, CPU)
    torch.testing.assert_close(F, closed_form(5))
    assert dct_matrix(5, torch.float64, CPU) is F
    assert dct_matrix(5, torch.float64, "cpu") is F
    assert dct_matrix(5, torch.float32, CPU).dtype == torch.float32
    assert dct_matrix(5, torch.float64, torch.device("meta")).is_meta
    assert dct_matrix(6, torch.float64, CPU).shape == (6, 6)


def test_no_more_than_a_few_are_kept():
    for length in range(1, 60):
        dct_matrix(length, torch.float32, CPU)
    assert len(bases._KEPT) <= 16


def test_one_of_a_transform_is_not_kept():
    def function(x):
        return x * dct_matrix(4, torch.float32, CPU)[0, 0]

    torch.func.jvp(function, (torch.ones(2),), (torch.ones(2),))
    F = dct_matrix(4, torch.float32, CPU)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(F)
    assert (F.numpy()[0] == 0.5).all()


def test_one_of_inference_mode_takes_part_in_graphs():
    with torch.inference_mode():
        dct_matrix(4, torch.float32, CPU)
    x = torch.ones(4, requires_grad=True)
    (dct_matrix(4, torch.float32, CPU) @ x).sum().backward()
    assert x.grad is not None


def test_fake_tensors_meet_fake_ones():
    real = dct_matrix(4, torch.float32, CPU)
    with FakeTensorMode() as mode:
        product = dct_matrix(4, torch.float32, CPU) @ mode.from_tensor(torch.ones(4))
    assert product.shape == (4,)
    assert dct_matrix(4, torch.float32, CPU) is real


def test_a_captured_graph_holds_its_own(monkeypatch):
    """It may outlive those that are kept."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(bases, "_computed", lambda length, dtype, device: object())
    bases._KEPT[4, torch.float32, cuda] = "kept"
    assert dct_matrix(4, torch.float32, cuda) != "kept"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert dct_matrix(4, torch.float32, cuda) == "kept"


def test_a_compiled_function_of_it():
    def function(x):
        return x @ dct_matrix(4, torch.float32, x.device)

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(2, 4)), function(torch.ones(2, 4)))
