"""The chat page: a chat, a box to type in, a panel of settings; and what happens at each click.

    page = Page([load_for_inference("runs/support")], [()], Activity(), "").blocks

The page only draws: conversations live in `studio.conversation`. `chat.css` says how the page looks, `chat.js` what it
does in the browser itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lmtune.errors import LmtuneError
from lmtune.inference.chat_model import ChatModel
from lmtune.inference.request import Sampling
from lmtune.io.console import err, escape
from lmtune.serve.studio.conversation import MAX_TABS, MODES, Activity, Conversation, Mode, Settings, Tabs
from lmtune.serve.studio.display import MATHS, escape_markdown, original_text, render_turns, status_line

CSS = (Path(__file__).parent / "chat.css").read_text(encoding="utf-8")
HEAD = f"<script>\n{(Path(__file__).parent / 'chat.js').read_text(encoding='utf-8')}</script>"
_COLUMN_LABELS = {"tuned": "Tuned", "base": "Base model", "both": "Tuned"}
_QUEUE_SIZE = 256
_ANSWERS_AT_ONCE = 64
_MAX_CHARACTERS = 100_000
_MAX_NEW_TOKENS = 8192
_SAVE_SECONDS = 2.0  # how often the browser's copy is renewed during an answer
_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "monospace")

Updates = AsyncIterator[tuple[Any, ...]]
Ask = Callable[[Conversation, Settings], AsyncIterator[None]]


def theme() -> Any:
    """Gradio's plain theme with one accent, and less of borders and boxes."""
    return gr.themes.Base(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=_SANS, font_mono=_MONO, radius_size="lg"
    ).set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        block_background_fill="white", block_background_fill_dark="*neutral_900",
        body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
        block_border_width="0px", block_shadow="none",
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
    )  # fmt: skip


