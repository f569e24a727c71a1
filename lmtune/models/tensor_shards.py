"""Tensors that several processes hold together, on disk: `torch.distributed.checkpoint`, in safetensors files.

    write_shards(folder, {"w": dtensor})     # every process, each its own part
    tensors = TensorShards(folder)           # any process, also one of another number
    copy_into({"w": parameter}, tensors)     # reads no more than this process's part of `parameter`

No pickle, which DCP's own files are: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from lmtune.models.tuning.base import Tensors
from lmtune.runs.store import ADAPTER, WEIGHTS

_FILE_BYTES = 2**30  # of whole tensors; DCP holds the own part of a file in memory twice while it writes it


class TensorShards(Mapping[str, torch.Tensor]):
    """The tensors of a folder that `write_shards` has filled; each is read, whole, when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(str(folder))

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole tensors."""
        return {name: entry.size for name, entry in self._entries.items()}

    def read_into(self, targets: Tensors) -> None:
        """Fill tensors in place, of a DTensor the part that this process holds."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each reads for itself
            with torch.no_grad():
                own = {name: tensor.detach() for name, tensor in targets.items()}
                load(own, storage_reader=self._reader, no_dist=True)

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        self.read_into({name: tensor})
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @cached_property
    def _entries(self) -> dict[str, TensorStorageMetadata]:
        found = self._reader.read_metadata().state_dict_metadata
        return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


class _Reader(HuggingFaceStorageReader):
    """Reads the headers of all files once, not for each tensor."""

    def read_metadata(self) -> Metadata:
        return self._metadata

    @cached_property
    def _metadata(self) -> Metadata:
        return super().read_metadata()


def are_shared_out(tensors: Tensors) -> bool:
    """Whether processes hold some of these together."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def held_share(tensors: Tensors) -> float:
    """Which share of the elements this process holds."""
    whole = sum(tensor.numel() for tensor in tensors.values())
    held = sum((one.to_local() if isinstance(one, DTensor) else one).numel() for one in tensors.values())
    return held / whole


def write_shards(folder: Path, tensors: Tensors) -> None:
    """Write this process's part of `tensors` into an existing folder; a collective of all processes.

    A tensor that each process holds whole is written by one of them.

    Raises:
        OSError: a process, perhaps another one, could not write.
    """
    places, size = dict[str, int](), 0
    for name, tensor in tensors.items():
        places[name] = 1 + size // _FILE_BYTES
        size += tensor.numel() * tensor.itemsize
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=places, save_distributed=True)
    try:
        save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
    except CheckpointException as error:  # which is no Exception
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {cause}") from None


def shards_of(folder: Path, rank: int) -> list[Path]:
    """The files in `folder` that the process of this rank has written."""
    return sorted(folder.glob(f"shard-{rank + 1:05}-*"))


def checkpoint_weights(checkpoint: Path) -> Tensors:
    """What is trained, as a whole checkpoint folder has it."""
    whole = checkpoint / ADAPTER
    return load_file(whole) if whole.exists() else TensorShards(checkpoint / WEIGHTS)


def shapes_of(tensors: Tensors) -> dict[str, torch.Size]:
    """The shape of each tensor, which is not read for that."""
    return tensors.shapes if isinstance(tensors, TensorShards) else {name: one.shape for name, one in tensors.items()}


def copy_into(targets: Tensors, source: Tensors) -> None:
    """Fill `targets` in place with what `source` has of the same names; of a DTensor the part that is here."""
    if isinstance(source, TensorShards):
        source.read_into(targets)
        return
    with torch.no_grad():
        for name, target in targets.items():
            value = source[name]
            if isinstance(target, DTensor):  # every process has the whole, so none sends
                value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
            target.copy_(value)
