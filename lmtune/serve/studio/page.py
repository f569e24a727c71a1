"""The app's page: a chat, a box to type in, and a panel of settings; what happens at each click.

    app = build_app(load_for_inference("runs/support"))

The page only draws. What was said lives in `studio.conversation`, under the key of each browser tab, and the browser
keeps a copy for when the page is loaded again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr

from lmtune.errors import LmtuneError
from lmtune.inference.engine import Sampling
from lmtune.inference.load import LoadedModel
from lmtune.io.console import err, escape
from lmtune.models.structure import base_of, max_positions
from lmtune.serve.request import MAX_CHARACTERS, index_of, mode_of, place_of, settings_of, text_of
from lmtune.serve.studio.conversation import MAX_TABS, MODES, Activity, Conversation, Mode, Settings, Tabs
from lmtune.serve.studio.display import MATHS, label, notes, origin, plain, shown, status, typed
from lmtune.serve.studio.saved import bring_back, to_text

_MODE_LABELS = {"tuned": "Tuned", "base": "Base", "both": "Both"}
_COLUMN_LABELS = {"tuned": "Tuned", "base": "Base model", "both": "Tuned"}
_QUEUE_SIZE = 256
_ANSWERS_AT_ONCE = 64
_MOST_NEW_TOKENS = 8192
_SAVE_SECONDS = 2.0  # how often the browser's copy is renewed during an answer


def build_app(
    models: LoadedModel | Sequence[LoadedModel],
    examples: Sequence[str] | Sequence[Sequence[str]] = (),
    activity: Activity | None = None,
    place: str = "Everything stays on this computer.",
) -> gr.Blocks:
    """The app for one or several loaded models.

    Args:
        models: the first is the one chosen at first.
        examples: questions offered in an empty conversation; for several models a list of them for each.
        activity: shared with a server that wants to know when answers are under way.
        place: a sentence on where the conversation goes.
    """
    loaded = [models] if isinstance(models, LoadedModel) else list(models)
    for_all = [examples] * len(loaded) if all(isinstance(one, str) for one in examples) else examples
    return _Page(loaded, [[str(one) for one in each] for each in for_all], activity or Activity(), place).blocks


class _Page:
    """The components, and what they do."""

    def __init__(self, models: list[LoadedModel], examples: list[list[str]], activity: Activity, place: str) -> None:
        self.models, self.examples, self.place = models, examples, place
        self.tabs = Tabs(models, activity)
        names = "\0".join(model.name for model in models)  # what was said to others stays away
        self.key = f"lmtune-{hashlib.sha256(names.encode()).hexdigest()[:16]}"
        self.can_switch = any(model.has_adapter for model in models)
        title = f"{models[0].name} · lmtune"
        with gr.Blocks(title=title, fill_height=True, analytics_enabled=False) as self.blocks:
            with gr.Row(elem_id="top"):
                self.header = gr.Markdown(self._header(0), elem_id="header")
                gr.Button("Settings", size="md", elem_id="open-settings", scale=0)
                self.clear = gr.Button("New chat", size="md", elem_id="clear", scale=0)
            with gr.Row(equal_height=False, elem_id="columns"):
                with gr.Column(scale=3, min_width=300, elem_id="talk"):
                    self._lay_out_chat()
                with gr.Column(scale=1, min_width=240, elem_id="settings"):
                    self._lay_out_settings()
            # Between the page's script and the server: what stands above answers and what the browser is to keep; and,
            # when the page is loaded, what it kept.
            self.notes = gr.Markdown(_for_script({"key": self.key, "columns": []}), elem_id="notes", visible="hidden")
            self.kept = gr.Textbox("", elem_id="kept", visible="hidden")
            self._connect()
        self.blocks.state_session_capacity = MAX_TABS  # each takes 70 kB; Gradio would keep those of 10,000 visitors
        self.blocks.max_threads = (
            _ANSWERS_AT_ONCE  # of the queue too; else no more than 40 questions are taken up at once
        )
        self.blocks.queue(api_open=False, max_size=_QUEUE_SIZE, default_concurrency_limit=_ANSWERS_AT_ONCE)

    # --- what is on the page

    def _lay_out_chat(self) -> None:
        with gr.Row(equal_height=True, elem_id="chats"):
            self.answers = self._chatbot(self.examples[0], visible=True)
            self.base_answers = self._chatbot((), visible=False)
        self.question = gr.Textbox(
            placeholder="Ask something", show_label=False, label="Question", lines=1, max_lines=8, autofocus=True,
            submit_btn=True, elem_id="question", max_length=MAX_CHARACTERS,
        )  # fmt: skip
        self.status = gr.Markdown("", elem_id="status")

    def _chatbot(self, examples: Sequence[str], visible: bool) -> gr.Chatbot:
        return gr.Chatbot(
            label=_COLUMN_LABELS["tuned" if visible else "base"], show_label=not visible, visible=visible,
            elem_classes=["answers"], height=None, editable="user", buttons=["copy"], sanitize_html=True,
            allow_tags=False, feedback_options=None, layout="bubble", latex_delimiters=MATHS, min_width=200,
            placeholder=self._greeting(0), allow_file_downloads=False, examples=_offered(examples),
            group_consecutive_messages=False,
        )  # fmt: skip

    def _greeting(self, index: int) -> str:
        return f"**{plain(self.models[index].name)}** is ready"

    def _lay_out_settings(self) -> None:
        longest = min(_MOST_NEW_TOKENS, *(max_positions(model.model) or _MOST_NEW_TOKENS for model in self.models))
        names = [(f"{model.name}", index) for index, model in enumerate(self.models)]
        self.model = gr.Dropdown(names, value=0, label="Model", visible=len(names) > 1, elem_id="model")
        self.mode = gr.Radio(
            [(_MODE_LABELS[mode], mode) for mode in MODES], value="tuned", label="Answers from",
            visible=self.can_switch, elem_id="mode",
        )  # fmt: skip
        self.system = gr.Textbox(
            label="System prompt", lines=2, max_lines=8, elem_id="system", max_length=MAX_CHARACTERS,
            placeholder=self.models[0].system or "none", info=_about_system(self.models[0]),
        )  # fmt: skip
        self.temperature = gr.Slider(
            0, 2, value=0, step=0.05, label="Temperature", elem_id="temperature",
            info="0 = greedy: the most probable token. Higher: more varied.",
        )  # fmt: skip
        self.top_p = gr.Slider(
            0.05, 1, value=1, step=0.05, label="Top p", elem_id="top-p",
            info="Nucleus sampling threshold: lower leaves out improbable tokens.",
        )  # fmt: skip
        self.max_new_tokens = gr.Slider(
            1, longest, value=min(256, longest), step=1, label="Max new tokens", elem_id="max-new-tokens",
            info="Where an answer is cut.",
        )  # fmt: skip
        self.seed = gr.Textbox(
            label="Seed", placeholder="random", info="Equal seeds give equal answers.", elem_id="seed",
            max_lines=1, max_length=10,
        )  # fmt: skip

    def _header(self, index: int) -> str:
        model = self.models[index]
        base = base_of(model.model)
        size = base.num_parameters()
        amount = f"{size / 1e9:.1f} billion" if size >= 1e9 else f"{size / 1e6:.1f} million"
        what = f"{amount} parameters{' with its LoRA adapter' if model.has_adapter else ''}"
        device = "on the GPU" if base.device.type == "cuda" else "on the CPU"
        alone = "" if model.renderer.uses_chat_template else " Each question stands alone."
        line = plain(f"{what}, {device}. {self.place}{alone}")
        return f"<h1>{plain(model.name)} <span>· lmtune</span></h1><p>{line}</p>"

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

    async def on_send(
        self, text: Any, model: Any, mode: Any, system: Any, temperature: Any, top_p: Any, max_new_tokens: Any,
        seed: Any, request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:  # fmt: skip
        """Answer what is in the box."""
        values = (model, mode, system, temperature, top_p, max_new_tokens, seed)
        async for update in self._answer(request, values, self._sending(text), typed_text=text):
            yield update

    async def on_example(
        self, model: Any, mode: Any, system: Any, temperature: Any, top_p: Any, max_new_tokens: Any, seed: Any,
        request: gr.Request, event: gr.EventData,
    ) -> AsyncIterator[tuple[Any, ...]]:  # fmt: skip
        """Ask the example that was clicked."""
        value = getattr(event, "value", None)
        text = value.get("text", "") if isinstance(value, dict) else value
        values = (model, mode, system, temperature, top_p, max_new_tokens, seed)
        async for update in self._answer(request, values, self._sending(text), typed_text=text):
            yield update

    async def on_retry(
        self, model: Any, mode: Any, system: Any, temperature: Any, top_p: Any, max_new_tokens: Any, seed: Any,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:  # fmt: skip
        """Answer the last question anew."""
        values = (model, mode, system, temperature, top_p, max_new_tokens, seed)
        async for update in self._answer(request, values, lambda talk, how: talk.retry(how), is_retry=True):
            yield update

    async def on_continue(
        self, model: Any, mode: Any, system: Any, temperature: Any, top_p: Any, max_new_tokens: Any, seed: Any,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:  # fmt: skip
        """Go on with an answer that was cut."""
        values = (model, mode, system, temperature, top_p, max_new_tokens, seed)
        async for update in self._answer(request, values, lambda talk, how: talk.continue_answers(how)):
            yield update

    async def on_edit(
        self, model: Any, mode: Any, system: Any, temperature: Any, top_p: Any, max_new_tokens: Any, seed: Any,
        request: gr.Request, event: gr.EventData,
    ) -> AsyncIterator[tuple[Any, ...]]:  # fmt: skip
        """Answer a question that was changed; what came after it is dropped."""

        def ask(talk: Conversation, how: Settings) -> AsyncIterator[None]:
            text = text_of(typed(getattr(event, "value", None)), "question")
            return talk.edit(origin(talk.columns[0].messages, place_of(getattr(event, "index", None))), text, how)

        values = (model, mode, system, temperature, top_p, max_new_tokens, seed)
        async for update in self._answer(request, values, ask):
            yield update

    def on_stop(self, request: gr.Request) -> None:
        """End the answer under way."""
        self._conversation(request).stop()

    def on_clear(self, request: gr.Request) -> tuple[Any, ...]:
        """Begin anew."""
        talk = self._conversation(request)
        talk.clear()
        return gr.update(submit_btn=True, stop_btn=False), *self._drawn(talk)

    def on_undo(self, request: gr.Request) -> tuple[Any, ...]:
        """Take the last question back into the box."""
        talk = self._conversation(request)
        question = talk.undo()
        return gr.update(value=question, submit_btn=True, stop_btn=False), *self._drawn(talk)

    def on_mode(self, model: Any, mode: Any, request: gr.Request) -> tuple[Any, ...]:
        """Show those who answer from here on, and what they take up."""
        try:
            index, wanted = index_of(model, len(self.models)), mode_of(mode)
        except LmtuneError as error:
            raise gr.Error(str(error), print_exception=False) from None
        talk = self._conversation(request)
        talk.choose(index, wanted if self.models[index].has_adapter else "tuned")
        return self._chosen(talk, index, wanted)

    def on_kept(self, kept: Any, request: gr.Request) -> tuple[Any, ...]:
        """Bring back what this browser kept of the conversation."""
        talk = self._conversation(request)
        if talk.columns[0].messages:
            return (gr.skip(),) * 8
        index, mode = bring_back(kept, talk, self.models) or (0, "tuned")
        return index, *self._chosen(talk, index, mode)

    def _chosen(self, talk: Conversation, index: int, mode: Mode) -> tuple[Any, ...]:
        """The page for these who answer: header, mode, system prompt, and what `_drawn` gives."""
        model = self.models[index]
        can_switch = model.has_adapter
        first, second, line, *rest = self._drawn(talk, _taking_up(talk))
        shared = {"placeholder": self._greeting(index), "examples": _offered(self.examples[index])}
        name = _COLUMN_LABELS[mode]
        return (
            self._header(index), gr.update(value=mode, visible=can_switch),
            gr.update(placeholder=model.system or "none", info=_about_system(model)),
            gr.update(value=first, label=name, show_label=can_switch and mode != "tuned", **shared),
            gr.update(value=second, visible=can_switch and mode == "both", placeholder=self._greeting(index)),
            line, *rest,
        )  # fmt: skip

    def on_unload(self, request: gr.Request) -> None:
        """Forget a tab that was closed."""
        self.tabs.close(_key(request))

    def _sending(self, text: Any) -> Callable[[Conversation, Settings], AsyncIterator[None]]:
        return lambda talk, how: talk.send(text_of(text, "question"), how)

    async def _answer(
        self, request: gr.Request, values: Sequence[Any], ask: Callable[[Conversation, Settings], AsyncIterator[None]],
        typed_text: Any = None, is_retry: bool = False,
    ) -> AsyncIterator[tuple[Any, ...]]:  # fmt: skip
        """Stream an answer to the page; whatever goes wrong becomes a line under the chat."""
        talk, begin = self._conversation(request), time.monotonic()
        emptied = {"value": ""} if typed_text is not None else {}
        with self.tabs.activity.drawing():
            yield gr.update(submit_btn=False, stop_btn=True, **emptied), *self._columns(talk)
            box: dict[str, Any] = {}
            saved_at = begin
            try:
                settings = settings_of(values, self.models)
                async for _ in ask(talk, settings):
                    is_due = time.monotonic() - saved_at > _SAVE_SECONDS
                    saved_at = time.monotonic() if is_due else saved_at
                    yield gr.skip(), *self._columns(talk, _waiting_for(talk), answering=True, keep=is_due)
                seconds = time.monotonic() - begin
                line = status(_figures(talk, seconds, settings.sampling, is_retry))
            except Exception as error:
                line = status(_explain(error), is_error=True)
                box = {"value": _printable(typed_text)} if typed_text is not None else {}
            yield gr.update(submit_btn=True, stop_btn=False, **box), *self._columns(talk, line)

    def _columns(
        self, talk: Conversation, line: str = "", answering: bool = False, keep: bool = True
    ) -> tuple[Any, ...]:
        """What `_drawn` gives, as plain values in Gradio's own form.

        For an update, `gr.skip()` too, Gradio makes the component anew: 3.5 ms for a chat, ten times as long as all
        else that it does to redraw a page.
        """
        first, second, *rest = self._drawn(talk, line, answering, keep)
        return *(self.answers.postprocess(column).model_dump() for column in (first, second)), *rest

    def _drawn(self, talk: Conversation, line: str = "", answering: bool = False, keep: bool = True) -> tuple[Any, ...]:
        """What the two chats show, the line below, and for the script what stands above answers and what to keep."""
        turns = [session.turns for session in talk.columns]
        columns = [
            shown([message for message, _ in said], answering, session.can_continue)
            for said, session in zip(turns, talk.columns, strict=True)
        ]
        for_script: dict[str, Any] = {"columns": [notes(said, answering) for said in turns]}
        if keep:
            for_script |= {"key": self.key, "kept": to_text(talk, self.models)}
        first, second = columns if len(columns) == 2 else (columns[0], [])
        return first, second, line, _for_script(for_script)

    def _conversation(self, request: gr.Request) -> Conversation:
        return self.tabs.of(_key(request))


def _key(request: gr.Request) -> tuple[str, str]:
    return str(getattr(request, "username", None) or ""), str(request.session_hash or "")


def _printable(text: Any) -> str:
    """What was typed, for the box it came from; a program may have sent what no browser can."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def _offered(questions: Sequence[str]) -> list[dict[str, str]]:
    """Examples as the chatbot takes them."""
    return [{"text": question} for question in questions]


