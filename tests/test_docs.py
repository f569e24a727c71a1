"""What the pages name exists: commands and their options, settings, files, layers. `make docs` checks the links."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import runpy
from pathlib import Path

import pytest
import typer

import lmtune
from lmtune.cli import VERBS
from lmtune.config.json_schema import every_kind
from lmtune.config.pretrain import PretrainConfig
from lmtune.config.schema import FinetuneConfig
from lmtune.data.checking import check_tree, inspect_data
from tests.test_imports import LAYERS

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*(ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md")), *(ROOT / "docs").glob("*.md")]
}
SECTIONS = "model|data|adapter|tuning|objective|train|evaluation|parallel|run"
KEYS = {one.key for schema in (FinetuneConfig, PretrainConfig) for *_, known in every_kind(schema) for one in known}
each_page = pytest.mark.parametrize("page", sorted(PAGES))


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def code(page: str) -> list[str]:
    """What stands between backticks, and the lines of fenced shell blocks and YAML blocks."""
    blocks = re.findall(r"^```(?:sh|yaml)\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return [*re.findall(r"`([^`\n]+)`", prose(page)), *(line for block in blocks for line in block.splitlines())]


@each_page
def test_every_command_and_option_exists(page: str) -> None:
    for text in code(page):
        for verb, rest in re.findall(r"(?<!--arms )\blmtune ([a-z]+)\b([^|;]*)", text):
            assert verb in VERBS, text
            assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= options(verb), text


def options(verb: str) -> set[str]:
    """The long options of a command."""
    app = typer.Typer()
    app.command()(importlib.import_module(f"lmtune.recipes.{verb}").main)
    return {name for option in typer.main.get_command(app).params for name in option.opts} | {"--help"}


@each_page
def test_every_setting_exists(page: str) -> None:
    named = re.compile(rf"(?<![\w./-])({SECTIONS})\.([a-z]\w*)(?![\w(/])")
    for text in code(page):
        for section, key in named.findall(text):
            if key not in ("json", "jsonl", "yaml", "md", "py"):
                assert f"{section.replace('adapter', 'tuning')}.{key}" in KEYS, text


@each_page
def test_every_file_exists(page: str) -> None:
    for text in code(page):
        if re.fullmatch(r"[\w./-]+(\.py|/)(::\w+)?", text) and not text.startswith(("runs/", "checkpoints/", ".venv/")):
            path = text.partition("::")[0]
            places = [path, f"lmtune/{path}", f"tests/faults/{path}", f"runs/NAME/{path}"]
            made = path in ("adapter/", "merged/")  # by a run
            assert made or any((ROOT / place).exists() for place in places), text


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/reliability.md"])
def test_every_test_named_exists(page: str) -> None:
    for file, function in re.findall(r"`([\w/]+\.py)::(\w+)`", PAGES[page]):
        path = ROOT / file if "/" in file else ROOT / "tests" / "faults" / file
        assert function in {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}, function


def test_the_tree_of_the_readme_names_what_is_there() -> None:
    tree = re.search(r"## The source tree\n\n```\n(.*?)```", PAGES["README.md"], re.DOTALL)
    assert tree
    folders: list[str] = []
    named = set()
    for line in tree[1].splitlines():
        if match := re.match(r"( *)([\w.-]+/?)(?=  |$)", line):
            depth = len(match[1]) // 2
            folders[depth:] = [match[2].rstrip("/")]
            path = "/".join(folders)
            assert (ROOT / path).exists(), path
            named.add(path)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lmtune").rglob("*.py")}
    unnamed = {path for path in modules - named if not path.startswith("lmtune/demo/") and "/__" not in path}
    assert not unnamed


def test_the_layers_are_those_of_the_imports() -> None:
    block = re.search(r"## Layers.*?```text\n(.*?)```", PAGES["docs/architecture.md"], re.DOTALL)
    assert block
    shown = [set(re.split(", ", re.split(r"  +", line)[0])) for line in block[1].splitlines()]
    assert shown == [names - {"__init__", "__main__"} for names in LAYERS]


def test_the_settings_page_is_in_step() -> None:
    generated = runpy.run_path(str(ROOT / ".ci" / "settings_page.py"))["page"]
    page = PAGES["docs/settings.md"]
    assert generated(page) == page, "run: python .ci/settings_page.py"


def test_the_python_page_names_what_is_public() -> None:
    for name, parameters in re.findall(r"^\| `(\w+)\(([^)]*)\)`", PAGES["docs/python.md"], re.MULTILINE):
        signature = inspect.signature(getattr(lmtune, name)).parameters
        named = {parameter.strip("* ") for parameter in parameters.split(",")} - {""}
        assert named == set(signature), name


def test_every_page_is_in_the_navigation_and_the_readme() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    navigation, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("mkdocs.yml", "README.md"))
    assert {page for page in pages if f": {page}" not in navigation} == set()
    assert {page for page in pages if f"docs/{page}" not in readme} == set()


def test_the_readme_names_every_command_that_prints_one_json_document() -> None:
    """`chat` prints one object a line; what `schema` prints is JSON in any case."""
    said = PAGES["README.md"].partition(" accept `--json`")[0].rpartition("each command.")[2]
    named = re.findall(r"`([a-z]+)`", said)
    assert set(named) == {verb for verb in VERBS if "--json" in options(verb)} - {"chat", "schema"}


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("Images", {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}),
        ("audio", {"role": "user", "content": "What is said?", "audio": "a.wav"}),
        ("video", {"role": "user", "content": "What is seen?", "video": "a.mp4"}),
        ("tool", {"role": "user", "content": "Off.", "calls": [{"name": "lamp", "arguments": {"on": False}}]}),
    ],
)
def test_the_limits_name_the_rows_that_are_refused(kind: str, row: dict[str, object], tmp_path: Path) -> None:
    limits = PAGES["README.md"].partition("## Limits")[2].partition("\n## ")[0]
    (refused,) = re.findall(r"^- (.*) are not supported as training data", limits, re.MULTILINE)
    calls = row.pop("calls", None)
    answer = {"role": "assistant", "content": "Yes."} if calls is None else {"role": "assistant", "tool_calls": calls}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [row, answer]}) + "\n")
    num_faults = check_tree(inspect_data([str(tmp_path / "rows.jsonl")], ()))["num_faults"]
    assert bool(num_faults) == (kind.lower() in refused.lower())
