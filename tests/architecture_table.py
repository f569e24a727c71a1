"""What works with which architecture, tried on a tiny random model of each: the table of docs/architectures.md.

    python -m tests.architecture_table

writes it anew; a test compares it. Each entry is a comparison: a loaded model with the one that was saved, a packed
step with a plain loop, a merged model with its adapter, an answer with what the model says without a cache.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lmtune.config.schema import LoraConfig, ModelConfig, Quantization
from lmtune.forward.packed import PackedForward
from lmtune.inference.engine import TransformersEngine
from lmtune.inference.load import build_renderer
from lmtune.inference.request import Request, Sampling
from lmtune.io.console import quiet
from lmtune.models.base import load_model, load_tokenizer
from lmtune.models.merge import merge
from lmtune.models.model_folder import write_adapter_texts
from lmtune.models.parameters import count_parameters
from lmtune.models.tuning.adapter_files import Metadata
from lmtune.models.tuning.base import trainable
from lmtune.models.tuning.lora import save_adapter
from tests.architectures import ARCHITECTURES, architecture
from tests.tiny import Rows, adapted, rows_behind_a_prefix
from tests.tokenizers import CHATML, make_tokenizer
from tests.training.test_gradients import by_hand, lmtune_step

PAGE = Path(__file__).parent.parent / "docs/architectures.md"
COLUMNS = ("loads", "packs", "shares prefixes", "nf4", "int8", "adapts", "merges", "chats")
IDS = torch.arange(5, 35)[None]


class Differs(Exception):
    """A result that is not the plain one."""


def try_architecture(name: str, rows: Rows, folder: Path) -> list[str]:
    """The entries of an architecture: `yes`, or what is not as it could be."""
    written = architecture(name)
    written.save_pretrained(folder / "base")
    make_tokenizer(CHATML).save_pretrained(folder / "base")
    return [
        _entry(_loads, written, folder), *_packs(name, rows),
        *(_entry(_quantizes, kind, folder) for kind in ("nf4", "int8")),
        _entry(_adapts, name, rows), _entry(_merges, rows, folder), _entry(_chats, written),
    ]  # fmt: skip


def _entry(attempt: Callable[..., str], *arguments: Any) -> str:
    try:
        return attempt(*arguments)
    except Exception as error:  # whatever a model's code raises for what it was not written for
        return _without_numbers(f"no: {type(error).__name__}: {' '.join(str(error).split())}")


def _base(folder: Path, quantization: Quantization = "none") -> ModelConfig:
    return ModelConfig(name=str(folder / "base"), quantization=quantization, dtype="float32")


@torch.no_grad()
def _loads(written: Any, folder: Path) -> str:
    _require_close(load_model(_base(folder), "cpu")(input_ids=IDS).logits, written(input_ids=IDS).logits)
    return "yes"


def _packs(name: str, rows: Rows) -> list[str]:
    """Whether sequences share a forward pass, and their beginnings; the step must be a plain loop's either way."""
    model = adapted(architecture(name)).eval()
    parameters = trainable(model)
    loss, gradients, _ = by_hand(model, rows)
    sums = lmtune_step(model, rows, 10**6)
    if not abs(sums.loss - loss) < 1e-5:
        raise Differs(f"{name}: the loss of a step differs by {abs(sums.loss - loss):.2g}")
    for key, parameter in parameters.items():
        _require_close(parameter.grad, gradients[key], 1e-3)
    capabilities = PackedForward(model).capabilities
    reasons = capabilities.packing, capabilities.shared_prefixes
    return ["yes" if reason is None else _without_numbers(f"no: {reason.partition(': ')[2]}") for reason in reasons]


def _quantizes(kind: Quantization, folder: Path) -> str:
    model = load_model(_base(folder, kind), "cpu")
    counted = count_parameters(model, LoraConfig(rank=4), kind, torch.float32)
    plain = load_model(_base(folder), "cpu")
    with torch.no_grad():
        logits, wanted = model(input_ids=IDS).logits[0], plain(input_ids=IDS).logits[0]
    # of most tokens: rounding sends some to other experts
    if not float(((logits - wanted).norm(dim=1) / wanted.norm(dim=1)).median()) < (0.5 if kind == "nf4" else 0.2):
        raise Differs("other logits than those of the base")
    peft = adapted(model, target_modules="all-linear").eval()
    peft(input_ids=IDS).logits.square().mean().backward()
    if not all(p.grad is None or torch.isfinite(p.grad).all() for p in trainable(peft).values()):
        raise Differs("a gradient is not finite")
    if not counted.experts:
        return "yes"
    return "all but experts"


