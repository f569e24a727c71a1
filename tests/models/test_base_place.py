"""A run and its adapter find their base wherever they are called from, and say what they look for where it is not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lmtune.config.load import build_config, dump_config
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import ConfigError, ModelError
from lmtune.export.uploads import shared_texts
from lmtune.inference.load import build_renderer, load_for_inference, run_metadata
from lmtune.io.atomic import write_json
from lmtune.models.base import base_fingerprint, load_model, load_tokenizer
from lmtune.models.locate import adapter_base, local_paths, shareable_name
from lmtune.models.model_folder import write_adapter_texts
from lmtune.models.tuning.lora import save_adapter
from lmtune.runs.store import RunDirectory
from tests.tiny import adapted, save_tiny
from tests.tokenizers import CHATML

IDS = torch.arange(5, 29)[None]


def write_run(work: Path, base: str) -> RunDirectory:
    """A finished run in `work`, made by a command that was called there, over a base that it calls `base`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        config = build_config(
            FinetuneConfig,
            {
                "model": {"name": base, "quantization": "none"},
                "data": {"train": "rows.jsonl"},
                "run": {"name": "trial"},
            },
            "test",
        )
        run = RunDirectory("runs/trial")
        run.adapter.mkdir(parents=True)
        run.config.write_text(dump_config(config))
        write_json(run.local, local_paths(run, config.model.name))
        model = adapted(load_model(config.model, "cpu"))
        renderer = build_renderer(load_tokenizer(config.model), config.model)
        model.peft_config["default"].base_model_name_or_path = shareable_name(config.model.name)
        metadata = run_metadata(config, renderer, base_fingerprint(config.model), run.adapter)
        save_adapter(model, run.adapter, metadata)
        write_adapter_texts(config.model, renderer, run.adapter)
        write_json(run.summary, {"status": "complete"})
    return RunDirectory(work / "runs/trial")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`work` with a run over `models/base`, and an empty folder `elsewhere`."""
    for name in ("work", "models", "elsewhere"):
        (tmp_path / name).mkdir()
    save_tiny(tmp_path / "models" / "base", chat_template=CHATML)
    write_run(tmp_path / "work", "../models/base")
    return tmp_path


@pytest.mark.parametrize("where", ["work", "elsewhere"])
@pytest.mark.parametrize("target", ["runs/trial", "runs/trial/adapter"])
def test_a_run_over_a_folder_works_from_everywhere(
    place: Path, monkeypatch: pytest.MonkeyPatch, where: str, target: str
) -> None:
    monkeypatch.chdir(place / where)
    assert load_for_inference(os.path.relpath(place / "work" / target)).has_adapter


def test_runs_and_base_can_be_moved_together_and_a_base_alone_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place / "elsewhere")
    shutil.move(place / "work", place / "new-work")
    assert load_for_inference(str(place / "new-work" / "runs" / "trial")).has_adapter
    shutil.move(place / "models" / "base", place / "elsewhere" / "other")
    for target in ("new-work/runs/trial", "new-work/runs/trial/adapter"):
        with pytest.raises(ModelError) as caught:
            load_for_inference(str(place / target))
        assert "its adapter was trained over the base model in the folder " in str(caught.value)
        assert f"there is no folder {place / 'models' / 'base'}" in str(caught.value)
        assert "--base FOLDER_OR_ID" in str(caught.value)
        assert load_for_inference(str(place / target), base="other").has_adapter


def test_an_adapter_alone_says_where_it_looked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place / "work/runs/trial/adapter", place / "elsewhere" / "deep" / "mine")
    monkeypatch.chdir(place / "elsewhere")
    with pytest.raises(ModelError, match="deep/mine: its adapter was trained over the base model in the"):
        load_for_inference("deep/mine")
    loaded = load_for_inference("deep/mine", base=str(place / "models/base"))
    assert loaded.renderer.stop_token_ids == (4, 1)
    assert adapter_base(Path("deep/mine"), "int8", "../models/base").quantization == "int8"


def test_another_base_is_refused_and_a_model_without_adapter_has_none(place: Path) -> None:
    other = save_tiny(place / "other", chat_template=CHATML, num_hidden_layers=3)
    with pytest.raises(ModelError, match="trained over another base model"):
        load_for_inference(str(place / "work/runs/trial"), base=str(other))
    with pytest.raises(ConfigError, match=r"--base: .* has no adapter, so no base belongs to it"):
        load_for_inference(str(other), base=str(place / "models/base"))


def test_no_file_holds_an_absolute_path_and_a_shared_one_no_way(place: Path) -> None:
    adapter = place / "work/runs/trial/adapter"
    for path in (place / "work/runs").rglob("*"):
        assert not path.is_file() or str(place).encode() not in path.read_bytes(), path
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "../models/base"
    assert json.loads((adapter / "lmtune.json").read_text())["base_model"] == "../../../../models/base"
    texts = {name: json.loads(text) for name, text in shared_texts(adapter).items()}
    assert texts["adapter_config.json"]["base_model_name_or_path"] == "./base"
    assert texts["lmtune.json"]["base_model"] == "./base"
