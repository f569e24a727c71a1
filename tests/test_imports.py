"""The shape of the source: imports point one way, light commands stay light, files and functions stay small."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lower layers first; a module may import from its own layer and from those before it.
LAYERS = (
    {"__init__", "errors"},
    {"io"},
    {"config", "examples"},
    {"data", "demo"},
    {"runs"},
    {"batching"},
    {"kernels"},
    {"models"},
    {"forward"},
    {"objectives"},
    {"parallel"},
    {"inference"},
    {"evaluation"},
    {"training"},
    {"export", "search", "serve", "doctor", "proposal"},
    {"api", "run"},
    {"recipes", "cli", "app", "__main__"},
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
HEAVY = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "gradio", "pyarrow", "pandas")


def sources() -> list[Path]:
    """Every file of ours but tests and benchmarks."""
    app = [ROOT / "app.py"] if (ROOT / "app.py").is_file() else []
    return [*sorted((ROOT / "lmtune").rglob("*.py")), *sorted((ROOT / "recipes").glob("*.py")), *app]


def part_of(path: Path) -> str:
    """The part of lmtune that a file belongs to: `data`, `config`, `recipes`, …"""
    relative = path.relative_to(ROOT)
    return (relative.parts[1] if relative.parts[0] == "lmtune" else relative.parts[0]).removesuffix(".py")


def imported_parts(source: str, package: list[str]) -> Iterator[tuple[str, int]]:
    """(part of lmtune, line) of every import in a module of `package`, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module or "") if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first in ("recipes", "app"):
                yield first, node.lineno
            elif first == "lmtune":
                part = rest.partition(".")[0]
                yield part if part in LAYER_OF else "__init__", node.lineno


def upward_imports(source: str, package: list[str], part: str) -> list[str]:
    """`line: part` of each import from a higher layer than that of `part`."""
    return [
        f"{n}: {name}" for name, n in imported_parts(source, package) if LAYER_OF.get(name, 0) > LAYER_OF.get(part, 99)
    ]


def test_every_part_has_its_layer() -> None:
    missing = {part_of(path) for path in sources()} - LAYER_OF.keys()
    assert not missing, f"say in LAYERS where these belong: {sorted(missing)}"


def test_imports_point_one_way() -> None:
    upwards = [
        f"{path.relative_to(ROOT)}:{found}"
        for path in sources()
        if path != ROOT / "lmtune" / "__init__.py"  # the package's face names what lies above, and imports it late
        for found in upward_imports(path.read_text(encoding="utf-8"), list(path.parent.relative_to(ROOT).parts),
                                    part_of(path))
    ]  # fmt: skip
    assert not upwards, "\n".join(upwards)


def test_an_upward_import_is_seen_however_it_is_written() -> None:
    for line in ("import lmtune.training.loop", "from lmtune import training", "from .. import training",
                 "import recipes.merge", "def f():\n    from lmtune.training.loop import train"):  # fmt: skip
        assert upward_imports(line, ["lmtune", "data"], "data")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in (ROOT / "lmtune").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: Collection[str]) -> set[str]:
    """The modules among `known` that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in known}


def test_no_modules_import_each_other() -> None:
    """A module that waits for the end of another's import works until somebody imports them in the other order."""
    known = {name: path for name, path in modules().items() if name not in ("lmtune", "lmtune.__main__")}
    graph = {name: imports_of(path, known) - {name} for name, path in known.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_config_and_checking_load_nothing_heavy() -> None:
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem != "__init__")
    code = (
        "import importlib, sys\n"
        "import lmtune.cli, lmtune.config.schema, lmtune.runs.store, lmtune.data.checking, lmtune.parallel.launch\n"
        f"for name in {recipes}: importlib.import_module('lmtune.recipes.' + name)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["finetune", "--help"], 0), (["finetune", "none.yaml"], 2)]
)
def test_help_and_config_errors_answer_at_once(arguments: list[str], code: int) -> None:
    """The aim is half a second; processor time, which a busy machine does not stretch, and room for a slow one."""
    seconds = []
    while len(seconds) < 3 and min(seconds, default=9e9) >= 1.5:
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "lmtune", *arguments], capture_output=True, check=False)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == code
    assert min(seconds) < 1.5


def test_modules_and_functions_are_short_and_modules_say_what_they_are() -> None:
    found = []
    for path in sources():
        source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        tree = ast.parse(source)
        if len(source.splitlines()) > 600:
            found.append(f"{name}: more than 600 lines")
        if source.strip() and not ast.get_docstring(tree):
            found.append(f"{name}: no docstring")
        found += [
            f"{name}:{node.lineno} {node.name}: more than 80 lines"
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (node.end_lineno or 0) - node.lineno >= 80
        ]
    assert not found, "\n".join(found)


TYPED = ("batching", "forward", "objectives", "parallel", "models/tuning", "inference", "runs")


def public_annotations(body: Iterable[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.expr]]:
    """(name, annotation) of the public functions, methods and fields in a module or class."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not node.name.startswith("_") or node.name in ("__init__", "__call__"):
                arguments = [each for each in ast.walk(node.args) if isinstance(each, ast.arg)]
                found = [node.returns, *(argument.annotation for argument in arguments)]
                yield from ((owner + node.name, each) for each in found if each is not None)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_annotations(node.body, f"{owner}{node.name}.")
        elif isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
            yield owner + ast.unparse(node.target), node.annotation


@pytest.mark.parametrize("folder", TYPED)
def test_public_signatures_hold_no_any(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{annotation.lineno} {name}: {ast.unparse(annotation)}"
        for path in sorted((ROOT / "lmtune" / folder).rglob("*.py"))
        for name, annotation in public_annotations(ast.parse(path.read_text(encoding="utf-8")).body)
        if re.search(r"\bAny\b", ast.unparse(annotation))
    ]
    assert not found, "\n".join(found)
