"""Planted faults: the tests are worth what they catch."""
