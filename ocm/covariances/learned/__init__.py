"""Covariances with a head that is trained by a loss of its own, a file each."""
