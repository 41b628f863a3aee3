"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import cifar10
import harness
import mixtures
import pytest
import records
import suites

import hessdiag
import hessdiag.kernels
import ocm

# The kernels' folder is mapped into the package, where a walk through it does not find it.
PACKAGES = (hessdiag, hessdiag.kernels, ocm, cifar10, harness, mixtures, records, suites)


def module_names():
    names = {}
    for package in PACKAGES:
        modules = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        names |= dict.fromkeys([package.__name__, *(module.name for module in modules)])
    return [name for name in names if not name.endswith(("__main__", "launch_times"))]


@pytest.mark.parametrize("name", module_names())
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_all_of_the_kernels_have_their_examples_run():
    names = module_names()
    assert len(names) == len(set(names))
    assert {"hessdiag.kernels.philox", "hessdiag.jacobian", "suites.machine_code"} <= set(names)
