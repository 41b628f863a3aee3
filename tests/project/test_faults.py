"""The faults of `make mutation` can be planted in the code as it is, and their tests are there."""

import ast
from pathlib import Path

import pytest
from faults import AREAS

ROOT = Path(__file__).parents[2]
FAULTS = [fault for faults in AREAS.values() for fault in faults]


def source_of(path):
    """The kernels lie beside the package, and are mapped into it."""
    return (ROOT / path.replace("hessdiag/kernels/", "kernels/")).read_text(encoding="utf-8")


@pytest.mark.parametrize("area", AREAS)
def test_every_fault_can_be_planted(area):
    for fault in AREAS[area]:
        ast.parse(fault.planted(source_of(fault.path)))


def test_each_has_a_name_of_its_own():
    names = [(area, fault.name) for area, faults in AREAS.items() for fault in faults]
    assert len(set(names)) == len(names)


def test_the_tests_that_must_notice_are_there():
    for fault in FAULTS:
        files = [argument for argument in fault.tests if argument.startswith("tests/")]
        assert files
        assert all((ROOT / file.split("::")[0]).exists() for file in files), fault.name


def test_text_that_stands_elsewhere_is_no_fault():
    fault = FAULTS[0]
    with pytest.raises(ValueError, match=r"occurs 2 times in .*, where it must occur once"):
        fault.planted(2 * source_of(fault.path))