class Page:
    """The components, and what they do.

    Args:
        models: the first is the one chosen at first.
        examples: for each model the questions that an empty conversation offers.
        activity: which answers are under way, shared with the server.
        place: a sentence on where the conversation goes.
    """

    def __init__(
        self, models: Sequence[ChatModel], examples: Sequence[Sequence[str]], activity: Activity, place: str
    ) -> None:
        self.models, self.place = models, place
        self.examples = [[{"text": question} for question in questions] for questions in examples]
        self.tabs = Tabs(models, activity)
        names = "\0".join(model.name for model in models)  # conversations with other models stay apart
        self.key = f"lmtune-{hashlib.sha256(names.encode()).hexdigest()[:16]}"
        self.writes = any(model.head is None for model in models)  # else classifiers, which have nothing to sample
        self.can_switch = any(model.has_adapter for model in models)
        title = f"{models[0].name} · lmtune"
        with gr.Blocks(title=title, fill_height=True, analytics_enabled=False) as self.blocks:
            with gr.Row(elem_id="top"):
                self.header = gr.Markdown(self._header(0), elem_id="header")
                gr.Button("Settings", size="md", elem_id="open-settings", scale=0)
                self.clear = gr.Button("New chat", size="md", elem_id="clear", scale=0)
            with gr.Row(equal_height=False, elem_id="columns"):
                with gr.Column(scale=3, min_width=300, elem_id="talk"):
                    self._build_chat()
                with gr.Column(scale=1, min_width=240, elem_id="settings"):
                    self._build_settings()
            # From the server to the page's script: what stands above answers, what the browser is to keep. And back:
            # what it kept.
            self.notes = gr.Markdown(_for_script({"key": self.key, "columns": []}), elem_id="notes", visible="hidden")
            self.kept = gr.Textbox("", elem_id="kept", visible="hidden")
            self._connect()
        self.blocks.state_session_capacity = MAX_TABS  # each takes 70 kB; Gradio would keep those of 10,000 visitors
        self.blocks.max_threads = _ANSWERS_AT_ONCE  # of the queue too; else only 40 questions are taken up at once
        self.blocks.queue(api_open=False, max_size=_QUEUE_SIZE, default_concurrency_limit=_ANSWERS_AT_ONCE)

    # --- what is on the page

    def _build_chat(self) -> None:
        with gr.Row(equal_height=True, elem_id="chats"):
            self.answers, self.base_answers = self._chatbot("tuned"), self._chatbot("base")
        self.question = gr.Textbox(
            placeholder="Ask something" if self.writes else "A text to classify", show_label=False, label="Question",
            lines=1, max_lines=8, autofocus=True, submit_btn=True, elem_id="question", max_length=_MAX_CHARACTERS,
        )  # fmt: skip
        self.status = gr.Markdown("", elem_id="status")

    def _chatbot(self, mode: Mode) -> gr.Chatbot:
        is_first = mode == "tuned"
        return gr.Chatbot(
            label=_COLUMN_LABELS[mode], show_label=not is_first, visible=is_first, elem_classes=["answers"],
            height=None, editable="user", buttons=["copy"], sanitize_html=True, allow_tags=False,
            feedback_options=None, layout="bubble", latex_delimiters=MATHS, min_width=200,
            placeholder=self._greeting(0), allow_file_downloads=False, group_consecutive_messages=False,
            examples=self.examples[0] if is_first else [],
        )  # fmt: skip

    def _greeting(self, index: int) -> str:
        return f"**{escape_markdown(self.models[index].name)}** is ready"

    def _build_settings(self) -> None:
        longest = min(_MAX_NEW_TOKENS, *(model.engine.max_positions or _MAX_NEW_TOKENS for model in self.models))
        names = [(model.name, index) for index, model in enumerate(self.models)]
        self.model = gr.Dropdown(names, value=0, label="Model", visible=len(names) > 1, elem_id="model")
        self.mode = gr.Radio(
            [(mode.title(), mode) for mode in MODES], value="tuned", label="Answers from",
            visible=self.can_switch, elem_id="mode",
        )  # fmt: skip
        self.system = gr.Textbox(
            label="System prompt", lines=2, max_lines=8, elem_id="system", max_length=_MAX_CHARACTERS,
            placeholder=self.models[0].system or "none", info=_about_system(self.models[0]),
            visible=self.writes or any(model.head is not None and model.head.chat for model in self.models),
        )  # fmt: skip
        self.temperature = gr.Slider(
            0, 2, value=0, step=0.05, label="Temperature", elem_id="temperature",
            info="0 = greedy: the most probable token. Higher: more varied.", visible=self.writes,
        )  # fmt: skip
        self.top_p = gr.Slider(
            0.05, 1, value=1, step=0.05, label="Top p", elem_id="top-p",
            info="Nucleus sampling threshold: lower leaves out improbable tokens.", visible=self.writes,
        )  # fmt: skip
        self.max_new_tokens = gr.Slider(
            1, longest, value=min(256, longest), step=1, label="Max new tokens", elem_id="max-new-tokens",
            info="Where an answer is cut.", visible=self.writes,
        )  # fmt: skip
        self.seed = gr.Textbox(
            label="Seed", placeholder="random", info="Equal seeds give equal answers.", elem_id="seed",
            max_lines=1, max_length=10, visible=self.writes,
        )  # fmt: skip

    def _header(self, index: int) -> str:
        model = self.models[index]
        what = f"{model.engine.description}{', with its LoRA adapter' if model.has_adapter else ''}"
        alone = "" if model.renderer.uses_chat_template else " Each question stands alone."
        line = escape_markdown(f"{what}. {self.place}{alone}")
        return f"<h1>{escape_markdown(model.name)} <span>· lmtune</span></h1><p>{line}</p>"

    # --- what happens

    def _connect(self) -> None:
        settings = [
            self.model, self.mode, self.system, self.temperature, self.top_p, self.max_new_tokens, self.seed,
        ]  # fmt: skip
        drawn = [self.answers, self.base_answers, self.status, self.notes]
        outputs = [self.question, *drawn]
        answering: dict[str, Any] = {
            "outputs": outputs, "concurrency_id": "answers", "concurrency_limit": _ANSWERS_AT_ONCE,
            "show_progress": "hidden", "api_visibility": "undocumented", "preprocess": False,
            "postprocess": False,
        }  # fmt: skip
        at_once: dict[str, Any] = {
            "queue": False, "show_progress": "hidden", "api_visibility": "private", "preprocess": False,
        }  # fmt: skip
        self.question.submit(self.on_send, [self.question, *settings], api_name="send", **answering)
        for chatbot in (self.answers, self.base_answers):
            chatbot.retry(self.on_retry, settings, api_name="retry", **answering)
            chatbot.edit(self.on_edit, settings, api_name="edit", **answering)
        self.answers.example_select(self.on_example, settings, api_name="example", **answering)
        self.question.stop(self.on_stop, None, None, **at_once)
        cleared = [self.clear.click, self.answers.clear, self.base_answers.clear]
        gr.on(cleared, self.on_clear, None, outputs, **at_once)
        chosen = [self.header, self.mode, self.system, *drawn]
        self.mode.change(self.on_mode, [self.model, self.mode], chosen, **at_once)
        self.model.change(self.on_mode, [self.model, self.mode], chosen, **at_once)
        self.kept.input(self.on_kept, self.kept, [self.model, *chosen], **at_once)
        for chatbot in (self.answers, self.base_answers):
            chatbot.option_select(self.on_continue, settings, **{**answering, "api_visibility": "private"})
            chatbot.undo(self.on_undo, None, outputs, **at_once)
        self.blocks.unload(self.on_unload)

    async def on_send(self, request: gr.Request, text: Any, *values: Any) -> Updates:
        def ask(conversation: Conversation, settings: Settings) -> AsyncIterator[None]:
            return conversation.send(_text(text), settings)

        async for update in self._answer(request, values, ask, typed=text):
            yield update

    async def on_example(self, request: gr.Request, event: gr.EventData, *values: Any) -> Updates:
        async for update in self.on_send(request, event.value.get("text", ""), *values):
            yield update

    async def on_retry(self, request: gr.Request, *values: Any) -> Updates:
        async for update in self._answer(request, values, Conversation.retry, is_retry=True):
            yield update

    async def on_continue(self, request: gr.Request, *values: Any) -> Updates:
        async for update in self._answer(request, values, Conversation.continue_answers):
            yield update

    async def on_edit(self, request: gr.Request, event: gr.EventData, *values: Any) -> Updates:
        def ask(conversation: Conversation, settings: Settings) -> AsyncIterator[None]:
            index = event.index[0] if isinstance(event.index, list) else event.index
            entry = render_turns(conversation.columns[0].turns)[index]
            return conversation.edit(entry.message, _text(original_text(event.value)), settings)

        async for update in self._answer(request, values, ask):
            yield update

    def on_stop(self, request: gr.Request) -> None:
        self._conversation(request).stop()

    def on_clear(self, request: gr.Request) -> tuple[Any, ...]:
        conversation = self._conversation(request)
        conversation.clear()
        return gr.update(submit_btn=True, stop_btn=False), *self._drawn(conversation)

    def on_undo(self, request: gr.Request) -> tuple[Any, ...]:
        conversation = self._conversation(request)
        question = conversation.undo()
        return gr.update(value=question, submit_btn=True, stop_btn=False), *self._drawn(conversation)

    def on_mode(self, model: int, mode: Mode, request: gr.Request) -> tuple[Any, ...]:
        conversation = self._conversation(request)
        conversation.choose(model, mode if self.models[model].has_adapter else "tuned")
        return self._chosen(conversation, model, mode)

    def on_kept(self, kept: str, request: gr.Request) -> tuple[Any, ...]:
        """Bring back what this browser kept of the conversation."""
        conversation = self._conversation(request)
        if conversation.columns[0].messages:
            return (gr.skip(),) * 8
        index, mode = conversation.restore_json(kept) or (0, "tuned")
        return index, *self._chosen(conversation, index, mode)

    def _chosen(self, conversation: Conversation, index: int, mode: Mode) -> tuple[Any, ...]:
        """The page for these who answer: header, mode, system prompt, and what `_drawn` gives."""
        model = self.models[index]
        can_switch = model.has_adapter
        first, second, *rest = self._drawn(conversation)
        return (
            self._header(index), gr.update(value=mode, visible=can_switch),
            gr.update(placeholder=model.system or "none", info=_about_system(model)),
            gr.update(
                value=first, label=_COLUMN_LABELS[mode], show_label=can_switch and mode != "tuned",
                placeholder=self._greeting(index), examples=self.examples[index],
            ),
            gr.update(value=second, visible=can_switch and mode == "both", placeholder=self._greeting(index)),
            *rest,
        )  # fmt: skip

    def on_unload(self, request: gr.Request) -> None:
        self.tabs.close(_key(request))

    async def _answer(
        self, request: gr.Request, values: Sequence[Any], ask: Ask, typed: Any = None, is_retry: bool = False
    ) -> Updates:
        """Stream an answer to the page; whatever goes wrong becomes a line under the chat."""
        conversation, begin = self._conversation(request), time.monotonic()
        emptied = {} if typed is None else {"value": ""}
        yield gr.update(submit_btn=False, stop_btn=True, **emptied), *self._columns(conversation)
        box: dict[str, Any] = {}
        saved_at = begin
        try:
            settings = _settings(values, self.models)
            async for _ in ask(conversation, settings):
                is_due = time.monotonic() - saved_at > _SAVE_SECONDS
                saved_at = time.monotonic() if is_due else saved_at
                line = _progress_line(conversation)
                yield gr.skip(), *self._columns(conversation, line, answering=True, keep=is_due)
            seconds = time.monotonic() - begin
            line = status_line(_describe_answer(conversation, seconds, settings.sampling, is_retry))
        except Exception as error:
            line = status_line(_explain(error), is_error=True)
            box = {} if typed is None else {"value": _text(typed)}
        yield gr.update(submit_btn=True, stop_btn=False, **box), *self._columns(conversation, line)

    def _columns(
        self, conversation: Conversation, line: str = "", answering: bool = False, keep: bool = True
    ) -> tuple[Any, ...]:
        """What `_drawn` gives, in Gradio's own form; Gradio itself takes 3.5 ms to convert a chat."""
        first, second, *rest = self._drawn(conversation, line, answering, keep)
        return *(self.answers.postprocess(column).model_dump() for column in (first, second)), *rest

    def _drawn(
        self, conversation: Conversation, line: str = "", answering: bool = False, keep: bool = True
    ) -> tuple[Any, ...]:
        """What the two chats show, the line below, and for the script what stands above answers and what to keep."""
        columns = [render_turns(session.turns, answering, session.can_continue) for session in conversation.columns]
        for_script: dict[str, Any] = {"columns": [[[one.label, one.copied] for one in entries] for entries in columns]}
        if keep:
            for_script |= {"key": self.key, "kept": conversation.to_json()}
        first, second, *_ = [[entry.value for entry in entries] for entries in [*columns, []]]
        return first, second, line, _for_script(for_script)

    def _conversation(self, request: gr.Request) -> Conversation:
        return self.tabs.of(_key(request))


