"""What a run does between two steps: score the validation rows, stop early, record, save, show progress.

    hooks = [ProgressHook(bar), EvaluationHook(…), EarlyStoppingHook(…), RecordHook(…), CheckpointHook(…)]

Their order matters: the records tell what the evaluation has scored, and a checkpoint follows a stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from lmtune.config.metrics import Direction
from lmtune.config.schema import FinetuneConfig
from lmtune.evaluation.scoring import Scores
from lmtune.io.console import warn
from lmtune.models.tensor_shards import are_shared_out, copy_into
from lmtune.models.tuning.base import Tensors
from lmtune.runs.events import CheckpointSaved, Evaluated, EventLog, StepDone
from lmtune.runs.log import Accuracies, Records, StepRecord
from lmtune.runs.store import RunDirectory, checkpoint_folder, checkpoint_folders, problem_of
from lmtune.training.checkpoint import (
    Checkpoint,
    CheckpointState,
    load_checkpoint,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
    save_together,
)
from lmtune.training.loop import Action, StepEvent, TrainingJob
from lmtune.training.progress import StepProgress
from lmtune.training.state import RunSignature, TrainState


class Hook:
    """A hook that does nothing."""

    def after_step(self, event: StepEvent) -> Action:
        return "continue"

    def on_failure(self, state: TrainState) -> None:
        pass


class ProgressHook(Hook):
    """Moves the bar."""

    def __init__(self, progress: StepProgress) -> None:
        self.progress = progress

    def after_step(self, event: StepEvent) -> Action:
        self.progress.advance(event.plan.step, event.result.loss, event.plan.totals.tokens, event.seconds)
        return "continue"


class EvaluationHook(Hook):
    """Scores the validation rows every so many steps and after the last, and notes which step is the best so far."""

    def __init__(
        self, score: Callable[[], Scores], metric: str, direction: Direction, every_steps: int | None,
        progress: StepProgress,
    ) -> None:  # fmt: skip
        """`metric` of what `score` gives says which step is the best, in this direction."""
        self.score, self.metric, self.direction = score, metric, direction
        self.every_steps, self.progress = every_steps, progress

    def after_step(self, event: StepEvent) -> Action:
        state, every = event.state, self.every_steps
        if not (state.step == event.total_steps or (every is not None and state.step % every == 0)):
            return "continue"
        event.validation = self.score()
        name, best = self.metric, state.best_loss
        value = event.validation.value(name)
        is_better = best is None or (value < best if self.direction == "min" else value > best)
        if is_better:
            state.best_step, state.best_loss, state.evaluations_without_gain = state.step, value, 0
        else:
            state.evaluations_without_gain += 1
        note = "best so far" if is_better else f"best was {best:.4f} at step {state.best_step}"
        self.progress.say(f"step {state.step}: validation {name} {value:.4f} ({note})")
        return "continue"


class EarlyStoppingHook(Hook):
    """Ends the run after `patience` evaluations without a better score."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def after_step(self, event: StepEvent) -> Action:
        return "stop" if self.is_due(event.state) else "continue"

    def is_due(self, state: TrainState) -> bool:
        """Whether patience is used up."""
        return state.evaluations_without_gain >= self.patience


class RecordHook(Hook):
    """Writes each step to `metrics.jsonl` and `results.csv`, and as an event."""

    def __init__(self, records: Records, events: EventLog, metric: str) -> None:
        """`metric` is what says which step is the best."""
        self.records, self.events, self.metric = records, events, metric

    def after_step(self, event: StepEvent) -> Action:
        plan, result, state = event.plan, event.result, event.state
        record = StepRecord(
            plan.step, round(plan.epoch, 6), result.loss, event.learning_rate, result.grad_norm, plan.totals.tokens,
            plan.totals.targets, plan.totals.examples, round(event.seconds, 6), result.metrics,
        )  # fmt: skip
        training = Accuracies(
            result.loss, result.num_correct / plan.totals.examples, result.metrics.get("token_accuracy")
        )
        scores = event.validation
        validation = (
            None if scores is None else Accuracies(scores.loss, scores.sequence_accuracy, scores.token_accuracy)
        )
        self.records.add(record, (state.elapsed_tokens, state.elapsed_examples), training, validation)
        self.events.add(StepDone(**vars(record)))
        if scores is not None:
            self.events.add(Evaluated(state.step, "validation", scores.as_dict(), self.metric, state.best_step))
        return "continue"


