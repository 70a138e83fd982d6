"""Imports inside the package point downward only. ``python tests/test_structure.py`` prints them.

Imports inside functions and for annotations count.
"""

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "trm_helpers"
# from the bottom up; a room is a folder, or a file at the package's top
ROOMS = ("schema", "files", "paths", "stats", "opengl", "software", "config", "sim", "preflight",
         "demos", "data", "policy", "training", "visuals", "evaluation", "selftest", "session",
         "progress", "notebooks", "search", "report", "__main__")


def modules(package: Path) -> dict[str, Path]:
    """Dotted name below the package, and file, of every module that holds code."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts != ("__init__",):  # the public names, loaded on first use
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


@functools.cache
def imports(package: Path) -> dict[str, set[str]]:
    """What each module imports of the package."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        folder = path.relative_to(package).parent.parts
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    base = [*folder[:len(folder) + 1 - node.level], *(node.module or "").split(".")]
                elif (node.module or "").split(".")[0] == package.name:
                    base = node.module.split(".")[1:]
                else:
                    continue
                base = ".".join(part for part in base if part)
                for alias in node.names:
                    target = f"{base}.{alias.name}".lstrip(".")
                    graph[name].update({target if target in known else base} & set(known))
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    first, _, target = alias.name.partition(".")
                    if first == package.name and target in known:
                        graph[name].add(target)
        graph[name].discard(name)
    return graph


def upward(graph: dict[str, set[str]]) -> list[str]:
    return [f"{name} imports {target}" for name, targets in graph.items() for target in
            sorted(targets) if _rank(target) > _rank(name)]


def _rank(name: str) -> int:
    return ROOMS.index(name.split(".")[0])


def test_every_module_stands_in_a_known_room():
    assert {name.split(".")[0] for name in modules(PACKAGE)} == set(ROOMS)


def test_no_import_points_upward():
    graph = imports(PACKAGE)
    assert sum(map(len, graph.values())) > 80  # the imports were found
    assert upward(graph) == []


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Modules that ``start`` imports, itself or through others."""
    found, waiting = set(), [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_training_and_its_policy_reach_no_simulator():
    """The localizer and rollouts are passed to a trainer."""
    graph = imports(PACKAGE)
    targets = reached(graph, "training.train") | reached(graph, "training.runs")
    assert {"training.tracking", "policy.model", "data.language"} <= targets
    assert not [target for target in targets
                if target.startswith(("sim.", "evaluation.")) or target == "policy.keypoints"]
    assert [target for target in reached(graph, "policy.keypoints") if target.startswith("sim.")]


def test_no_imports_form_a_circle():
    tuple(TopologicalSorter(imports(PACKAGE)).static_order())


@pytest.mark.parametrize("source, complaint", [
    ("def f():\n    from ..evaluation import evaluate\n", "upward"),
    ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import b\n", "circle"),
    ("import trm_helpers.evaluation.evaluate\n", "upward"),
])
def test_a_hidden_import_is_seen(tmp_path, source, complaint):
    package = tmp_path / "trm_helpers"
    for name, text in {"sim/a.py": source, "sim/b.py": "from .a import x\n",
                       "evaluation/evaluate.py": ""}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    graph = imports(package)
    if complaint == "upward":
        assert upward(graph) == ["sim.a imports evaluation.evaluate"]
    else:
        with pytest.raises(CycleError):
            tuple(TopologicalSorter(graph).static_order())


if __name__ == "__main__":
    for module, targets in sorted(imports(PACKAGE).items(), key=lambda item: _rank(item[0])):
        print(f"{module:28} -> {', '.join(sorted(targets))}")
