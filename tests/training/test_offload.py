"""Layer streaming: the result of a base that is held whole, bit for bit, with no more layers in memory than allowed."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmtune.config.schema import FinetuneConfig, LoraConfig, ModelConfig, Quantization
from lmtune.data.sequences import SequenceTable
from lmtune.errors import ConfigError, ModelError
from lmtune.export.merged import merge_run
from lmtune.forward.packed import PackedForward
from lmtune.inference.chat import ChatSession
from lmtune.inference.load import load_for_inference
from lmtune.inference.request import Sampling
from lmtune.kernels.lora_linear import fuse
from lmtune.models.base import load_model
from lmtune.models.offload import LayerStream, MappedFiles, PinnedMemory, _is_file, mapped_bytes
from lmtune.models.structure import base_of, empty_model, is_streamed
from lmtune.models.tuning.base import trainable
from lmtune.models.tuning.lora import attach_adapter
from lmtune.runs.store import RunDirectory
from lmtune.training.estimate import forecast
from lmtune.training.hooks import CheckpointHook
from lmtune.training.loop import StepEvent
from lmtune.training.memory import checkpoint_layers
from lmtune.training.run import run_finetune
from lmtune.training.shared import Shared
from tests.tiny import adapted, losses_of, pack_rows, random_rows, rows_behind_a_prefix, save_tiny
from tests.tokenizers import CHATML
from tests.workplace import RESTLESS, config_of, finetune, inside, lasting, make_workplace, write_rows

# Wide enough that the weights of a layer are worth to be streamed
WIDE: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 5}
STREAMED: dict[str, Any] = {"model__offload": "layers", "model__resident_layers": 2}

RUNS: dict[str, dict[str, Any]] = {
    "sft": RESTLESS,
    "checkpointed": {"train__gradient_checkpointing": True, "train__micro_batch_tokens": 64},
    "one layer": {"model__resident_layers": 1, "train__micro_batch_tokens": 64},
    "three layers": {"model__resident_layers": 3},
    "last layer": {"tuning__target_modules": r".*\.layers\.4\..*(q|v)_proj"},
    "dora": {"tuning__use_dora": True, "tuning__modules_to_save": ("head",)},
    "bf16": {"model__dtype": "bfloat16"},
    "nf4": {"model__quantization": "nf4"},
    "int8": {"model__quantization": "int8"},
    "dpo": {"objective__kind": "dpo", "data__train": "pairs.jsonl", "data__validation": "pairs.jsonl"},
    "classification": {
        "objective__kind": "classification", "data__train": "texts.jsonl", "data__validation": "texts.jsonl",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a base of five layers, answers behind a long prefix, pairs and labelled texts."""
    folder = make_workplace(tmp_path_factory.mktemp("offload") / "work")
    save_tiny(folder / "base", chat_template=CHATML, **WIDE)
    prefix = "In our shop all numbers are told by the one who asks for them. "
    write_rows(folder / "train.jsonl", [{"prompt": f"{prefix}{n}?", "completion": f"{7 * n % 10}."} for n in range(24)])
    pairs = [{"prompt": f"{prefix}{n}?", "chosen": f"{7 * n % 10}.", "rejected": f"{n % 7}!"} for n in range(12)]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "texts.jsonl", [{"text": f"number {n} it is", "label": "ab"[n % 2]} for n in range(12)])
    return folder


def train(place: Path, name: str, **changes: Any) -> dict[str, Any]:
    """What lasts of a run of three steps."""
    config: FinetuneConfig = config_of(**{"train__max_steps": 3, **changes, "run__name": name})
    with inside(place):
        run_finetune(config, RunDirectory.of(config.run))
    kept = lasting(place, name)
    kept["adapter"].pop("README.md", None)  # names the run
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_streamed_run_is_the_whole_one_bit_for_bit(place: Path, name: str) -> None:
    """Adapter, losses, scores, generated answers, and what is precomputed for preferences."""
    changes = RUNS[name]
    whole = train(place, f"whole-{name}".replace(" ", "-"), **changes, model__offload="none")
    streamed = train(place, f"streamed-{name}".replace(" ", "-"), **{**STREAMED, **changes, "model__offload": "layers"})
    for part in whole:
        assert streamed[part] == whole[part], part


