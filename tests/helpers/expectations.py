"""What the checks of cases of bad input ask of a result."""

import torch


def holds(condition):
    """Say in a lambda what must be true."""
    assert condition


def close(expected, **tolerance):
    """The result must be a number or a tensor like this one."""
    return lambda found: torch.testing.assert_close(found, expected, **tolerance)


def shaped(*sizes):
    """The result must be a tensor of this shape."""
    return lambda found: holds(tuple(found.shape) == sizes)
