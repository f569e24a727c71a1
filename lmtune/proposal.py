"""A config that suits this machine, this model and these rows, with the reason for each choice: `lmtune init`.

    values, reasons = propose("Qwen/Qwen3-0.6B", ["my.jsonl"], None, 40, this_machine(), known_model("Qwen/Qwen3-0.6B"))

Only what is on this machine is looked at; of a model that is not here yet only the name is known, and the defaults
stand.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lmtune.config.schema import ModelConfig, Quantization, RowKind
from lmtune.errors import LmtuneError, ModelError
from lmtune.io.console import progress

_ROWS_READ = 5000  # of the data, to measure lengths
_OBJECTIVES: dict[RowKind, tuple[str, str]] = {
    "pair": ("dpo", "the rows are pairs of a better and a worse answer; also ipo, orpo, simpo"),
    "judged": ("kto", "the rows are answers that are judged good or bad"),
    "labelled": ("classification", "the rows have labels; regression for numbers that are no classes"),
}
_GIB = 2**30
_LEAST_HELD_OUT = 30  # rows; the scores of fewer say little


@dataclass(frozen=True)
class Machine:
    """Where the model will be trained: `kind` is cpu, cuda or another of torch's, `free_bytes` its memory."""

    kind: str
    free_bytes: int

    def __str__(self) -> str:
        where = "GPU" if self.kind == "cuda" else "CPU" if self.kind == "cpu" else self.kind
        return f"{where}, {self.free_bytes / _GIB:.1f} GiB free"


@dataclass(frozen=True)
class KnownModel:
    """What this machine knows of a base: its parameters, its positions and its tokenizer; None is unknown."""

    parameters: int | None = None
    positions: int | None = None
    renderer: Any = None


def this_machine() -> Machine:
    """The device that lmtune would train on."""
    from lmtune.models.device import default_device, free_memory

    device = default_device()
    return Machine(device.type, free_memory(device))