@pytest.mark.slow
def test_a_streamed_run_resumes_and_may_be_held_whole_from_then_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    whole = train(place, "uninterrupted", **RESTLESS, train__max_steps=6)
    for name, after in (("resumed", STREAMED), ("resumed-whole", {"model__offload": "none"})):
        with monkeypatch.context() as patch:
            saved = CheckpointHook.after_step

            def cut(hook: CheckpointHook, event: StepEvent, saved: Any = saved) -> Any:
                done = saved(hook, event)
                if event.plan.step == 4:
                    raise OSError("a power cut")
                return done

            patch.setattr(CheckpointHook, "after_step", cut)
            with pytest.raises(OSError, match="a power cut"):
                train(place, name, **RESTLESS, **STREAMED, train__max_steps=6)
        resumed = train(place, name, **RESTLESS, **after, train__max_steps=6)
        for part in ("adapter", "metrics", "answers", "scores"):
            assert resumed[part] == whole[part], part


@pytest.mark.slow
def test_runs_share_a_streamed_base(place: Path) -> None:
    shared, whole = Shared(), train(place, "alone")
    for name in ("first", "second"):
        config = config_of(**STREAMED, train__max_steps=3, run__name=name)
        with inside(place):
            run_finetune(config, RunDirectory.of(config.run), shared=shared)
        assert lasting(place, name)["metrics"] == whole["metrics"]


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_gpu_gives_the_same_gradients_with_streamed_layers(tmp_path: Path, quantization: Quantization) -> None:
    model = ModelConfig(name=str(base_folder(tmp_path)), quantization=quantization, dtype="float32", offload="none")
    found = []
    for offload in ("none", "layers"):
        base = load_model(replace(model, offload=offload), "cuda")
        with torch.device("cuda"):
            found.append(losses_and_gradients(base, checkpointed=False))
        assert is_streamed(base) is (offload == "layers")
    assert not any(_is_here(layer) for layer in base.model.layers[2:])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.slow
def test_what_was_streamed_is_merged_and_answers(place: Path) -> None:
    train(place, "merged", **STREAMED)
    with inside(place):
        run = RunDirectory(Path("runs/merged"))
        report = merge_run(run, run.merged)
        streamed = load_for_inference("runs/merged")
        assert is_streamed(base_of(streamed.model))
        plain = load_for_inference("runs/merged/merged")
        said = [ChatSession(one).reply("3?", Sampling(max_new_tokens=4)) for one in (streamed, plain)]
    assert report["logits_difference"] < report["bound"]
    assert said[0] == said[1]


def stream_of(base: Any) -> LayerStream:
    stream: LayerStream = base.lmtune_stream
    return stream


def losses_and_gradients(base: Any, checkpointed: bool) -> list[torch.Tensor]:
    """Of two micro-batches, after an evaluation; some sequences share a prefix."""
    model = adapted(base)
    fuse(model, keep_dense=False)
    forward = PackedForward(model)
    if checkpointed:
        checkpoint_layers(base, len(base.model.layers))
    model.train()
    with torch.no_grad():
        found = [losses_of(forward, pack_rows(random_rows(4, seed=9).rows))]
    for seed in range(2):
        batch = pack_rows(rows_behind_a_prefix().rows if seed else random_rows(5).rows, share_prefixes=bool(seed))
        with forward.context():
            losses = -forward(batch).logprobs
            losses.sum().backward()
        found.append(losses.detach())
    return found + [parameter.grad for parameter in trainable(model).values() if parameter.grad is not None]


def base_folder(tmp_path: Path, **changes: Any) -> Path:
    return save_tiny(tmp_path / "base", **{**WIDE, **changes})


