"""Installed package: light imports, one version, complete wheels, valid README."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from solo_vlm.models.solo.image_processing_solo import LIBRARY

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = {"torch", "transformers", "numpy", "PIL", "pyarrow", "pydantic", "sklearn", "matplotlib", "cv2"}


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules that a new interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_heavy_module() -> None:
    loaded = modules_after("import solo_vlm; solo_vlm.__version__; dir(solo_vlm)")
    assert "solo_vlm" in loaded
    assert not loaded & HEAVY


def test_command_line_loads_no_heavy_module() -> None:
    loaded = modules_after("from solo_vlm.cli import main")
    assert not loaded & {"torch", "transformers", "sklearn", "matplotlib"}


def test_version_is_the_same_everywhere() -> None:
    import solo_vlm

    assert PYPROJECT["project"]["dynamic"] == ["version"]
    source = (ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    assert f'__version__ = "{solo_vlm.__version__}"' in source
    installed = importlib.metadata.version("solo-vlm")
    assert installed == solo_vlm.__version__, "installed before the version changed: pip install -e . again"


def test_console_script_resolves() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="solo")
    assert script.value == PYPROJECT["project"]["scripts"]["solo"]
    assert callable(script.load())


def test_torchvision_is_never_imported_or_required() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in names:
                assert name.partition(".")[0] != "torchvision", f"{path}:{node.lineno}"
    for name in ("pyproject.toml", "constraints.txt"):
        assert not re.search(r"^[\s\"']*torchvision", (ROOT / name).read_text(encoding="utf-8"), re.M), name


def test_constraints_pin_every_direct_dependency_and_no_cuda() -> None:
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {normal(name) for name in pins}
    project = PYPROJECT["project"]
    for requirements in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in requirements:
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            assert match and normal(match[0]) in pinned, requirement
    assert not any("+" in version for version in pins.values()), (
        "a local build suffix does not pin other builds"
    )
    assert not {name for name in pinned if name.startswith(("nvidia", "cuda", "triton"))}
    assert "solo-vlm" not in pinned


def test_readme_names_only_existing_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"^```.*?^```|^ {4}.*?$|`[^`\n]+`", readme, re.M | re.S)
    named = set(re.findall(r"\bmake(?:[ \t]+[A-Z_]+=\S+)*[ \t]+([a-z][a-z-]*)", "\n".join(code)))
    assert named <= targets
    assert {"quickstart", "test"} <= named


def test_readme_links_into_docs_only() -> None:
    """The README is the site's home page, where links to files outside docs/ would be broken."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", readme):
        if re.match(r"[a-z]+:|#", target):
            continue
        path = target.partition("#")[0]
        assert (ROOT / path).is_file(), target
        assert path.startswith("docs/"), f"{target}: name it in code font instead of linking it"


@pytest.mark.parametrize(
    ("compiler", "source"), [("no-such-compiler", "int main;"), ("cc", "no C")], ids=["none", "fails"]
)
def test_failed_compilation_leaves_no_files(tmp_path, monkeypatch, capsys, compiler, source) -> None:
    """An outdated library must not stay in use."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    (tmp_path / "kernel.c").write_text(source)
    (tmp_path / "kernel.so").write_text("old")
    assert not build.compiled(tmp_path / "kernel.c", tmp_path / "kernel.so")
    assert [path.name for path in tmp_path.iterdir()] == ["kernel.c"]
    assert "kernel.c was not compiled" in capsys.readouterr().err


@pytest.mark.slow
def test_wheel_is_complete(tmp_path: Path) -> None:
    """The wheel is built from the source distribution, which must be complete, too."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=True,
    )
    (wheel,) = tmp_path.glob("solo_vlm-*-py3-none-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    src = ROOT / "src"
    expected = {path.relative_to(src).as_posix() for path in src.rglob("*") if path.is_file()}
    expected -= {name for name in expected if "__pycache__" in name}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    assert recipes
    expected |= {f"solo_vlm/{recipe}" for recipe in recipes}
    assert expected <= names, sorted(expected - names)
    kernel = LIBRARY.relative_to(src).as_posix()
    assert (kernel in names) != wheel.name.endswith("-any.whl")
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("solo_vlm/", "solo_vlm-"))]
