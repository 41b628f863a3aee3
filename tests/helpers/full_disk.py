"""Disks that are full."""

import resource
from contextlib import contextmanager


@contextmanager
def files_of_at_most(size):
    """A disk on which a file can have this many bytes and no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
