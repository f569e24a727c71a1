"""Real chat templates: what is trained is what generation is asked for, and a reply is read back as the row says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmtune.data.rendering import Renderer, Template
from lmtune.data.replies import split_reply
from lmtune.data.types import Example, Message
from lmtune.errors import DataError
from tests.real.folders import template_files, tokenizer_of
from tests.real.goldens import FOLDER, TOKENIZERS, golden
from tests.tokenizers import LLAMA2

pytestmark = pytest.mark.real

NEAREST = {
    "gemma": "gemma3", "diffusion": "gemma3", "deepseek": "deepseek_v3", "gptoss": "gptoss", "muse": "gptoss",
    "llama": "llama3_1",
}  # fmt: skip
CODE = "    place = 2\n    return place\n"
FORGED = "a <|im_end|> b <|end|> c <end_of_turn> d <|eot_id|> e </s>"
THOUGHT = "<think>\nTwo and two.\n</think>\n\n"
# Reasons for which a template rightly takes no such row.
REFUSED = (
    "opens a <think> part before every answer, and this one has none", "drops the answer's <think> part",
)  # fmt: skip


def rows(thinking: bool) -> list[tuple[Message, ...]]:
    thought = THOUGHT if thinking else ""
    user, said = Message("user", "What is 2 + 2?"), Message("assistant", thought + "Four, 四.")
    return [
        (user, said), (user, said, Message("user", "And 3?"), Message("assistant", thought + "Five.")),
        (Message("user", FORGED), Message("assistant", thought + FORGED)),
        (Message("user", "Write code."), Message("assistant", thought + CODE)),
    ]  # fmt: skip


READ_PICTURES = ("idefics3", "llava_next", "smolvlm")  # contents are lists of parts there, which no row of ours is


def check(renderer: Renderer, messages: tuple[Message, ...], thinking: bool) -> None:
    documents = renderer.render(Example("rows.jsonl", 1, messages))
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = renderer.prompt_ids(messages[:index])
        document = next(d for d in documents if len(d) > len(prompt) and d.input_ids[: len(prompt)].tolist() == prompt)
        assert not document.loss_mask[len(prompt) - 1]
        assert document.loss_mask[len(prompt)]
        end = [*document.loss_mask, False].index(False, len(prompt))
        trained = document.input_ids[len(prompt) : end]
        assert trained[-1] in renderer.stop_token_ids
        assert not set(trained[:-1]) & set(renderer.stop_token_ids)
        reasoning, answer = split_reply(renderer.decode(trained))
        wanted_reasoning, wanted = split_reply(message.content)
        assert answer.strip(" ") == wanted.strip(" ")
        assert answer.startswith(wanted)
        assert reasoning == wanted_reasoning


@pytest.mark.parametrize("option", ["auto", "thinking"])
@pytest.mark.parametrize(
    "path", [p for p in template_files() if p.stem not in READ_PICTURES], ids=lambda path: path.stem
)
def test_every_template_of_the_collection(path: Path, option: Template) -> None:
    tokenizer = tokenizer_of(NEAREST.get(path.stem.split("_")[0].rstrip("0123456789v"), "qwen3"), path.read_text())
    renderer = Renderer(tokenizer, option)
    refused = 0
    for thinking in (False, True) if option == "thinking" else (False,):
        for messages in rows(thinking):
            try:
                check(renderer, messages, thinking)
            except DataError as error:
                if not any(reason in str(error) for reason in REFUSED):
                    raise
                refused += 1
    assert refused <= 4, "no row of this template can be trained"


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3", "deepseek_v3", "llama2"])
def test_every_tokenizer_with_its_own_template(name: str) -> None:
    """Llama 2's package holds none: ours has its shape."""
    renderer = Renderer(tokenizer_of(name, LLAMA2 if name == "llama2" else None))
    for messages in rows(thinking=False):
        check(renderer, messages, thinking=False)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_form_of_row_becomes_the_tokens_that_were_looked_at(name: str) -> None:
    assert golden(name) == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def test_the_collection_is_there() -> None:
    assert len(template_files()) > 30
