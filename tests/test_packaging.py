"""What an installed lmtune holds: all its packages, the recipes' configs, the example rows and the embedded model."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirement_name(requirement: str) -> str:
    """`huggingface_hub>=1.0` -> `huggingface-hub`: the name, as the package index compares it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~;\[ ]", requirement)[0]).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in a wheel built from a copy of the checkout, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("lmtune", "recipes", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('out'))"
    (folder / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "out").glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_the_wheel_holds_every_source_file_and_what_goes_with_it(wheel: list[str]) -> None:
    kinds = (".py", ".css", ".js")
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "lmtune").rglob("*.*") if path.suffix in kinds}
    wanted |= {
        f"lmtune/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").glob("**/*.*") if path.suffix != ".pyc"
    }
    wanted |= {
        "lmtune/examples/support.jsonl",
        "lmtune/examples/support_heldout.jsonl",
        "lmtune/py.typed",
        "lmtune/demo/drift.jsonl",
    }
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "lmtune" / "demo" / "tiny").iterdir()}
    assert wanted <= set(wheel)
    assert {name.split("/")[0] for name in wheel} == {"lmtune", f"lmtune-{PROJECT['project']['version']}.dist-info"}
    assert not [name for name in wheel if "tests" in name or name.endswith((".pyc", ".bin", ".pt"))]


def test_the_versions_agree() -> None:
    from lmtune import __version__

    assert __version__ == PROJECT["project"]["version"]


def test_every_direct_dependency_is_pinned() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    pinned = {requirement_name(name) for name in pins}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(requirement for extra in extras for requirement in extra)]
    missing = {requirement_name(requirement) for requirement in wanted} - pinned
    assert not missing, f"constraints.txt does not pin {sorted(missing)}"


@pytest.mark.parametrize(
    ("name", "version"), [("torch", "2.10"), ("transformers", "5.3"), ("gradio", "6.21"), ("jinja2", "3.1.6")]
)
def test_versions_with_known_vulnerabilities_are_ruled_out(name: str, version: str) -> None:
    from packaging.requirements import Requirement
    from packaging.version import Version

    wanted = next(r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == name)
    (floor,) = (part.version for part in wanted.specifier if part.operator == ">=")
    assert Version(floor) >= Version(version)


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    """But for what is used only where it is installed."""
    import ast

    declared = {requirement_name(requirement) for requirement in PROJECT["project"]["dependencies"]}
    extras = PROJECT["project"]["optional-dependencies"]
    optional = {requirement_name(one) for name in ("gguf", "sweep") for one in extras[name]}
    aliases = {"yaml": "pyyaml", "PIL": "pillow", "lmtune": None, "recipes": None}
    imported = set()
    for path in [*(ROOT / "lmtune").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            imported |= {name.split(".")[0] for name in names}
    imported -= {"flash_attn", "triton"}  # on GPUs; PyTorch brings Triton
    imported -= {"wandb"}  # a tracker that the user has
    third_party = {aliases.get(name, name) for name in imported - sys.stdlib_module_names} - {None}
    assert {requirement_name(str(name)) for name in third_party} - optional == declared
