"""Processes that end, or never come, are an error of the connection."""

from datetime import timedelta

import pytest
from torch import distributed
from two_processes import environment_of, free_port

from ocm.training import processes
from ocm.training.processes import naming_lost


def test_processes_that_never_come_are_not_waited_for_long(monkeypatch):
    for name, value in environment_of(0, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))
    with pytest.raises(ConnectionError, match=r"another of 2 processes .* before all had come"):
        processes.join("cpu")
    assert not distributed.is_initialized()


@pytest.mark.parametrize(
    ("count", "error"),
    [
        (2, RuntimeError("the shapes do not fit")),
        (2, ValueError("Connection closed by peer")),
        (1, RuntimeError("Connection closed by peer")),
    ],
)
def test_other_errors_stay_what_they_are(count, error):
    with pytest.raises(type(error)) as raised, naming_lost(count, lambda: "at step 3"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]"),
        distributed.DistBackendError("NCCL communicator was aborted on rank 1\nand more"),
        distributed.DistNetworkError("The client socket has timed out"),
    ],
)
def test_the_end_of_another_process_names_where_it_was_noticed(error):
    with pytest.raises(ConnectionError) as raised, naming_lost(2, lambda: "at step 3"):
        raise error
    first = str(error).splitlines()[0]
    assert str(raised.value) == (
        "another of 2 processes has ended, or cannot be reached, at step 3; start all of them "
        f"again ({first})"
    )
