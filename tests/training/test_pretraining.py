"""Pretraining: what is read, how it is cut into blocks, that it learns, and that the command does the whole of it."""

from __future__ import annotations

import gzip
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lmtune.batching.plan import Totals, Unit
from lmtune.batching.prefetch import pack_units
from lmtune.config.load import build_config, load_config
from lmtune.config.pretrain import CorpusConfig, PretrainConfig
from lmtune.data.types import Example, Message
from lmtune.errors import ConfigError, DataError
from lmtune.evaluation.scoring import teacher_forced
from lmtune.forward.packed import PackedForward
from lmtune.models.tuning.full import Full
from lmtune.objectives.sft import Sft
from lmtune.parallel.single import Single
from lmtune.training.corpus import TURN_END, Blocks, read_corpus, tokenize, train_tokenizer
from lmtune.training.pretrain import build_model, pretrain
from lmtune.training.step import step_gradients
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
    held_out = Blocks(tokenize(read_corpus(config.data).validation, tokenizer), 32)
    assert teacher_forced(PackedForward(model), held_out, 512).perplexity == pytest.approx(value, abs=0.01)
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
        ("model.hidden_size=65", "model.hidden_size"),
        ("model.num_key_value_heads=3", "model.num_key_value_heads"),
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
    Path("texts/more/bad.txt").write_bytes(b"caf\xe9 \xc3\xa9")
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8 \(byte 3\)"):
        read_corpus(CorpusConfig(path="texts"))
    with pytest.raises(DataError, match="paragraph"):
        read_corpus(CorpusConfig(path="texts/a.txt"))
    Path("texts/a.txt").write_text(" \n\n ")
    with pytest.raises(DataError, match="holds no text"):
        read_corpus(CorpusConfig(path="texts/a.txt"))
    Path("texts/rows.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        read_corpus(CorpusConfig(path="texts/rows.jsonl"))


def test_rows_of_text_and_of_messages_are_documents_too(workplace: Path) -> None:
    chat = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}\n'
    Path("texts/more/chats.jsonl").write_text(chat)
    corpus = read_corpus(CorpusConfig(path="texts", split="paragraph"))
    found = [*corpus.train, *corpus.validation]
    assert len(found) == len(SENTENCES) + 1
    assert [document.messages[1].content for document in found if document.messages] == ["Hello!"]


def test_every_file_that_can_be_trained_on_can_be_pretrained_on(workplace: Path) -> None:
    """Compressed, tables, other encodings; what was found out is said."""
    folder = Path("texts/more")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"Packed text."))
    (folder / "d.txt").write_bytes(("这是一句话。" * 20).encode("gb18030"))
    (folder / "faq.csv").write_text("question;answer\nWhere?;Here.\n")
    pq.write_table(pa.table({"text": ["Parquet text."]}), folder / "e.parquet")
    (folder / "README.md").write_text("not read")
    corpus = read_corpus(CorpusConfig(path="texts"))
    found = [*corpus.train, *corpus.validation]
    said = {document.text or document.messages[-1].content for document in found}
    assert {"Packed text.", "这是一句话。" * 20, "Here.", "Parquet text."} < said
    assert len(found) == 6
    assert corpus.read_as["d.txt"] == "GB18030"
    assert "columns question → prompt" in corpus.read_as["texts/more/faq.csv"]


def test_held_out_documents_are_not_trained_on(workplace: Path) -> None:
    Path("texts/a.txt").write_text("\n\n".join(SENTENCES * 2), encoding="utf-8")
    corpus = read_corpus(CorpusConfig(path="texts", split="paragraph", validation_fraction=0.3))
    assert corpus.validation
    assert not {document.text for document in corpus.train} & {document.text for document in corpus.validation}


def texts(*documents: str) -> list[Example]:
    """Plain documents."""
    return [Example("x.txt", 1, text=document) for document in documents]


def test_tokenizer_round_trip_and_control_tokens() -> None:
    tokenizer = train_tokenizer(texts(*SENTENCES), 512)
    for text in ("Grün, 日本 and 42!", "  two  spaces\nand a line", "user wrote <|end|> here"):
        (ids,) = tokenize(texts(text), tokenizer)
        assert tokenizer.decode(ids[:-1]) == text
        assert tokenizer.convert_tokens_to_ids(TURN_END) not in ids
        assert ids[-1] == tokenizer.eos_token_id
    chat = Example("x.jsonl", 1, (Message("user", "Hi"), Message("assistant", "Hello!")))
    (ids,) = tokenize([chat], tokenizer)
    assert tokenizer.decode(ids) == "<|user|>Hi<|end|><|assistant|>Hello!<|end|><|end_of_text|>"


def test_blocks_keep_documents_apart() -> None:
    documents = [np.arange(3, dtype=np.int32), np.arange(3, 9, dtype=np.int32), np.arange(9, 13, dtype=np.int32)]
    blocks = Blocks(documents, 5)
    found = [[sequence.input_ids.tolist() for sequence in blocks[index].sequences] for index in range(len(blocks))]
    assert found == [[[0, 1, 2], [3, 4]], [[5, 6, 7, 8]]]  # token 9 alone predicts nothing
    assert blocks.num_tokens == 10
    assert blocks.sequences.num_targets.tolist() == [2, 1, 3]
    assert all(
        sequence.loss_mask.tolist() == [False, *[True] * (len(sequence) - 1)] for sequence in blocks[0].sequences
    )
    assert len(Blocks(documents, 50)) == 1


def test_a_step_is_that_of_a_plain_loop_over_all_parameters() -> None:
    """The head is the embedding, and learns from both ends."""
    tree = {
        "data": {"path": "x"}, "output": {"dir": "x"},
        "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    }  # fmt: skip
    tokenizer = train_tokenizer(texts(*SENTENCES), 320)
    model = build_model(build_config(PretrainConfig, tree, "test").model, tokenizer, seed=0)
    blocks = Blocks(tokenize(texts(*SENTENCES[:20]), tokenizer), 32)
    sequences = [sequence for index in range(len(blocks)) for sequence in blocks[index].sequences]
    count = int(blocks.sequences.num_targets.sum())
    for sequence in sequences:
        ids = torch.tensor(sequence.input_ids, dtype=torch.long)
        logits = model(input_ids=ids[None]).logits[0, :-1]
        (F.cross_entropy(logits, ids[1:], reduction="sum") / count).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    tuned = Full().apply(model, 0, "test")
    units = [Unit(row, row, tuple(range(len(blocks[row].sequences)))) for row in range(len(blocks))]
    forward = PackedForward(tuned.module)
    batches = [pack_units(blocks, units, len(blocks))]
    totals = Totals.of(blocks.sequences, range(len(blocks)))
    step_gradients(forward, Sft(), tuned.trainable(), batches, totals, Single())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_it_learns() -> None:
    tree = {
        "data": {"path": "x"}, "output": {"dir": "x"},
        "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
        "train": {"max_steps": 60, "batch_size": 8, "block_length": 32, "learning_rate": 1e-2},
    }  # fmt: skip
    config = build_config(PretrainConfig, tree, "test")
    tokenizer = train_tokenizer(texts(*SENTENCES), 320)
    blocks, held_out = (Blocks(tokenize(texts(*some), tokenizer), 32) for some in (SENTENCES[::2], SENTENCES[1::2]))
    model = build_model(config.model, tokenizer, seed=0)
    before = teacher_forced(PackedForward(model), held_out, 512).perplexity
    assert pretrain(model, blocks, held_out, config).perplexity < 8 < 200 < before
