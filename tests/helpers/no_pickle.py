"""Code that must not unpickle anything, in whatever way."""

import _pickle
import pickle
from contextlib import ExitStack, contextmanager
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

    replaced = [
        *((module, name, refuse) for module in (pickle, _pickle) for name in ("load", "loads")),
        *((module, "Unpickler", Unpickler) for module in (pickle, _pickle)),
        (pickle._Unpickler, "load", refuse),
        (torch, "load", refuse),
        (torch.serialization, "load", refuse),
        (_weights_only_unpickler.Unpickler, "load", refuse),
        (_weights_only_unpickler, "load", refuse),
    ]
    with ExitStack() as stack:
        for owner, name, instead in replaced:
            stack.enter_context(mock.patch.object(owner, name, instead))
        yield
