# SPDX-License-Identifier: Apache-2.0
"""Check who imports whom inside `src/tunesmith`, and that the command line starts without heavy libraries.

Two rules, both read from the syntax tree without importing anything:

1. Each folder imports only the folders named in `ALLOWED` (docs/architecture.md). Imports inside functions, under
   `TYPE_CHECKING`, relative ones and `import_module("tunesmith...")` with a literal name count too. Only the registry
   in `core` may load method folders by name.
2. Importing `tunesmith`, `tunesmith.core.errors` or any module of `tunesmith.cli` loads none of `HEAVY`, directly or
   through other modules of the package (a module's parent packages are loaded with it).
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "tunesmith"
METHODS = (
    "deltas",
    "derive",
    "objectives",
    "select",
    "compose",
    "edit",
    "unlearn",
    "continual",
    "test_time",
    "decode",
    "inspect",
)
ENGINES = ("data", "models", "evaluate", "train", "serve", "export")
ANYTHING = None
# folder: the folders it may import besides itself; None means any but the forbidden ones
ALLOWED: dict[str, frozenset[str] | None] = {
    "core": frozenset(),
    **{method: frozenset({"core"}) for method in METHODS},
    "data": frozenset({"core"}),
    "models": frozenset({"core"}),
    "evaluate": frozenset({"core", "data"}),
    "train": frozenset({"core", "data", "models", "evaluate"}),
    "serve": frozenset({"core", "data", "models"}),
    "export": frozenset({"core", "data", "models"}),
    "study": frozenset({"core", *ENGINES}),
    "arena": frozenset({"core", "study", *ENGINES}),
    "cli": ANYTHING,
    "web": ANYTHING,
    "": ANYTHING,
}
# Nothing may import these; a folder may import itself, and __main__ starts the command line.
LEAVES = frozenset({"cli", "web"})
OUTSIDE = frozenset({"studies", "tests", "benchmarks", "tools"})
HEAVY = frozenset({"torch", "transformers", "matplotlib", "accelerate"})


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module: dotted name, line, and whether importing the file runs it."""

    target: str
    line: int
    at_load: bool
    by_name: bool = False


@dataclass(frozen=True, slots=True)
class Module:
    """One source file: dotted name, path relative to the root, and what it imports."""

    name: str
    path: str
    imports: tuple[Import, ...]

    @property
    def area(self) -> str:
        """The folder directly under the package, or the empty string for a file of the package itself."""
        parts = self.name.split(".")
        return parts[1] if len(parts) == 2 and self.path.endswith("/__init__.py") else area_of(self.name)


def area_of(dotted: str) -> str:
    """`tunesmith.data.packing` is in `data`; `tunesmith.checks`, a file or name at the top, is in none."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and parts[1] in ALLOWED) else ""


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _named_import(node: ast.Call) -> str | None:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
        value = node.args[0].value
        return value if isinstance(value, str) else None
    return None


def _walk(node: ast.AST, at_load: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, False)
        elif isinstance(child, ast.If) and _is_type_checking(child.test):
            for part in child.body:
                yield part, False
                yield from _walk(part, False)
            for part in child.orelse:
                yield part, at_load
                yield from _walk(part, at_load)
        else:
            yield child, at_load
            yield from _walk(child, at_load)


def read_imports(source: str, module: str, is_package: bool) -> tuple[Import, ...]:
    """Every import in a file. `from a import b` yields `a.b`, which may be a module or a name in module `a`."""
    found = []
    for node, at_load in _walk(ast.parse(source), True):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, at_load) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            found += [Import(f"{base}.{alias.name}", node.lineno, at_load) for alias in node.names]
        elif isinstance(node, ast.Call) and (name := _named_import(node)):
            found.append(Import(name, node.lineno, at_load, by_name=True))
    return tuple(found)


def read_package(root: Path) -> dict[str, Module]:
    """All modules under `root/src/tunesmith`, by dotted name. Raises `SyntaxError` for a file that does not parse."""
    source = root / "src"
    modules = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        relative = path.relative_to(source)
        is_package = path.name == "__init__.py"
        parts = relative.parent.parts if is_package else relative.with_suffix("").parts
        name = ".".join(parts)
        text = path.read_text(encoding="utf-8")
        shown = path.relative_to(root).as_posix()
        modules[name] = Module(name, shown, read_imports(text, name, is_package))
    return modules


def _allowed(module: Module, target: str) -> bool:
    here, there = module.area, area_of(target)
    if here == there:
        return True
    if there in LEAVES:
        return module.name == f"{PACKAGE}.__main__"
    if target == f"{PACKAGE}.__version__":
        return here != "core"
    choices = ALLOWED[here]
    return choices is None or there in choices


def layer_errors(modules: dict[str, Module]) -> list[str]:
    """Violations of rule 1, one line each."""
    errors = []
    for module in modules.values():
        if module.area not in ALLOWED:
            errors.append(f"{module.path}: folder {module.area!r} is not in the table of tools/check_imports.py")
            continue
        for item in module.imports:
            top = item.target.split(".")[0]
            if top in OUTSIDE:
                errors.append(f"{module.path}:{item.line}: the package imports nothing from {top}/")
            by_registry = item.by_name and module.area == "core"
            if top == PACKAGE and not by_registry and not _allowed(module, item.target):
                here, there = module.area or PACKAGE, area_of(item.target) or f"the top of {PACKAGE}"
                errors.append(f"{module.path}:{item.line}: {here} may not import {there} ({item.target})")
    return errors


def _loads(module: Module) -> Iterator[tuple[str, int]]:
    for item in module.imports:
        if item.at_load:
            parts = item.target.split(".")
            for end in range(1, len(parts) + 1):
                yield ".".join(parts[:end]), item.line


def heavy_errors(modules: dict[str, Module]) -> list[str]:
    """Violations of rule 2: the chain of modules from a light module to a heavy library."""
    starts = [m for m in modules.values() if m.area == "cli" or m.name in (PACKAGE, f"{PACKAGE}.core.errors")]
    errors = []
    for start in starts:
        for parent in _parents(start.name):
            if parent in modules and (chain := _chain(modules[parent], modules)):
                errors.append(f"{start.path}: loads {chain[-1]} at import ({' -> '.join(chain)})")
                break
    return errors


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _chain(start: Module, modules: dict[str, Module]) -> list[str] | None:
    queue, seen = [[start.name]], {start.name}
    while queue:
        path = queue.pop(0)
        for target, line in _loads(modules[path[-1]]):
            if target in HEAVY:
                return [*path[:-1], f"{path[-1]}:{line}", target]
            if target in modules and target not in seen:
                seen.add(target)
                queue.append([*path, target])
    return None


def main(argv: list[str] | None = None) -> int:
    """Print each violation and return 1, or return 0."""
    parser = argparse.ArgumentParser(description="check the import rule of docs/architecture.md")
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    root = parser.parse_args(argv).root
    try:
        modules = read_package(root)
    except (SyntaxError, UnicodeDecodeError) as error:
        print(f"imports: cannot read a file: {error}", file=sys.stderr)
        return 1
    if not modules:
        print(f"imports: no {PACKAGE} package under {root / 'src'}", file=sys.stderr)
        return 1
    errors = layer_errors(modules) + heavy_errors(modules)
    for line in errors:
        print(line)
    print(f"imports: {len(modules)} modules, {len(errors)} violations")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
