"""The shape of the code: imports run one way, those inside functions too, and the library knows nothing above it."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "timesearch").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imports_of(module: str) -> set[str]:
    """What a module imports when it runs, wherever the import stands; imports for type checkers are not run."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in skipped:
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
            named |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return named


def test_no_import_leads_back_to_where_it_started() -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {}
    for module in MODULES:
        own = imports_of(module) & MODULES.keys()
        # `from package import module` names the package too, whose own imports are not what is meant.
        graph[module] = {name for name in own if name not in packages or not any(n.startswith(name + ".") for n in own)}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")
    assert order.index("timesearch.base.errors") < order.index("timesearch.cli.app")


@pytest.mark.parametrize("room", ["base", "data"])
def test_the_rooms_below_import_nothing_from_above(room: str) -> None:
    below = ("timesearch.base",) if room == "base" else ("timesearch.base", "timesearch.data", "timesearch.dialects")
    for module in MODULES:
        if module.startswith(f"timesearch.{room}"):
            above = {
                name for name in imports_of(module) if name.startswith("timesearch") and not name.startswith(below)
            }
            assert not above, f"{module} imports {above}"


def test_the_library_knows_nothing_of_those_who_call_it() -> None:
    for module in MODULES:
        callers = {name.split(".")[0] for name in imports_of(module)} & {"prefect", "dvc", "flows", "tasks"}
        assert not callers, f"{module} imports {callers}"
        if not module.startswith(("timesearch.cli", "timesearch.__main__")):
            assert not {name for name in imports_of(module) if name.startswith(("timesearch.cli", "typer"))}