def _key(request: gr.Request) -> tuple[str, str]:
    return str(getattr(request, "username", None) or ""), str(request.session_hash or "")


def _settings(values: Sequence[Any], models: Sequence[ChatModel]) -> Settings:
    """The values of the settings panel.

    Raises:
        LmtuneError: naming a value that is out of bounds.
    """
    model, mode, system, temperature, top_p, max_new_tokens, seed = values
    text = _text(seed).strip()
    is_number = text.isdecimal() and len(text) <= 10
    number: Any = int(text) if is_number else text or random.randrange(2**32)
    sampling = Sampling(temperature, top_p, max_new_tokens, number)
    return Settings(model, mode if models[model].has_adapter else "tuned", _text(system), sampling)


def _text(value: Any) -> str:
    """What was typed, without halves of characters, which no file and no tokenizer can hold."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def _for_script(value: dict[str, Any]) -> str:
    """`value` in letters that Markdown leaves alone."""
    return base64.b64encode(json.dumps(value).encode()).decode()


def _about_system(model: ChatModel) -> str | None:
    return "Empty: the one of training." if model.system else None


def _progress_line(conversation: Conversation) -> str:
    """The line under the chat until the first word comes."""
    if conversation.num_tokens():
        return ""
    read, whole = conversation.prompt_progress()
    if not whole:
        return status_line("Waiting for the model", is_busy=True)
    if read >= whole:
        return status_line("Writing", is_busy=True)
    return status_line(f"Reading the prompt, {100 * read // whole} %" if read else "Reading the prompt", is_busy=True)


def _describe_answer(conversation: Conversation, seconds: float, sampling: Sampling, is_retry: bool) -> str:
    """How long the answer was, why it ended, and what it takes to have it again, or another."""
    num_tokens = conversation.num_tokens()
    if not num_tokens and all(session.classifier is not None for session in conversation.columns):
        return ""
    rate = f", {num_tokens / seconds:.0f} a second" if num_tokens > 1 and seconds > 0 else ""
    again = f" · seed {sampling.seed}" if sampling.temperature > 0 else ""
    hint = " · for another answer raise the temperature" if is_retry and sampling.temperature == 0 else ""
    ended = {info.finish_reason for session in conversation.columns for _, info in session.turns[-1:] if info}
    cut = ""
    if "length" in ended:
        cut = " · cut at the limit (Max new tokens): Continue extends it"
    elif "context" in ended:
        cut = " · cut: the model can read no further; New chat starts again"
    return f"{num_tokens} token{'' if num_tokens == 1 else 's'}{rate}{cut}{again}{hint}"


def _explain(error: Exception) -> str:
    """The message for the page; what the user cannot fix goes to the terminal as well."""
    if isinstance(error, LmtuneError):
        return str(error)
    if os.environ.get("LMTUNE_TRACEBACK") == "1":
        traceback.print_exception(error, file=sys.stderr)
    err.print(f"[bold red]error:[/] {escape(f'{type(error).__name__}: {error}')}")
    return f"The answer failed: {type(error).__name__}: {error}"
