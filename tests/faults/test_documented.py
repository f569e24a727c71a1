"""docs/reliability.md and the tests agree: every fault has its row, every row its tests, every test here its row."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
TABLES = re.findall(r"^\| \| promise \| what happens \| test \|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
ROWS = [row for table in TABLES for row in table.splitlines()[1:]]


def names_in(path: Path) -> set[str]:
    """The names of a module's tests."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_fault_has_its_row() -> None:
    numbers = [[int(number) for number in row.split("|")[1].split("-")] for row in ROWS]  # `7` or `10-14`
    assert sorted(n for first, *last in numbers for n in range(first, [first, *last][-1] + 1)) == list(range(1, 33))


def test_every_row_names_tests_that_exist() -> None:
    for row in ROWS:
        named = re.findall(r"`(\S+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            path = ROOT / file if "/" in file else HERE / file
            assert test in names_in(path), f"{file}::{test}"


def test_every_test_of_a_fault_has_its_row() -> None:
    for path in HERE.glob("test_*.py"):
        for name in names_in(path):
            if path != Path(__file__):
                assert f"`{path.name}::{name}`" in TEXT, name
