"""Pretraining: what is read, how it is cut into blocks, that it learns, and that the command does the whole of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lmtune.config.load import build_config, load_config
from lmtune.demo.world import Turn, world
from lmtune.errors import ConfigError, DataError
from lmtune.training.corpus import TURN_END, TokenStream, read_corpus, take_blocks, tokenize, train_tokenizer
from lmtune.training.pretrain_config import CorpusConfig, PretrainConfig
from lmtune.training.pretraining import block_numbers, build_model, perplexity, pretrain
from tests import processes

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

SENTENCES = [f"The {thing} number {n} is {colour}." for n in range(40)
             for thing, colour in (("cat", "black"), ("dog", "brown"), ("fish", "golden"))]  # fmt: skip
CONFIG = """
data: {path: texts, split: paragraph, validation_fraction: 0.1}
tokenizer: {vocabulary_size: 320}
model: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1}
train: {max_steps: 6, batch_size: 4, block_length: 32, learning_rate: 5.0e-3}
output: {dir: out, name: small}
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with texts and a config, as the current one."""
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(SENTENCES[:80]), encoding="utf-8")
    (tmp_path / "texts" / "more" / "b.txt").write_text("\n\n".join(SENTENCES[80:]), encoding="utf-8-sig")
    (tmp_path / "small.yaml").write_text(CONFIG, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return processes.completed(Path.cwd(), "pretrain", *arguments, variables={"LMTUNE_TRACEBACK": "0"})


@pytest.mark.slow
def test_the_command_trains_a_model_that_plain_transformers_loads(workplace: Path) -> None:
    done = command("small.yaml")
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained("out", use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained("out")
    stops = [tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.eos_token_id]
    assert model.generation_config.eos_token_id == stops
    assert model.config.pad_token_id == tokenizer.pad_token_id not in stops
    value = float(done.stdout.split("held-out text: ")[1].split()[0])
    assert 1.0 < value < 320.0
    config = load_config(PretrainConfig, "small.yaml")
    held_out = tokenize(read_corpus(config.data).validation, tokenizer)
    assert perplexity(model, held_out, 32, 4) == pytest.approx(value, abs=0.01)
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert f"| perplexity on held-out text | {value:.2f} |" in card
    assert not [file for file in Path("out").iterdir() if str(workplace).encode() in file.read_bytes()]
    assert not list(workplace.glob(".staging-*"))


def test_a_model_that_is_there_is_not_replaced_unasked(workplace: Path) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("kept")
    done = command("small.yaml")
    assert done.returncode == 2
    assert "output.dir" in done.stderr
    assert "--overwrite" in done.stderr
    assert Path("out/mine.txt").read_text() == "kept"


@pytest.mark.slow
def test_ctrl_c_ends_early_and_saves(workplace: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lmtune", "pretrain", "small.yaml", "train.max_steps=100000"], stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "parameters" in line:
            break
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130, rest
    assert "of 100000" in rest
    assert Path("out/model.safetensors").is_file()
    assert "stopped early" in Path("out/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.batchsize=3", "train.batchsize: unknown key; did you mean batch_size?"),
        ("tokenizer.vocabulary_size=100", "tokenizer.vocabulary_size"),
        ("model.architecture=gpt2", "model.architecture"),
        ("model.hidden_size=65", "model.hidden_size"),
        ("model.num_key_value_heads=3", "model.num_key_value_heads"),
        ("data.world_documents=10", "data.path"),
        ("train.block_length=4096", "train.block_length"),
        ("data.path=nowhere", "data.path"),
    ],
)
def test_wrong_settings_are_named(workplace: Path, override: str, named: str) -> None:
    import typer

    from lmtune.recipes.pretrain import main

    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["small.yaml", override])
    assert isinstance(result.exception, (ConfigError, DataError))
    assert result.exception.exit_code == 2
    assert named in str(result.exception)
    assert not Path("out").exists()


def test_text_that_cannot_be_read_is_named(workplace: Path) -> None:
    Path("texts/more/bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8 \(byte 3\)"):
        read_corpus(CorpusConfig(path="texts"))
    with pytest.raises(DataError, match="paragraph"):
        read_corpus(CorpusConfig(path="texts/a.txt"))
    Path("texts/a.txt").write_text(" \n\n ")
    with pytest.raises(DataError, match="empty"):
        read_corpus(CorpusConfig(path="texts/a.txt"))


def test_held_out_documents_are_not_learned(workplace: Path) -> None:
    Path("texts/a.txt").write_text("\n\n".join(SENTENCES * 2), encoding="utf-8")
    corpus = read_corpus(CorpusConfig(path="texts", split="paragraph", validation_fraction=0.3))
    assert corpus.validation
    assert not set(corpus.train) & set(corpus.validation)


def test_tokenizer_round_trip_and_control_tokens() -> None:
    documents = list(world(300, seed=0))
    tokenizer = train_tokenizer(documents, 512)
    for text in ("Grün, 日本 and 42!", "  two  spaces\nand a line", "user wrote <|end|> here"):
        stream = tokenize([text], tokenizer)
        assert tokenizer.decode(stream.input_ids[:-1]) == text
        assert tokenizer.convert_tokens_to_ids(TURN_END) not in stream.input_ids
        assert stream.input_ids[-1] == tokenizer.eos_token_id
    stream = tokenize([(Turn("user", "Hi"), Turn("assistant", "Hello!"))], tokenizer)
    assert tokenizer.decode(stream.input_ids) == ("<|user|>Hi<|end|><|assistant|>Hello!<|end|><|end_of_text|>")


def test_blocks_keep_documents_apart() -> None:
    lengths = (3, 6, 4)
    ids = torch.arange(13, dtype=torch.int32).numpy()
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]).numpy()
    blocks = take_blocks(TokenStream(ids, positions), 5, [0, 1])
    assert blocks.input_ids.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert blocks.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert blocks.targets.tolist() == [[1, 2, -100, 4, -100], [6, 7, 8, -100, -100]]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_document_scores_the_same_alone_and_beside_others(architecture: str) -> None:
    documents = ["The cat is black.", "A dog is brown.", "The fish is golden."] * 10
    tokenizer = train_tokenizer(documents, 300)
    tree = {"data": {"world_documents": 1}, "output": {"dir": "x"},
            "model": {"architecture": architecture, "hidden_size": 64, "num_hidden_layers": 2}}  # fmt: skip
    model = build_model(build_config(PretrainConfig, tree, "test").model, tokenizer, seed=0).eval()
    alone, together = tokenize(documents[1:2], tokenizer), tokenize(documents[:3], tokenizer)
    start = len(tokenize(documents[:1], tokenizer))
    with torch.no_grad():
        first = take_blocks(alone, 512, [0])
        both = take_blocks(together, 512, [0])
        expected = model(input_ids=first.input_ids, position_ids=first.position_ids, use_cache=False).logits[0]
        found = model(input_ids=both.input_ids, position_ids=both.position_ids, use_cache=False).logits[0]
    torch.testing.assert_close(found[start : start + len(alone)], expected, atol=1e-5, rtol=1e-5)


def test_each_epoch_reads_every_block_once_in_a_new_order() -> None:
    first = [number for step in (1, 2, 3) for number in block_numbers(step, 12, 4, seed=0)]
    second = [number for step in (4, 5, 6) for number in block_numbers(step, 12, 4, seed=0)]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert block_numbers(5, 12, 4, seed=0) == second[4:8]


def test_it_learns() -> None:
    tree = {
        "data": {"world_documents": 1}, "output": {"dir": "x"},
        "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
        "train": {"max_steps": 60, "batch_size": 8, "block_length": 32, "learning_rate": 1e-2},
    }  # fmt: skip
    config = build_config(PretrainConfig, tree, "test")
    tokenizer = train_tokenizer(SENTENCES, 320)
    stream = tokenize(SENTENCES[::2], tokenizer)
    held_out = tokenize(SENTENCES[1::2], tokenizer)
    results = []
    for _ in range(2):
        model = build_model(config.model, tokenizer, seed=0)
        before = perplexity(model, held_out, 32, 8)
        results.append(pretrain(model, stream, held_out, config).perplexity)
        assert results[-1] < 8 < 200 < before
    assert results[0] == pytest.approx(results[1], rel=1e-6)