def known_model(name: str) -> KnownModel:
    """What can be known of the base `name` without a network.

    Raises:
        ModelError: it is a folder or a name that no model can have.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
    from transformers import AutoConfig

    from lmtune.inference.load import build_renderer
    from lmtune.models.base import load_tokenizer, resolve_name, stored_parameters

    config = ModelConfig(name=name, quantization="none")
    path = resolve_name(name)
    is_online, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        if not os.path.isdir(path):
            validate_repo_id(name)
        renderer = build_renderer(load_tokenizer(config, alone=True), config)
        text = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
        return KnownModel(stored_parameters(config), getattr(text, "max_position_embeddings", None), renderer)
    except HFValidationError:
        raise ModelError(
            f"--model: {name} is neither a folder here nor a Hub id; give a Hub id like Qwen/Qwen3-0.6B, a model "
            "folder, or tiny"
        ) from None
    except (LmtuneError, OSError, ValueError) as error:
        if os.path.isdir(path):
            raise ModelError(f"--model: {error}") from error
        return KnownModel()
    finally:
        constants.HF_HUB_OFFLINE = is_online


def propose_quantization(parameters: int | None, machine: Machine) -> tuple[Quantization, str]:
    """How to hold the frozen weights, and why: as they are where they fit, since 4 bit saves memory and not time."""
    from lmtune.models.base import check_bitsandbytes

    if parameters is None:
        wanted, why = "nf4", "the model is not on this machine yet, so its size is not known"
    else:
        needed = parameters * (4 if machine.kind == "cpu" else 2)
        size = (
            f"{_words(parameters)} parameters take {needed / _GIB:.1f} GiB of the {machine.free_bytes / _GIB:.1f} free"
        )
        wanted = "none" if needed <= 0.5 * machine.free_bytes else "nf4"
        why = f"{size} as they are" + ("" if wanted == "none" else f", {parameters * 0.55 / _GIB:.1f} in nf4")
    if wanted == "none":
        return "none", why
    try:
        check_bitsandbytes("nf4")
    except LmtuneError:
        return "none", f"{why}; bitsandbytes, which nf4 needs, does not work here"
    return "nf4", why


def propose(
    model: str, data: Sequence[str], quantization: Quantization | None, num_rows: int, machine: Machine,
    known: KnownModel, rows: RowKind = "answer", columns: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:  # fmt: skip
    """Settings by `section.key`, and the reasons for those that are not the user's words.

    Args:
        model: the base.
        data: checked files or folders of rows.
        quantization: the user's choice, if there is one.
        num_rows: how many rows they hold.
        machine: where it will be trained.
        known: what is known of the base.
        rows: which kind they are.
        columns: the setting `data.columns`.
    """
    values: dict[str, Any] = {"model.name": model, "data.train": list(data) if len(data) > 1 else data[0]}
    values |= {"data.columns": dict(columns)} if columns else {}
    reasons: dict[str, str] = {}
    proposed, why = propose_quantization(known.parameters, machine)
    values["model.quantization"] = quantization or proposed
    if quantization is None:
        reasons["model.quantization"] = why
    values["data.validation_fraction"], reasons["data.validation_fraction"] = _held_out(num_rows)
    batch = max(4, min(32, 2 ** int(math.log2(max(1, num_rows / 10)))))
    values["train.batch_size"] = batch
    reasons["train.batch_size"] = f"about ten steps or more an epoch with {num_rows:,} rows"
    values["train.epochs"] = max(3, min(10, math.ceil(60 * batch / num_rows)))
    reasons["train.epochs"] = f"{math.ceil(values['train.epochs'] * num_rows / batch):,} steps in all"
    if known.parameters is not None and known.parameters < 300_000_000:
        values["train.learning_rate"] = 4.0e-3 if known.parameters < 30_000_000 else 1.0e-3
        reasons["train.learning_rate"] = f"a small model, of {_words(known.parameters)} parameters"
    if rows in _OBJECTIVES:
        values["objective.kind"], reasons["objective.kind"] = _OBJECTIVES[rows]
    if rows in ("pair", "judged"):
        values["train.learning_rate"] = values.get("train.learning_rate", 2.0e-4) / 4
        reasons["train.learning_rate"] = "preferences take lower rates than answers"
    if known.renderer is None:
        reasons["data.max_length"] = "the tokenizer is not on this machine yet, so the rows were not measured"
    else:
        _add_lengths(values, reasons, data, known, columns)
    return values, reasons


def described(path: Path, machine: str, settings: str) -> str:
    """The file, headed by how it is used; editors find a schema that lies beside it."""
    schema = "# yaml-language-server: $schema=lmtune.schema.json\n"
    head = schema if path.with_name("lmtune.schema.json").is_file() else ""
    use = f"# Written by `lmtune init` on a machine with: {machine}. Start with: lmtune finetune {path.name}\n"
    return f"{head}{use}# A setting is replaced on the command line as train.epochs=1.\n\n{settings}"


def _add_lengths(
    values: dict[str, Any], reasons: dict[str, str], data: Sequence[str], known: KnownModel,
    columns: Mapping[str, str] | None,
) -> None:  # fmt: skip
    """Set what follows from the tokens of the first rows, and of their answers."""
    from lmtune.data.reading import ReadReport, read_examples
    from lmtune.data.sources import find_files

    rows, answers, is_text = [], [], True
    with progress("measuring the rows", unit="rows") as shown:
        for example in islice(read_examples(find_files(data), ReadReport(), None, columns), _ROWS_READ):
            sequences = known.renderer.render(example)
            rows.append(max(map(len, sequences)))
            answers.append(max(sequence.num_targets for sequence in sequences))
            is_text &= example.text is not None and example.kind == "answer"
            shown.advance()
    if not rows:
        return
    limit = min(max(64, _rounded(max(rows), 64)), known.positions or 8192, 8192)
    beyond = sum(length > limit for length in rows)
    measured = f" (of the first {_ROWS_READ:,} rows)" if len(rows) == _ROWS_READ else ""
    longer = f"; {beyond:,} rows are longer" if beyond else ""
    values["data.max_length"] = limit
    reasons["data.max_length"] = f"the longest row has {max(rows):,}{longer}{measured}"
    if beyond and is_text:
        values["data.too_long"], reasons["data.too_long"] = "split", "longer texts are trained in pieces"
    values["evaluation.max_new_tokens"] = min(1024, max(32, _rounded(max(answers) + 8, 16)))
    reasons["evaluation.max_new_tokens"] = f"the longest answer has {max(answers):,} tokens"


def _held_out(num_rows: int) -> tuple[float, str]:
    """The share of rows to hold out: 5 %, more of a small file, so that scores say something; none of a tiny one."""
    if num_rows < 10:
        return 0.0, f"{num_rows} rows are too few to hold some out; nothing is scored"
    share = min(0.2, max(0.05, round(_LEAST_HELD_OUT / num_rows, 2)))
    held = round(share * num_rows)
    few = "; scores of so few are rough" if held < _LEAST_HELD_OUT else ""
    return share, f"{held:,} of {num_rows:,} rows{few}"


def _rounded(number: int, step: int) -> int:
    return math.ceil(number / step) * step


def _words(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
