"""`lmtune verify` beside servers that serve a run rightly, and wrongly in each way that happens."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from lmtune.config.schema import ModelConfig
from lmtune.data.rendering import Renderer
from lmtune.data.types import Message
from lmtune.errors import CheckpointError, ConfigError, LmtuneError, ModelError
from lmtune.export.asking import choose_model
from lmtune.export.k_quants import quantize_q4_k
from lmtune.export.references import load_references
from lmtune.export.rounding import ROUNDINGS, Rounding, round_inputs, round_rows, rounded
from lmtune.export.served import Served
from lmtune.export.verdict import Verification
from lmtune.export.verification_rows import verification_rows
from lmtune.export.verify import verify_endpoint
from lmtune.inference.load import LoadedModel, load_for_inference
from lmtune.io.endpoint import Endpoint
from lmtune.models.base import load_model
from lmtune.recipes import verify as recipe
from lmtune.runs.store import RunDirectory
from tests.served_models import Logits, Serving, served
from tests.tiny import SAVED_VOCABULARY, adapted, tiny_model
from tests.tokenizers import CHATML, LLAMA2, NO_SYSTEM, QWEN3, make_tokenizer
from tests.workplace import finetune, inside, make_workplace, write_rows

BEGUN = "{{ bos_token }}" + CHATML
OTHER_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
ECHO = ("echo", "completions", "chat", "logprobs")
FIRST = ("completions", "chat", "logprobs")
CHAT = ("chat", "logprobs")
TEXTS = ("completions", "chat")
CHAT_TEXTS = ("chat",)


@dataclass(frozen=True)
class Trained:
    """A run, and its models in this process."""

    folder: Path
    run: RunDirectory
    loaded: LoadedModel
    tuned: Logits
    base: Logits

    def serving(self, ways: Sequence[str] = ECHO, logits: Logits | None = None, **changes: Any) -> Serving:
        """Right but for what is given."""
        renderer = self.loaded.renderer
        right = Serving(logits or self.tuned, self.loaded.tokenizer, tuple(renderer.stop_token_ids), ways=tuple(ways))
        return replace(right, **changes)

    def with_template(self, template: str) -> Any:
        tokenizer = copy.deepcopy(self.loaded.tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    def with_weights(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Logits:
        """The tuned model, merged, with each matrix changed."""
        merged: Any = copy.deepcopy(self.loaded.model)
        merged = merged.merge_and_unload()
        for parameter in merged.parameters():
            if parameter.dim() == 2:
                parameter.data = change(parameter.data)
        return lambda ids: logits_of(merged, ids)


def logits_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = make_workplace(tmp_path_factory.mktemp("verify") / "work", BEGUN)
    run, _ = finetune(
        folder, train__max_steps=60, train__batch_size=12, train__learning_rate=2e-2, data__system="Be brief."
    )
    with inside(folder):
        loaded = load_for_inference(str(run.path))

        def base(ids: Sequence[int]) -> torch.Tensor:
            with loaded.use_base():
                return logits_of(loaded.model, ids)

        yield Trained(folder, run, loaded, lambda ids: logits_of(loaded.model, ids), base)


def verified(trained: Trained, serving: Serving, model: str | None = None) -> Verification:
    with served(serving) as url, inside(trained.folder), endpoint_at(url) as endpoint:
        name, listed = choose_model(endpoint, model, trained.run.name)
        return verify_endpoint(Served(endpoint, name), trained.run, listed)


def endpoint_at(url: str) -> Endpoint:
    advice = "start the server, or give its address"
    return Endpoint.at(url, "URL", recipe.KEYS, advice, sleep=lambda seconds: None)


@pytest.fixture(scope="module")
def other() -> Logits:
    """Another model altogether, of the same vocabulary."""
    model = tiny_model(seed=7, vocab_size=SAVED_VOCABULARY)
    return lambda ids: logits_of(model, ids)


def begin(trained: Trained) -> int:
    return int(trained.loaded.tokenizer.bos_token_id)


Make = Callable[[Trained, Logits], Serving]
SITUATIONS: dict[str, tuple[Make, str]] = {
    "tuned, echo": (lambda t, o: t.serving(), "tuned"),
    "tuned, echo, prompts as text": (lambda t, o: t.serving(takes_tokens=False), "tuned"),
    "tuned, echo, vLLM's form": (lambda t, o: t.serving(style="vllm"), "tuned"),
    "tuned, first tokens": (lambda t, o: t.serving(FIRST), "tuned"),
    "tuned, first tokens, llama.cpp's form": (lambda t, o: t.serving(FIRST, style="llama.cpp"), "tuned"),
    "tuned, first tokens of chat alone": (lambda t, o: t.serving(CHAT), "tuned"),
    "tuned, greedy answers": (lambda t, o: t.serving(TEXTS), "tuned"),
    "tuned, greedy answers of chat alone": (lambda t, o: t.serving(CHAT_TEXTS), "tuned"),
    "tuned, greedy answers, tokens not counted": (lambda t, o: t.serving(CHAT_TEXTS, counts=False), "tuned"),
    "tuned, no chat": (lambda t, o: t.serving(("completions", "logprobs")), "tuned"),
    "base, echo": (lambda t, o: t.serving(logits=t.base), "base"),
    "base, first tokens": (lambda t, o: t.serving(FIRST, t.base), "base"),
    "base, first tokens of chat alone": (lambda t, o: t.serving(CHAT, t.base), "base"),
    "base, greedy answers": (lambda t, o: t.serving(TEXTS, t.base), "base"),
    "base, greedy answers of chat alone": (lambda t, o: t.serving(CHAT_TEXTS, t.base), "base"),
    "template changed, echo": (
        lambda t, o: t.serving(tokenizer=t.with_template(OTHER_TEMPLATE)), "template other",
    ),
    "template changed, chat alone": (
        lambda t, o: t.serving(CHAT, tokenizer=t.with_template(OTHER_TEMPLATE)), "template other",
    ),
    "template changed, greedy answers": (
        lambda t, o: t.serving(TEXTS, tokenizer=t.with_template(OTHER_TEMPLATE)), "template other",
    ),
    "system prompt lost, echo": (lambda t, o: t.serving(drops_system=True), "template system"),
    "system prompt lost, chat alone": (lambda t, o: t.serving(CHAT, drops_system=True), "template system"),
    "system prompt lost, greedy answers of chat alone": (
        lambda t, o: t.serving(CHAT_TEXTS, drops_system=True), "template system",
    ),
    "base behind a lost system prompt": (lambda t, o: t.serving(CHAT, t.base, drops_system=True), "base system"),
    "beginning token twice": (lambda t, o: t.serving(before=(begin(t),)), "template bos_twice"),
    "beginning token twice, chat alone": (
        lambda t, o: t.serving(CHAT_TEXTS, before=(begin(t),)), "template bos_twice",
    ),
    "an end token at the beginning": (
        lambda t, o: t.serving(before=(int(t.loaded.tokenizer.eos_token_id),)), "template bos_added",
    ),
    "beginning token lost": (lambda t, o: t.serving(tokenizer=t.with_template(CHATML)), "template bos_lost"),
    "words before the template": (
        lambda t, o: t.serving(CHAT, tokenizer=t.with_template("{{ 'Hello' }}" + BEGUN)), "template other",
    ),
    "stop token lost, echo": (lambda t, o: t.serving(stops=()), "end token"),
    "stop token lost, greedy answers": (lambda t, o: t.serving(CHAT_TEXTS, stops=()), "end token"),
    "stop token lost, no chat": (lambda t, o: t.serving(("completions",), stops=()), "end token"),
    "16 bit": (lambda t, o: t.serving(logits=t.with_weights(lambda w: w.half().float())), "tuned f16"),
    "8 bit": (lambda t, o: t.serving(logits=t.with_weights(lambda w: round_rows(w, "q8_0"))), "tuned q8_0"),
    "4 bit": (lambda t, o: t.serving(logits=t.with_weights(lambda w: round_rows(w, "q4_k_m"))), "tuned q4_k_m"),
    "another model, echo": (lambda t, o: t.serving(logits=o), "neither"),
    "another model, first tokens": (lambda t, o: t.serving(FIRST, o), "neither"),
    "another model, greedy answers": (lambda t, o: t.serving(TEXTS, o), "neither"),
    "another model, chat alone": (lambda t, o: t.serving(CHAT, o), "neither"),
    "half of the adapter": (
        lambda t, o: t.serving(logits=lambda ids: (t.tuned(ids) + t.base(ids)) / 2), "neither",
    ),
    "log-probabilities null": (lambda t, o: t.serving(("completions", "chat")), "tuned"),
}  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_is_served(situation: str, trained: Trained, other: Logits) -> None:
    make, wanted = SITUATIONS[situation]
    found = verified(trained, make(trained, other))
    print("\n".join(found.lines))
    verdict, _, detail = wanted.replace("end token", "end_token").partition(" ")
    assert found.verdict.replace(" ", "_") == verdict, found
    assert detail in ("", found.variant and found.variant.key, found.nearness.nearest_type), found
    assert bool(found.advice) != found.is_right
    assert "\n" not in "".join(found.lines)
    json.dumps(found.as_dict())


def test_the_best_way_that_there_is_is_taken(trained: Trained) -> None:
    ways = {
        ECHO: ("log-probabilities of whole rows (completions with echo)", 6),
        FIRST: ("log-probabilities of answers (completions)", 6),
        CHAT: ("log-probabilities of answers (chat)", 6),
        TEXTS: ("greedy answers (completions)", 6),
        CHAT_TEXTS: ("greedy answers (chat)", 6),
    }
    for given, (way, rows) in ways.items():
        found = verified(trained, trained.serving(given))
        assert (found.way, found.nearness.rows) == (way, rows)
    quantized = verified(trained, trained.serving(logits=trained.with_weights(lambda w: round_rows(w, "q8_0"))))
    expected = quantized.nearness.expected
    assert expected["f16"] * 20 < expected["q8_0"] < expected["q4_k_m"] / 20
    assert quantized.nearness.to_tuned == pytest.approx(expected["q8_0"], rel=0.5)
    assert "as expected of q8_0 or bf16 (f16 " in quantized.lines[1]
    assert quantized.nearness.share == pytest.approx(1, abs=0.02)


def test_a_chat_counts_more_than_completions_behind_a_template(trained: Trained) -> None:
    """As Ollama's, which puts its template around the prompts of completions, too."""

    class Wrapping(Serving):
        def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
            prompt = body["prompt"]
            ids = prompt if isinstance(prompt, list) else self.tokenizer.encode(prompt)
            return super()._completion({**body, "prompt": [*ids, *ids[-17:-4]]})

    right = trained.serving(FIRST, counts=False)
    found = verified(trained, Wrapping(**{name: getattr(right, name) for name in Serving.__dataclass_fields__}))
    assert (found.verdict, found.way) == ("tuned", "log-probabilities of answers (chat)")
    assert "completions: they fit no prompt of training, and chats do" in found.notes
    right.counts = True
    found = verified(trained, Wrapping(**{name: getattr(right, name) for name in Serving.__dataclass_fields__}))
    assert found.verdict == "tuned"
    assert any("reads 46 tokens where training has 33" in note for note in found.notes), found.notes


