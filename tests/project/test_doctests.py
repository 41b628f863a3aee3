"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import cifar10
import harness
import mixtures
import pytest
import records

import hessdiag
import ocm


def module_names():
    for package in (hessdiag, ocm, cifar10, harness, mixtures, records):
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__"):
                yield module.name


@pytest.mark.parametrize("name", list(module_names()))
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
