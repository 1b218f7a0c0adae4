"""One direction of imports: modules form no cycle, packages neither, and the core knows no library for models or data."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "src" / "hocket"
CORE = {
    "errors", "tree", "wire", "registry", "combine", "codecs", "methods", "schedules", "server", "client", "clock", "store",
    "ledger", "products", "draws", "directions", "executors", "flight", "downlink", "evaluations", "simulate",
}  # fmt: skip
HEAVY = {"transformers", "peft", "datasets", "sklearn", "plotly", "rich", "typer", "flwr_datasets", "tensorboard"}


def imports(path: Path) -> set[str]:
    """Absolute names a module imports when it runs; those for type checkers alone do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{a.name}" for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def acyclic(graph: dict[str, set[str]]) -> list[str]:
    """Names that lie on a cycle."""
    left = {k: set(v) for k, v in graph.items()}
    while free := [k for k, v in left.items() if not v & left.keys()]:
        for k in free:
            del left[k]
    return sorted(left)


def test_no_cycle_between_modules_or_packages() -> None:
    known = modules()
    graph = {m: {i for i in imports(p) if i in known and i != m and not i.startswith(f"{m}.")} for m, p in known.items()}
    inside = {m: {i for i in deps if not m.startswith(f"{i}.")} for m, deps in graph.items()}
    assert acyclic(inside) == []
    unit = lambda m: m.split(".")[1] if "." in m else m
    packages: dict[str, set[str]] = {}
    for m, deps in graph.items():
        packages.setdefault(unit(m), set()).update(unit(d) for d in deps if d != "hocket" and unit(d) != unit(m))
    packages.pop("hocket", None)
    assert acyclic(packages) == []


def test_the_core_knows_no_model_data_or_display_library() -> None:
    for name, path in modules().items():
        if name.split(".")[1:2] and name.split(".")[1] in CORE:
            assert not {i.split(".")[0] for i in imports(path)} & HEAVY, name
            assert not {i.split(".")[1] for i in imports(path) if i.startswith("hocket.")} - CORE, name


def test_importing_the_core_loads_no_heavy_library_and_prints_nothing() -> None:
    code = f"import sys, hocket.simulate; print(sorted({HEAVY!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert out.stderr == ""


def test_nothing_executable_is_read_and_modules_stay_small() -> None:
    for name, path in modules().items():
        text = path.read_text()
        tree = ast.parse(text)
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not called & {"eval", "exec"}, name
        assert not {i.split(".")[0] for i in imports(path)} & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, name
        assert len(text.splitlines()) <= 340, name
