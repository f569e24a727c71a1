"""Layer streaming: a frozen base that is larger than its device, whose decoder layers come in ahead of use.

    stream = stream_for(model, empty, device)
    with stream.loading():      # each weight goes to its place as it is loaded
        base = from_pretrained(…)
    stream.attach(base)         # layers come and go with each pass, forward and backward

At most `model.resident_layers` layers are in memory at once: the first ones of these stay, the others pass through two
places, one for the layer at work and one for the layer that comes next. Nothing is ever written back, for the weights
are frozen.

- On a CPU weights are in files that are mapped into memory. A weight whose stored dtype is that of computation is
  mapped where it is stored; any other is converted or quantized once and written to a file in the cache folder, which
  has no name and ends with the process. The system is told which layer to read ahead, and which to forget.
- On a GPU they are in pinned host memory. A layer's storages are emptied and filled again in place, as FSDP does it, so
  that parameters, views and what autograd has saved stay valid.

A base that is sharded over processes is loaded in the same way (`hold`); then each layer is there once (`layer`), while
a process takes its part of it.

A pass is the same as over a base that is held whole, bit for bit: the same kernels read the same bytes. Activation
checkpointing is not needed for it, and goes well with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from lmtune.config.schema import FullConfig, LoraConfig, ModelConfig, PartialConfig
from lmtune.errors import LmtuneError, ModelError
from lmtune.io.atomic import cache_folder
from lmtune.io.text import size_text
from lmtune.models.device import return_freed_memory, return_large_blocks
from lmtune.models.structure import decoder_layers, head_of, linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GIB = 2**30
QUANTIZED_BYTES = {"nf4": 0.516, "int8": 1.002}  # of an element of a linear layer, scales included
_SMALLEST = 2**16  # bytes of a weight below which it stays in memory
_OF_THE_HUB = "/blobs/"  # in the real paths of its local cache
_AT_ONCE = 2**23  # bytes that are written before the memory of what they were made from is freed
_MADV_WILLNEED, _MADV_DONTNEED = 3, 4  # of Linux and macOS alike
_ROOM = 0.9  # of the free memory, that a base may take which is held whole; the rest is for what computes with it
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers then reads one weight after the other, not all of them ahead


class Store(Protocol):
    """Where the weights of layers are while they are not in use."""

    def take(self, weight: torch.Tensor) -> None:
        """Put a weight that was just loaded there, and free its memory."""
        ...

    def finish(self) -> None:
        """All weights are loaded."""
        ...

    def has(self, weight: torch.Tensor) -> bool:
        """Whether it can bring this weight in."""
        ...

    def fetch(self, weights: Sequence[torch.Tensor]) -> None:
        """Begin to bring weights in; does not wait for them."""
        ...

    def wait(self) -> None:
        """What is computed from now on finds all that was fetched."""
        ...

    def release(self, weights: Sequence[torch.Tensor]) -> None:
        """Free the memory of weights as soon as what was computed up to now is done."""
        ...


class MappedFiles:
    """Weights in files that are mapped into memory, on a CPU."""

    def __init__(self) -> None:
        self._file: Any = None
        self._page = mmap.PAGESIZE
        self._mapped: dict[int, torch.Tensor] = {}  # by address; held, so that no other memory gets it
        self._before = mapped_files()
        self._written_bytes = 0
        return_large_blocks()  # what dense matrices of quantized layers took, one after the other

    def finish(self) -> None:
        """See `Store`: what was read to be converted or quantized is forgotten, and what was freed is returned."""
        forget_mapped(self._before)
        self._written_bytes = 0
        return_freed_memory()

    def take(self, weight: torch.Tensor) -> None:
        """See `Store`."""
        if self.has(weight):
            return
        if weight.nbytes < _SMALLEST:
            if weight.dim() < 2:  # a vector: where the system reads it, it reads 64 KB of the file around it
                weight.data = weight.data.clone()
            return
        if _is_file(weight):
            self._mapped[weight.data_ptr()] = weight.data
        else:
            weight.data = self._written(weight.data)
            if getattr(weight, "CB", None) is not None:  # bitsandbytes' second name for the codes in 8 bit
                weight.CB = weight.data  # type: ignore[attr-defined]
            self._written_bytes += weight.nbytes
            if self._written_bytes > _AT_ONCE:
                self.finish()
        self.release([weight])

    def has(self, weight: torch.Tensor) -> bool:
        """See `Store`."""
        return weight.data_ptr() in self._mapped

    def fetch(self, weights: Sequence[torch.Tensor]) -> None:
        """See `Store`."""
        for weight in weights:
            start = weight.data_ptr() // self._page * self._page
            _advise(start, weight.data_ptr() + weight.nbytes - start, _MADV_WILLNEED)

    def wait(self) -> None:
        """See `Store`; a page that is not there yet is read where it is touched."""

    def release(self, weights: Sequence[torch.Tensor]) -> None:
        """See `Store`."""
        for weight in weights:  # whole pages of its own: others may have been written to
            start = -(-weight.data_ptr() // self._page) * self._page
            count = (weight.data_ptr() + weight.nbytes) // self._page * self._page - start
            if count > 0:
                _advise(start, count, _MADV_DONTNEED)

    def _written(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight in the file, at the beginning of a page, with its strides."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
        weight = weight if span == weight.numel() else weight.contiguous()
        flat = weight.as_strided((weight.numel(),), (1,))
        folder = cache_folder() / "offloaded"
        try:
            if self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as it is mapped
            place = -(-self._file.tell() // self._page) * self._page
            self._file.seek(place)
            self._file.write(flat.view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise LmtuneError(
                f"model.offload: the base cannot be written to {folder} ({error.strerror or error}); free space "
                "there, or name another folder in LMTUNE_CACHE"
            ) from error
        mapped = mmap.mmap(self._file.fileno(), weight.nbytes, mmap.MAP_PRIVATE, offset=place)
        found = torch.frombuffer(mapped, dtype=weight.dtype).as_strided(weight.shape, weight.stride())
        self._mapped[found.data_ptr()] = found
        return found


class PinnedMemory:
    """Weights in pinned host memory, for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._is_gpu = device, device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self._is_gpu else None  # type: ignore[no-untyped-call]
        self._held: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}  # by the storage's address in C++

    def take(self, weight: torch.Tensor) -> None:
        """See `Store`."""
        storage = weight.untyped_storage()
        if weight.nbytes < _SMALLEST or weight.device != self.device or storage._cdata in self._held:
            return
        host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._is_gpu)
        host.copy_(_bytes_of(storage, self.device))
        self._held[storage._cdata] = storage, host
        storage.resize_(0)

    def finish(self) -> None:
        """See `Store`: the GPU's memory that weights passed through is free for others."""
        if self._is_gpu:
            torch.cuda.empty_cache()

    def has(self, weight: torch.Tensor) -> bool:
        """See `Store`."""
        return weight.untyped_storage()._cdata in self._held

    def fetch(self, weights: Sequence[torch.Tensor]) -> None:
        """See `Store`: the copies run beside what is computed now, into memory that was free before."""
        for storage, host in self._of(weights):
            storage.resize_(host.nbytes)  # belongs to the stream that computes, so that it is free in its order
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            for storage, host in self._of(weights):
                _bytes_of(storage, self.device).copy_(host, non_blocking=True)

    def wait(self) -> None:
        """See `Store`."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def release(self, weights: Sequence[torch.Tensor]) -> None:
        """See `Store`."""
        self.wait()  # a copy that nobody has waited for
        for storage, _ in self._of(weights):
            storage.resize_(0)

    def _of(self, weights: Sequence[torch.Tensor]) -> list[tuple[torch.UntypedStorage, torch.Tensor]]:
        return [self._held[weight.untyped_storage()._cdata] for weight in weights]


class LayerStream:
    """Which decoder layers of one model are in memory.

    Attributes:
        store: where the others are.
        resident_layers: the most that are.
        most_resident: that were so far.
    """

    def __init__(self, store: Store, resident_layers: int) -> None:
        self.store, self.resident_layers, self.most_resident = store, resident_layers, 0
        self._weights: list[list[torch.Tensor]] = []
        self._here: set[int] = set()
        self._kept: set[int] = set()
        self._now = -1

    def __deepcopy__(self, memo: dict[int, object]) -> LayerStream:
        """Itself: a copy of the model over the same weights shares them."""
        return self

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Inside the block each weight that a module gets goes to the store at once."""

        def take(module: torch.nn.Module, name: str, weight: torch.nn.Parameter | None) -> None:
            for part in () if weight is None or weight.device.type == "meta" else _parts(weight):
                self.store.take(part)

        hook, before = register_module_parameter_registration_hook(take), os.environ.get(_NO_THREADS)
        os.environ[_NO_THREADS] = "1"
        try:
            yield
        finally:
            hook.remove()
            self.store.finish()
            if before is None:
                del os.environ[_NO_THREADS]
            else:
                os.environ[_NO_THREADS] = before

    @contextlib.contextmanager
    def holding(self, weight: torch.Tensor) -> Iterator[None]:
        """The weight is in memory inside the block, with its scales."""
        stored = [part for part in _parts(weight) if self.store.has(part)]
        self.store.fetch(stored)
        self.store.wait()
        yield
        self.store.release(stored)

    def hold(self, base: PreTrainedModel) -> torch.nn.ModuleList:
        """Know the layers of `base`, which was loaded in `loading`, and return them; what is outside of them stays."""
        layers = decoder_layers(base)
        assert layers is not None
        self._weights = [[weight for weight in _weights_of(layer) if self.store.has(weight)] for layer in layers]
        inside = {id(weight) for weights in self._weights for weight in weights}
        outside = [weight for weight in _weights_of(base) if self.store.has(weight) and id(weight) not in inside]
        self.store.fetch(outside)
        self.store.wait()
        base.lmtune_stream = self
        return layers

    def attach(self, base: PreTrainedModel) -> None:
        """Let the layers of `base`, which was loaded in `loading`, come and go with its passes; the rest stays."""
        layers = self.hold(base)
        self._kept = set(range(self.resident_layers - 2))
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            layer.register_forward_hook(lambda module, args, output, index=index: self._watch(index, output))

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """A layer is in memory inside the block, which may put other weights in the place of its own."""
        stored = [weight.data for weight in self._weights[index] if self.store.has(weight)]
        self.store.fetch(stored)
        self.store.wait()
        yield
        self.store.release(stored)

    def use(self, index: int, step: int) -> None:
        """Have a layer in memory, and the one that follows in this direction on its way.

        Args:
            index: of the layer.
            step: 1 in a forward pass, -1 in a backward pass.
        """
        last = len(self._weights) - 1
        following = index + step if 0 <= index + step <= last else index - step  # a pass often turns round
        near = {index, following} if self.resident_layers > 1 else {index}
        for other in self._here - self._kept - near:
            self.store.release(self._weights[other])
            self._here.remove(other)
        self._fetch(index)
        self.store.wait()  # before the next is fetched, which nobody has to wait for yet
        if following == index + step and following in near:
            self._fetch(following)
        self._now, self.most_resident = index, max(self.most_resident, len(self._here))

    def _fetch(self, index: int) -> None:
        if index not in self._here:
            self.store.fetch(self._weights[index])
            self._here.add(index)

    def _enter(self, index: int) -> None:
        if index != self._now:  # else it is computed again, in a backward pass that has fetched it
            self.use(index, 1)

    def _watch(self, index: int, output: Any) -> None:
        """See to it that a layer is there when the gradient of its output is."""
        if not torch.is_grad_enabled():
            return
        for part in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(part, torch.Tensor) and part.requires_grad:
                part.register_hook(lambda _: self.use(index, -1))  # type: ignore[no-untyped-call]


