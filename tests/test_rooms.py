"""The package's rooms: no lower floor imports a higher one, and there is no circle."""

import ast
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

import lightning_plasticity

PACKAGE = Path(lightning_plasticity.__file__).parent
# From the top. Rooms of one floor do not know each other.
FLOORS = [
    ["callbacks"],
    ["monitoring"],
    ["engine", "layers", "metrics"],
    ["functional", "editing", "units"],
    ["shards"],
    ["kernels", "distributed", "checks", "examining", "layer_views"],
    ["names", "notices"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path: Path) -> str:
    """The name of a file's module inside the package, empty for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imported_by(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            # `from a.b import c` may name a module c
            candidates = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        else:
            continue
        inside = {
            name.removeprefix("lightning_plasticity").lstrip(".")
            for name in candidates
            if name.startswith("lightning_plasticity")
        }
        known = inside & MODULES.keys()
        found |= known - {""} if known - {""} else known
    return found


def room_of(module: str) -> str:
    return module.split(".")[0]


def climbs(room: str, imported: str) -> bool:
    """Whether a room may not import from another: it stands as high or higher."""
    return room != imported and FLOOR[imported] <= FLOOR[room]


def test_every_module_has_a_room() -> None:
    assert {room_of(module) for module in MODULES} == {*FLOOR, ""}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {""}))
def test_no_import_climbs(module: str) -> None:
    imported = imported_by(MODULES[module])
    assert "" not in imported, "a module must not import the package's root, which imports all of them"
    climbing = {name for name in imported if climbs(room_of(module), room_of(name))}
    assert not climbing, f"{module} imports {climbing} from a room on the same floor or above"


def test_climbing_is_seen() -> None:
    assert climbs("functional", "engine")
    assert climbs("editing", "units")
    assert not climbs("engine", "units")
    assert not climbs("units", "units")
    assert "functional.rank" in imported_by(MODULES["metrics.rank"])


def test_there_is_no_circle() -> None:
    graph = {module: imported_by(path) - {module} for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("room", sorted(FLOOR.keys() - {"distributed", "checks", "examining", "names", "notices"}))
def test_each_room_says_what_lives_there(room: str) -> None:
    source = MODULES[room].read_text()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert docstring.endswith(".")
    assert docstring.count(".") == 1, "one sentence"
    assert "\n" not in docstring
    assert "__all__" in source


def test_the_version_is_that_of_the_installed_package() -> None:
    assert lightning_plasticity.__version__ == version("lightning-plasticity")
