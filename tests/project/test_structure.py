"""Who may import whom, by the import statements of every module, wherever in it they stand."""

import ast
import re
from pathlib import Path

import networkx
import pytest

import hessdiag
import hessdiag.kernels

ROOT = Path(__file__).parents[2]
# Every floor imports from itself and from those below.
FLOORS = (
    {"ocm.diffusion", "ocm.files", "ocm.progress"},
    {"ocm.covariances", "ocm.data", "ocm.images"},
    {"ocm.sampling", "ocm.training", "ocm.checkpoints"},
    {"ocm.likelihoods"},
    {"ocm.integrations", "ocm.evaluation"},
    {"ocm.cli"},
)
# These show what is on all floors.
ENTRANCES = {"ocm", "ocm.__main__"}
PUBLIC = {module.__name__: set(module.__all__) for module in (hessdiag, hessdiag.kernels)}
MOST_FILES = 12
# What trains, stores, scores and commands is a rig around the method, and stays small.
RIG = ("training", "checkpoints", "evaluation", "cli", "data", "images")
# Without docstrings, which are as long as they need to be.
MOST_LINES_OF_THE_RIG = 6_350
MOST_LINES = 14_250


def sources_of(folder, package):
    """The source of every module of a folder by name; ``package`` is that of the folder, or ""."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        parts = [*package.split("."), *file.relative_to(folder).with_suffix("").parts]
        name = ".".join(part for part in parts if part not in ("", "__init__"))
        found[name] = file.read_text()
    return found


LIBRARY = sources_of(ROOT / "hessdiag", "hessdiag") | sources_of(
    ROOT / "kernels", "hessdiag.kernels"
)
LAYER = sources_of(ROOT / "ocm", "ocm")
BENCHMARKS = sources_of(ROOT / "benchmarks", "")


def names_of(statement, module, modules):
    """The dotted names that an import statement asks for; ``from a import b`` asks for a.b."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    origin = statement.module or ""
    if statement.level:
        is_package = any(name.startswith(f"{module}.") for name in modules)
        parts = module.split(".")
        above = parts[: len(parts) - statement.level + is_package]
        origin = ".".join([*above, *filter(None, [origin])])
    return [f"{origin}.{alias.name}" for alias in statement.names]


def imports(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]


def graph_of(sources):
    """The modules that each module imports, of those that are here.

    A name of a package that is no module is in its __init__. To import a module is not to import
    the __init__ beside it, which may show that very module to others.
    """
    graph = networkx.DiGraph()
    graph.add_nodes_from(sources)
    for module, source in sources.items():
        for statement in imports(ast.parse(source)):
            for name in names_of(statement, module, sources):
                while name and name not in sources:
                    name = name.rpartition(".")[0]
                if name:
                    graph.add_edge(module, name)
    return graph


def circles(graph):
    """Groups of modules that import one another."""
    found = networkx.strongly_connected_components(graph)
    return sorted(
        sorted(group) for group in found if len(group) > 1 or graph.has_edge(*group, *group)
    )


def place_of(module):
    """The floor of a module and the package that stands there; the entrances are above all."""
    if module in ENTRANCES:
        return len(FLOORS), module
    for level, packages in enumerate(FLOORS):
        for package in packages:
            if f"{module}.".startswith(f"{package}."):
                return level, package
    raise ValueError(f"{module} must be on one of FLOORS, or in a package that is")


def upward(graph):
    """Imports of a module from a floor above, and of the covariances from beside them."""
    found = []
    for module, imported in graph.edges:
        (here, package), (there, other) = place_of(module), place_of(imported)
        beside = package == "ocm.covariances" and other in ("ocm.data", "ocm.images")
        if module not in ENTRANCES and (there > here or beside):
            found.append(f"{module} imports {imported}")
    return sorted(found)


def packages_of(graph):
    """The packages that each package of a floor imports."""
    found = networkx.DiGraph()
    for module, imported in graph.edges:
        package, other = place_of(module)[1], place_of(imported)[1]
        if package != other and module not in ENTRANCES:
            found.add_edge(package, other)
    return found


