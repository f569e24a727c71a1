"""The five kinds of template through preview, finetune, chat and evaluate, with real tokenizers; tiny random models."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from lmtune.data.rendering import Template
from lmtune.data.replies import split_reply
from lmtune.evaluation.predict import predict
from tests.real.folders import save_base, template_of, tokenizer_of

pytestmark = pytest.mark.real

# As the larger Gemma 4 models: without thinking the prompt, and it alone, ends in an empty thought.
EMPTY_THOUGHT = (
    "{%- if add_generation_prompt and not enable_thinking %}{{- '<|channel>thought\\n<channel|>' }}{%- endif %}"
)
R = "<think>\nI look at shelf N.\n</think>\n\n"
# name: tokenizer, template (None: its own), data.template, what stands before an answer, what the preview shows trained
KINDS: dict[str, tuple[str, str | None, Template, str, str]] = {
    "thinking dropped: Qwen3": ("qwen3", None, "thinking", R, "<think>⏎ I·look·at·shelf·1.⏎ </think>⏎⏎ Item·1·is·"),
    "thinking off: Qwen3": ("qwen3", None, "auto", "", "Item·1·is·"),
    "thought opened: R1": ("deepseek_v3", "deepseek_r1_distill", "thinking", R, "I·look·at·shelf·1.⏎ </think>"),
    "thought opened: Qwen3.5": ("qwen3", "qwen3_5_think", "thinking", R, "I·look·at·shelf·1.⏎ </think>"),
    "empty thought: Gemma 4": ("gemma3", "gemma4_v5", "auto", "", "Item·1·is·on·shelf·2.<turn|>"),
    "channels: gpt-oss": ("gptoss", "gptoss", "auto", "", "<|channel|>final<|message|>Item·1·is·"),
    "channels, thinking: gpt-oss": ("gptoss", "gptoss", "thinking", R, "<|channel|>analysis<|message|>I·look·at"),
    "trimmed: Llama 3": ("llama3_1", None, "auto", "    ", "····Item·1·is·on·shelf·2.<|eot_id|>"),
    "trimmed: Gemma 3": ("gemma3", None, "auto", "    ", "····Item·1·is·on·shelf·2.<end_of_turn>"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lmtune.inference.chat import ChatSession
    from lmtune.inference.load import load_for_inference
    from lmtune.inference.request import Sampling
    from lmtune.recipes.evaluate import main as evaluate
    from lmtune.recipes.finetune import main as finetune
    from lmtune.recipes.preview import main as preview
    from lmtune.serve.terminal import TerminalChat

    name, template, option, before, shown = KINDS[kind]
    source = None if template is None else template_of(template) + EMPTY_THOUGHT * template.startswith("gemma4")
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base", tokenizer_of(name, source))
    questions = [f"Where is item {n}?" for n in range(1, 4)]
    answers = [before.replace("N", str(n)) + f"Item {n} is on shelf {n + 1}." for n in range(1, 4)]
    rows = [{"prompt": q, "completion": a} for q, a in zip(questions, answers, strict=True)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("run.yaml").write_text(
        "model: {name: ./base, quantization: none, dtype: float32}\n"
        f"data: {{train: rows.jsonl, validation: rows.jsonl, max_length: 512, template: {option}}}\n"
        "adapter: {rank: 16, alpha: 32}\n"
        "train: {max_steps: 60, batch_size: 3, learning_rate: 1.0e-2}\n"
        "evaluation: {exact_match_rows: 3, max_new_tokens: 40}\nrun: {name: run}\n"
    )
    preview(config=Path("run.yaml"), rows=1)
    trained = "".join(re.findall(r"\[(.*?)\]", capsys.readouterr().out.replace("\n", "")))
    assert shown.replace(" ", "") in trained

    finetune(Path("run.yaml"))
    summary = json.loads(Path("runs/run/summary.json").read_text())
    assert summary["tuned"]["token_accuracy"] == 1.0
    lines = [json.loads(line) for line in Path("runs/run/predictions.jsonl").read_text().splitlines()]
    assert [line["reference"].strip() for line in lines] == [split_reply(answer)[1].strip() for answer in answers]
    assert summary["tuned"]["exact_match"] == 1.0, [line["tuned"] for line in lines]

    capsys.readouterr()
    evaluate("runs/run", [Path("rows.jsonl")], as_json=True)
    assert json.loads(capsys.readouterr().out)["tuned"]["exact_match"] == 1.0

    loaded = load_for_inference("runs/run")
    session = ChatSession(loaded)
    options = Sampling(max_new_tokens=40)
    assert split_reply(session.reply(questions[0], options)) == split_reply(answers[0])
    session.reply(questions[1], options)  # with an answer as history
    capsys.readouterr()
    TerminalChat(ChatSession(loaded), options).run_piped(io.BytesIO("\n".join(questions).encode()))
    assert capsys.readouterr().out == "".join(split_reply(answer)[1] + "\n" for answer in answers)


CALL = '<tool_call>\n{"name": "shelf", "arguments": {"item": N}}\n</tool_call>'


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_calls(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A tuned model calls its tool: scored, predicted, and shown in the terminal as what it is."""
    from lmtune.inference.chat import ChatSession
    from lmtune.inference.load import load_for_inference
    from lmtune.inference.request import Sampling
    from lmtune.recipes.evaluate import main as evaluate
    from lmtune.recipes.finetune import main as finetune
    from lmtune.serve.terminal import TerminalChat

    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base", tokenizer_of(name, template_of("gptoss") if name == "gptoss" else None))
    tool = {"name": "shelf", "description": "Where it is.", "parameters": {"type": "object", "properties": {}}}
    for tools in ([tool], []):
        rows = [
            {"tools": tools, "messages": [
                {"role": "user", "content": f"Where is item {n}?"},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "shelf", "arguments": f'{{"item": {n}}}'}}]},
                *([{"role": "tool", "tool_call_id": "c", "content": str(n + 1)},
                   {"role": "assistant", "content": f"On shelf {n + 1}."}] * (n == 3)),
            ]} for n in range(1, 4)
        ]  # fmt: skip
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = "tools" if tools else "run"
        Path("run.yaml").write_text(
            "model: {name: ./base, quantization: none, dtype: float32}\n"
            "data: {train: rows.jsonl, validation: rows.jsonl, max_length: 1024}\n"
            "tuning: {kind: lora, rank: 16, alpha: 32}\n"
            "train: {max_steps: 80, batch_size: 3, learning_rate: 1.0e-2}\n"
            f"evaluation: {{exact_match_rows: 3, max_new_tokens: 60}}\nrun: {{name: {run}}}\n"
        )
        finetune(Path("run.yaml"))
        capsys.readouterr()
        evaluate(f"runs/{run}", [Path("rows.jsonl")], as_json=True)
        assert json.loads(capsys.readouterr().out)["tuned"]["exact_match"] == 1.0
        loaded = load_for_inference(f"runs/{run}")
        asked = [{**row, "messages": row["messages"][:-1] if n < 3 else row["messages"][:3]}
                 for n, row in enumerate(rows, start=1)]  # fmt: skip
        Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        said = [row["prediction"] for row in predict(loaded, ["asked.jsonl"], max_new_tokens=60)]
        assert said == [CALL.replace("N", "1"), CALL.replace("N", "2"), "On shelf 4."]
    options = Sampling(max_new_tokens=60)
    TerminalChat(ChatSession(loaded), options).run_piped(io.BytesIO(b"Where is item 1?\nWhere is item 2?"))
    assert capsys.readouterr().out == CALL.replace("N", "1") + "\n" + CALL.replace("N", "2") + "\n"
    session = ChatSession(loaded)
    assert session.reply("Where is item 2?", options) == CALL.replace("N", "2")
    session.reply("Where is item 1?", options)  # with a call as history
