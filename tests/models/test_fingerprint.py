"""The base's fingerprint: the same for the same weights wherever they lie, another for any other weights."""

import shutil
from pathlib import Path

import pytest
import torch

from lmtune.config.schema import ModelConfig
from lmtune.models import base as module
from lmtune.models.base import base_fingerprint
from tests.tiny import save_tiny, tiny_model


def of(folder: Path, quantization: str = "none") -> str:
    """The fingerprint of a folder."""
    return base_fingerprint(ModelConfig(name=str(folder), quantization=quantization))  # type: ignore[arg-type]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder."""
    return save_tiny(tmp_path / "base")


def test_it_is_32_hex_digits_and_the_same_in_another_folder_and_quantization(base: Path, tmp_path: Path) -> None:
    found = of(base)
    assert len(found) == 32
    assert set(found) <= set("0123456789abcdef")
    shutil.copytree(base, tmp_path / "elsewhere")
    assert of(tmp_path / "elsewhere") == of(base, "nf4") == of(base, "int8") == found


def test_other_layers_names_or_dtypes_change_it(tmp_path: Path, base: Path) -> None:
    others = [
        save_tiny(tmp_path / "deep", num_hidden_layers=3),
        save_tiny(tmp_path / "half", dtype=torch.float16),
        save_tiny(tmp_path / "kind", kind="qwen3"),
    ]
    assert len({of(folder) for folder in [base, *others]}) == 4


def test_of_large_files_samples_and_the_size_are_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First and last bytes are among the samples."""
    monkeypatch.setattr(module, "_SAMPLES", 8)
    monkeypatch.setattr(module, "_SAMPLE_BYTES", 64)
    path, found = base / "model.safetensors", [of(base)]
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in (header, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        found.append(of(base))
    path.write_bytes(content)
    assert len(set(found)) == 3
    assert of(base) == found[0]


def test_every_shard_counts(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "one", max_shard_size="100KB")
    other = tiny_model()
    other.model.norm.weight.data[0] += 1
    other.save_pretrained(tmp_path / "two", max_shard_size="100KB")
    assert len(list((tmp_path / "one").glob("model-*.safetensors"))) > 1
    assert of(tmp_path / "one") != of(tmp_path / "two")
