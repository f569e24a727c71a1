"""A model for Ollama: its GGUF file, and a Modelfile with the template, the stop tokens and the system prompt.

    modelfile(tokenizer, "support.gguf", ["<|im_end|>"], system=None)

Ollama has templates of its own, in Go. The one written here is found by rendering conversations with transformers and
looking at what stands around each turn; then it is tried on others. A template that does more than put texts around
turns is refused, for the model would read another prompt than it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lmtune.errors import ModelError

Turns = Sequence[tuple[str, str]]  # role and text
_S, _U, _A, _V, _B = "\x02S\x02", "\x02U\x02", "\x02A\x02", "\x02V\x02", "\x02B\x02"  # texts that no template holds


@dataclass(frozen=True)
class TurnTexts:
    """What stands before and after each turn, and before and after a conversation."""

    head: str  # before a conversation without a system prompt
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, turns: Turns) -> str:
        """The prompt of a conversation, which ends with the user's turn."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        text = "" if turns[0][0] == "system" else self.head
        for role, content in turns:
            before, after = around[role]
            text += before + content + after
        return text + self.assistant[0]

    def go_template(self) -> str:
        """The same as a template of Ollama."""
        written = {
            role: f"{_go(before)}{{{{ .Content }}}}{_go(after)}"
            for role, (before, after) in (("system", self.system), ("user", self.user), ("assistant", self.assistant))
        }
        cases = f'{{{{ if eq .Role "system" }}}}{written["system"]}{{{{ else if eq .Role "user" }}}}{written["user"]}'
        cases += f'{{{{ else if eq .Role "assistant" }}}}{written["assistant"]}{{{{ end }}}}'
        first = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_go(self.head)}{{{{ end }}}}' if self.head else ""
        return f"{first}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{_go(self.assistant[0])}"


def modelfile(tokenizer: Any, gguf: str, stops: Sequence[str], system: str | None) -> str:
    """The text of a Modelfile.

    Args:
        tokenizer: of transformers, with the chat template.
        gguf: the file, as the Modelfile finds it.
        stops: texts of the tokens that end an answer.
        system: the system prompt of training; None for none.

    Raises:
        ModelError: the template cannot be written as one of Ollama.
    """
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{turn_texts(tokenizer).go_template()}"""']
    if system is not None:
        if '"""' in system:
            raise ModelError(
                'the system prompt holds """, which ends a text in a Modelfile; train with another data.system'
            )
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join([*lines, ""])


def turn_texts(tokenizer: Any) -> TurnTexts:
    """What the chat template puts around turns.

    Raises:
        ModelError: it does more than that.
    """
    begin = tokenizer.bos_token if _adds_begin(tokenizer) else ""

    def render(turns: Turns) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(begin)  # which Ollama writes itself

    if tokenizer.chat_template is None:
        raise ModelError(
            "the model has no chat template, which Ollama needs; use llama.cpp's server with the plain prompt"
        )
    try:
        found = _found(render)
        tried: list[Turns] = [
            [("user", _U)],
            [("user", _U), ("assistant", _A), ("user", _V), ("assistant", _B), ("user", "x")],
            [("system", _S), ("user", _U), ("assistant", _A), ("user", _V)],
        ]
        is_same = all(found.render(turns) == render(turns) for turns in tried)
    except Exception as error:  # of any kind, as a template raises it
        raise ModelError(f"the chat template cannot be written as Ollama's: {type(error).__name__}: {error}") from error
    if not is_same:
        raise ModelError(
            "the chat template does more than put texts around turns, which Ollama's cannot; serve the GGUF file with "
            "llama.cpp's `llama-server --jinja`"
        )
    return found


def _found(render: Any) -> TurnTexts:
    alone, two = render([("user", _U)]), render([("user", _U), ("assistant", _A), ("user", _V)])
    with_system = render([("system", _S), ("user", _U)])
    before, after = alone.split(_U)
    middle = _between(two, _A, _V)
    opening, joint = with_system.split(_S)[0], _between(with_system, _S, _U)
    user = _common_suffix([before, middle, joint])
    answer = _common_suffix([after, _between(two, _U, _A)])
    return TurnTexts(
        before.removesuffix(user), (opening, joint.removesuffix(user)), (user, after.removesuffix(answer)),
        (answer, middle.removesuffix(user)),
    )  # fmt: skip


def _between(text: str, left: str, right: str) -> str:
    return text.split(left)[1].split(right)[0]


def _common_suffix(texts: Sequence[str]) -> str:
    backwards = zip(*(text[::-1] for text in texts), strict=False)
    return "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, backwards))[::-1]


def _adds_begin(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _go(text: str) -> str:
    """A text as a constant in a Go template; nothing for none."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