def test_log_probabilities_of_temperature_0_are_of_no_use(trained: Trained) -> None:
    def sharp(ids: Sequence[int]) -> torch.Tensor:
        return trained.tuned(ids) * 1e6

    found = verified(trained, trained.serving(FIRST, sharp))
    assert (found.verdict, found.way) == ("tuned", "greedy answers (completions)")


def test_nothing_can_be_told_of_a_run_that_has_changed_nothing(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(trained.folder, folder)
    weights = folder / "runs/trial/adapter/adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    same = replace(trained, folder=folder, run=RunDirectory(folder / "runs/trial"))
    for ways in (ECHO, CHAT_TEXTS):
        found = verified(same, same.serving(ways, trained.base))
        assert (found.verdict, found.is_right) == ("unknown", False)
        assert "nothing can be told" in found.advice


# --- endpoints that do not answer


def message(trained: Trained, serving: Serving, model: str | None, kind: type[LmtuneError]) -> str:
    with pytest.raises(kind) as raised:
        verified(trained, serving, model)
    assert type(raised.value).exit_code == kind.exit_code
    return str(raised.value)


def test_another_name_is_answered_by_the_names_that_there_are(trained: Trained) -> None:
    several = trained.serving(names=("base-model", "tuned-model"))
    said = message(trained, several, "trail", ConfigError)
    assert said.startswith("--model: trail: http://127.0.0.1")
    assert said.endswith("does not know it; it has base-model, tuned-model")
    assert "--model: missing; " in message(trained, several, None, ConfigError)
    assert verified(trained, several, "tuned-model").is_right
    both = trained.serving(logits=trained.base, names=("trial", "elsewhere"))  # the run's name is taken
    assert "the endpoint also lists elsewhere: --model NAME" in verified(trained, both).advice
    both.parents = {"trial": "elsewhere"}
    assert "an adapter of this name over elsewhere, which changes nothing" in verified(trained, both).advice


def test_a_key_is_asked_for_sent_and_written_nowhere(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in recipe.KEYS:
        monkeypatch.delenv(name, raising=False)
    said = message(trained, trained.serving(CHAT, key="sesame"), None, ConfigError)
    assert "status 401; set LMTUNE_VERIFY_KEY or OPENAI_API_KEY" in said
    monkeypatch.setenv("OPENAI_API_KEY", "poppy")
    assert "poppy" not in message(trained, trained.serving(CHAT, key="sesame"), None, ConfigError)
    monkeypatch.setenv("LMTUNE_VERIFY_KEY", "sesame")
    right = trained.serving(CHAT, key="sesame")
    found = verified(trained, right)
    assert found.is_right
    assert set(right.keys) == {"Bearer sesame"}
    told = capsys.readouterr()
    assert "sesame" not in repr(found) + json.dumps(found.as_dict()) + told.out + told.err


def test_what_is_no_endpoint_is_named(trained: Trained) -> None:
    html = b"<html><body>It works!</body></html>"
    for body, reason in (((200, html), "no JSON"), ((500, b"oh"), "status 500")):
        broken = trained.serving(body=body)
        said = message(trained, broken, "trial", LmtuneError)
        assert f"completions with echo: {reason}; chat: {reason}; completions: {reason}" in said
        assert "4 times; start the server, or give its address" in message(trained, broken, None, LmtuneError)
    with served(trained.serving()) as url:
        pass
    with inside(trained.folder), endpoint_at(url) as endpoint, pytest.raises(LmtuneError, match="4 times") as raised:
        choose_model(endpoint, "trial", "trial")  # nobody is there any more
    assert raised.value.exit_code == 1
    with pytest.raises(ConfigError, match="URL: expected an address such as"):
        endpoint_at("trial")


def test_the_command(trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with served(trained.serving()) as url, inside(trained.folder):
        recipe.main(url, "trial")
        said = capsys.readouterr().out
        assert said.startswith(f"{url}, model trial, beside runs/trial\ntuned: the endpoint serves the tuned model\n")
        recipe.main(url, "runs/trial", as_json=True)
        tree = json.loads(capsys.readouterr().out)
        assert (tree["verdict"], tree["run"], tree["url"], tree["advice"]) == ("tuned", "trial", url, "")
        assert tree["chat"]["to_tuned"] < 1e-6 < tree["expected"]["q4_k_m"]
    with served(trained.serving(logits=trained.base)) as url, inside(trained.folder):
        with pytest.raises(typer.Exit) as raised:
            recipe.main(url, "trial", as_json=True)
        assert raised.value.exit_code == 1
        assert json.loads(capsys.readouterr().out)["verdict"] == "base"
        with pytest.raises(ModelError, match="no such run"):
            recipe.main(url, "trail")


# --- other runs


def test_a_file_of_an_earlier_version_is_read(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(trained.folder, folder)
    run = RunDirectory(folder / "runs/trial")
    renderer = trained.loaded.renderer
    rows = verification_rows(trained.run, renderer, "Be brief.")
    tree = json.loads(run.verification.read_text())
    assert tree.pop("prompt_tokens") == [row.num_prompt for row in rows]
    run.verification.write_text(json.dumps(tree))
    assert verification_rows(run, renderer, "Be brief.") == rows
    assert rows[0].messages[0] == Message("system", "Be brief.")
    assert rows[0].messages[1].content.startswith("Say number")
    run.verification.write_text(json.dumps({**tree, "prompt_tokens": [-1] * len(rows)}))
    with pytest.raises(CheckpointError, match="damaged: prompt_tokens"):
        run.read_prompt_lengths()


def test_messages_are_read_back_from_tokens(tmp_path: Path) -> None:
    talks = [
        [Message("user", "one?")],
        [Message("user", "one?"), Message("assistant", "two."), Message("user", "three\n\nfour?")],
        [Message("system", "Be kind."), Message("user", " spaces ")],
        [Message("user", "")],
    ]
    run = RunDirectory(tmp_path)
    for template, system in ((BEGUN, None), (BEGUN, "Be brief."), (LLAMA2, None), (QWEN3, None), (NO_SYSTEM, None)):
        renderer = Renderer(make_tokenizer(template), system=system)
        for talk in talks:
            if template in (LLAMA2, NO_SYSTEM) and talk[0].role == "system":
                continue
            prompt = renderer.prompt_ids(talk)
            ids = [*prompt, 50, 51, renderer.stop_token_ids[0]]
            run.verification.write_text(json.dumps({"sequences": [ids], "prompt_tokens": [len(prompt)]}))
            (row,) = verification_rows(run, renderer, system)
            assert row.prompt == tuple(prompt)
            wanted = [Message("system", system)] if system and talk[0].role != "system" else []
            if row.messages or template != LLAMA2:
                assert renderer.prompt_ids(row.messages) == prompt
                assert [turn.content.strip() for turn in row.messages] == [t.content.strip() for t in (*wanted, *talk)]
    plain = Renderer(make_tokenizer())
    run.verification.write_text(json.dumps({"sequences": [[9, 8, 7, 6]], "prompt_tokens": [0]}))
    (row,) = verification_rows(run, plain, None)
    assert (row.num_prompt, row.messages) == (2, ())


@pytest.mark.parametrize("kind", ["full", "plain"])
def test_runs_of_all_weights_and_of_plain_text(kind: str, tmp_path: Path) -> None:
    """The one has no adapter to switch off, the other no template, so that chats are not asked."""
    folder = make_workplace(tmp_path / "work", None if kind == "plain" else BEGUN)
    changes = {"tuning__kind": "full", "train__learning_rate": 1e-3} if kind == "full" else {}
    run, _ = finetune(folder, train__max_steps=30, train__batch_size=12, **changes)
    with inside(folder):
        loaded = load_for_inference(str(run.path))
        before = load_model(ModelConfig(name="base"))
    made = Trained(folder, run, loaded, lambda ids: logits_of(loaded.model, ids), lambda ids: logits_of(before, ids))
    assert verified(made, made.serving()).verdict == "tuned"
    assert verified(made, made.serving(("completions", "logprobs"))).verdict == "tuned"
    if kind == "plain":
        said = message(made, made.serving(CHAT), None, LmtuneError)
        assert "chat: no row of the run can be written as messages" in said
        made = replace(made, base=lambda ids: base_logits(loaded, ids))
    assert verified(made, made.serving(logits=made.base)).verdict == "base"


def base_logits(loaded: LoadedModel, ids: Sequence[int]) -> torch.Tensor:
    with loaded.use_base():
        return logits_of(loaded.model, ids)


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    folder = make_workplace(tmp_path / "work")
    rows = [{"text": f"{word} {n}", "label": word} for n in range(8) for word in ("good", "bad")]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "validation.jsonl", rows)
    run, _ = finetune(folder, train__max_steps=2, objective__kind="classification", evaluation__exact_match_rows=0)
    with inside(folder), pytest.raises(ModelError, match="a classifier, whose scores no endpoint"):
        load_references(run)


# --- rounding


@pytest.mark.parametrize("kind", ROUNDINGS)
def test_a_rounded_model_computes_with_rounded_weights_and_inputs(kind: Rounding) -> None:
    ids = list(range(5, 45))
    model = adapted(tiny_model(vocab_size=SAVED_VOCABULARY))
    exact = logits_of(model, ids)
    with rounded(model, kind):
        found = logits_of(model, ids)
    merged: Any = copy.deepcopy(model).merge_and_unload()
    for name, parameter in merged.named_parameters():
        if parameter.dim() == 2:
            parameter.data = round_rows(parameter.data, kind, "embed_tokens" in name or "lm_head" in name)
    for module in merged.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda layer, given: round_inputs(given[0], kind))
    wanted = logits_of(merged, ids)
    # not to 1e-5: an input between two steps is rounded to the one or the other
    assert (found - wanted).norm() < 0.5 * (wanted - exact).norm()


def test_rounding_is_that_of_gguf() -> None:
    import gguf

    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    written = gguf.quants.dequantize(
        gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
    )
    torch.testing.assert_close(round_rows(weight, "q8_0"), torch.from_numpy(written))
    coded = gguf.quants.dequantize(quantize_q4_k(weight.numpy()), gguf.GGMLQuantizationType.Q4_K)
    errors = [(torch.as_tensor(one) - weight).square().mean() for one in (coded, round_rows(weight, "q4_k_m"))]
    assert 0.5 < errors[0] / errors[1] < 1.5