def can_stream(tuning: LoraConfig | FullConfig | PartialConfig) -> bool:
    """Whether the weights of layers stay as they are stored while this is trained."""
    return isinstance(tuning, LoraConfig) and tuning.init_lora_weights != "pissa"


def reason_to_stream(model: ModelConfig, base_bytes: float, free_bytes: float) -> str | None:
    """Why the layers of a base of this size come and go, or None where it is held whole."""
    if model.offload == "layers":
        return "model.offload"
    if model.offload == "auto" and base_bytes > _ROOM * free_bytes:
        return f"the base takes {size_text(base_bytes / _GIB)}, and {size_text(free_bytes / _GIB)} are free"
    return None


def base_bytes(empty: PreTrainedModel, quantization: str, dtype: torch.dtype) -> float:
    """Bytes of the weights of a model on the meta device, held in a quantization, and in `dtype` where it has none."""
    head, modules = head_of(empty), dict(empty.named_modules())
    linear = sum(a * b for name, (a, b) in linear_layers(empty).items() if modules[name] is not head)
    others = sum(parameter.numel() for parameter in empty.parameters()) - linear
    return float(linear * QUANTIZED_BYTES.get(quantization, dtype.itemsize) + others * dtype.itemsize)


def stream_for(model: ModelConfig, empty: PreTrainedModel, device: torch.device) -> LayerStream:
    """A stream for a model that is about to be loaded to `device`.

    Args:
        model: its settings.
        empty: the model on the meta device.

    Raises:
        ModelError: the model has no single list of layers.
    """
    if decoder_layers(empty) is None:
        raise ModelError(
            f"model.offload: {model.offload}: {model.name} has no single list of decoder layers to stream; set "
            "model.offload: none, or use another model"
        )
    return LayerStream(PinnedMemory(device) if device.type == "cuda" else MappedFiles(), model.resident_layers)


