"""The model card of a pretrained model: what it is, from which data, made how, and how good it was measured to be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lmtune.config.load import dump_config
from lmtune.training.pretrain_config import CorpusConfig, PretrainConfig
from lmtune.training.pretraining import Pretrained

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
| vocabulary | {vocabulary:,} tokens, byte-level BPE learned from the same text |
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

_WORLD = """\
## Data

A demonstration model, with no general ability: it has read {documents:,} documents in plain English from the generator
`lmtune.demo.world`, written for this purpose, and nothing about the real world. Two thirds are conversations with
invented shops whose facts (opening hours, delivery, returns, …) are drawn at random; the rest is everyday language
about things, colours, numbers, days, opposites, small sums, names and small talk. So the model speaks the language of
questions to a shop, and gives plausible, made-up answers.
"""


def model_card(
    config: PretrainConfig, result: Pretrained, num_parameters: int, num_vocabulary: int, config_file: Path
) -> str:
    """The card as Markdown; holds no absolute path."""
    shape = config.model
    card = _CARD.format(
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
        data=_data(config.data),
        tokens=result.tokens,
        steps=result.steps,
        seconds=result.seconds,
        stopped="" if result.steps == result.total_steps else f", stopped early (of {result.total_steps:,} steps)",
        perplexity=result.perplexity,
        config_name=config_file.name if config_file.is_absolute() else config_file.as_posix(),
        config=dump_config(replace(config, output=replace(config.output, dir=config.output.name))),  # no path of ours
    )
    if config.data.world_documents is not None:
        card += "\n" + _WORLD.format(documents=config.data.world_documents)
    return card


def _data(data: CorpusConfig) -> str:
    if data.world_documents is not None:
        return f"{data.world_documents:,} documents of the built-in small world"
    return f"text files in `{os.path.basename(os.path.normpath(str(data.path)))}`"
