"""lmtune from Python: what a verb of the command line does, a function does.

    import lmtune

    run = lmtune.finetune(model="Qwen/Qwen3-0.6B", data=[{"prompt": "…", "completion": "…"}])
    run.scores.tuned.exact_match
    run.load().chat("Where is my order?")
    lmtune.evaluate(run, "heldout.jsonl")

Rows may be a path, a list of dicts, a pandas DataFrame or a Dataset. A function prints nothing but a progress bar
(`progress=False` switches it off) and raises an `LmtuneError` for what a user can fix. The same call again resumes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmtune.config import load as configuration
from lmtune.config.files import find_config, run_name
from lmtune.config.load import Overrides, build_config, first_path, with_overrides
from lmtune.config.schema import DataSource, FinetuneConfig, Quantization
from lmtune.data.checking import check_config, check_data
from lmtune.data.in_memory import Data, paths_or_rows, rows_file
from lmtune.errors import ConfigError, DataError
from lmtune.io.console import quiet
from lmtune.runs.columns import columns_for
from lmtune.runs.history import run_status
from lmtune.runs.store import RunDirectory

if TYPE_CHECKING:
    from lmtune.evaluation.evaluate import Evaluation
    from lmtune.evaluation.scoring import Scores
    from lmtune.inference.chat import ChatSession
    from lmtune.inference.load import LoadedModel
    from lmtune.models.tuning.adapter_files import Into
    from lmtune.runs.log import StepRecord

__all__ = ["Model", "Run", "RunScores", "chat", "evaluate", "finetune", "load", "load_config", "predict"]

Message = Mapping[Literal["role", "content"], str]


@dataclass(frozen=True)
class RunScores:
    """Scores of the held-out rows before and after training; None where none were held out or scored."""

    base: Scores | None
    tuned: Scores | None


@dataclass(frozen=True)
class Run:
    """A fine-tuning run on disk, in the folder `path`."""

    path: Path

    @property
    def config(self) -> FinetuneConfig:
        """The resolved settings."""
        return configuration.load_config(FinetuneConfig, self._directory.config)

    @property
    def status(self) -> str:
        """`complete`, `running`, `interrupted` or `failed`."""
        return run_status(self._directory, self._directory.read_summary())

    @property
    def adapter(self) -> Path:
        """The adapter's folder, which plain PEFT loads."""
        return self._directory.adapter

    @property
    def metrics(self) -> list[StepRecord]:
        """One record a step: loss, learning rate, gradient norm, tokens, seconds. `pandas.DataFrame(run.metrics)`."""
        from lmtune.runs.log import step_records

        return step_records(self._directory)

    @property
    def scores(self) -> RunScores:
        """Scores of the held-out rows, base and tuned."""
        from lmtune.evaluation.scoring import Scores

        summary = self._directory.read_summary()
        base, tuned = (Scores.from_dict(dict(scores)) if scores else None for scores in (summary.base, summary.tuned))
        return RunScores(base, tuned)

    @property
    def predictions(self) -> list[dict[str, str]]:
        """Held-out questions with the reference, the base's and the tuned model's answer."""
        from lmtune.runs.log import read_predictions

        return read_predictions(self._directory)

    def load(self, quantization: Quantization | None = None) -> Model:
        """The tuned model, ready to answer."""
        return load(self, quantization=quantization)

    def merge(
        self, output: str | os.PathLike[str] | None = None, *, into: Into = "trained", accept_difference: bool = False,
        base: str | os.PathLike[str] | None = None, dtype: Literal["stored", "float32"] = "stored",
    ) -> Path:  # fmt: skip
        """Merge the adapter into its base: a plain model folder, verified against the model as trained.

        Args:
            output: the folder to write; `merged` in the run's if not given.
            into: `trained`: the weights that were trained over, dequantized. `original`: as published.
            accept_difference: keep the merged model even where its logits differ by more than rounding explains.
            base: where the base model is now, a folder or Hub id, if it was moved.
            dtype: of the changed weights: that of the base, or fp32, in which nothing is rounded.

        Raises:
            ConfigError: `output` cannot be written, or holds something else.
            ModelError: there is no adapter, the base is another one, or the merged model differs.
        """
        from lmtune.export.merged import merge_run

        folder = self._directory.merged if output is None else Path(output)
        with quiet():
            place = None if base is None else os.fspath(base)
            merge_run(self._directory, folder, into, accept_difference, place, dtype == "float32")
        return folder

    @property
    def _directory(self) -> RunDirectory:
        return RunDirectory(self.path)


