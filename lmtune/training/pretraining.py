"""Pretraining a small language model from scratch: shape, loop, perplexity, and what is saved.

Plain on purpose: AdamW, cosine with warm-up, cross-entropy on every token of fixed blocks. fp32 on a CPU, bf16 autocast
on a GPU. The recipe follows nanoGPT's; the model is a Llama or Qwen3 of transformers, so whatever loads those loads it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lmtune.config.schema import TrainConfig
from lmtune.errors import LmtuneError
from lmtune.io.atomic import name_disk_errors, new_folder
from lmtune.models.base import DTYPES, compute_dtype
from lmtune.models.device import default_device
from lmtune.models.libraries import quiet_libraries
from lmtune.models.model_folder import make_readable
from lmtune.parallel.signals import StopSignals
from lmtune.runs.store import expand_home
from lmtune.training.corpus import TURN_END, Blocks, TokenStream, num_blocks, take_blocks
from lmtune.training.optim import learning_rate
from lmtune.training.pretrain_config import PretrainConfig, ShapeConfig
from lmtune.training.progress import StepProgress


@dataclass(frozen=True)
class Pretrained:
    """How a pretraining run ended.

    Attributes:
        steps: optimizer steps made; fewer than `total_steps` if the run was asked to stop.
        tokens: tokens read, all steps together.
        seconds: of training.
        perplexity: e to the mean loss of a held-out token, in nats.
        exit_code: 0, or what the signal that stopped the run stands for.
    """

    steps: int
    total_steps: int
    tokens: int
    seconds: float
    perplexity: float
    exit_code: int


def build_model(shape: ShapeConfig, tokenizer: Any, seed: int) -> Any:
    """A new model of this shape in fp32; its vocabulary is the tokenizer's, rounded up to a multiple of 64."""
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen3Config

    quiet_libraries()
    common: dict[str, Any] = {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads or shape.num_attention_heads,
        "head_dim": shape.hidden_size // shape.num_attention_heads,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[shape.architecture](**common)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Generation ends with a turn as well as with a text.
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def pretrain(model: Any, stream: TokenStream, validation: TokenStream, config: PretrainConfig) -> Pretrained:
    """Train `model` in place on `stream`, then measure it on `validation`.

    Ctrl-C and SIGTERM end training after the step that is under way; the model is measured all the same.

    Raises:
        LmtuneError: the loss is not finite.
    """
    train, device = config.train, default_device()
    model.to(device).train()
    available = num_blocks(stream, train.block_length)
    total = train.max_steps or max(1, math.ceil(train.epochs * available / train.batch_size))
    optimizer = torch.optim.AdamW(_groups(model, train.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True)
    rates = TrainConfig(learning_rate=train.learning_rate, warmup_ratio=train.warmup_ratio, schedule="cosine")
    tokens, step, began = 0, 0, time.perf_counter()
    with StopSignals() as signals, StepProgress(total, 1) as progress:
        while step < total and signals.received is None:
            started = time.perf_counter()
            step += 1
            indices = block_numbers(step, available, train.batch_size, train.seed)
            blocks = take_blocks(stream, train.block_length, indices)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, rates)
            loss = _step(model, optimizer, blocks, train.max_grad_norm)
            if not math.isfinite(loss):
                raise LmtuneError(f"step {step}: the loss is {loss}; lower train.learning_rate")
            tokens += blocks.input_ids.numel()
            progress.advance(step, loss, blocks.input_ids.numel(), time.perf_counter() - started)
    seconds = time.perf_counter() - began
    value = perplexity(model, validation, train.block_length, train.batch_size)
    return Pretrained(step, total, tokens, seconds, value, 0 if signals.received is None else signals.exit_code)


def block_numbers(step: int, available: int, batch_size: int, seed: int) -> list[int]:
    """Which blocks `step` (from 1) reads: all in a new order each epoch, a pure function of seed and step."""
    numbers = []
    for place in range((step - 1) * batch_size, step * batch_size):
        epoch, offset = divmod(place, available)
        numbers.append(int(_order(seed, epoch, available)[offset]))
    return numbers


@torch.no_grad()
def perplexity(model: Any, stream: TokenStream, block_length: int, batch_size: int) -> float:
    """e to the mean loss of a token of `stream`, read in blocks as in training."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    available = num_blocks(stream, block_length)
    for start in range(0, available, batch_size):
        blocks = take_blocks(stream, block_length, range(start, min(start + batch_size, available)))
        losses, targets = _losses(model, blocks)
        total += float(losses.double().sum())
        count += int((targets != -100).sum())
    model.train(training)
    return math.exp(min(total / max(1, count), 700.0))


def save_pretrained(model: Any, tokenizer: Any, card: str, config: PretrainConfig) -> Path:
    """Write model, tokenizer, template, generation config and model card; the folder appears when it is complete.

    Returns:
        The folder `output.dir`, replaced if it was there.
    """
    folder = expand_home(config.output.dir, "output.dir")
    with new_folder(folder) as staging, name_disk_errors(folder):
        model.to("cpu", DTYPES[config.output.dtype]).save_pretrained(staging)
        tokenizer.model_max_length = config.model.max_position_embeddings
        tokenizer.save_pretrained(staging)
        make_readable(staging)
        (staging / "README.md").write_text(card, encoding="utf-8")
    return folder


_order_cache: dict[tuple[int, int, int], Any] = {}


def _order(seed: int, epoch: int, available: int) -> Any:
    key = (seed, epoch, available)
    if key not in _order_cache:
        _order_cache.clear()
        _order_cache[key] = np.random.default_rng([seed, epoch]).permutation(available)
    return _order_cache[key]


def _step(model: Any, optimizer: torch.optim.Optimizer, blocks: Blocks, max_grad_norm: float) -> float:
    """One optimizer step; the mean loss of its tokens before it."""
    losses, targets = _losses(model, blocks)
    loss = losses.sum() / (targets != -100).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _losses(model: Any, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's loss and target, `[B·T]`; no loss where there is no target."""
    device = model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype(device) == torch.bfloat16):
        # Position ids that restart, without a mask, keep documents apart.
        logits = model(
            input_ids=blocks.input_ids.to(device), position_ids=blocks.position_ids.to(device), use_cache=False
        ).logits
    targets = blocks.targets.to(device).flatten()
    return F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none", ignore_index=-100), targets


def _groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay towards zero; norms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
