"""Reverse processes, the likelihood bound, and x0 given x at any noise level."""