def _for_script(value: dict[str, Any]) -> str:
    """`value` in letters that Markdown leaves alone."""
    return base64.b64encode(json.dumps(value).encode()).decode()


def _about_system(model: LoadedModel) -> str | None:
    return "Empty: the one of training." if model.system else None


def _waiting_for(talk: Conversation) -> str:
    """The line under the chat until the first word comes."""
    if talk.num_tokens():
        return ""
    read, whole = talk.prompt_progress()
    if not whole:
        return status("Waiting for the model", is_busy=True)
    if read >= whole:
        return status("Writing", is_busy=True)
    return status(f"Reading the prompt, {100 * read // whole} %" if read else "Reading the prompt", is_busy=True)


def _taking_up(talk: Conversation) -> str:
    """A line for those who go on after answers that are not theirs."""
    lines = [
        f"{label(own)} goes on with the answers of {' and '.join(map(label, others))} above as if they were its own"
        for own, others in talk.strangers()
        if others
    ]
    return status("; ".join(lines) + "; New chat begins without them") if lines else ""


def _figures(talk: Conversation, seconds: float, sampling: Sampling, is_retry: bool) -> str:
    """How long the answer was, why it ended, and what it takes to have it again, or another."""
    num_tokens = talk.num_tokens()
    rate = f", {num_tokens / seconds:.0f} a second" if num_tokens > 1 and seconds > 0 else ""
    again = f" · seed {sampling.seed}" if sampling.temperature > 0 else ""
    hint = " · for another answer raise the temperature" if is_retry and sampling.temperature == 0 else ""
    ended = {info.finish_reason for *_, (_, info) in (session.turns for session in talk.columns) if info is not None}
    cut = ""
    if "length" in ended:
        cut = " · cut at the limit (Max new tokens): Continue goes on"
    elif "context" in ended:
        cut = " · cut: the model can read no further; New chat begins anew"
    return f"{num_tokens} token{'' if num_tokens == 1 else 's'}{rate}{cut}{again}{hint}"


def _explain(error: Exception) -> str:
    """The message for the page; what is no fault of the user's goes to the terminal as well."""
    if isinstance(error, LmtuneError):
        return str(error)
    if os.environ.get("LMTUNE_TRACEBACK") == "1":
        traceback.print_exception(error, file=sys.stderr)
    err.print(f"[bold red]error:[/] {escape(f'{type(error).__name__}: {error}')}")
    return f"The answer failed: {type(error).__name__}: {error}"
