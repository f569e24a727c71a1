"""Several processes, each with a part of the layers' weights: FSDP2, https://docs.pytorch.org/docs/stable/fsdp.

A layer's weights are gathered when it runs, forward and backward, and let go of after it. An adapter is small and stays
whole on every rank, with its gradients summed as in `Replicated`: so a step makes the same update, and adapters,
checkpoints and merges are those of one process. Where the layers' own weights learn, their gradients are summed and
shared out as each layer's backward pass ends, and the optimizer's moments are where they are. Every rank must make
equally many passes, since each gathers for all: ranks with fewer micro-batches make empty ones, and rows are scored by
all ranks alike.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lmtune.errors import LmtuneError, ModelError
from lmtune.models.device import is_out_of_memory, return_large_blocks
from lmtune.models.offload import LayerStream
from lmtune.models.structure import decoder_layers
from lmtune.models.tuning.base import TunedModel
from lmtune.parallel.base import GradientBuffer, Parallel
from lmtune.parallel.replicated import Replicated
from lmtune.parallel.single import Single


class Sharded(Replicated):
    """This rank of several, which hold the model together."""

    equal_passes = True
    _in_passes = False  # in which backward passes gather weights too

    @property
    def load_device(self) -> torch.device:
        """Where a model is loaded before it is sharded; the device may not hold it whole."""
        return torch.device("cpu")

    @property
    def scoring(self) -> Parallel:
        """Each rank scores all rows."""
        return Single(self.device, is_main=self.is_main)

    def shard(self, model: TunedModel, dtype: torch.dtype) -> None:
        """Keep this rank's part of the weights of all layers, on its device; an adapter stays whole.

        Weights that learn are held in fp32, and gathered in `dtype`, that of products, where that has 16 bit.

        Raises:
            ModelError: the model has no single list of layers.
        """
        layers, body = decoder_layers(model.base), model.base.base_model
        if layers is None:
            raise ModelError("parallel.kind: fsdp; expected a model with one list of layers; use replicated")
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        # Vectors are small, and kernels read them outside of their layer's pass.
        # So does the loss with the head, and with what is tied to it.
        whole = {
            one for one in model.module.parameters() if one.dim() < 2 or (one.requires_grad and model.has_adapter)
        } | (set(model.module.parameters()) - set(layers.parameters()))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if dtype.itemsize == 2 and not model.has_adapter:  # else autocast's copies would stay for the backward pass
            policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        # The body returns a view, which nothing of ours changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        _keep_quantization(layers)
        body.register_forward_pre_hook(lambda *_: self._watchdog.enter())
        body.register_forward_hook(lambda *_: None if self._in_passes else self._watchdog.leave())
        return_large_blocks()
        stream: LayerStream | None = vars(model.base).pop("lmtune_stream", None)
        gather = _GatherInPlace()
        for index, layer in enumerate(layers):
            with contextlib.nullcontext() if stream is None else stream.layer(index):
                sharded = fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=whole)
            sharded.set_gradient_divide_factor(1.0)  # the loss's denominator is of all ranks
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other
            if self.device.type == "cpu":
                sharded.set_custom_all_gather(gather)  # type: ignore[arg-type]  # a protocol in all but name
                sharded.set_modules_to_backward_prefetch([sharded])  # no other one: it would fill the same memory
        fully_shard(body, mesh=mesh, ignored_params=whole)  # ties the layers' passes together
        with torch.no_grad():
            for tensor in (*whole, *model.module.buffers()):
                tensor.data = tensor.data.to(self.device)

    def gradient_norm(self, buffer: GradientBuffer) -> float:
        """The 2-norm of the whole gradient, of which ranks have parts."""
        if not buffer.parts:
            return super().gradient_norm(buffer)
        whole, own = (float(torch.nn.utils.get_total_norm(some)) for some in (buffer.whole, buffer.parts))
        return math.hypot(whole, *self.gather([own]))

    @contextlib.contextmanager
    def passes(self) -> Iterator[None]:
        """Inside every rank makes equally many passes, forward and backward alike.

        Raises:
            LmtuneError: there is no memory for one, or a peer is gone.
        """
        self._watchdog.enter()
        self._in_passes = True
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):  # the others wait for this pass, so it cannot be made again in smaller parts
                raise LmtuneError(
                    f"rank {self.rank}: out of memory in {self.phase}; lower train.micro_batch_tokens (same result), "
                    "or set train.gradient_checkpointing=true; the same command resumes"
                ) from error
            raise LmtuneError(f"rank {self.rank}: {self._watchdog.why_apart()}") from error
        finally:
            self._in_passes = False
        self._watchdog.leave()


class _GatherInPlace:
    """FSDP2's `AllGather` for CPUs: one layer after the other into the same memory, from which torch copies it.

    A CPU has copied a layer before it gathers the next one; torch would keep both, for a GPU that has not. Each rank
    sends its part into its place, in a third of the time of gloo's `all_gather`, which fills a copy first.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:  # fmt: skip
        """See torch's `Comm`."""
        count = math.prod(int(length) for length in size) * dtype.itemsize
        if count > len(self._bytes):
            self._bytes = torch.empty(0, dtype=torch.uint8)  # before the larger one is there
            self._bytes = torch.empty(count, dtype=torch.uint8, device=device)
        return self._bytes[:count].view(dtype).view(size)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """See torch's `AllGather`; `input_tensor` is this rank's part of `output_tensor`."""
        parts = output_tensor.view(torch.uint8).chunk(group.size())  # of any dtype
        works = [dist.broadcast(part, group=group, group_src=rank, async_op=True) for rank, part in enumerate(parts)]
        for work in works:
            work.wait()


def _keep_quantization(layers: torch.nn.ModuleList) -> None:
    """Let quantized layers themselves hold what belongs to their weights, which are plain tensors once sharded."""
    for module in layers.modules():
        weight: Any = dict(module.named_parameters(recurse=False)).get("weight")
        if (state := getattr(weight, "quant_state", None)) is not None:
            module.quant_state = state
        if (largest := getattr(weight, "SCB", None)) is not None:
            module.state.SCB = largest  # type: ignore[union-attr]