class Model:
    """A model in memory that answers; `load` makes one. Without an adapter `base=True` makes no difference."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self.name = loaded.name
        self.has_adapter = loaded.has_adapter

    def __repr__(self) -> str:
        return f"<lmtune.Model {self.name}>"

    def chat(
        self, question: str, *, history: Sequence[Message] = (), system: str | None = None, max_new_tokens: int = 256,
        temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, base: bool = False,
    ) -> str:  # fmt: skip
        """The answer to one question.

        Args:
            question: what the user says.
            history: earlier turns, as dicts of `role` and `content`.
            system: the system prompt; that of training if not given.
            max_new_tokens: where an answer that does not stop is cut.
            temperature: 0 is greedy.
            top_p: nucleus sampling threshold.
            seed: equal seeds give equal answers.
            base: answer without the adapter.

        Raises:
            LmtuneError: an option is out of bounds, or the conversation is longer than the model can read.
        """
        from lmtune.inference.request import Sampling

        sampling = Sampling(temperature, top_p, max_new_tokens, seed)
        return self.session(system, history).reply(question, sampling, use_base=base)

    def session(self, system: str | None = None, history: Sequence[Message] = ()) -> ChatSession:
        """A conversation: `for piece in session.stream("…"): …`; it keeps what was said."""
        from lmtune.data.types import Message as Turn
        from lmtune.inference.chat import ChatSession

        for index, message in enumerate(history):
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise ConfigError(f"history[{index}]: expected a dict of role (system, user or assistant) and content")
        turns = [Turn(message["role"], message["content"]) for message in history]  # type: ignore[arg-type]
        return ChatSession(self._loaded, system, turns)


def finetune(
    config: FinetuneConfig | str | os.PathLike[str] | None = None, *, model: str | None = None,
    data: Data | None = None, validation: Data | None = None, name: str | None = None, overrides: Overrides = (),
    progress: bool = True, verbose: bool = False,
) -> Run:  # fmt: skip
    """Fine-tune a model; the same call again resumes a run that was stopped, and returns one that is complete.

    Args:
        config: settings, or a YAML file; without one the defaults, for which `model` and `data` are needed.
        model: a Hub id, a local folder, a GGUF file, or `tiny`.
        data: rows to train on: a path, several, a list of dicts, a DataFrame or a Dataset; also sources, as
            `data.train` takes them: `[{"path": "a.csv", "share": 0.7}, {"path": "hub:user/name", "split": "train"}]`.
        validation: rows to score on; without them `data.validation_fraction` of `data` is held out.
        name: of the run; from the data's file or content if neither this nor the config names it.
        overrides: settings by key, `{"train.epochs": 1}`, or as on the command line, `["train.epochs=1"]`.
        progress: show a progress bar.
        verbose: print what the command prints.

    Raises:
        ConfigError, DataError, ModelError, CheckpointError: something is wrong with what was given; a faulty row is
            named as `data:LINE`, counted from 1.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint holds the last step.
    """
    if isinstance(overrides, Mapping):
        overrides = {key: str(value.path) if isinstance(value, Run) else value for key, value in overrides.items()}
    tree = with_overrides(config, overrides)
    for key in ("model", "data", "run"):
        if not isinstance(tree.setdefault(key, {}), dict):
            build_config(FinetuneConfig, tree, where="lmtune.finetune")  # says what is wrong
    if model is not None:
        tree["model"]["name"] = model
    section, runs = tree["data"], Path(str(tree["run"].get("dir") or "runs"))
    files: dict[str, str] = {}
    for key, given in (("train", data), ("validation", validation)):
        if given is not None:
            section[key] = _paths_of(given, runs / ".rows", "data" if key == "train" else "validation", files)
    if name is not None:
        tree["run"]["name"] = name
    elif tree["run"].get("name") is None:
        tree["run"]["name"] = _run_name(config, section.get("train"), files)
    missing = [what for what, key in (("model", "model"), ("data", "data")) if not tree.get(key)]
    if config is None and missing:
        raise ConfigError(f"finetune: {' and '.join(missing)} missing; give a config, or model=… and data=…")
    settings = build_config(FinetuneConfig, tree, where="lmtune.finetune")

    directory = RunDirectory.of(settings.run)
    with quiet(progress=progress, enabled=not verbose), _naming_rows(files):
        from lmtune.training.run import run_finetune

        check_config(settings)
        run_finetune(settings, directory)
    return Run(directory.path)


def load(
    target: str | os.PathLike[str] | Run, *, quantization: Quantization | None = None,
    base: str | os.PathLike[str] | None = None, vote: bool = False,
) -> Model:  # fmt: skip
    """Load a model to talk to.

    Args:
        target: a run or its name, an ensemble, an adapter folder, a merged or plain model folder, a Hub id, or `tiny`.
        quantization: of the base; by default what the adapter was trained over, and none for a plain model.
        base: where the base of a run or adapter is now, a folder or Hub id, if it was moved.
        vote: count the votes of an ensemble's members, whatever it says itself.

    Raises:
        ConfigError: `vote` for what is no ensemble.
        ModelError: no such run, adapter or model, or a damaged one.
    """
    with quiet():
        from lmtune.inference.load import load_for_inference

        name = str(target.path) if isinstance(target, Run) else os.fspath(target)
        where = None if base is None else os.fspath(base)
        return Model(load_for_inference(name, quantization, where, "vote" if vote else None))


def chat(target: str | os.PathLike[str] | Run | Model, question: str, **options: Any) -> str:
    """One answer of what `target` names; the options are those of `Model.chat`. `load` once for more than one."""
    model = target if isinstance(target, Model) else load(target)
    return model.chat(question, **options)


def evaluate(
    target: str | os.PathLike[str] | Run | Model, data: Data, *, exact_match_rows: int = 200, max_new_tokens: int = 128,
    max_length: int = 2048, columns: Mapping[str, str] | None = None, metrics: Sequence[str] = (),
    by: str | None = None,
) -> Evaluation:  # fmt: skip
    """Score a model on rows with known answers, with and without its adapter.

    Args:
        target: what `load` takes, or a loaded model.
        data: a path, several, a list of dicts, a DataFrame or a Dataset.
        exact_match_rows: generate answers for so many rows.
        max_new_tokens: where an answer that does not stop is cut.
        max_length: longer rows are left out.
        columns: keys for columns of other names; by default those that the run was trained with.
        metrics: of generated answers, by their names: `("f1", "number:Answer:")`; the first decides the comparison.
        by: a field of the rows, `length` or `source`, by which they are sliced.

    Raises:
        DataError: a row is faulty; named as `data:LINE`, counted from 1.
        ConfigError: there is no such metric or field.
        ModelError: the target cannot be loaded.
    """
    from lmtune.evaluation.answer_metrics import answer_metrics
    from lmtune.evaluation.evaluate import evaluate_loaded

    with _loaded_with_files(target, data) as (loaded, paths):
        known = columns_for(loaded.run, paths, columns)
        check_data(paths, columns=known)
        return evaluate_loaded(
            loaded, paths, exact_match_rows, max_new_tokens, max_length, known, answer_metrics(metrics, ()), by
        )


def predict(
    target: str | os.PathLike[str] | Run | Model, data: Data, *, max_length: int = 2048, max_new_tokens: int = 128,
    columns: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What a model says of each row, in their order: the row with `prediction` beside its own keys.

    Args:
        target: what `load` takes, or a loaded model.
        data: a path, several, a list of dicts, a DataFrame or a Dataset; rows have labels or not.
        max_length: of longer rows a classifier reads the last tokens.
        max_new_tokens: where an answer that does not stop is cut.
        columns: keys for columns of other names; by default those that the run was trained with.

    Raises:
        DataError: a row is faulty; named as `data:LINE`, counted from 1.
        ModelError: the target cannot be loaded.
    """
    from lmtune.evaluation.predict import predict as rows_of

    with _loaded_with_files(target, data) as (loaded, paths):
        return list(rows_of(loaded, paths, max_length, max_new_tokens, columns))


