"""Several models from one config that answer together: bagging and boosting.

    folder = train_ensemble(config, members=5, way="bagging")      # runs/NAME, with ensemble.json
    scores = score_ensemble(folder, config)
    scores.beside(scores.best, scores.together).difference.interval

Bagging (Breiman, 1996) trains each member on a bootstrap sample: as many rows as there are, drawn with replacement.
Boosting is SAMME (Zhu, Zou, Rosset and Hastie, 2009, https://doi.org/10.4310/SII.2009.v2.n3.a8) of K classes: each
member is trained on rows weighted by the errors of those before it, and votes by how few errors it makes.

    err = Σ w of the rows that it gets wrong / Σ w        α = log((1 - err) / err) + log(K - 1)
    w of a wrong row = w · exp(α), then all so that their sum is what it was

Members are ordinary runs, `runs/NAME/member-1` and so on, so the same call resumes what was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from lmtune.config.schema import ClassificationConfig, FinetuneConfig, LoraConfig
from lmtune.data.selection import Selection
from lmtune.data.store import LoadedData, TokenizedData, load_data
from lmtune.errors import ConfigError, LmtuneError
from lmtune.evaluation.answer_metrics import mean_of_sums
from lmtune.evaluation.intervals import Difference, difference
from lmtune.evaluation.scoring import RowScores, plural_of, score_rows, sequence_logprobs
from lmtune.inference.load import (
    LoadedModel,
    build_renderer,
    load_for_inference,
    load_members,
    load_run_tokenizer,
)
from lmtune.io.console import err, warn
from lmtune.models.members import Members
from lmtune.objectives.chosen import objective_of
from lmtune.runs.ensembles import FILE, EnsembleFile, Method
from lmtune.runs.store import RunDirectory, find_run
from lmtune.search.combine import Combination, combine
from lmtune.training.run import run_finetune
from lmtune.training.shared import Shared

Float64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Way = Literal["bagging", "boosting"]
_SEED = 0xBA66  # keeps these random numbers apart from those of a run
_PACK_TOKENS = 4096


# --- which rows, and how much they count


def bootstrap(rows: int, seed: int, member: int) -> Selection:
    """The rows of one member: as many as there are, drawn with replacement; `member` counts from 1."""
    drawn = np.random.default_rng([seed, _SEED, member]).integers(0, rows, rows)
    return Selection(tuple(sorted(drawn.tolist())))


@dataclass(frozen=True)
class Boosted:
    """What SAMME makes of one member.

    Attributes:
        error: the weighted share of the rows that it gets wrong.
        alpha: how much it counts; None of one that is no better than chance.
        factors: `[N]`, what the weights of the rows are multiplied by for the next member.
    """

    error: float
    alpha: float | None
    factors: Float64

    @property
    def is_last(self) -> bool:
        """Whether there is nothing to learn for a further member: it is perfect, or no better than chance."""
        return self.alpha is None or self.error == 0


def samme(wrong: Bools, weights: Float64, factors: Float64, classes: int) -> Boosted:
    """One step of SAMME.

    Args:
        wrong: `[N]`, the rows that the member gets wrong.
        weights: `[N]`, of the rows themselves.
        factors: `[N]`, what these are multiplied by for this member.
        classes: K.
    """
    now = weights * factors
    error = float(now[wrong].sum() / now.sum())
    if error > 1 - 1 / classes - 1e-9:  # as good as chance, to rounding
        return Boosted(error, None, factors)
    if error == 0:  # infinitely good; it counts as a member of α = 1, as in scikit-learn
        return Boosted(error, 1.0, factors)
    alpha = math.log((1 - error) / error) + math.log(classes - 1)
    after = factors * np.exp(alpha * wrong)
    return Boosted(error, alpha, after * (now.sum() / (weights * after).sum()))


# --- training


def train_ensemble(
    config: FinetuneConfig, members: int, way: Way, method: Method | None = None,
    tell: Callable[[str], None] = err.print,
) -> Path:  # fmt: skip
    """Train the members that are not there yet, and write `ensemble.json`; returns its folder.

    Args:
        config: of each member but for its rows; `run.name` is the ensemble's.
        members: how many, at most: boosting may stop before.
        way: how members get their rows.
        method: how they answer together; by default `mean` for bagging, and the `vote` that SAMME is made for.
        tell: is given a line before each member.

    Raises:
        ConfigError: the settings are not for this, or the folder holds something else.
        LmtuneError: boosting ends with fewer than two members, or a member cannot be trained.
    """
    folder = RunDirectory.of(config.run).path
    check_settings(config, way, folder)
    weights, found, shared = list[float](), list[RunDirectory](), Shared()
    for number, (run, selection, weigh) in enumerate(_planned(config, members, way, folder), 1):
        tell(f"member {number} of {members}: {run.path}")
        own = replace(config, run=replace(config.run, dir=str(folder), name=run.name))
        run_finetune(own, run, selection, shared=shared)
        weight = weigh(run)
        if weight is not None:
            weights.append(weight)
            found.append(run)
    if len(found) < 2:
        raise LmtuneError(
            f"{folder}: {len(found)} member{'s' * (len(found) != 1)} left, and an ensemble needs two; what was trained "
            "is a run like others; members that get every row right need fewer steps (train.max_steps), those no "
            "better than chance more; or take --method bagging"
        )
    chosen: Method = method or ("vote" if way == "boosting" else "mean")
    EnsembleFile(tuple(run.name for run in found), tuple(weights), chosen, way).write(folder)
    return folder


def check_settings(config: FinetuneConfig, way: Way, folder: Path) -> None:
    """ConfigError for settings of which no ensemble can be made."""
    if not isinstance(config.tuning, LoraConfig):
        raise ConfigError(
            f"tuning.kind: {config.tuning.kind}; expected lora: the members of an ensemble are adapters of one base"
        )
    if config.tuning.new_tokens:
        raise ConfigError("tuning.new_tokens: members that share a base cannot have tokens of their own; leave it out")
    if way == "boosting" and not isinstance(config.objective, ClassificationConfig):
        raise ConfigError(
            f"--method boosting: weighs rows by the class they are taken for; objective.kind is "
            f"{config.objective.kind}; expected classification, or --method bagging"
        )
    if RunDirectory(folder).exists():
        raise ConfigError(f"run.name: {folder} is a run already; give run.name=… for the ensemble")
    if (folder / FILE).is_file() and (before := EnsembleFile.read(folder).made_by) != way:
        raise ConfigError(f"run.name: {folder} is an ensemble by {before}; give run.name=… for another")


Weigh = Callable[[RunDirectory], float | None]


def _planned(
    config: FinetuneConfig, members: int, way: Way, folder: Path
) -> Iterator[tuple[RunDirectory, Selection, Weigh]]:
    """Of each member its run, its rows, and what finds its weight when it is trained, None to leave it out."""
    runs = [RunDirectory(folder / f"member-{number}") for number in range(1, members + 1)]
    data = load_rows(config)
    if way == "bagging":
        for number, run in enumerate(runs, 1):
            selection = bootstrap(len(data.train), config.train.seed, number)
            if data.validation is None:  # the rows that it has not seen
                unseen = sorted(set(range(len(data.train))) - set(selection.train))
                selection = replace(selection, validation=tuple(unseen))
            yield run, selection, lambda run: 1.0
        return
    labels = {label for label in data.train.labels if isinstance(label, str | int | bool)}
    if len(labels) < 2 or any(isinstance(label, tuple) for label in data.train.labels):
        raise ConfigError("--method boosting: rows may have several classes; expected one; take --method bagging")
    everything, factors = tuple(range(len(data.train))), np.ones(len(data.train))
    for run in runs:
        yield run, Selection(everything, weights=tuple(factors.tolist())), (found := _Boosting(
            config, data, factors, len(labels)
        ))  # fmt: skip
        if found.step is None or found.step.is_last:
            return
        factors = found.step.factors


class _Boosting:
    """Finds α of a trained member by its errors on the training rows."""

    def __init__(self, config: FinetuneConfig, data: LoadedData, factors: Float64, classes: int) -> None:
        self._config, self._data, self._factors, self._classes = config, data, factors, classes
        self.step: Boosted | None = None

    def __call__(self, run: RunDirectory) -> float | None:
        rows = self._data.train
        weights = np.ones(len(rows)) if rows.sequences.weights is None else np.asarray(rows.sequences.weights)
        self.step = step = samme(training_errors(run, self._data, self._config), weights, self._factors, self._classes)
        told = f"{run.name}: error {step.error:.1%} on the weighted training rows"
        if step.alpha is None:
            warn(f"{told}, no better than chance; it is left out, and boosting ends")
        elif step.is_last:
            warn(f"{told}: it gets every row right, so boosting ends; members of fewer steps would leave errors")
        else:
            err.print(f"{told}, weight {step.alpha:.3f}")
        return step.alpha


def load_rows(config: FinetuneConfig) -> LoadedData:
    """The rows of the config, which members select from."""
    renderer = build_renderer(
        load_run_tokenizer(config, alone=True), config.model, config.data.template, config.data.system
    )
    return load_data(config.data, renderer, config.train.seed, config.objective.rows)


def training_errors(run: RunDirectory, data: LoadedData, config: FinetuneConfig) -> Bools:
    """`[N]`: the training rows that a trained member gets wrong."""
    found = _rows_of(load_for_inference(str(run.path)), data.train, config, run.name)
    return np.asarray(found.parts["sequence_accuracy"][:, 0] == 0)


# --- scores


@dataclass(frozen=True)
class Gain:
    """One model beside another on the same rows, by the score `metric`."""

    metric: str
    first: float
    second: float
    difference: Difference


@dataclass(frozen=True)
class Scored:
    """A model on the validation rows; `weight` is how much a member counts."""

    name: str
    rows: RowScores
    weight: float | None = None


@dataclass(frozen=True)
class EnsembleScores:
    """An ensemble on rows that no member was trained on.

    Attributes:
        members: each alone.
        together: all of them.
        metric: the score by which models are told apart.
        combined: one adapter made of the members, if that was asked for.
    """

    members: Sequence[Scored]
    together: Scored
    metric: str
    combined: Scored | None = None

    @property
    def best(self) -> Scored:
        """The best member, by the metric and then by the loss."""
        sign = -1.0 if self.metric == "loss" else 1.0
        return max(self.members, key=lambda one: (sign * one.rows.scores.value(self.metric), -one.rows.scores.loss))

    def beside(self, first: Scored, second: Scored) -> Gain:
        """The second of two models beside the first."""
        one, other = first.rows.parts[self.metric], second.rows.parts[self.metric]
        found = difference(one, other, mean_of_sums, higher_is_better=self.metric != "loss")
        assert found is not None
        values = first.rows.scores.value(self.metric), second.rows.scores.value(self.metric)
        return Gain(self.metric, *values, found)


def score_ensemble(folder: Path, config: FinetuneConfig, combined: Combination | None = None) -> EnsembleScores | None:
    """Each member and all together on the validation rows of the config; None where there are no such rows.

    With `combined` one adapter is made of them, too, `combined-…` in the folder.
    """
    file = EnsembleFile.read(folder)
    places, loaded = file.places(folder), load_members(file, folder)
    target = folder / f"combined-{combined}"
    if combined is not None:
        run = find_run(places[0])
        combine(loaded, combined, places[0] if run is None else run.adapter, target, config.train.seed)
    held_out = load_rows(config).validation
    if held_out is None:
        return None
    score = partial(_rows_of, rows=held_out, config=config)
    members = [
        Scored(place.name, score(replace(loaded, members=Members((name,))), who=place.name), weight)
        for name, place, weight in zip(loaded.members.adapters, places, file.weights, strict=True)
    ]
    together = Scored("ensemble", score(loaded, who="all members together"))
    one = None if combined is None else Scored(target.name, score(load_for_inference(str(target)), who=target.name))
    # which rows are right, or, of answers and values, how far off they are
    of_loss = config.objective.rows == "answer" or (loaded.head is not None and loaded.head.kind == "value")
    return EnsembleScores(members, together, "loss" if of_loss else "sequence_accuracy", one)


def _rows_of(loaded: LoadedModel, rows: TokenizedData, config: FinetuneConfig, who: str) -> RowScores:
    forward, objective = loaded.packed_forward(), objective_of(config.objective, loaded.head)
    with loaded.use_base():
        find = partial(sequence_logprobs, forward, objective.units, what=plural_of(objective))
        known = objective.precompute(rows, find)
    return score_rows(forward, objective, known, _PACK_TOKENS, who)