def _weights_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The parameters of a module, and the scales of those in 4 bit."""
    for parameter in module.parameters():
        yield from _parts(parameter)


def _parts(weight: torch.Tensor) -> list[torch.Tensor]:
    """A weight, and its scales where it is in 4 bit."""
    scales = getattr(getattr(weight, "quant_state", None), "absmax", None)
    return [weight] if scales is None else [weight, scales]


def _bytes_of(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    """All bytes of a storage `[N]`, with a version counter of their own: autograd takes no note of what is written."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (storage.nbytes(),))  # type: ignore[call-overload, no-any-return]


def _is_file(weight: torch.Tensor) -> bool:
    """Whether a file is mapped where a weight is."""
    place = weight.data_ptr()
    return any(place in part and place + weight.nbytes <= part.stop for part in mapped_files())


def mapped_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters that are pages of files, which Linux counts as available."""
    files = mapped_files()
    places = {one.data_ptr(): one.nbytes for one in model.parameters() if one.device.type == "cpu"}
    return sum(size for place, size in places.items() if any(place in part for part in files))


def forget_mapped(before: Sequence[range]) -> None:
    """Let the system forget the pages that were read of files mapped since `before`; it reads them again where needed.

    For a base that is loaded at this moment, where nobody has written to them.
    """
    known = {part.start for part in before}
    for part in mapped_files():
        if part.start not in known:
            _advise(part.start, len(part), _MADV_DONTNEED)


def _advise(start: int, count: int, advice: int) -> None:
    _madvise()(start, count, advice)


@functools.cache
def _madvise() -> Any:
    found = ctypes.CDLL(None, use_errno=True).madvise
    found.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return found


def mapped_files() -> list[range]:
    """The addresses at which files of weights are mapped; none on a system that does not tell."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.endswith(".safetensors") or _OF_THE_HUB in line:
                start, end = line.split(maxsplit=1)[0].split("-")
                found.append(range(int(start, 16), int(end, 16)))
    return found
