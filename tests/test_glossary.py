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
    r"gone on with|goes on (after step|from|with it)": "continue, resume",
    r"said only": "reported, not enforced",
    r"(is|are) no number": "is not a number",
    r"mend(s|ed|ing)?": "fix",
    r"half a character": "unpaired surrogate",
    r"turned into numbers": "dequantize",
    r"label[ _]positions?|label_places": "read positions, read_index",
    r"likeliest|first choices?|same_first_choice": "top-1, most likely",
    r"(computed?|computes) (layers )?twice": "activation checkpointing",
    r"in silence": "silently",
    r"offenders?|find_offenders": "non-finite examples",
    r"lay|lays|laid|laying": "pack, format",
    r"rows? at fault": "non-finite examples",
    r"becomes of": "(name what is done)",
    r"learnt|(is|are|was|were) learned|learned (tokens?|rows?|ones)|(tokens?|rows?) to learn": "trained",
    r"what learns": "trained parameters",
    r"(by|of)[ _]documents?|document_tokens": "sequence, segment",
    r"(it|which|that|what|who|nobody) is none": "is not one",
    r"Tally|shown_first": "RowCounter, format_examples",
    r"Feeder|todo|of_documents|give_up": "BatchPrefetcher, plan, of_segments, disable",
    r"stop_with_starter|STARTED_BY": "exit_with_parent, PARENT_PID",
    r"_kept_or_made|_keep_one_layout": "load_cached_or_quantize, disable_cpu_repacking",
    r"run_notes|read_notes": "metadata",
    r"require_same|set_aside|odd_files": "check_resumable, archive, describe_contents",
    r"_is_truth|_Forgiving|keep_without_stderr": "is_bool, BrokenPipeTolerantStream",
    r"_ArrivingText|_next_filled|end_of_gap": "StreamingJsonReader, next_nonblank, skip_whitespace",
    r"(un|de|re)?(quant|optim|token|normal|initial)is(e[drs]?|ing|ations?)": "quantize, optimize: American spelling",
    r"(minim|maxim|summar|material|synchron|general)is(e[drs]?|ing|ations?)": "minimize, summarize: American spelling",
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