def strangers(sources, within, among):
    """Imports of names within ``within`` but not within ``among``."""
    found = []
    for module, source in sources.items():
        for statement in imports(ast.parse(source)):
            for name in names_of(statement, module, sources):
                inside = [p for p in (within, *among) if f"{name}.".startswith(f"{p}.")]
                if inside == [within]:
                    found.append(f"{module} imports {name}")
    return sorted(found)


def private(sources, public):
    """Imports and attributes of packages that their ``__all__`` does not name."""
    found = []
    for module, source in sources.items():
        tree = ast.parse(source)
        known = {}
        for statement in imports(tree):
            for name, alias in zip(
                names_of(statement, module, sources), statement.names, strict=True
            ):
                package, _, last = name.rpartition(".")
                if name.split(".")[0] not in public:
                    continue
                if isinstance(statement, ast.Import) and name in public:
                    known[alias.asname or name] = name
                elif last not in public.get(package, ()):
                    found.append(f"{module} imports {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in known:
                package = known[ast.unparse(node.value)]
                if node.attr not in public[package] and f"{package}.{node.attr}" not in known:
                    found.append(f"{module} uses {package}.{node.attr}")
    return sorted(found)


# The house as it is


def test_no_import_goes_up_a_floor():
    assert upward(graph_of(LAYER)) == []


def test_packages_do_not_import_one_another_in_a_circle():
    assert circles(packages_of(graph_of(LAYER))) == []


@pytest.mark.parametrize(
    "sources", [LIBRARY, LAYER, BENCHMARKS], ids=["hessdiag", "ocm", "benchmarks"]
)
def test_no_modules_import_one_another_in_a_circle(sources):
    assert len(sources) > 20
    assert circles(graph_of(sources)) == []


def test_hessdiag_does_not_know_ocm():
    assert strangers(LIBRARY, "ocm", ()) == []


def test_kernels_do_not_know_hessdiag():
    kernels = {name: text for name, text in LIBRARY.items() if name.startswith("hessdiag.kernels")}
    assert strangers(kernels, "hessdiag", ["hessdiag.kernels"]) == []


def test_ocm_takes_what_is_public_in_hessdiag():
    assert private(LAYER, PUBLIC) == []


def test_folders_of_ocm_are_easy_to_survey():
    folders = [folder for folder in (ROOT / "ocm").rglob("*") if folder.is_dir()]
    counts = {str(f.relative_to(ROOT)): len(list(f.glob("*.py"))) for f in folders}
    assert {name: count for name, count in counts.items() if count > MOST_FILES} == {}


def test_contributors_are_told_the_same():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert f"more than {MOST_LINES:,} lines" in text
    assert f"more\nthan {MOST_FILES} modules" in text
    for level, packages in enumerate(FLOORS, start=1):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {level} |")]
        named = {name.removesuffix(".py") for name in re.findall(r"`([\w.]+)`", line)}
        assert named == {package.removeprefix("ocm.") for package in packages}


def lines_without_docstrings(text):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [
        node.body[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
    ]
    return len(text.splitlines()) - sum(d.end_lineno - d.lineno + 1 for d in docstrings)


def test_ocm_stays_thin():
    lines = {name: lines_without_docstrings(text) for name, text in LAYER.items()}
    assert sum(lines.values()) <= MOST_LINES
    rig = [count for name, count in lines.items() if f"{name}.".split(".")[1] in RIG]
    assert sum(rig) <= MOST_LINES_OF_THE_RIG


# The checks, on houses that are made up


def test_docstrings_are_no_lines_of_code():
    q = '"""'
    code = [
        f"{q}A module.{q}",
        f"x = {q}Two",
        f"lines.{q}",
        "def f():",
        f"    {q}A",
        f"    function.{q}",
    ]
    assert lines_without_docstrings("\n".join([*code, "    return x"])) == 4


def test_every_kind_of_import_counts():
    sources = {
        "a": "",
        "a.b": "from a import c",
        "a.c": "def f():\n    import a.d",
        "a.d": "if TYPE_CHECKING:\n    from a.b import B",
        "a.e": "from . import f as other",
        "a.e.f": "from ..b import B",
        "alone": "import a.nothing, os",
    }
    assert sorted(graph_of(sources).edges) == [
        ("a.b", "a.c"), ("a.c", "a.d"), ("a.d", "a.b"), ("a.e", "a.e.f"), ("a.e.f", "a.b"),
        ("alone", "a"),
    ]  # fmt: skip
    assert circles(graph_of(sources)) == [["a.b", "a.c", "a.d"]]


def test_a_package_that_shows_its_modules_makes_no_circle():
    sources = {"a": "from a.b import B", "a.b": "from a import c", "a.c": ""}
    assert circles(graph_of(sources)) == []
    assert circles(graph_of(sources | {"a.c": "from a import B"})) == [["a", "a.b", "a.c"]]


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("ocm.sampling.x", "from ocm.cli.x import f", "ocm.sampling.x imports ocm.cli.x"),
        ("ocm.diffusion.x", "def f():\n import ocm.data", "ocm.diffusion.x imports ocm.data"),
        ("ocm.covariances.x", "import ocm.data", "ocm.covariances.x imports ocm.data"),
        ("ocm.cli.y", "from ocm import Denoiser", "ocm.cli.y imports ocm"),
        ("ocm.cli.y", "import ocm.data", None),
        ("ocm.training.x", "import ocm.sampling.y", None),
        ("ocm", "import ocm.cli.x", None),
    ],
)
def test_imports_upward_are_found(module, source, found):
    others = ("ocm", "ocm.cli.x", "ocm.data", "ocm.sampling.y")
    sources = dict.fromkeys(others, "") | {module: source}
    assert upward(graph_of(sources)) == ([found] if found else [])


