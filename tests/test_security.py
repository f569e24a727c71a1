"""Every threat of SECURITY.md has its test, and nothing in the source could run what it reads."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = [line for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
SOURCES = [*sorted((ROOT / "lmtune").rglob("*.py")), *sorted((ROOT / "recipes").glob("*.py")), ROOT / "app.py"]
MODULES = {"pickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
CALLS = {"eval", "exec", "compile", "torch.load", "os.system", "os.popen", "yaml.safe_load", "yaml.unsafe_load",
         "yaml.full_load", "numpy.load", "np.load"}  # fmt: skip


def test_every_threat_has_its_test() -> None:
    threats = [line for line in TABLE if not line.startswith(("| **", "| threat"))]
    assert len(threats) >= 18
    without = [line[:60] for line in threats if not re.search(r"`tests/[\w/]+\.py::\w+` ?[,|]", line)]
    assert not without


def dangers(source: str) -> list[str]:
    """Imports and calls in `source` through which a file that is read could run code, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: import {name}" for name in names if name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            if (name := ast.unparse(node.func)) in CALLS:
                found.append(f"{node.lineno}: {name}")
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                if (keyword.arg, value) in {("shell", "True"), ("trust_remote_code", "True")}:
                    found.append(f"{node.lineno}: {keyword.arg}={value}")
                if name == "yaml.load" and keyword.arg == "Loader" and value != "_StrictLoader":
                    found.append(f"{node.lineno}: yaml.load with {value}")
    return found


def test_a_danger_is_seen() -> None:
    for source in ("from dill import loads", "torch.load(path)", "f(trust_remote_code=True)",
                   "yaml.load(text, Loader=yaml.Loader)"):  # fmt: skip
        assert dangers(source)


def test_nothing_of_ours_can_run_what_it_reads() -> None:
    found = [f"{path.relative_to(ROOT)}:{danger}" for path in SOURCES for danger in dangers(path.read_text())]
    assert not found, "\n".join(found)