def _adapts(name: str, rows: Rows) -> str:
    model = architecture(name)
    counted = count_parameters(model, LoraConfig(rank=4), "none", torch.float32)
    peft = adapted(model).eval()
    peft(input_ids=IDS).logits.square().mean().backward()
    dead = [key for key, parameter in trainable(peft).items() if parameter.grad is None]
    if dead:
        raise Differs(f"{len(dead)} parameters have no gradient, such as {dead[0]}")
    left = [part for part in counted.not_adapted if part != "router"]
    return "all but " + ", ".join(f"`{part}`" for part in left) if left else "yes"


def _merges(rows: Rows, folder: Path) -> str:
    base = _base(folder)
    tokenizer = load_tokenizer(base)
    renderer = build_renderer(tokenizer, base)
    (folder / "adapter").mkdir()
    save_adapter(adapted(load_model(base, "cpu")), folder / "adapter", Metadata())
    write_adapter_texts(base, renderer, folder / "adapter")
    sequences = [sequence.input_ids.tolist() for row in rows.rows for sequence in row.sequences]
    merge(base, folder / "adapter", folder / "merged", "trained", sequences, tokenizer, renderer.stop_token_ids)
    return "yes"


def _chats(model: Any) -> str:
    prompts = [list(range(5, 25)), list(range(30, 41))]
    wanted = [_greedy(model, prompt, 8) for prompt in prompts]
    engine = TransformersEngine(model)
    requests = [Request(prompt, Sampling(max_new_tokens=8)) for prompt in prompts]
    if [list(engine.submit(request)) for request in requests] != wanted:
        raise Differs("other tokens than without a cache")
    try:
        together = [list(answer) for answer in engine.generate(requests)]
    except Exception as error:  # of the model's code
        return f"one by one: {' '.join(str(error).split())[:100]}"
    return "yes" if together == wanted else "one by one: a batch gives other tokens"


@torch.no_grad()
def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _require_close(one: torch.Tensor, other: torch.Tensor, bound: float = 1e-5) -> None:
    difference = float((one - other).abs().max())
    if not difference <= bound * max(float(other.abs().max()), 1e-2):
        raise Differs(f"differs by {difference:.2g}")


def _without_numbers(reason: str) -> str:
    return re.sub(r" by [\d.e+-]+|\([\d.]+\) ?", "", reason)


def entries_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The entries of some architectures."""
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder, quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = try_architecture(name, rows_behind_a_prefix(), Path(folder))
    return found


def stored_entries() -> dict[str, list[str]]:
    """What the page says."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    notes = {mark: f": {note}" for mark, note in (line.split(". ", 1) for line in lines if re.match(r"\d+\. ", line))}
    found = {}
    for line in lines:
        if line.startswith("| `"):
            name, *entries = (cell.strip() for cell in line.strip("|").split(" |"))
            found[name.strip("`")] = [re.sub(r" \((\d+)\)$", lambda m: notes[m[1]], entry) for entry in entries]
    return found


def table(entries: Mapping[str, Sequence[str]]) -> str:
    """The table and its notes in Markdown."""
    notes: dict[str, int] = {}
    lines = ["| architecture | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, cells in entries.items():
        shown = []
        for cell in cells:
            short, _, note = cell.partition(": ")
            shown.append(f"{short} ({notes.setdefault(note, len(notes) + 1)})" if note else short)
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for note, number in notes.items())]) + "\n"


def main() -> None:
    """Write the page's table anew; with names, print the entries of these."""
    if names := sys.argv[1:]:
        for name, entries in entries_of(names).items():
            print(name, *entries, sep=" | ")
        return
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index("| architecture |")] + table(entries_of(ARCHITECTURES)), encoding="utf-8")


if __name__ == "__main__":
    main()
