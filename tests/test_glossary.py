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
    r"fp8|read in an afternoon": "(nothing: it is not true)",
    r"fates?|becomes of": "data report",
    r"dealt|deals? out|dealing": "assign",
    r"lay|lays|laid|laying": "pack, format",
    r"meetings?": "collective",
    r"fast ways?": "optimized path",
    r"dear(er|est)": "more expensive",
    r"gone on with|goes on (after step|from|with it)": "continue, resume",
    r"said only": "reported, not enforced",
    r"(is|are) no number|(it|which|that|what|who|nobody) is none": "is not a number, is not one",
    r"mend(s|ed|ing)?": "fix",
    r"half a character": "unpaired surrogate",
    r"turned into numbers": "dequantize",
    r"label[ _]positions?|label_places": "read positions, read_index",
    r"likeliest|first choices?|same_first_choice": "top-1, most likely",
    r"(computed?|computes) (layers )?twice": "activation checkpointing",
    r"in silence": "silently",
    r"offenders?|rows? at fault": "non-finite examples",
    r"learnt|(is|are|was|were) learned|learned (tokens?|rows?|ones)|(tokens?|rows?) to learn|what learns": "trained",
    r"(by|of)[ _]documents?|document_tokens": "sequence, segment",
    r"(un|de|re)?(quant|optim|token|normal|initial|minim|maxim|summar|material|synchron|general)is(e[drs]?|ing|ations?)":
        "quantize, optimize: American spelling",
}  # fmt: skip


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
