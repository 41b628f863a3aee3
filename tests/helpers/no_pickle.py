"""Code that must not unpickle anything, in whatever way."""

import _pickle
import pickle
from contextlib import contextmanager
from unittest import mock

import torch
from torch import _weights_only_unpickler


class UnpickledError(BaseException):
    """Something was unpickled; no ``except Exception`` hides it."""


@contextmanager
def no_pickle():
    """Let every way to unpickle end in an UnpickledError: PyTorch's restricted one too."""

    def refuse(*arguments, **options):
        raise UnpickledError(f"unpickled: {arguments!r:.200}")

    class Unpickler(pickle.Unpickler):
        load = refuse

    functions = [
        *((module, name) for module in (pickle, _pickle) for name in ("load", "loads")),
        (pickle._Unpickler, "load"),
        (torch, "load"),
        (torch.serialization, "load"),
        (_weights_only_unpickler.Unpickler, "load"),
        (_weights_only_unpickler, "load"),
    ]
    patches = [mock.patch.object(owner, name, refuse) for owner, name in functions]
    patches += [mock.patch.object(module, "Unpickler", Unpickler) for module in (pickle, _pickle)]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