class CheckpointHook(Hook):
    """Saves what is needed to resume: every so many steps and minutes, after the best step, the last, and a signal."""

    def __init__(
        self, run: RunDirectory, config: FinetuneConfig, signature: RunSignature, job: TrainingJob, total_steps: int,
        events: EventLog,
    ) -> None:  # fmt: skip
        self.run, self.config, self.signature, self.events = run, config, signature, events
        self.job, self.parallel, self.total_steps = job, job.parallel, total_steps
        self._is_shared_out = are_shared_out(job.parameters)
        self._saved_at = time.monotonic()

    def after_step(self, event: StepEvent) -> Action:
        due = event.is_last or event.is_interrupted or self._is_due(event)
        if self._is_shared_out:  # all write together, by the clock and the scores of one
            due = self.parallel.gather([due])[0]
        if due:
            self.on_failure(event.state)
            self._saved_at = time.monotonic()
        return "continue"

    def on_failure(self, state: TrainState) -> None:
        """Write a checkpoint from rank 0, or from all where they hold what is trained together, then drop the oldest.

        Before the first step there is none.
        """
        if not (self.parallel.is_main or self._is_shared_out) or state.step == 0:
            return
        self.parallel.phase = f"saving step {state.step}"  # while the others wait in the next one
        parameters = self.job.parameters
        weights = {name: parameter.detach().contiguous() for name, parameter in parameters.items()}
        setting = self.config.train.micro_batch_tokens
        saved = CheckpointState(replace(state), self.signature, self.total_steps, setting)
        started, known = time.monotonic(), checkpoint_folders(self.run.checkpoints)
        checkpoint = Checkpoint(weights, optimizer_tensors(self.job.optimizer, parameters), saved)
        if self._is_shared_out:
            path = save_together(self.run.checkpoints, checkpoint, self.parallel)
        else:
            path = save_checkpoint(self.run.checkpoints, checkpoint)
        if not self.parallel.is_main:
            return
        if path not in known:
            place = path.relative_to(self.run.path).as_posix()
            self.events.add(CheckpointSaved(state.step, place, round(time.monotonic() - started, 3)))
        best = state.best_step if self.config.evaluation.keep_best else None
        prune_checkpoints(self.run.checkpoints, self.config.run.keep_checkpoints, best, state.step)

    def best_weights(self, state: TrainState) -> Tensors | None:
        """Put the best step's weights into the model and return them; None if the last step is to be kept."""
        if not self.config.evaluation.keep_best or state.best_step in (None, state.step):
            return None
        self.parallel.barrier()
        path = checkpoint_folder(self.run.checkpoints, state.best_step)
        if problem := problem_of(path):
            if self.parallel.is_main:
                warn(
                    f"the checkpoint of the best step, {path.name}, is damaged: {problem}; the last step's weights are "
                    "kept"
                )
            state.best_step = None
            return None
        best = load_checkpoint(path)
        copy_into(self.job.parameters, best.weights)
        return best.weights

    def _is_due(self, event: StepEvent) -> bool:
        """Whether a checkpoint is to be written, as rank 0 sees it; the ranks need not have the same clock."""
        minutes, state = self.config.run.checkpoint_every_minutes, event.state
        if minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes:
            return True
        is_best = event.validation is not None and state.best_step == state.step and self.config.evaluation.keep_best
        return is_best or state.step % self.config.run.checkpoint_every_steps == 0