def test_a_module_on_no_floor_is_an_error():
    with pytest.raises(ValueError, match=r"ocm\.attic\.x must be on one of FLOORS"):
        upward(graph_of({"ocm.attic.x": "import ocm.data", "ocm.data": ""}))


def test_packages_in_a_circle_are_found_where_their_modules_are_not():
    sources = {
        "ocm.sampling.a": "import ocm.training.b",
        "ocm.training.b": "",
        "ocm.training.c": "import ocm.sampling.d",
        "ocm.sampling.d": "",
    }
    assert circles(graph_of(sources)) == []
    assert circles(packages_of(graph_of(sources))) == [["ocm.sampling", "ocm.training"]]


def test_strangers_are_found():
    sources = {"hessdiag.x": "from ocm.data import load", "hessdiag.y": "import ocmother"}
    assert strangers(sources, "ocm", ()) == ["hessdiag.x imports ocm.data.load"]
    sources = {"hessdiag.kernels.x": "from hessdiag import checks\nimport hessdiag.kernels.y"}
    assert strangers(sources, "hessdiag", ["hessdiag.kernels"]) == [
        "hessdiag.kernels.x imports hessdiag.checks"
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import hessdiag\nhessdiag.estimate(f, x)", []),
        ("from hessdiag import estimate", []),
        ("from hessdiag.kernels import normal", []),
        ("def f():\n from hessdiag.checks import check", ["imports hessdiag.checks.check"]),
        ("from hessdiag import checks", ["imports hessdiag.checks"]),
        ("import hessdiag.lanczos", ["imports hessdiag.lanczos"]),
        ("import hessdiag as h\nh.lanczos.solve()", ["uses hessdiag.lanczos"]),
        ("import hessdiag, hessdiag.kernels\nhessdiag.kernels.normal()", []),
        ("import hessdiag.kernels\nhessdiag.kernels.philox", ["uses hessdiag.kernels.philox"]),
    ],
)
def test_what_is_not_public_is_found(source, found):
    public = {"hessdiag": {"estimate"}, "hessdiag.kernels": {"normal"}}
    assert private({"ocm.x": source}, public) == [f"ocm.x {what}" for what in found]
