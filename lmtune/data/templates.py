"""A tokenizer's chat template, rendered to tokens: what stands before an answer, and the answer with its end.

The template is run by transformers with `sanitize_control_tokens`, so that only the template itself writes control
tokens. What a template does is found out once, with a probe conversation: the token that ends an answer, how a reply is
formatted (`lmtune.data.replies`), whether reasoning has a field of its own, and whether contents stay as they are. A
template that ends answers with no token ("### Response: …") is amended with the tokenizer's end token, because a model
that never sees an end never stops.

An answer is what the template writes after the prompt: its tokens where they continue the prompt's, and else what
stands around it in the template's text, encoded apart. So a row is trained as it is written even where the template
trims answers, and where the prompt ends in something (an empty thought) that the rendered answer has not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmtune.data.calls import ELSEWHERE, ToolSupport, common_prefix, find_tool_support, holds_in_key
from lmtune.data.replies import CLOSING, OPENING, ReplyFormat, is_still_reasoning, split_reply
from lmtune.data.template_source import DATE_FORMATS, at_time, literal, with_end
from lmtune.data.types import Message, Role
from lmtune.errors import ModelError
from lmtune.io.sandbox import TemplateLimitError, probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _QUESTION, _ANSWER, _REASONING = "probe system", "probe question", "probe answer", "probe reasoning"
_ASKED = Message("user", _QUESTION)
_INSIDE = "a  b\t\n\n\n  c <d> & \"e\" 'é'"
_CLOSING_TAG = re.compile(r"</([\w:.-]+)>")
_FIRST_MARK = 0x10F000  # of a private plane of Unicode, which no text uses
_NOW = "%Y-%m-%d %H:%M:%S"


class TemplateFault(Exception):
    """The template cannot render one conversation: why, and what whoever has the model can do.

    `once`: it is the same for all rows of this kind.
    """

    def __init__(self, reason: str, remedy: str = "", once: bool = False) -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.once = once


_Tools = Sequence[str]  # JSON texts


class ChatTemplate:
    """One tokenizer's template.

    Attributes:
        source: the Jinja text in use, amended where answers had no end; what a tuned model should be saved with.
        end_token_id: the token that ends an answer.
        is_amended: whether `source` differs from the tokenizer's.
        system_fault: why the template cannot take a system prompt; None if it can.
        reply_format: how a reply is formatted.
        writes_date: whether prompts hold today's date.
        tools: what the template does with tools and calls.
        call_end_id: the token that ends a turn of calls; None if the template writes none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, thinking: bool, eos_token_ids: Sequence[int], now: str | None = None
    ) -> None:
        """
        Args:
            tokenizer: a transformers tokenizer with a chat template.
            thinking: answers may hold reasoning in <think> tags.
            eos_token_ids: what the model stops at; the first ends answers where the template writes no end.
            now: the time that the template writes, as `time_now` gives it; None is the time of rendering.

        Raises:
            ModelError: the template is missing, endless, wrong, or answers have no end.
        """
        self._tokenizer = tokenizer
        self._thinking = thinking
        self._now = now
        self._passes_reasoning = self._knows_reasoning = False
        # what is around reasoning, and all that stands between it and the answer
        self._opening, self._closing, self._between = OPENING, CLOSING, f"\n{CLOSING}\n\n"
        self.source = self._checked_source()
        self.end_token_id = self._find_end(eos_token_ids)
        self._end = str(tokenizer.convert_ids_to_tokens(self.end_token_id))
        self._calls_as_objects = True
        self.tools = self._find_tool_support()
        self._calls_as_objects = self.tools.form is None or self.tools.form.as_object
        self.call_end_id = None if self.tools.form is None else self._token_id(self.tools.form.end)
        self._passes_reasoning, self.reply_format = self._find_reply_format()
        if thinking and self.end_token_id in self.reply_format.marks:
            raise ModelError(
                f"data.template: thinking: the chat template ends reasoning with {self._end}, as it ends answers, so "
                "generation would stop before the answer; use rows without reasoning, or data.template: plain"
            )
        self._ends_thought = not self._passes_reasoning and self._prompt(thinking).rstrip().endswith(CLOSING)
        self._knows_reasoning = (
            self._passes_reasoning
            or self.reply_format.is_opened
            or self._ends_thought
            or self._prompt(True) != self._prompt(False)
        )
        before, head, _ = self._around([_ASKED, Message("assistant", _ANSWER)])
        self._continues = head.startswith(before)
        self.system_fault = self._find_system_fault()
        self._later_system_fault = self._find_later_system_fault()
        self._rewrites = not self._keeps(_INSIDE)
        self._trims = not all(self._keeps(f"{blank}{_ANSWER}{blank}") for blank in (" ", "\n", "\t"))
        self.writes_date = self._find_date()

    def prompt_ids(self, messages: Sequence[Message], tools: _Tools = ()) -> list[int]:
        """The tokens before the assistant's next turn; a `TemplateFault` if the template refuses these messages."""
        if self.system_fault and messages[0].role == "system":
            raise TemplateFault(self.system_fault)
        self._check_tools(messages, tools)
        ids: list[int] = self._apply(messages, prompt=True, tools=tools)
        return ids

    def answer_ids(self, messages: Sequence[Message], prompt_ids: Sequence[int], tools: _Tools = ()) -> list[int]:
        """The tokens of the last message, an answer, as they follow `prompt_ids`, up to its end token.

        A `TemplateFault` if the template refuses, or renders the answer so that it does not continue the prompt.
        """
        content = messages[-1].content
        reasoning, answer = self._split(content)
        if reasoning is not None and not self._thinking:
            raise TemplateFault("the answer holds a <think> part; set data.template: thinking", once=True)
        if reasoning is not None and self._ends_thought:
            raise TemplateFault(
                "the template writes an empty <think> part before every answer, so the answer's own would stand after "
                "it; remove the reasoning, or use data.template: plain"
            )
        if reasoning is not None and is_still_reasoning(content):
            raise TemplateFault("the answer's <think> part has no end; write </think> after it")
        if messages[-1].tool_calls:
            return self._call_ids(messages, prompt_ids, tools)
        if not self._continues or self._rewrites or (self._trims and answer != answer.strip()):
            return self._answer_by_text(messages, tools)
        ids, num_prompt = self._apply(messages, prompt=False, tools=tools), len(prompt_ids)
        if ids[:num_prompt] != list(prompt_ids):
            return self._answer_by_text(messages, tools)
        if CLOSING in content:
            self._check_reasoning_kept(messages, tools)
        if answer not in self._tokenizer.decode(ids[num_prompt:]) and answer not in self._text(messages, tools=tools):
            return self._answer_by_text(messages, tools)
        trained = [*ids[num_prompt:], *([self.end_token_id] if self._end_opens_next_turn else [])]
        if self.end_token_id not in trained:
            raise TemplateFault(f"the template does not end this answer with {self._end}")
        return trained[: trained.index(self.end_token_id) + 1]

    def check_calls(self, messages: Sequence[Message], tools: _Tools = ()) -> str:
        """What the template writes of the last message, which holds calls, behind the prompt, to the end of its turn.

        A `TemplateFault` if that does not say the same calls, or not all that the message says.
        """
        self._check_tools(messages, tools)
        form, message = self.tools.form, messages[-1]
        assert form is not None  # else `_check_tools` has raised
        before, whole = self._text(messages[:-1], True, tools=tools), self._text(messages, tools=tools)
        lead = ""
        if not whole.startswith(before):
            head = self._around([*messages[:-1], Message("assistant", _ANSWER)], tools)[1]
            head, opened = common_prefix(head, whole), _opens(before, self._opening, self._closing)
            if not before.startswith(head) or (opened and not (self._thinking and OPENING not in message.content)):
                raise TemplateFault(_mismatch(before, whole, self.reply_format.is_opened))
            before, lead = head, self._between * opened
        said = lead + whole[len(before) :].rstrip()
        if not self._end_opens_next_turn:
            if not said.endswith(form.end):
                raise TemplateFault(f"the chat template does not end this tool call with {form.end}")
            said = said[: -len(form.end)]
        if (fault := form.fault(said, message.tool_calls)) is not None:
            raise TemplateFault(fault)
        reasoning, answer = self._split(message.content)
        if answer.strip() not in said:
            raise TemplateFault(
                "the chat template drops the text beside a tool call; take it out (content: null), or make it the "
                "answer without the call"
            )
        if reasoning is not None:
            self._check_reasoning_kept(messages, tools)
        return said

    def _call_ids(self, messages: Sequence[Message], prompt_ids: Sequence[int], tools: _Tools) -> list[int]:
        """As `answer_ids`, of a message with calls."""
        said, num_prompt, end = self.check_calls(messages, tools), len(prompt_ids), self.call_end_id
        assert end is not None
        ids = self._apply(messages, prompt=False, tools=tools)
        (reasoning, answer), calls = self._split(messages[-1].content), messages[-1].tool_calls
        own = [reasoning or "", answer, *(part for call in calls for part in (call.name, call.arguments))]
        found = next((token for token in self._control_tokens if any(token in text for text in own)), None)
        if ids[:num_prompt] == list(prompt_ids):
            trained = [*ids[num_prompt:], *([end] if self._end_opens_next_turn else [])]
            trained = trained[: trained.index(end) + 1] if end in trained else []
            form, text = self.tools.form, self._tokenizer.decode(trained[:-1])
            # a template may undo what keeps text from becoming control tokens, as by escapes
            if trained and (found is None or (form is not None and form.fault(text, calls) is None)):
                return trained
        if found is not None:
            raise TemplateFault(f"the tool call holds the text of a control token, {found}; write it otherwise")
        return [*self._encode([], [], said)[:-1], end]

    def _check_tools(self, messages: Sequence[Message], tools: _Tools) -> None:
        """Whether the template has a place for everything about tools, and for a system turn that is not the first."""
        calls = [call for message in messages for call in message.tool_calls]
        support = self.tools
        for needed, fault in (
            (bool(tools), support.tools_fault), (bool(calls), support.call_fault),
            (any(message.role == "tool" for message in messages), support.result_fault),
        ):  # fmt: skip
            if needed and fault is not None:
                raise TemplateFault(fault, ELSEWHERE, once=True)
        for text in (*tools, *(call.arguments for call in calls)):
            held = (token for token in self._control_tokens if token in text and holds_in_key(text, token))
            if found := next(held, None):
                raise TemplateFault(f"a key of a tool or a call holds the text of a control token, {found}; rename it")
        if self._later_system_fault and any(message.role == "system" for message in messages[1:]):
            raise TemplateFault(self._later_system_fault)

    def sample_prompts(self) -> list[str]:
        """The text before an answer, without and with a system prompt; today's date is in it."""
        asked = [[_ASKED]] if self.system_fault else [[_ASKED], [Message("system", _SYSTEM), _ASKED]]
        return [self._text(messages, prompt=True) for messages in asked]

    def time_now(self, given: bool = True) -> str:
        """The time that the template writes, day and time of day; not the `given` one, the clock's if that is asked."""
        if given and self._now is not None:
            return self._now
        found: str = self._apply([], prompt=True, text=True, source=f"{{{{ strftime_now({literal(_NOW)}) }}}}")
        return found

    # --- rendering

    def _apply(
        self, messages: Sequence[Message], prompt: bool, text: bool = False, source: str | None = None,
        thinking: bool | None = None, tools: _Tools = (),
    ) -> Any:  # fmt: skip
        """Token ids, or the text if `text`."""
        try:
            return self._tokenizer.apply_chat_template(
                [self._as_dict(message) for message in messages] or [{"role": "user", "content": ""}],
                tools=[json.loads(tool) for tool in tools] or None,
                chat_template=source or (self.source if self._now is None else at_time(self.source, self._now)),
                add_generation_prompt=prompt,
                tokenize=not text,
                sanitize_control_tokens=not text,
                return_dict=False,
                enable_thinking=self._thinking if thinking is None else thinking,
            )
        # The template is foreign code, and may fail in any way that Python has.
        except Exception as error:
            reason = str(error).strip() or type(error).__name__
            bare = any(not {"description", "parameters"} <= json.loads(tool)["function"].keys() for tool in tools)
            hint = "; a tool has no description or no parameters, write both" if bare else ""
            raise TemplateFault(f"the chat template refuses it: {reason}{hint}") from error

    def _text(self, messages: Sequence[Message], prompt: bool = False, tools: _Tools = (), **options: Any) -> str:
        return str(self._apply(messages, prompt, text=True, tools=tools, **options))

    def _prompt(self, thinking: bool) -> str:
        return self._text([_ASKED], prompt=True, thinking=thinking)

    def _as_dict(self, message: Message) -> dict[str, Any]:
        content = message.content
        if message.role == "tool":
            return {"role": "tool", "content": content, "tool_call_id": message.tool_call_id, "name": message.name}
        reasoning, answer = self._split(content) if message.role == "assistant" else (None, content)
        further: dict[str, Any] = {}
        if message.tool_calls:
            further["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {
                    "name": call.name,
                    "arguments": json.loads(call.arguments) if self._calls_as_objects else call.arguments,
                }}
                for call in message.tool_calls
            ]  # fmt: skip
        if reasoning is not None and self._passes_reasoning:
            return {"role": "assistant", "reasoning_content": reasoning, "content": answer, **further}
        if reasoning is not None and is_still_reasoning(content):  # it was stopped there
            content += f"\n{CLOSING}\n\n"
        return {"role": message.role, "content": content, **further}

    def _split(self, content: str) -> tuple[str | None, str]:
        """(reasoning, answer) of an assistant's message; a template that knows no reasoning takes it as it is."""
        return split_reply(content) if self._knows_reasoning else (None, content)

    def _around(self, messages: Sequence[Message], tools: _Tools = ()) -> tuple[str, str, str]:
        """The prompt before the last message, what stands before the answer with that in it, and what after."""
        reasoning = self._split(messages[-1].content)[0] if self._passes_reasoning else None
        thought = "" if reasoning is None else f"{OPENING}\n{_REASONING}\n{CLOSING}\n\n"
        whole = self._text([*messages[:-1], Message("assistant", thought + _ANSWER)], tools=tools)
        head, _, tail = whole.rpartition(_ANSWER)
        return self._text(messages[:-1], prompt=True, tools=tools), head, tail

    def _answer_by_text(self, messages: Sequence[Message], tools: _Tools) -> list[int]:
        """The answer encoded apart from the prompt, with what the template writes around it.

        Generation starts from the prompt's own tokens, so this is what the model must produce where the answer's first
        characters would merge with the prompt's last into one token, or the rendered answer differs.
        """
        content = messages[-1].content
        reasoning, answer = self._split(content)
        if reasoning is not None and not self._passes_reasoning:
            if self._thinking and self.reply_format.is_opened:
                # DeepSeek-R1: the prompt opens the reasoning, but the rendered answer has lost it.
                return self._encode([reasoning, "\n\n" + answer], ["\n" + CLOSING])
            reasoning, answer = None, content
        before, head, tail = self._around(messages, tools)
        whole = self._text(messages, tools=tools)
        start, _, between = head.partition(_REASONING) if reasoning is not None else (head, "", "")
        opened = _opens(before, self._opening, self._closing)
        if start.startswith(before):
            lead = start[len(before) :]
        elif before.startswith(start) and not opened:
            lead = ""
        elif opened and reasoning is None and self._thinking and OPENING not in content:
            lead = self._between  # no reasoning: the thought that the prompt opens ends at once
        elif (usual := self._usual_lead(messages, before, start, reasoning is not None)) is not None:
            lead = usual
        else:
            raise TemplateFault(_mismatch(before, whole, self.reply_format.is_opened))
        if not self._end_opens_next_turn:
            tail, end, _ = tail.partition(self._end)
            if not end:
                raise TemplateFault(f"the template does not end this answer with {self._end}")
        rendered = start + (reasoning or "") + between + answer + tail
        if not _squeezed(whole).startswith(_squeezed(rendered)):
            if OPENING in content:
                self._check_reasoning_kept(messages, tools)
            raise TemplateFault("the template rewrites this answer, so it cannot be trained as it is written")
        if reasoning is None:
            return self._encode([answer], [], lead, tail)
        return self._encode([reasoning, answer], [between], lead, tail)

    def _usual_lead(self, messages: Sequence[Message], before: str, start: str, reasons: bool) -> str | None:
        """What stands between a prompt and an answer, if prompt and rendered answer differ in earlier turns alone.

        gpt-oss drops the reasoning before a call once an answer follows; the prompt of that answer still holds it.
        """
        thought = f"{OPENING}\n{_REASONING}\n{CLOSING}\n\n" * reasons
        asked, head, _ = self._around([_ASKED, Message("assistant", thought + _ANSWER)])
        head = head.partition(_REASONING)[0]
        lead, said = head[len(asked) :], messages[-2].content
        shared = common_prefix(before[::-1], start[: len(start) - len(lead)][::-1])[::-1]
        same = any(text in shared for text in (said, json.dumps(said, ensure_ascii=False)[1:-1]))
        return lead if same and head.startswith(asked) and start.endswith(lead) else None

    def _encode(self, texts: Sequence[str], between: Sequence[str], lead: str = "", tail: str = "") -> list[int]:
        """The tokens of `lead`, `texts` with `between` them, `tail`, the end; control tokens in `texts` stay text."""
        # Rendered after a control token, as in the whole conversation, which is then taken off. The untaken branch
        # tells transformers which tokens this template holds for control tokens.
        parts = [literal(self._end + lead)]
        for index, text in enumerate((*between, tail)):
            parts += [f"messages[{index}]['content']", literal(text)]
        echo = f"{{{{ {' + '.join(parts)} }}}}{{% if false %}}{self.source}{{% endif %}}"
        ids = self._apply([Message("user", text) for text in texts], prompt=False, source=echo)
        return [*ids[1:], self.end_token_id]

    def _check_reasoning_kept(self, messages: Sequence[Message], tools: _Tools) -> None:
        reasoning, _ = split_reply(messages[-1].content)
        if reasoning is not None and reasoning not in self._text(messages, tools=tools):
            raise TemplateFault(
                "the template drops the answer's <think> part; set data.template: thinking, "
                "or plain if it does so even then"
            )

    # --- what the probes find out

    def _checked_source(self) -> str:
        try:
            source: str = self._tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(f"the tokenizer has no usable chat template ({error}); use data.template: plain") from None
        special = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
        try:
            probe(source, tuple(sorted(special.items())))
        except TemplateLimitError as error:
            raise ModelError(f"the chat template is not safe to run: {error}; use data.template: plain") from None
        return source

    def _find_end(self, eos_token_ids: Sequence[int]) -> int:
        """The token that ends an answer; amends the template where it writes none."""
        exchange = [_ASKED, Message("assistant", _ANSWER)]
        end = self._token_after_answer(exchange)
        self.is_amended = self._end_opens_next_turn = False
        if end is None:  # GLM models stop by opening the user's next turn
            end = self._token_after_answer([*exchange, exchange[0]])
            self._end_opens_next_turn = end in eos_token_ids
            self.is_amended = not self._end_opens_next_turn
        if self.is_amended:
            if not eos_token_ids:
                raise ModelError(
                    "the chat template ends answers with no token, and the tokenizer has no EOS token, so the model "
                    "could never learn to stop; set the tokenizer's eos_token"
                )
            self.source = with_end(self.source, str(self._tokenizer.convert_ids_to_tokens(eos_token_ids[0])))
            end = self._token_after_answer(exchange)
        if end is None:
            raise ModelError(
                "the chat template drops what follows an answer, its end included; use data.template: plain"
            )
        return end

    def _token_after_answer(self, messages: Sequence[Message]) -> int | None:
        """The control token that the template writes after the answer, with at most white space between.

        Not one that stands before the answer too, as a mark on both of its sides: generation would stop there.
        """
        try:
            text = self._text(messages)
            before, lead, _ = self._around(messages[:2])
        except TemplateFault as fault:
            raise ModelError(
                f"the chat template fails on a question and its answer: {fault}; use data.template: plain"
            ) from None
        _, found, tail = text.rpartition(_ANSWER)
        if not found or _QUESTION not in text:
            lost = "questions" if found else "answers"
            raise ModelError(f"the chat template drops or rewrites {lost}; use data.template: plain")
        lead = lead[len(before) :] if lead.startswith(before) else ""
        tail = tail.lstrip()
        added = {token.content: index for index, token in self._tokenizer.added_tokens_decoder.items()}
        while starting := [content for content in added if content.strip() and tail.startswith(content)]:
            token = max(starting, key=len)
            if token not in lead:
                return int(added[token])
            tail = tail[len(token) :].lstrip()
        return None

    def _find_system_fault(self) -> str | None:
        try:
            text = self._text([Message("system", _SYSTEM), _ASKED], prompt=True)
        except TemplateFault as fault:
            return str(fault)
        return None if _SYSTEM in text else "the chat template drops system prompts; leave them out"

    def _find_later_system_fault(self) -> str | None:
        """Why a system turn cannot stand behind others."""

        def text(role: Role) -> str:
            return self._text([_ASKED, Message("assistant", _ANSWER), Message(role, _SYSTEM), _ASKED], prompt=True)

        try:
            shown, as_others = text("system"), []
        except TemplateFault as fault:
            return f"a system turn stands after the first turn: {fault}"
        for role in ("user", "assistant"):
            with contextlib.suppress(TemplateFault):
                as_others.append(text(role))
        if _SYSTEM in shown.partition(_ANSWER)[2] and shown not in as_others:
            return None
        return (
            "a system turn stands after the first turn, where the chat template drops or moves it, or writes it as a "
            "turn of another; remove the turn, or write it into the question after it"
        )

    def _find_tool_support(self) -> ToolSupport:
        """What the template does with tools, calls and results."""

        def render(messages: Sequence[Message], tools: _Tools, prompt: bool, as_object: bool) -> str | None:
            self._calls_as_objects = as_object
            try:
                return self._text(messages, prompt, tools=tools)
            except TemplateFault:
                return None

        tokens = {token.content: token.special for token in self._tokenizer.added_tokens_decoder.values()}
        return find_tool_support(render, tokens, self._end, self._end_opens_next_turn)

    @functools.cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        return tuple(token.content for token in self._tokenizer.added_tokens_decoder.values() if token.content.strip())

    def _token_id(self, content: str) -> int:
        return int(self._tokenizer.convert_tokens_to_ids(content))

    def _find_reply_format(self) -> tuple[bool, ReplyFormat]:
        """Whether the template renders reasoning passed in a field of its own, and how replies are formatted."""
        opening, closing, between = self._find_reasoning()
        passes = closing is not None
        if passes:
            self._opening, self._closing, self._between = opening, closing or CLOSING, between
        before, head, _ = self._around([_ASKED, Message("assistant", _ANSWER)])
        lead = head[len(before) :] if head.startswith(before) else ""
        opening, closing = (opening, closing or "") if passes else (OPENING, CLOSING)
        is_opened = _opens(before, opening, closing)
        if not opening or (not passes and not is_opened):
            opening = closing = ""
        elif opening in lead or closing in lead:  # an empty thought before the answer
            lead = ""
        form = self.tools.form
        written = [] if form is None else [form.written.rpartition(form.end)[0], form.lead, form.between or ""]
        (lead, opening, closing, *written), marks = self._marked([lead, opening, closing, *written])
        calls = None
        if form is not None:
            held = any(mark in "".join(written) for mark in marks.values())
            first = form.before_first(written[0], written[1])
            first = (first.rpartition(closing)[2] if closing else first).strip()
        if form is not None and first and (held or (form.is_json and form.lead != "<tool_call>")):
            own = None if form.between is None else written[2]
            calls = replace(form, lead=written[1], between=own, first=first)
        names = {mark: str(self._tokenizer.convert_ids_to_tokens(index)) for index, mark in marks.items()}
        return passes, ReplyFormat(lead, opening, closing, is_opened, marks, names, calls)

    def _find_reasoning(self) -> tuple[str, str | None, str]:
        """What stands before and after reasoning that is passed in its field, and all between it and the answer;
        (…, None, …) if it is not rendered."""
        opening, closing, gap = "", None, ""
        self._passes_reasoning = self._knows_reasoning = True  # for the time of this probe
        reply = Message("assistant", f"{OPENING}\n{_REASONING}\n{CLOSING}\n\n{_ANSWER}")
        for thinking in (self._thinking, not self._thinking):
            try:
                head, found, rest = self._text([_ASKED, reply], thinking=thinking).rpartition(_REASONING)
            except TemplateFault:
                continue
            between, answered, _ = rest.rpartition(_ANSWER)
            before = self._prompt(thinking)
            if found and answered:
                closing, gap = closing or between.strip(), gap or between
                opening = opening or (head[len(before) :].strip() if head.startswith(before) else "")
        self._passes_reasoning = self._knows_reasoning = False
        if not opening and closing and (tag := _CLOSING_TAG.fullmatch(closing)):
            opening = f"<{tag[1]}>"
        return opening, closing, gap

    def _marked(self, texts: Sequence[str]) -> tuple[list[str], dict[int, str]]:
        """`texts` with a character in place of each special token, and the character of each."""
        special = {
            token.content: index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special
        }
        marks: dict[int, str] = {}
        for content in sorted(special, key=len, reverse=True):
            if content and any(content in text for text in texts):
                marks[special[content]] = mark = chr(_FIRST_MARK + len(marks))
                texts = [text.replace(content, mark) for text in texts]
        return list(texts), marks

    def _keeps(self, answer: str) -> bool:
        """Whether `answer` comes into the text of a conversation as it is."""
        try:
            given, plain = (self._text([_ASKED, Message("assistant", said)]) for said in (answer, _ANSWER))
        except TemplateFault:
            return False
        return given == plain.replace(_ANSWER, answer)

    def _find_date(self) -> bool:
        if "strftime_now(" not in self.source.replace(" ", ""):
            return False
        sources = [at_time(self.source, time) for time in ("2001-02-03 04:05:06", "2012-11-11 09:08:07")]
        first, second = [self._apply([_ASKED], prompt=True, text=True, source=source) for source in sources]
        return bool(first != second) or not DATE_FORMATS.search(self.source)

    @functools.cached_property
    def own_words(self) -> str:
        """What stands before a first question and not before a second one, without control tokens: a system prompt."""
        question, said = _ASKED, Message("assistant", _ANSWER)
        try:
            first = self._text([question]).partition(_QUESTION)[0]
            later = self._text([question, said, question]).rpartition(_QUESTION)[0].rpartition(_ANSWER)[2]
        except TemplateFault:
            return ""
        same = next((n for n in range(min(len(first), len(later)), 0, -1) if first.endswith(later[-n:])), 0)
        words = first[: len(first) - same]
        for token in self._tokenizer.added_tokens_decoder.values():
            words = words.replace(token.content, " ") if token.content.strip() else words
        words = " ".join(words.split()).removeprefix("system").strip()
        return words if any(letter.isalnum() for letter in words) else ""


def _squeezed(text: str) -> str:
    """`text` without white space."""
    return "".join(text.split())


def _opens(text: str, opening: str = OPENING, closing: str = CLOSING) -> bool:
    """Whether `text` ends where reasoning begins; never where nothing marks its beginning."""
    _, found, tail = text.rpartition(opening) if opening else ("", "", text)
    return bool(found) and not tail.strip() and closing not in tail


def _mismatch(before: str, whole: str, is_opened: bool) -> str:
    """Why the answer does not continue the prompt, shown where the two part."""
    if is_opened:
        return (
            "the template opens a <think> part before every answer, and this one has none; set data.template: thinking "
            "(the part then ends at once), or use plain"
        )
    at = len(common_prefix(before, whole))
    return (
        f"the template asks for an answer with {before[at : at + 40]!r}, but begins this one with "
        f"{whole[at : at + 40]!r}; training would not match generation, use data.template: plain"
    )
