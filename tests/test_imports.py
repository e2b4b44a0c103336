"""No import cycles, and imports point downwards: every import statement of the library and of bench/, read by `ast`.

Imports inside functions and under TYPE_CHECKING count too: they are dependencies all the same.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("epo_kernels", "bench")

# From the bottom up. A name stands for the module, or for the package with everything in it. A module may import from
# the lines below its own and within its entry; entries on one line don't import each other.
LIBRARY = (
    ("declaration",),
    ("config", "metrics", "autograd"),
    ("shard", "placements"),
    ("inputs",),
    ("aggregation", "history", "schedule", "controller", "mismatch", "shaping"),
    ("defaults",),
    ("reference",),
    ("fused.rows",),
    ("fused.sharded", "fused.ops"),
    ("fused.head",),
    ("fused.linear",),
    ("fused.linear_ops",),
    ("fused.backend",),
    ("backends",),
    ("functional",),
    ("modules", "heads"),
    ("",),  # the package itself: the public names
    ("integrations", "train"),
)
DRIVER = (
    ("",),  # the package itself: which packages it needs
    ("setting", "packing"),
    ("envs",),
    ("config", "data"),
    ("evaluate",),
    ("io",),
    ("distributed",),
    ("models",),
    ("rollout",),
    ("rl",),
    ("header", "plan"),
    ("start",),
    ("parts",),
    ("build",),
    ("trainer",),
    ("__main__",),
)

Graph = dict[str, set[str]]


def module_names(root: Path, packages: Iterable[str]) -> dict[str, Path]:
    """{dotted name: file} of every module of the packages; a package's `__init__` goes by the package's name."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(name: str, path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name or None) of each import statement, relative ones resolved."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((base, alias.name) for alias in node.names)


def import_graph(root: Path, packages: Iterable[str] = PACKAGES) -> Graph:
    """{module: modules of the packages that it imports}; `from package import submodule` imports the submodule."""
    modules = module_names(root, packages)
    graph: Graph = {}
    for name, path in modules.items():
        targets = set()
        for base, member in imported_names(name, path):
            submodule = f"{base}.{member}"
            target = submodule if member is not None and submodule in modules else base
            if target in modules and target != name:
                targets.add(target)
        graph[name] = targets
    return graph


def find_cycle(graph: Graph) -> list[str] | None:
    """A chain of imports from a module back to itself; None if there is none."""
    done: set[str] = set()
    for start in graph:
        path: list[str] = []
        stack = [(start, iter(sorted(graph[start])))] if start not in done else []
        while stack:
            name, targets = stack[-1]
            if len(path) < len(stack):
                path.append(name)
            following = next(targets, None)
            if following is None:
                done.add(name)
                path.pop()
                stack.pop()
            elif following in path:
                return [*path[path.index(following) :], following]
            elif following not in done:
                stack.append((following, iter(sorted(graph[following]))))
    return None


def place_of(module: str, layers: tuple[tuple[str, ...], ...], package: str) -> tuple[int, str]:
    """(line, entry) of a module in the table: its own entry, or that of the nearest package above it.

    Raises:
        KeyError: the table doesn't mention it.
    """
    inner = module.removeprefix(package).removeprefix(".")
    places = {entry: line for line, entries in enumerate(layers) for entry in entries}
    entry = inner
    while entry and entry not in places:
        entry = entry.rpartition(".")[0]
    if not entry and inner:
        raise KeyError(f"{module} must be in the table of layers")
    return places[entry], entry


def upward_imports(graph: Graph, layers: tuple[tuple[str, ...], ...], package: str) -> list[str]:
    """'module imports module' for every import within the package that doesn't point downwards."""
    wrong = []
    for module, targets in graph.items():
        inside = sorted(target for target in targets if is_inside(target, package))
        if not is_inside(module, package) or not inside:
            continue
        line, entry = place_of(module, layers, package)
        for target in inside:
            other_line, other_entry = place_of(target, layers, package)
            if other_entry != entry and other_line >= line:
                wrong.append(f"{module} imports {target}")
    return wrong


def is_inside(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph(ROOT)


def test_every_module_is_read(graph):
    assert {"epo_kernels.functional", "epo_kernels.train.trainer", "bench.truth"} <= set(graph)
    assert "epo_kernels.inputs.loss" in graph["epo_kernels.inputs"]
    assert "epo_kernels.fused.linear" in graph["epo_kernels.fused.backend"], "from a package, a submodule"
    assert "epo_kernels.inputs" in graph["epo_kernels.fused.rows"]


def test_no_cycles(graph):
    assert find_cycle(graph) is None


@pytest.mark.parametrize(
    ("package", "layers"),
    [("epo_kernels", LIBRARY), ("epo_kernels.train", DRIVER)],
)
def test_imports_point_downwards(graph, package, layers):
    assert upward_imports(graph, layers, package) == []


PLANTED = {
    "at the top": "from planted.low import y",
    "in a function": "def f():\n    import planted.low",
    "under TYPE_CHECKING": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from planted import low",
    "relative": "from . import low",
    "relative, of a name": "from .low import y",
}


@pytest.mark.parametrize("statement", PLANTED.values(), ids=PLANTED)
def test_a_planted_cycle_is_found(tmp_path, statement):
    package = tmp_path / "planted"
    (package / "deep").mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "high": statement,
        "low": "from planted.deep.middle import z",
        "deep/__init__": "",
        "deep/middle": "from ..high import x",
    }.items():
        (package / f"{name}.py").write_text(text)
    planted = import_graph(tmp_path, ["planted"])
    cycle = find_cycle(planted)
    assert cycle is not None
    assert set(cycle) == {"planted.high", "planted.low", "planted.deep.middle"}
    assert upward_imports(planted, (("low",), ("deep",), ("high",)), "planted") == [
        "planted.deep.middle imports planted.high",
        "planted.low imports planted.deep.middle",
    ]
    (package / "high.py").write_text("")
    assert find_cycle(import_graph(tmp_path, ["planted"])) is None


def test_a_module_outside_of_the_table_is_named(tmp_path):
    (tmp_path / "planted").mkdir()
    for name, text in {"__init__": "", "low": "", "new": "import planted.low"}.items():
        (tmp_path / "planted" / f"{name}.py").write_text(text)
    with pytest.raises(KeyError, match=r"planted\.new must be in the table"):
        upward_imports(import_graph(tmp_path, ["planted"]), (("low",),), "planted")
