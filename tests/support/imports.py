"""Who imports whom in ``npt_kernels``: every import statement, lazy and type-only ones too, and module names in strings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

__all__ = ["ROOT", "cycles", "edges", "modules", "other_libraries", "room"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "npt_kernels"


@lru_cache(maxsize=1)
def modules() -> dict[str, Path]:
    """Module name → file, of the whole package."""
    found = {}
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = list(file.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def room(module: str) -> str:
    """Folder or file directly below the package; ``""`` for the package itself."""
    return module.split(".")[1] if "." in module else ""


def _strings(node: ast.AST) -> Iterator[re.Pattern[str]]:
    """Module names that a string, or the fixed part of an f-string, can stand for."""
    if isinstance(node, ast.JoinedStr):
        text = "".join(
            re.escape(v.value) if isinstance(v, ast.Constant) and isinstance(v.value, str) else r"\w+"
            for v in node.values
        )
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = re.escape(node.value)
    else:
        return
    if text.startswith(PACKAGE + r"\."):
        yield re.compile(text + r"\Z")


def _imports(module: str, file: Path) -> Iterator[str]:
    known = modules()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            target = node.module or ""
            if node.level:
                base = package.split(".")
                target = ".".join([*base[: len(base) - node.level + 1], *([node.module] if node.module else [])])
            for name in node.names:
                full = f"{target}.{name.name}"
                yield full if full in known else target
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif id(node) not in docstrings:
            for pattern in _strings(node):
                yield from (name for name in known if pattern.match(name))


@lru_cache(maxsize=1)
def _all_imports() -> dict[str, frozenset[str]]:
    return {module: frozenset(_imports(module, file)) for module, file in modules().items()}


def edges() -> Iterator[tuple[str, str]]:
    """(importer, imported) inside the package."""
    known = modules()
    for module, targets in _all_imports().items():
        yield from ((module, target) for target in sorted(targets) if target in known and target != module)


def other_libraries(module: str) -> set[str]:
    """Top-level names that a module imports from outside of the package."""
    return {name.split(".")[0] for name in _all_imports()[module]} - {PACKAGE, ""}


def cycles() -> list[list[str]]:
    """Strongly connected groups of two modules or more (Tarjan)."""
    graph: dict[str, list[str]] = {module: [] for module in modules()}
    for importer, imported in edges():
        graph[importer].append(imported)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for target in graph[module]:
            if target not in order:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], order[target])
        if low[module] == order[module]:
            group = []
            while not group or group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in order:
            visit(module)
    return sorted(found)
