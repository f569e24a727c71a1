"""What else a chat endpoint may make of the same messages: the mistakes in serving that change a prompt, as tokens.

    for (variant, form), ids in variants(renderer, messages).items(): ...

The one under which the tuned model says what the endpoint says, and which has as many tokens as the endpoint counts, is
the mistake.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmtune.data.rendering import Renderer
from lmtune.data.types import Message


@dataclass(frozen=True)
class Variant:
    """One mistake.

    Attributes:
        key: a name for programs.
        what: how the endpoint's prompt is.
        fix: what to do.
    """

    key: str
    what: str
    fix: str


_FEW = 8  # tokens that are tried before a prompt
_TEMPLATE = "serve it with the chat_template.jinja of the run (vLLM: --chat-template FILE; llama.cpp: --jinja "
_TEMPLATE += "--chat-template-file FILE; Ollama: the Modelfile of `lmtune export --to ollama`)"
SYSTEM_LOST = Variant(
    "system", "without the system prompt that the request holds",
    "the template of the endpoint drops it; " + _TEMPLATE,
)  # fmt: skip
BEGIN_TWICE = Variant(
    "bos_twice", "with one more beginning token ({bos}) than in training",
    "the template writes {bos} and the tokenizer adds it again; switch one off (GGUF: add_bos_token false; vLLM: no "
    "add_special_tokens), or export the run again",
)  # fmt: skip
BEGIN_ADDED = Variant(
    "bos_added", "with a token before the prompt of training",
    "let the endpoint's tokenizer add no beginning token (GGUF: add_bos_token false), or export the run again",
)  # fmt: skip
BEGIN_LOST = Variant(
    "bos_lost", "without the beginning token ({bos}) of training",
    "let the endpoint's tokenizer or template write it; " + _TEMPLATE,
)  # fmt: skip
REASONING = Variant(
    "reasoning", "with the other setting of reasoning (enable_thinking) than in training",
    "set it for the endpoint (chat_template_kwargs), or " + _TEMPLATE,
)  # fmt: skip
UNOPENED = Variant(
    "unopened", "without the words that open the assistant's turn",
    "let the endpoint add the generation prompt; " + _TEMPLATE,
)  # fmt: skip
CHATML = Variant("chatml", "in ChatML, which servers take for models without a template", _TEMPLATE)
PLAIN = Variant("plain", "as plain text, without a template", _TEMPLATE)
OTHER = Variant("other", "by a template that is not the one of training", _TEMPLATE)


def variants(renderer: Renderer, messages: Sequence[Message]) -> dict[tuple[Variant, int], list[int]]:
    """The prompt of `messages` under each mistake that changes it, by the mistake and the number of its form."""
    tokenizer: Any = renderer.tokenizer
    right = renderer.prompt_ids(messages)
    bos = tokenizer.bos_token_id
    begin = [] if bos is None else [int(bos)]
    others = [number for number in tokenizer.all_special_ids if [number] != begin][:_FEW]
    turns = [{"role": turn.role, "content": turn.content} for turn in messages]

    def rendered(turns: Sequence[Any], **options: Any) -> list[int]:
        options = {"add_generation_prompt": True, **options}
        text = tokenizer.apply_chat_template(turns, chat_template=renderer.chat_template, tokenize=False, **options)
        return encoded(str(text))

    def encoded(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    chatml = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    tried: list[tuple[Variant, Callable[[], list[int]]]] = [
        (SYSTEM_LOST, lambda: rendered([turn for turn in turns if turn["role"] != "system"])),
        (BEGIN_TWICE, lambda: [*begin, *right]),
        *((BEGIN_ADDED, lambda number=number: [number, *right]) for number in others),
        (BEGIN_LOST, lambda: right[1:] if right[:1] == begin else right),
        (REASONING, lambda: rendered(turns, enable_thinking=True)),
        (REASONING, lambda: rendered(turns, enable_thinking=False)),
        (UNOPENED, lambda: rendered(turns, add_generation_prompt=False)),
        (CHATML, lambda: encoded(chatml + "<|im_start|>assistant\n")),
        (CHATML, lambda: begin + encoded(chatml + "<|im_start|>assistant\n")),
        (PLAIN, lambda: begin + encoded("\n\n".join(turn["content"] for turn in turns))),
    ]
    found = dict[tuple[Variant, int], list[int]]()
    for form, (variant, render) in enumerate(tried):
        with contextlib.suppress(Exception):  # of any kind, as a template raises it: then it is no mistake of this one
            ids = render()
            if ids and ids != right and ids not in found.values():
                found[variant, form] = ids
    return found
