"""Tiny random models to talk to, made in a second, offline: what they say is nonsense, but always the same."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lmtune.data.rendering import Renderer
from lmtune.inference.engine import TransformersEngine
from lmtune.inference.load import LoadedModel
from tests.tokenizers import CHATML, make_tokenizer

_SHAPE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2, "tie_word_embeddings": True,
}  # fmt: skip


def random_model(
    seed: int = 0, adapter: bool = True, positions: int = 512, window: int | None = None, dora: bool = False
) -> Any:
    """A Llama, or with `window` a Qwen3 with sliding attention; the adapter's weights are random too."""
    torch.manual_seed(seed)
    if window is None:
        model: Any = LlamaForCausalLM(LlamaConfig(**_SHAPE, max_position_embeddings=positions))
    else:
        config = Qwen3Config(
            **_SHAPE, max_position_embeddings=positions, use_sliding_window=True, sliding_window=window,
            max_window_layers=1,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
    if adapter:
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
        )
    return model.eval()


def chat_model(
    seed: int = 0, adapter: bool = True, template: str | None = CHATML, positions: int = 512,
    window: int | None = None, system: str | None = None, dora: bool = False,
) -> LoadedModel:  # fmt: skip
    """A random model with tokenizer and renderer."""
    tokenizer = make_tokenizer(template)
    renderer = Renderer(tokenizer, "auto", system)
    model = random_model(seed, adapter, positions, window, dora)
    return LoadedModel(
        name="random", renderer=renderer, engine=TransformersEngine(model), has_adapter=adapter, system=system,
        model=model, tokenizer=tokenizer,
    )  # fmt: skip


def never_stops(loaded: LoadedModel, seconds: float = 0.0) -> LoadedModel:
    """The same model, which never says a stop token and takes at least `seconds` for each token."""

    def silence_stops(module: Any, args: Any, output: Any) -> Any:
        time.sleep(seconds)
        output.logits[..., list(loaded.renderer.stop_token_ids)] = -1e4
        return output

    loaded.model.register_forward_hook(silence_stops)
    return loaded


class Parrot(torch.nn.Module):
    """Answers in words: what was asked, or numbers for ever if asked to count; each token takes `seconds`.

    It has what a model, a PEFT model and a KV cache have as far as conversations need it, and no weights. The tuned
    parrot says "You asked: …", the base one "Base heard: …"; asked for "system", it tells its system prompt.
    """

    def __init__(self, tokenizer: Any, seconds: float, positions: int) -> None:
        super().__init__()
        self.tokenizer, self.seconds, self.is_base = tokenizer, seconds, False
        self.config = SimpleNamespace(
            max_position_embeddings=positions, _attn_implementation="sdpa", vocab_size=len(tokenizer)
        )  # fmt: skip
        self.config.get_text_config = lambda: self.config
        self.peft_config = {"default": None}
        self.device = torch.device("cpu")
        self._encoded: dict[str, list[int]] = {}

    def num_parameters(self) -> int:
        return 2_400_000

    def forward(
        self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = True,
        adapter_names: list[str] | None = None,
    ) -> Any:  # fmt: skip
        self.is_base = adapter_names == ["__base__"]
        time.sleep(self.seconds)
        ids = [*(past_key_values.ids if past_key_values else []), *input_ids[0].tolist()]
        logits = torch.zeros(1, 1, len(self.tokenizer))
        logits[0, 0, self._next(ids)] = 60.0
        return SimpleNamespace(logits=logits, past_key_values=ParrotCache(ids))

    def _next(self, ids: list[int]) -> int:
        start = len(ids) - ids[::-1].index(self.tokenizer.convert_tokens_to_ids("<|im_start|>"))
        turns = self.tokenizer.decode(ids[:start]).split("<|im_start|>")
        question = next(turn for turn in reversed(turns) if turn.startswith("user\n"))[5:].split("<|im_end|>")[0]
        system = turns[1][7:].split("<|im_end|>")[0] if turns[1].startswith("system\n") else "none"
        if question == "count":
            answer = " ".join(map(str, range(1, 1500)))
        else:
            answer = system if question == "system" else ("Base heard: " if self.is_base else "You asked: ") + question
        said = len(ids) - start - len(self.tokenizer.encode("assistant\n", add_special_tokens=False))
        if answer not in self._encoded:
            ids = self.tokenizer.encode(answer, add_special_tokens=False, split_special_tokens=True)
            self._encoded[answer] = [*ids, 4]
        answer_ids = self._encoded[answer]
        return int(answer_ids[min(said, len(answer_ids) - 1)])


class ParrotCache:
    """The tokens themselves in place of keys and values."""

    is_croppable = True

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def crop(self, tokens_to_remove: int) -> None:
        self.ids = self.ids[:tokens_to_remove]

    def get_seq_length(self) -> int:
        return len(self.ids)


def parrot(
    seconds: float = 0.0, name: str = "parrot", positions: int = 4096, system: str | None = None,
    adapter: bool = True,
) -> LoadedModel:  # fmt: skip
    """A model that says what it was asked."""
    tokenizer = make_tokenizer(CHATML)
    model = Parrot(tokenizer, seconds, positions)
    renderer = Renderer(tokenizer, "auto", system)
    return LoadedModel(
        name=name, renderer=renderer, engine=TransformersEngine(model), has_adapter=adapter, system=system,
        model=model, tokenizer=tokenizer,
    )  # fmt: skip
