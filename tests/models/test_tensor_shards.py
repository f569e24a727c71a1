"""Tensors that processes wrote together: read one by one, in whole or in part, wherever their files are cut."""

from pathlib import Path

import pytest
import torch

from lmtune.models import tensor_shards
from lmtune.models.tensor_shards import TensorShards, copy_into, shapes_of, write_shards

TENSORS = {f"layer.{n}": torch.randn(3 + n, 5, generator=torch.Generator().manual_seed(n)) for n in range(6)}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_written_is_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_shards, "_FILE_BYTES", 200)
    write_shards(tmp_path, TENSORS)
    assert len(list(tmp_path.glob("shard-00001-*.safetensors"))) > 2
    shards = TensorShards(tmp_path)
    assert shapes_of(shards) == shapes_of(TENSORS)
    assert all(torch.equal(shards[name], tensor) for name, tensor in TENSORS.items())
    copied = {name: torch.empty_like(TENSORS[name]) for name in ("layer.4", "layer.1")}
    for source in (shards, TENSORS):
        copy_into(copied, source)
        assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in copied.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_disk_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"rank 0: .*file"):
        write_shards(tmp_path / "file", TENSORS)
