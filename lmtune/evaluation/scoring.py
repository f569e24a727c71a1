"""How good a model is on held-out rows: what it would have said, and what it does say.

*Teacher-forced* scores run each row once with its right answer: loss (mean over trained tokens, so long answers count
for their length), perplexity, the share of trained tokens that were the model's top-1 token, and of rows all of whose
were. A row's weight counts in the loss and perplexity, which are what training minimizes, and not in the shares.
*Exact match* lets the model answer by itself, greedily, and compares the answers' text, less any reasoning.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmtune.batching.packing import MicroBatch, pack_bins
from lmtune.batching.plan import Totals, Unit, each_alone
from lmtune.batching.prefetch import pack_units
from lmtune.data.rendering import Renderer
from lmtune.data.types import ExampleStore
from lmtune.errors import ConfigError, LmtuneError
from lmtune.evaluation.generative import Answer, answers, split_prompt, verdicts
from lmtune.evaluation.measures import ClassScores, measure
from lmtune.forward.packed import Outputs, PackedForward
from lmtune.io.console import err, progress, warn
from lmtune.io.text import format_list, is_finite_number
from lmtune.models.device import is_out_of_memory
from lmtune.models.head import Head
from lmtune.models.structure import base_of, max_positions
from lmtune.objectives.base import Objective
from lmtune.parallel.base import Parallel

UnitsOf = Callable[[int], Sequence[Sequence[int]]]
Float64 = npt.NDArray[np.float64]
_REFERENCE_TOKENS = {"cuda": 4096, "cpu": 1024}  # of a forward pass


@dataclass(frozen=True)
class Scores:
    """What a model scores on some rows.

    Attributes:
        loss: of the objective, for answers nats per trained token; rows count by their weights, as in training.
        perplexity: e to the loss of answers; None for other objectives, as is `token_accuracy`.
        token_accuracy, sequence_accuracy, exact_match: shares from 0 to 1; exact_match is None if not measured. Of
            other objectives than answers `sequence_accuracy` is the share of rows, or pairs, on the right side.
        metrics: the objective's own, by name.
        classes: of a classifier each class for itself.
        rows: how many rows were scored, `exact_match_rows` of them by generation.
        loss_standard_error, token_accuracy_standard_error: how far other rows of the same kind may move the score;
            None if that is not known, as for one row.
    """

    loss: float
    perplexity: float | None
    token_accuracy: float | None
    sequence_accuracy: float
    exact_match: float | None
    rows: int
    exact_match_rows: int
    loss_standard_error: float | None = None
    token_accuracy_standard_error: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    classes: ClassScores | None = None

    def as_dict(self) -> dict[str, Any]:
        """For `summary.json`, the metrics among the scores; standard errors and classes stand beside them there."""
        beside = ("loss_standard_error", "token_accuracy_standard_error", "classes")
        own = {key: value for key, value in asdict(self).items() if key not in beside}
        metrics = own.pop("metrics")
        return {**metrics, **own}

    def value(self, name: str) -> float:
        """A score or metric by its name."""
        return float(self.metrics[name] if name in self.metrics else getattr(self, name))

    @property
    def standard_errors(self) -> dict[str, float | None]:
        """Of loss and token accuracy, by their names."""
        return {"loss": self.loss_standard_error, "token_accuracy": self.token_accuracy_standard_error}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scores:
        """Scores as `summary.json` holds them; other numbers are metrics."""
        names = {own.name for own in fields(cls)} - {"metrics", "classes"}
        metrics = {name: value for name, value in values.items() if name not in names and is_finite_number(value)}
        return cls(**{name: values.get(name) for name in names}, metrics=metrics)  # type: ignore[arg-type]


@dataclass(frozen=True)
class RowScores:
    """What a model scores on N rows, and each of them by itself.

    Attributes:
        scores: of all rows.
        parts: by score, of each row a value and how much it counts, `[N, 2]`; the score is the quotient of their sums.
        outputs, targets: of a classifier, what its head says of each row `[N, K]`, and what is right, as `measure` has
            them.
    """

    scores: Scores
    parts: Mapping[str, Float64]
    outputs: Float64 | None = None
    targets: Float64 | None = None


def plural_of(objective: Objective) -> str:
    """What several rows of an objective are called."""
    return "pairs" if objective.rows == "pair" else "rows"


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


def score_rows(
    forward: PackedForward, objective: Objective, data: ExampleStore, micro_batch_tokens: int, who: str = "the model",
    parallel: Parallel | None = None,
) -> RowScores:  # fmt: skip
    """What the model scores on all rows without generating: of answers token by token, else by its objective."""
    if objective.rows == "answer":
        return rows_teacher_forced(forward, data, micro_batch_tokens, parallel, who)
    return rows_of_objective(forward, objective, data, micro_batch_tokens, parallel, who)


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
    return rows_teacher_forced(forward, data, micro_batch_tokens, parallel, who).scores


def rows_teacher_forced(
    forward: PackedForward, data: ExampleStore, micro_batch_tokens: int, parallel: Parallel | None = None,
    who: str = "the model",
) -> RowScores:  # fmt: skip
    """As `teacher_forced`, and of each row by itself."""
    losses, targets, right = row_losses(forward, data, micro_batch_tokens, parallel, who)
    weights = np.ones(len(data)) if data.sequences.weights is None else data.sequences.weights
    parts = {
        "loss": np.stack([weights * losses, weights * targets], 1), "token_accuracy": np.stack([right, targets], 1),
        "sequence_accuracy": np.stack([right == targets, np.ones(len(data))], 1),
    }  # fmt: skip
    loss, accuracy, whole = (float(total / count) for total, count in (part.sum(0) for part in parts.values()))
    scores = Scores(
        loss, math.exp(min(loss, 700.0)), accuracy, whole, None, len(data), 0, standard_error(*parts["loss"].T),
        standard_error(right, targets),
    )  # fmt: skip
    return RowScores(scores, parts)


def row_losses(
    forward: PackedForward, data: ExampleStore, micro_batch_tokens: int, parallel: Parallel | None = None,
    who: str = "the model",
) -> tuple[Float64, Float64, Float64]:  # fmt: skip
    """Of each row, `[N]` each: the loss of its targets together in nats, their number, and how many are top-1.

    The arguments are those of `teacher_forced`.

    Raises:
        LmtuneError: the loss of some rows is not finite; names them.
    """
    units = units_of_rows(data, each_alone)
    sums = np.zeros((3, len(data)))  # on the host, since not every device has 64 bit
    for _, batch, outputs in forward_passes(forward, data, _own(units, parallel), micro_batch_tokens, f"scoring {who}"):
        row_of = batch.example_of[batch.sequence_of].cpu().numpy()
        losses, right = -outputs.logprobs.cpu().double().numpy(), outputs.is_top1.cpu().double().numpy()
        for total, values in zip(sums, (losses, np.ones_like(losses), right), strict=True):
            np.add.at(total, row_of, values)
    losses, targets, right = _sum_over_ranks(sums, parallel)
    _check_finite(losses, data)
    return losses, targets, right


def sequence_logprobs(
    forward: PackedForward, units_of: UnitsOf, data: ExampleStore, parallel: Parallel | None = None, what: str = "rows"
) -> Float64:
    """The log-probability of the targets of each sequence of `data` `[S]` under the model as it is.

    By the packed forward pass of training, in packs of a size that depends on nothing, so that a resumed run finds the
    same. Says how long it took for so many of `what`.
    """
    began, found = time.perf_counter(), np.zeros(len(data.sequences.num_tokens))
    micro_batch_tokens = _REFERENCE_TOKENS[forward.device.type]
    units = _own(units_of_rows(data, units_of), parallel)
    for some, batch, outputs in forward_passes(forward, data, units, micro_batch_tokens, "computing the reference"):
        sums = torch.zeros(len(batch.example_of), device=outputs.logprobs.device)
        sums.index_add_(0, batch.sequence_of, outputs.logprobs)
        places = [data.sequences.first[unit.row] + place for unit in some for place in unit.sequences]
        found[places] = sums.cpu().double().numpy()
    found = _sum_over_ranks(found, parallel)
    _check_finite(found, data, data.sequences.row)
    if parallel is None or parallel.is_main:
        seconds = time.perf_counter() - began
        err.print(f"reference: computed {len(data):,} {what} in {seconds:.0f} s")
    return found


def score_objective(
    forward: PackedForward, objective: Objective, data: ExampleStore, micro_batch_tokens: int,
    parallel: Parallel | None = None, who: str = "the model", run: Callable[[MicroBatch], Outputs] | None = None,
) -> Scores:  # fmt: skip
    """The loss and the metrics of an objective over all rows of `data`, as of one step of all of them.

    `run` gives the outputs in place of the model.
    """
    return rows_of_objective(forward, objective, data, micro_batch_tokens, parallel, who, run).scores


def rows_of_objective(
    forward: PackedForward, objective: Objective, data: ExampleStore, micro_batch_tokens: int,
    parallel: Parallel | None = None, who: str = "the model", run: Callable[[MicroBatch], Outputs] | None = None,
) -> RowScores:  # fmt: skip
    """As `score_objective`, and of each row by itself."""
    units, statistic = _own(units_of_rows(data, objective.units), parallel), 0.0
    if objective.two_passes:
        found = np.zeros(2)
        for _, batch, outputs in forward_passes(forward, data, units, micro_batch_tokens, f"reading for {who}"):
            part, number = objective.statistic(outputs, batch)
            found += [float(part), number]
        total, count = _sum_over_ranks(found, parallel)
        statistic = float(total / max(1.0, count))
    errors, sums = np.zeros(len(data)), np.zeros((len(data), 1 + len(objective.metrics), 2))
    seen: list[tuple[int, Float64]] = []  # of a classifier: row, its outputs and targets
    for _, batch, outputs in forward_passes(forward, data, units, micro_batch_tokens, f"scoring {who}", run):
        result = objective.loss(outputs, batch, statistic)
        errors += result.errors.cpu().double().numpy()
        assert result.rows is not None
        parts = [torch.stack([x.float() for x in result.parts[name]], 1) for name in ("loss", *objective.metrics)]
        sums[result.rows.cpu().numpy()] += torch.stack(parts, 1).cpu().double().numpy()
        if outputs.scores is not None and "target" in batch.values:
            target = batch.values["target"].reshape(len(outputs.scores), -1)
            found = torch.cat([outputs.scores, target], 1).cpu().double().numpy()
            seen += zip(batch.example_of.tolist(), found, strict=True)
    errors, sums = _sum_over_ranks(errors, parallel), _sum_over_ranks(sums, parallel)
    each = {name: sums[:, place] for place, name in enumerate(("loss", *objective.metrics))}
    loss = float(each["loss"][:, 0].sum()) / objective.denominator(Totals.of(data.sequences, np.arange(len(data))))
    if not math.isfinite(loss):
        raise LmtuneError(f"the loss of {who} on the rows it is scored on is not finite")
    each = {name: part for name, part in each.items() if part[:, 1].any()}
    metrics = {name: float(np.divide(*part.sum(0))) for name, part in each.items() if name != "loss"}
    each["sequence_accuracy"] = np.stack([errors == 0, np.ones(len(data))], 1)
    head, outputs_of_rows, targets = objective.head, None, None
    more, classes = dict[str, float](), None
    if head is not None and (seen := seen if parallel is None else parallel.gather(seen)):
        outputs_of_rows, targets = _of_head(head, seen)
        more, classes = measure(head, outputs_of_rows, targets)
    scores = Scores(
        loss, None, None, float((errors == 0).mean()), None, len(data), 0, metrics={**metrics, **more}, classes=classes
    )
    return RowScores(scores, each, outputs_of_rows, targets)


def _of_head(head: Head, seen: Sequence[tuple[int, Float64]]) -> tuple[Float64, Float64]:
    """Outputs `[N, K]` and targets of a classifier, each row of `seen` with its number before and both behind it."""
    all_rows = np.stack([found for _, found in sorted(seen, key=lambda one: one[0])])
    outputs, targets = np.split(all_rows, [len(head.labels)], axis=1)
    return outputs, targets if head.kind == "multi_label" else targets[:, 0]


def forward_passes(
    forward: PackedForward, data: ExampleStore, units: Sequence[Unit], micro_batch_tokens: int, title: str,
    run: Callable[[MicroBatch], Outputs] | None = None,
) -> Iterator[tuple[list[Unit], MicroBatch, Outputs]]:  # fmt: skip
    """Run the model over `units`, of examples that are numbered as their rows, without gradients or dropout.

    A micro-batch has at most so many tokens, or one unit; where the memory is too small for several they are halved.
    `run` gives the outputs in place of the model.
    """
    first, tokens = data.sequences.first, data.sequences.num_tokens
    lengths = [int(tokens[first[unit.row] + np.array(unit.sequences)].sum()) for unit in units]
    training = forward.model.training
    forward.model.eval()
    try:
        with torch.no_grad(), forward.context(), progress(title, len(units), "sequences") as shown:
            groups = deque(pack_bins(lengths, micro_batch_tokens) if units else ())
            while groups:
                group = groups.popleft()
                some = [units[index] for index in group]
                batch = pack_units(data, some, len(data), forward.shares_prefixes, forward.reads).to(forward.device)
                try:
                    outputs = (run or forward)(batch)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or len(group) == 1:
                        raise
                    groups.extendleft((group[len(group) // 2 :], group[: len(group) // 2]))
                    continue
                yield some, batch, outputs
                shown.advance(len(group))
    finally:
        forward.model.train(training)


def units_of_rows(data: ExampleStore, units_of: UnitsOf) -> list[Unit]:
    """The units of all rows, each an example of its own number; `units_of` says which sequences are one."""
    counts = np.diff(data.sequences.first).tolist()
    return [Unit(row, row, tuple(group)) for row, count in enumerate(counts) for group in units_of(count)]


def _own(units: Sequence[Unit], parallel: Parallel | None) -> Sequence[Unit]:
    """This rank's share."""
    return units if parallel is None else units[parallel.rank :: parallel.world_size]