@contextlib.contextmanager
def _loaded_with_files(
    target: str | os.PathLike[str] | Run | Model, data: Data
) -> Iterator[tuple[LoadedModel, list[str | DataSource]]]:
    """What is named, loaded, and the files that its rows are in while the block runs; quiet but for errors."""
    model = target if isinstance(target, Model) else load(target)
    files: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, quiet(), _naming_rows(files):
        paths = _paths_of(data, Path(folder), "data", files)
        yield model._loaded, [one if isinstance(one, str) else DataSource(**one) for one in paths]


def load_config(path: str | os.PathLike[str], overrides: Overrides = ()) -> FinetuneConfig:
    """The settings of a YAML file, with `overrides` in place of its own.

    Raises:
        ConfigError: with every problem found, each by `section.key`.
    """
    return configuration.load_config(FinetuneConfig, os.fspath(path), overrides)


def _paths_of(data: Data, folder: Path, name: str, files: dict[str, str]) -> tuple[str | Mapping[str, Any], ...]:
    """The files or sources of `data`; rows in memory become one in `folder`, noted in `files` as `name`."""
    given = paths_or_rows(data, name)
    if isinstance(given, tuple):
        return given
    path = str(rows_file(given, folder, name))
    files[path] = name
    return (path,)


def _run_name(config: FinetuneConfig | str | os.PathLike[str] | None, train: object, files: Mapping[str, str]) -> str:
    """The name of a run that was given none: its config file's, its data file's, or one by the content of its rows."""
    if isinstance(config, (str, os.PathLike)):
        return find_config(config).stem  # the shipped qwen3_0.6b may be named without its suffix
    first = first_path(train)
    return f"rows-{Path(first).stem[:8]}" if first in files else run_name(first)


@contextlib.contextmanager
def _naming_rows(files: Mapping[str, str]) -> Iterator[None]:
    """Name rows in memory as the caller knows them, `data:17`, in errors that name the file written for them."""
    try:
        yield
    except DataError as error:
        text = str(error)
        for path, name in files.items():
            text = text.replace(path, name)
        raise DataError(text) from error
