"""Rules of the layout: allowed imports, no cycles, tests that mirror the modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from tests.factories import ROOT

SOURCE = ROOT / "src" / "solo_vlm"
PACKAGES = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))
ENTRY_POINTS = {"__init__", "__main__"}


def module_name(path: Path) -> str:
    """Return the dotted name of a file below the package, without the package's own name."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCE.rglob("*.py")}


def imported_modules(name: str) -> Iterator[str]:
    """Yield the project's modules that a module imports, lazily or not, except for type checkers only."""
    path = MODULES[name]
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in _running_code(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["solo_vlm", *package[: len(package) - node.level + 1]] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{prefix}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "solo_vlm":
                yield _longest_module(target.removeprefix("solo_vlm").lstrip("."))


def _running_code(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _running_code(node)


def _longest_module(target: str) -> str:
    """Return the module of `package.module.name`, where only the module is a file."""
    while target and target not in MODULES:
        target = target.rpartition(".")[0]
    return target


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_what_its_docstring_allows(package):
    docstring = ast.get_docstring(ast.parse((SOURCE / package / "__init__.py").read_text())) or ""
    found = re.search(r"^May import: ([^.]+)\.$", docstring, re.MULTILINE)
    assert found, f'{package}/__init__.py needs a last line such as "May import: models, utils."'
    allowed = set() if found[1] == "nothing of the project" else set(re.split(r",\s*", found[1]))
    assert allowed <= set(PACKAGES)
    for name in MODULES:
        if name.split(".")[0] == package:
            packages = {target.split(".")[0] for target in imported_modules(name) if target}
            assert packages <= allowed | {package}, name


def test_package_imports_are_acyclic():
    graph = {
        package: {
            target.split(".")[0]
            for name in MODULES
            if name.split(".")[0] == package
            for target in imported_modules(name)
        }
        - {package, ""}
        for package in PACKAGES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"packages import each other: {' -> '.join(error.args[1])}")


def test_no_import_cycle_between_modules():
    graph = {name: set(imported_modules(name)) - {name, ""} for name in MODULES if name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_published_modules_import_only_each_other():
    for name in MODULES:
        if name.startswith("models.solo."):
            assert all(target.startswith("models.solo") for target in imported_modules(name)), name


def test_no_loose_module_next_to_the_packages():
    assert {path.stem for path in SOURCE.glob("*.py")} == ENTRY_POINTS


def test_every_test_file_is_named_after_a_module():
    """`tests/data/test_loader.py` tests `data/loader.py`; `test_loader_resume.py` would, too."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = path.parent.relative_to(ROOT / "tests")
        if folder.parts[:1] in ((), ("examples",), ("benchmarks",)):
            continue
        modules = {file.stem for file in (SOURCE / folder).glob("*.py")}
        modules |= {file.parent.name for file in (SOURCE / folder).glob("*/__init__.py")}
        modules.add((SOURCE / folder).name)
        tested = path.stem.removeprefix("test_")
        assert any(tested == module or tested.startswith(f"{module}_") for module in modules), path