def _sum_over_ranks(values: Float64, parallel: Parallel | None) -> Float64:
    if parallel is None or parallel.world_size == 1:
        return values
    total: Float64 = np.sum(parallel.gather([values]), axis=0)
    return total


def _check_finite(values: Float64, data: ExampleStore, row_of: npt.NDArray[np.int64] | None = None) -> None:
    """LmtuneError names the rows whose values, of rows or of `row_of`, are not finite."""
    places = np.flatnonzero(~np.isfinite(values))
    rows = (places if row_of is None else np.unique(row_of[places])).tolist()
    if rows:
        raise LmtuneError(
            f"the loss of these rows is not finite:\n{format_list([data[row].location for row in rows])}\n"
            "  look at them with `lmtune preview`; if they are fine, the model cannot compute them in this model.dtype"
        )


def standard_error(values: Float64, counts: Float64) -> float | None:
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
    micro_batch_tokens: int, objective: Objective, parallel: Parallel | None = None, who: str = "the model",
    known: RowScores | None = None,
) -> tuple[Scores, list[Answer]]:  # fmt: skip
    """Scores of all rows, and what the model says of the first `exact_match_rows`, in row order: its answers with their
    exact match, or the classes or values that a classifier gives.

    With several ranks each scores its share, and all return the same. `who` is named in the progress shown; `known`
    are the scores without generating, where these weights were scored before.
    """
    found = known or score_rows(forward, objective, data, micro_batch_tokens, who, parallel)
    if objective.head is not None and found.outputs is not None:
        return found.scores, verdicts(renderer, objective.head, data, found.outputs[:exact_match_rows])
    if objective.rows != "answer":
        return found.scores, []
    rank, world = (0, 1) if parallel is None else (parallel.rank, parallel.world_size)
    room = max_positions(forward.model) or math.inf
    rows = [row for row in range(min(exact_match_rows, len(data))) if 0 < len(split_prompt(data[row])[0]) < room]
    with forward.autocast():
        given = answers(forward.model, renderer, data, rows[rank::world], max_new_tokens, who, forward.members)
    if world > 1 and parallel is not None:
        given = sorted(parallel.gather(given), key=lambda answer: answer.row)
    return with_exact_match(found.scores, given), given
