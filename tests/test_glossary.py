"""Words that are retired: the field has a term for each, and a reader should meet only that one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    *(ROOT / "lmtune").rglob("*.py"), *(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes").glob("configs/*.yaml"),
    *(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md",
]  # fmt: skip
DEMO = ROOT / "lmtune" / "demo"  # its sentences are data: what the embedded model's world says
RETIRED = {
    r"read in an afternoon": "(nothing: it is not true)",
    r"fp8": "(nothing: it is gone)",
    r"fates?": "data report",
    r"dealt|deals? out|dealing": "assign",
    r"laid down|lay(s|ing)? down|laid once": "pack",
    r"meetings?": "collective",
    r"fast ways?": "optimized path",
    r"dear(er|est)": "more expensive",
    r"gone on with": "continue, resume",
    r"(is|are) no number": "is not a number",
    r"mend(s|ed|ing)?": "fix",
    r"half a character": "unpaired surrogate",
}


@pytest.mark.parametrize("word", RETIRED)
def test_nobody_uses(word: str) -> None:
    pattern = re.compile(rf"\b({word})\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in FILES
        if not path.is_relative_to(DEMO) and path.name != "CHANGELOG.md"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, f"say {RETIRED[word]}:\n" + "\n".join(found)
