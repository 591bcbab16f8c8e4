"""Tests that the documentation agrees with the code: links, commands, modules, diagrams."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
import typer
from tests.factories import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PACKAGE = ROOT / "src" / "solo_vlm"
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Return the anchors that MkDocs derives from a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def command_lines(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the `solo` commands of a page, and whether each is complete.

    Commands in code blocks are complete, without prompts and comments. Code spans may omit arguments.
    """
    for block in re.findall(r"^```(?:bash|text|ini)?\n(.*?)^```$", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.search(r"(?:^(?:\$ |ExecStart=\S*/)?solo|-m solo_vlm) (.*)$", line):
                yield re.split(r" +# ", match[1])[0], True
    for span in re.findall(r"`solo ([^`]+)`", FENCE.sub("", text)):
        yield " ".join(span.split()), False


@lru_cache
def command_line(complete: bool) -> click.Group:
    """Build the command `solo`; if commands may be incomplete, without required arguments."""
    from solo_vlm.cli import app

    def relax(command: click.Command) -> None:
        command.no_args_is_help = False
        for parameter in command.params:
            parameter.required = False
        for subcommand in getattr(command, "commands", {}).values():
            relax(subcommand)

    group = typer.main.get_command(app)
    if not complete:
        relax(group)
    return group


def parse(command: click.Command, name: str, arguments: list[str]) -> None:
    """Parse a command line as Click does, through the groups, without running it."""
    context = command.make_context(name, arguments)
    rest = [*getattr(context, "_protected_args", []), *context.args]
    if rest and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"there is no command {rest[0]}"
        parse(command.commands[rest[0]], rest[0], rest[1:])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve_to_files_and_headings(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist_with_their_options(page):
    for line, complete in command_lines(page.read_text(encoding="utf-8")):
        arguments = shlex.split(line)
        try:
            parse(command_line(complete), "solo", [part for part in arguments if part != "--help"])
        except Exception as error:  # of click, or of typer's copy of it
            pytest.fail(f"solo {line}: {error}")


@pytest.mark.parametrize(
    "line", ["nothing", "data nothing", "serve --model m --nothing", "serve --model m --port many"]
)
def test_invalid_commands_are_detected(line):
    with pytest.raises(Exception, match=r"nothing|integer"):
        parse(command_line(True), "solo", line.split())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_dotted_names_can_be_imported(page):
    for name in sorted(set(re.findall(r"\bsolo_vlm(?:\.\w+)+", page.read_text(encoding="utf-8")))):
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_imports_in_python_examples_work(page):
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        for line in re.findall(r"^(?:import solo_vlm|from solo_vlm[\w.]* import .*)", block, re.M):
            exec(line, {})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_tests_exist(page):
    for file, test in re.findall(r"`(test_\w+\.py)::(test_\w+)`", page.read_text(encoding="utf-8")):
        assert any(f"def {test}(" in path.read_text() for path in (ROOT / "tests").rglob(file)), test


def test_paths_in_the_architecture_exist():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    paths = re.findall(r"(?:src/solo_vlm/)?\b((?:[a-z_]+/)+(?:\w+\.(?:py|c|yaml))?)", text)
    for path in paths:
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path


def test_architecture_lists_the_allowed_imports():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", text, re.M))
    for initializer in PACKAGE.glob("*/__init__.py"):
        allowed = re.search(r"^May import: ([^.]+)\.$", initializer.read_text(encoding="utf-8"), re.M)
        listed = set(re.findall(r"`(\w+)`", table[initializer.parent.name]))
        if table[initializer.parent.name] != "everything":
            assert listed - {"utils"} == set(allowed[1].split(", ")) - {"utils", "nothing of the project"}


def test_every_diagram_has_its_picture(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from diagrams import find_diagrams

    pictures = {path for _, path in find_diagrams()}
    assert pictures
    assert {path for path in pictures if not path.is_file()} == set(), "run `make docs-assets ARGS=diagrams`"
    assert set((DOCS / "assets" / "diagrams").iterdir()) == pictures
    for picture in pictures:
        ElementTree.parse(picture)


def test_every_picture_is_shown():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in (DOCS / "assets").iterdir():
        assert picture.is_dir() or picture.name in text, picture.name


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_page_opens_with_a_command():
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if page.name in {"index.md", "api.md"}:  # the README, and the reference
            continue
        assert re.match(r"# .*\n\n```(bash|yaml)\n", text), name_of(page)
