"""How good a model is on held-out rows: what it would have said, and what it does say.

*Teacher-forced* scores run each row once with its right answer: loss (mean over trained tokens, so long answers count
for their length), perplexity, the share of trained tokens that were the model's top-1 token, and of rows all of whose
were. A row's weight counts in the loss and perplexity, which are what training minimizes, and not in the shares.
*Exact match* lets the model answer by itself, greedily, and compares the answers' text, less any reasoning.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmtune.batching.packing import pack_bins
from lmtune.batching.plan import Unit
from lmtune.batching.prefetch import pack_units
from lmtune.config.load import build_config, load_config
from lmtune.config.schema import DataConfig, FinetuneConfig
from lmtune.data.rendering import Renderer
from lmtune.data.report import PartReport
from lmtune.data.store import load_data, tokenize
from lmtune.data.types import ExampleStore
from lmtune.errors import ConfigError, LmtuneError
from lmtune.evaluation.generative import Answer, answers, split_prompt
from lmtune.forward.packed import PackedForward
from lmtune.inference.load import LoadedModel
from lmtune.io.console import progress, warn
from lmtune.io.text import format_list
from lmtune.models.device import is_out_of_memory
from lmtune.models.structure import base_of, max_positions
from lmtune.parallel.base import Parallel
from lmtune.runs.store import RunDirectory


@dataclass(frozen=True)
class Scores:
    """What a model scores on some rows.

    Attributes:
        loss: nats per trained token; rows that have weights count by them, as in training.
        perplexity: e to the loss.
        token_accuracy, sequence_accuracy, exact_match: shares from 0 to 1; exact_match is None if not measured.
        rows: how many rows were scored, `exact_match_rows` of them by generation.
        loss_standard_error, token_accuracy_standard_error: how far other rows of the same kind may move the score;
            None if that is not known, as for one row.
    """

    loss: float
    perplexity: float
    token_accuracy: float
    sequence_accuracy: float
    exact_match: float | None
    rows: int
    exact_match_rows: int
    loss_standard_error: float | None = None
    token_accuracy_standard_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For `summary.json`; the standard errors stand beside the scores there."""
        return {key: value for key, value in asdict(self).items() if not key.endswith("_standard_error")}

    @property
    def standard_errors(self) -> dict[str, float | None]:
        """Of loss and token accuracy, by their names."""
        return {"loss": self.loss_standard_error, "token_accuracy": self.token_accuracy_standard_error}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scores:
        """Scores as `summary.json` holds them; what a later version has added is left out."""
        return cls(**{field.name: values.get(field.name) for field in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on some rows.

    Attributes:
        tuned: scores of the model as it is.
        base: of the same model without its adapter; None for a model that has none.
        answers: the model's generated answers beside the reference, in the order of the rows.
        report: what became of every row read.
        trained_rows: how many of the scored rows the model was trained on; None if that is not known.
    """

    tuned: Scores
    base: Scores | None
    answers: list[Answer]
    report: PartReport
    trained_rows: int | None = None


def evaluate_loaded(
    loaded: LoadedModel, paths: Sequence[str], exact_match_rows: int, max_new_tokens: int, max_length: int
) -> Evaluation:
    """Score a loaded model on the rows of `paths`, and its base beside it; answers are generated for some rows.

    Raises:
        DataError: a row is faulty, or none is left.
        ConfigError: `max_length` is beyond the model's positions.
    """
    settings = build_config(DataConfig, {"train": list(paths), "max_length": max_length}, where="lmtune evaluate")
    rows = tokenize(paths, loaded.renderer, settings)
    check_lengths(loaded.model, [rows], "--max-length")
    forward = PackedForward(loaded.model)
    arguments = (forward, loaded.renderer, rows, exact_match_rows, max_new_tokens, max(4096, max_length))
    tuned, given = evaluate(*arguments)
    base = None
    if loaded.has_adapter:
        with loaded.use_base():
            base = evaluate(*arguments, who="the base")[0]
    known = None if loaded.run is None else _trained_rows(loaded.run, loaded)
    trained = None if known is None else int(np.isin(rows.content, known).sum())
    return Evaluation(tuned, base, given, rows.report, trained)


def _trained_rows(run: RunDirectory, loaded: LoadedModel) -> npt.NDArray[np.uint64] | None:
    """The hashes of the rows that `run` trained on; None if its data is not here any more, or is not the same."""
    try:
        config = load_config(FinetuneConfig, run.config)
        data = load_data(config.data, loaded.renderer, config.train.seed, config.objective.rows)
        # by the files' content: the tokenizer beside an adapter may name another end token than the base's
        begun = run.read_data_report()
    except (LmtuneError, OSError):
        return None
    return data.train.content if begun is not None and begun.train.sha256 == data.report.train.sha256 else None


def check_lengths(model: Any, parts: Sequence[Any], key: str, tell: bool = True) -> None:
    """Compare the longest sequence of `parts` (tokenized rows) with the positions that the model was made for.

    `key` is the setting that lets in rows so long; `tell`: warn where the model can compute them nevertheless.

    Raises:
        ConfigError: the model cannot compute them: it has a table of positions, and they are beyond its end.
    """
    limit = max_positions(model)
    longest, where = 0, ""
    for data in parts:
        place = int(data.sequences.num_tokens.argmax())
        if (length := int(data.sequences.num_tokens[place])) > longest:
            longest, where = length, data[int(data.sequences.row[place])].location
    if limit is None or longest <= limit:
        return
    if _has_position_table(model, limit):
        raise ConfigError(
            f"{key}: {where} has {longest:,} tokens, but this model has positions for {limit:,}; set {key} to "
            f"{limit:,} or less (data.too_long decides about longer rows)"
        )
    if tell:
        warn(
            f"{key}: {where} has {longest:,} tokens, but this model was made for at most {limit:,}; quality "
            f"may degrade past them, and generation skips such rows; {key} {limit} leaves longer rows out"
        )


def _has_position_table(model: Any, limit: int) -> bool:
    """Whether positions are looked up in a table, which ends (at `limit`, or a few entries later)."""
    base = base_of(model)
    stored, tokens = base.state_dict().keys(), base.get_input_embeddings()
    tables = [m.weight for m in base.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
    tables += [table for name, table in base.named_buffers() if table.dim() == 2 and name not in stored]
    return any(limit <= len(table) < limit + 8 for table in tables)


def teacher_forced(
    forward: PackedForward, data: ExampleStore, micro_batch_tokens: int, parallel: Parallel | None = None,
    who: str = "the model",
) -> Scores:  # fmt: skip
    """Score every row of `data` without generating.

    Args:
        forward: the model.
        data: the rows.
        micro_batch_tokens: the most tokens in a forward pass; a longer sequence stands alone, and where the memory is
            too small for several they are halved.
        parallel: the ranks that share the work; None is this one alone.
        who: is scored, for the progress that is shown.

    Raises:
        LmtuneError: the loss of some rows is not finite; names them.
    """
    rank, world = (0, 1) if parallel is None else (parallel.rank, parallel.world_size)
    sequences = data.sequences
    mine = np.arange(rank, len(sequences.num_tokens), world)
    # loss, targets and right targets of each row: on the host, since not every device has 64 bit
    sums = np.zeros((3, len(data)))
    training = forward.model.training
    forward.model.eval()
    with torch.no_grad(), forward.context(), progress(f"scoring {who}", len(mine), "sequences") as shown:
        groups = deque(pack_bins(sequences.num_tokens[mine].tolist(), micro_batch_tokens))
        while groups:
            group = groups.popleft()
            rows, places = sequences.row[mine[group]].tolist(), sequences.place_in_row[mine[group]].tolist()
            units = [Unit(row, row, (place,)) for row, place in zip(rows, places, strict=True)]
            batch = pack_units(data, units, len(data), forward.shares_prefixes).to(forward.device)
            try:
                outputs = forward(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(group) == 1:
                    raise
                groups.extendleft((group[len(group) // 2 :], group[: len(group) // 2]))
                continue
            row_of = batch.example_of[batch.sequence_of].cpu().numpy()
            losses, right = -outputs.logprobs.cpu().double().numpy(), outputs.is_top1.cpu().double().numpy()
            for total, values in zip(sums, (losses, np.ones_like(losses), right), strict=True):
                np.add.at(total, row_of, values)
            shown.advance(len(group))
    forward.model.train(training)
    if world > 1 and parallel is not None:
        sums = np.sum(parallel.gather([sums]), axis=0)
    not_finite = np.flatnonzero(~np.isfinite(sums[0])).tolist()
    if not_finite:
        raise LmtuneError(
            f"the loss of these rows is not finite:\n{format_list([data[row].location for row in not_finite])}\n"
            "  look at them with `lmtune preview`; if they are fine, the model cannot compute them in this model.dtype"
        )
    losses, targets, right = sums  # [rows] each
    weights = np.ones(len(data)) if sequences.weights is None else sequences.weights
    loss = float((weights * losses).sum() / (weights * targets).sum())
    accuracy = float(right.sum() / targets.sum())
    return Scores(
        loss, math.exp(min(loss, 700.0)), accuracy, float((right == targets).mean()), None, len(data), 0,
        standard_error(weights * losses, weights * targets), standard_error(right, targets),
    )  # fmt: skip


def standard_error(values: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> float | None:
    """Of the ratio `sum(values[N]) / sum(counts[N])`, whose rows are independent and whose tokens are not.

    None for fewer than two rows. Cochran, Sampling Techniques, 2.11.
    """
    num_rows = len(values)
    if num_rows < 2:
        return None
    apart = values - values.sum() / counts.sum() * counts
    return float(np.sqrt(num_rows / (num_rows - 1) * np.square(apart).sum()) / counts.sum())


def with_exact_match(scores: Scores, given: Sequence[Answer]) -> Scores:
    """`scores` with the exact match of generated answers filled in."""
    share = sum(answer.matches for answer in given) / len(given) if given else None
    return replace(scores, exact_match=share, exact_match_rows=len(given))


def evaluate(
    forward: PackedForward, renderer: Renderer, data: ExampleStore, exact_match_rows: int, max_new_tokens: int,
    micro_batch_tokens: int, parallel: Parallel | None = None, who: str = "the model", known: Scores | None = None,
) -> tuple[Scores, list[Answer]]:  # fmt: skip
    """Teacher-forced scores of all rows, and exact match of the first `exact_match_rows`; answers in row order.

    With several ranks each scores its share, and all return the same. `who` is named in the progress shown; `known`
    are the teacher-forced scores, where these weights were scored before.
    """
    scores = known or teacher_forced(forward, data, micro_batch_tokens, parallel, who)
    rank, world = (0, 1) if parallel is None else (parallel.rank, parallel.world_size)
    room = max_positions(forward.model) or math.inf
    rows = [row for row in range(min(exact_match_rows, len(data))) if 0 < len(split_prompt(data[row])[0]) < room]
    with forward.autocast():
        given = answers(forward.model, renderer, data, rows[rank::world], max_new_tokens, who)
    if world > 1 and parallel is not None:
        given = sorted(parallel.gather(given), key=lambda answer: answer.row)
    return with_exact_match(scores, given), given
