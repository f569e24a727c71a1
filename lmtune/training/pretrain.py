"""Pretraining a small language model from scratch: its shape, its loop, and what is saved.

The loop is the one of every run, with every token a target, full tuning, and a fresh model. The recipe (AdamW with
betas 0.9 and 0.95, cosine with warm-up) follows nanoGPT's; the model is a Llama or Qwen3 of transformers, so whatever
loads those loads it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmtune.batching.plan import Planner
from lmtune.config.load import dump_config
from lmtune.config.pretrain import PretrainConfig, ShapeConfig
from lmtune.config.schema import TrainConfig
from lmtune.evaluation.scoring import teacher_forced
from lmtune.forward.packed import PackedForward
from lmtune.io.atomic import name_disk_errors, new_folder
from lmtune.models.base import DTYPES, compute_dtype
from lmtune.models.libraries import quiet_libraries
from lmtune.models.model_folder import make_readable
from lmtune.models.tuning.full import Full
from lmtune.objectives.sft import Sft
from lmtune.parallel.signals import Interrupted
from lmtune.parallel.single import Single
from lmtune.training.corpus import TURN_END, Blocks
from lmtune.training.hooks import ProgressHook
from lmtune.training.loop import TrainingJob, train
from lmtune.training.memory import MOST_TOKENS
from lmtune.training.optim import adamw
from lmtune.training.progress import StepProgress
from lmtune.training.state import TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Pretrained:
    """How a pretraining run ended."""

    state: TrainState
    total_steps: int  # more than were made if the run was asked to stop
    perplexity: float  # e to the mean loss of a held-out token, in nats
    exit_code: int  # 0, or what the signal that stopped the run stands for


def build_model(shape: ShapeConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
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


def pretrain(model: PreTrainedModel, blocks: Blocks, validation: Blocks, config: PretrainConfig) -> Pretrained:
    """Train `model` in place on `blocks`, then measure it on `validation`.

    Ctrl-C and SIGTERM end training after the step that is under way; the model is measured all the same.
    """
    parallel, tuning, objective = Single(), Full(), Sft()
    settings = config.train
    rates = TrainConfig(
        epochs=settings.epochs, max_steps=settings.max_steps, batch_size=settings.batch_size,
        learning_rate=settings.learning_rate, warmup_ratio=settings.warmup_ratio, weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm, seed=settings.seed,
    )  # fmt: skip
    tuned = tuning.apply(model.to(parallel.device), settings.seed, config.output.name)
    dtype = compute_dtype(parallel.device, sizes=(model.config.hidden_size, model.config.intermediate_size))
    forward = PackedForward(tuned.module, dtype)
    budget = MOST_TOKENS[parallel.device.type]
    planner = Planner(blocks.sequences, rates, 1, budget)
    optimizer = adamw(tuning.parameter_groups(tuned, settings.weight_decay), betas=(0.9, 0.95))
    job = TrainingJob(planner, blocks, forward, objective, tuned, optimizer, parallel, rates)
    state, exit_code = TrainState(), 0
    with StepProgress(planner.total_steps, 1) as progress:
        try:
            train(job, [ProgressHook(progress)], state)
        except Interrupted as stopped:
            exit_code = stopped.exit_code
    scores = teacher_forced(forward, validation, budget, who="the model")
    return Pretrained(state, planner.total_steps, scores.perplexity or math.nan, exit_code)


def save_pretrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, card: str, config: PretrainConfig
) -> None:  # fmt: skip
    """Write model, tokenizer, template, generation config and model card to `output.dir`, complete or not at all."""
    folder = Path(os.path.expanduser(config.output.dir))
    with new_folder(folder) as staging, name_disk_errors(folder):
        model.to("cpu", DTYPES[config.output.dtype]).save_pretrained(staging)
        tokenizer.model_max_length = config.model.max_position_embeddings
        tokenizer.save_pretrained(staging)
        make_readable(staging)
        (staging / "README.md").write_text(card, encoding="utf-8")


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A small {architecture} language model of {parameters:,} parameters, trained from scratch with lmtune.
It knows what its training text holds and nothing else.

| | |
|---|---|
| parameters | {parameters:,}, stored as {dtype} |
| layers, width, feed-forward, heads | {layers}, {width}, {feed_forward}, {heads} ({kv_heads} for keys and values) |
| vocabulary | {vocabulary:,} tokens, byte-level BPE trained on the same text |
| data | {data} |
| trained on | {tokens:,} tokens in {steps:,} steps, {seconds:,.0f} seconds{stopped} |
| perplexity on held-out text | {perplexity:.2f} |

Answers end with `<|end|>`, plain texts with `<|end_of_text|>`; generation stops at both.

## Rebuild

```
lmtune pretrain {config_name}
```

with this config:

```yaml
{config}```
"""


def model_card(
    config: PretrainConfig, result: Pretrained, num_parameters: int, num_vocabulary: int, config_file: Path
) -> str:
    """The card as Markdown: what the model is, from which data, made how; holds no absolute path."""
    shape, state = config.model, result.state
    return _CARD.format(
        name=config.output.name,
        architecture={"llama": "Llama", "qwen3": "Qwen3"}[shape.architecture],
        parameters=num_parameters,
        dtype=config.output.dtype,
        layers=shape.num_hidden_layers,
        width=shape.hidden_size,
        feed_forward=shape.intermediate_size,
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads or shape.num_attention_heads,
        vocabulary=num_vocabulary,
        data=f"text files in `{os.path.basename(os.path.normpath(config.data.path))}`",
        tokens=state.elapsed_tokens,
        steps=state.step,
        seconds=state.seconds,
        stopped="" if state.step == result.total_steps else f", stopped early (of {result.total_steps:,} steps)",
        perplexity=result.perplexity,
        config_name=config_file.name if config_file.is_absolute() else config_file.as_posix(),
        config=dump_config(replace(config, output=replace(config.output, dir=config.output.name))),  # no path of ours
    )