@pytest.mark.parametrize("resident", [1, 2, 4])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("place_of", [MappedFiles, lambda: PinnedMemory(torch.device("cpu"))])
def test_either_store_gives_the_same_gradients_and_holds_no_more_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: int, checkpointed: bool, place_of: Any
) -> None:
    """That of GPUs runs here without its streams: it empties storages and fills them again."""
    folder = str(base_folder(tmp_path, dtype=torch.bfloat16))  # so that fp32 weights are in memory of their own
    wanted = losses_and_gradients(
        load_model(ModelConfig(name=folder, quantization="none", dtype="float32", offload="none")), checkpointed
    )
    monkeypatch.setattr("lmtune.models.base.stream_for", lambda *_: LayerStream(place_of(), resident))
    base = load_model(ModelConfig(name=folder, quantization="none", dtype="float32", offload="layers"))
    layers, held = base.model.layers, list[int]()
    if not isinstance(stream_of(base).store, MappedFiles):  # what is there can be counted
        for layer in layers:
            layer.register_forward_hook(lambda *_: held.append(sum(_is_here(one) for one in layers)))
    found = losses_and_gradients(base, checkpointed)
    assert len(found) == len(wanted) > 10
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert stream_of(base).most_resident == min(resident, len(layers))
    assert max(held, default=resident) <= resident


def _is_here(layer: Any) -> bool:
    (weight,) = [one for name, one in layer.named_parameters() if "down_proj" in name and ".lora_" not in name]
    return weight.untyped_storage().nbytes() > 0


@pytest.mark.slow
def test_resident_memory_is_bounded(tmp_path: Path) -> None:
    """200 MB of weights, of which 16 layers are 12 MB each: the process takes less than four of them to run."""
    shape = {"hidden_size": 512, "intermediate_size": 1280, "num_hidden_layers": 16, "num_attention_heads": 8,
             "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip
    folder = base_folder(tmp_path, **shape)
    assert (folder / "model.safetensors").stat().st_size > 180e6
    for quantization, dtype in (("none", torch.float32), ("none", torch.bfloat16)):
        if dtype != torch.float32:  # converted as it is loaded
            folder = base_folder(tmp_path / "narrow", dtype=dtype, **shape)
        whole, streamed = (_memory_of(folder, quantization, offload) for offload in ("none", "layers"))
        assert whole["sums"] == streamed["sums"]
        assert whole["taken"] > 180e6
        assert streamed["taken"] < 70e6


def _memory_of(folder: Path, quantization: str, offload: str) -> dict[str, Any]:
    """What a process took for loading a base and two passes, forward and backward."""
    code = f"""
import json, psutil, torch, bitsandbytes, transformers.models.llama.modeling_llama
from pathlib import Path
from lmtune.config.schema import ModelConfig
from lmtune.models.base import load_model
from lmtune.models.offload import LayerStream
before = psutil.Process().memory_info().rss
Path("/proc/self/clear_refs").write_text("5")
model = ModelConfig(name={str(folder)!r}, quantization={quantization!r}, dtype="float32", offload={offload!r})
base = load_model(model)
sums = []
for seed in range(2):
    x = base.get_input_embeddings()(torch.arange(seed, seed + 8)[None]).requires_grad_()
    base.model(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
    sums.append(float(x.grad.sum()))
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
print(json.dumps({{"taken": peak - before, "sums": sums}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_small_weights_leave_their_file(tmp_path: Path) -> None:
    """Where one is touched the system reads 64 KB around it, which are those of weights that are not in use."""
    base = load_model(ModelConfig(name=str(base_folder(tmp_path, **WIDE)), quantization="none", offload="layers"))
    store = stream_of(base).store
    assert isinstance(store, MappedFiles)
    assert not any(_is_file(norm.weight) for name, norm in base.named_modules() if name.endswith("norm"))
    assert store.has(base.model.layers[0].mlp.up_proj.weight)


def resident_bytes(file: Path) -> int:
    """Of a file that is mapped into this process."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            here = str(file) in line
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_what_a_base_was_quantized_from_leaves_memory(tmp_path: Path) -> None:
    folder = base_folder(tmp_path, **WIDE)
    whole = load_model(ModelConfig(name=str(folder), quantization="none", dtype="float32", offload="none"))
    assert mapped_bytes(whole) > 0.9 * (folder / "model.safetensors").stat().st_size
    other = base_folder(tmp_path / "other", **WIDE)
    base = load_model(ModelConfig(name=str(other), quantization="int8", dtype="float32", offload="none"))
    assert mapped_bytes(base) < 0.5 * mapped_bytes(whole)  # embeddings, head and norms
    assert resident_bytes(other / "model.safetensors") < 0.5 * mapped_bytes(whole)


def test_a_base_that_does_not_fit_is_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig(name=str(base_folder(tmp_path)), quantization="none")
    assert not is_streamed(load_model(model))
    monkeypatch.setattr("lmtune.models.base.free_memory", lambda device: 2**20)
    assert is_streamed(load_model(model))
    said = capsys.readouterr().err
    assert "offload: 2 layers of the base are in memory at once: the base takes 5.59 MiB" in said
    assert "1 MiB are free" in said
    assert not is_streamed(load_model(replace(model, offload="none")))


def test_what_cannot_be_streamed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, reason in (
        ({"tuning__kind": "full"}, "tuning.kind: full trains the model's own"),
        ({"tuning__kind": "partial", "tuning__parts": ("head",)}, "tuning.kind: partial trains the model's own"),
        ({"tuning__init_lora_weights": "pissa"}, "pissa rewrites the base weights"),
    ):
        with pytest.raises(ConfigError, match=reason):
            config_of(**STREAMED, **changes)
    model = ModelConfig(name=str(base_folder(tmp_path)), quantization="none", offload="layers")
    with monkeypatch.context() as patch:
        patch.setattr("lmtune.models.offload.decoder_layers", lambda empty: None)
        with pytest.raises(ModelError, match="has no single list of decoder layers to stream"):
            load_model(model)
    # as on a GPU, whose check is by its device
    streamed = load_model(model)
    monkeypatch.setattr(type(streamed), "device", torch.device("cuda"))
    for wrong in ({"use_dora": True}, {"modules_to_save": ("q_proj",)}):
        with pytest.raises(ConfigError, match="reads weights of layers before they are in the GPU's memory"):
            attach_adapter(streamed, LoraConfig(**wrong), 0, "base")


def test_the_whole_model_learns_without_streams_even_where_it_does_not_fit(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("lmtune.models.base.free_memory", lambda device: 2**20)
    train(place, "full", tuning__kind="full", train__max_steps=1)


def test_a_checkpoint_of_the_whole_model_answers_where_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    place = make_workplace(tmp_path)
    save_tiny(place / "base", chat_template=CHATML, **WIDE)
    run, _ = finetune(place, tuning__kind="full", train__max_steps=4, train__learning_rate=1e-3)
    shutil.rmtree(run.merged)
    (run.path / "summary.json").unlink()
    with inside(place):
        wanted = load_for_inference("runs/trial").model.state_dict()
        monkeypatch.setattr("lmtune.models.base.free_memory", lambda device: 2**20)
        loaded = load_for_inference("runs/trial").model
        with torch.no_grad():
            loaded(torch.arange(8)[None])  # in which layers would come and go
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def test_plan_streams_a_base_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(model__name=str(base_folder(tmp_path)))
    rows = SequenceTable.one_each(np.array([20] * 8, dtype=np.int32), np.array([5] * 8, dtype=np.int32))
    whole = forecast(config, rows, torch.device("cpu"), 1)
    monkeypatch.setattr("lmtune.training.estimate.free_memory", lambda device: 2**20)
    streamed = forecast(config, rows, torch.device("cpu"), 1)
    assert whole.offload == ""
    assert streamed.offload.startswith("2 of 5 layers in memory at once: the base takes")
    layer = (whole.memory.base_weights - streamed.memory.base_weights) / 3
    assert layer * 2**30 == pytest.approx(
        4 * sum(p.numel() for p in empty_model(config.model.name).model.layers[0].parameters()), rel=0.01
    )
