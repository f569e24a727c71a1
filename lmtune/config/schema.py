"""The configuration of a fine-tuning run: eight small frozen sections, checked whole before anything is loaded.

    config = load_config(FinetuneConfig, "recipes/configs/quickstart.yaml", ["train.epochs=1"])
    config.train.batch_size

A setting is written once, here, with its default, its bounds and its meaning. That a config is a handful of small types
follows litgpt's `args.py`.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast, dataclass_transform, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic.dataclasses import dataclass

from lmtune.config.files import plain_name
from lmtune.config.metrics import GENERATED, METRICS
from lmtune.errors import ConfigError
from lmtune.io.console import HUB_TOKEN
from lmtune.io.text import format_list, pluralize, shorten

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
    """Make a class a config section: a frozen dataclass whose values are checked when it is made.

    Made by hand, `TrainConfig(epochs=-1)`, it raises ConfigError as a file does.
    """
    made: Any = dataclass(frozen=True, kw_only=True, config=_STRICT)(cls)
    checked = made.__init__

    @functools.wraps(checked)
    def init(self: Any, **values: Any) -> None:
        try:
            checked(self, **values)
        except ValidationError as error:
            raise settings_error(made.__name__, describe_all(made, error)) from None

    made.__init__ = init
    return cast(type[T], made)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Quantization = Literal["none", "nf4", "int8"]
MAX_RANK = 4096
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    BeforeValidator(
        lambda value: (
            _DTYPES.get(value.removeprefix("torch."), value.removeprefix("torch.")) if isinstance(value, str) else value
        )
    ),
]
# What a row is: an answer, a better and a worse one, one that is judged, or a whole with a label.
RowKind = Literal["answer", "pair", "judged", "labelled"]
# A run's folder is `run.dir/run.name`: one plain folder name, which cannot climb out of `run.dir`.
RunName = Annotated[str, AfterValidator(plain_name)]

_PLAIN_NAMES = re.compile(r"[\w.-]+(\s*,\s*[\w.-]+)*")


def _names(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """A list of names where no character makes `value` a regular expression: `q_proj`, or `q_proj,v_proj`."""
    if isinstance(value, str) and value != "all-linear" and _PLAIN_NAMES.fullmatch(value):
        return tuple(re.split(r"\s*,\s*", value))
    return value


def _unique(value: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [item for number, item in enumerate(value) if item in value[:number]]:
        raise ValueError(f"a list in which nothing stands twice; {twice[0]} does")
    return value


# `all-linear`, names, or a regular expression on full names
TargetModules = Annotated[str | Annotated[tuple[str, ...], Field(min_length=1)], AfterValidator(_names)]
# Names of parts, or a regular expression on full names of parameters
Parts = TargetModules


@section
class ModelConfig:
    """Which base model, and how its frozen weights are held in memory."""

    name: Annotated[str, Field(min_length=1)]  # a Hub id, a local folder, a GGUF file, or `tiny`
    revision: str | None = None  # a branch, tag or commit on the Hub
    quantization: Quantization = "nf4"  # of the frozen weights: nf4 is 4 bit, int8 is 8 bit
    dtype: Dtype = "auto"  # auto: bf16 where the device multiplies in it faster, else fp32
    # layers: decoder layers come into memory ahead of use and leave it again; auto: where the base does not fit
    offload: Literal["auto", "none", "layers"] = "auto"
    resident_layers: Count = 2  # the most decoder layers in memory at once with offload; more: faster, more memory


@section
class LoraConfig:
    """What is trained: a low-rank adapter beside the frozen base; names and meanings are PEFT's."""

    kind: Literal["lora"] = "lora"  # lora: https://arxiv.org/abs/2106.09685; full: every weight; partial: some parts
    # a run, an adapter folder or one on the Hub (user/name) to begin from; its rank, alpha, layers and variant hold
    # where these are left at default
    adapter: Annotated[str, Field(min_length=1)] | None = None
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 16  # higher: more capacity, more memory
    alpha: Annotated[float, Field(gt=0, le=1e30)] = 32  # the adapter's output is scaled by alpha / rank
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # share of the adapter's inputs set to 0 in training
    target_modules: TargetModules = "all-linear"  # or names (q_proj,v_proj), or a regular expression
    use_rslora: bool = False  # scale by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732
    use_dora: bool = False  # https://arxiv.org/abs/2402.09353
    init_lora_weights: Literal["default", "pissa"] = "default"  # PiSSA: https://arxiv.org/abs/2404.02948
    # the learning rate of B is so many times that of A, https://arxiv.org/abs/2402.12354
    lora_plus_ratio: Annotated[float, Field(gt=0, le=1e4)] = 1.0
    # modules that are trained whole beside the adapter: head, embeddings, or names (q_norm)
    modules_to_save: Annotated[tuple[str, ...], AfterValidator(_unique)] = ()
    # tokens to add to the vocabulary; of the embeddings only their rows are trained
    new_tokens: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AfterValidator(_unique)] = ()


@section
class FullConfig:
    """What is trained: every weight of the model; needs `model.quantization: none`, and 16 bytes a weight."""

    kind: Literal["full"] = "full"  # the result is a plain model, in `merged/` of the run


@section
class PartialConfig:
    """What is trained: parts of the model's own weights; needs `model.quantization: none`."""

    kind: Literal["partial"] = "partial"  # the result is a plain model, in `merged/` of the run
    # head, embeddings, norms, last_4_layers (or another number), or a regular expression on full names of parameters
    parts: Parts


# What is trained is told apart by `kind`
TuningConfig = Annotated[LoraConfig | FullConfig | PartialConfig, Field(discriminator="kind")]


@section
class SftConfig:
    """What is minimized over the rows."""

    # sft: the cross-entropy of every answer token; dpo, ipo, orpo, simpo: over pairs of answers; kto: over judged ones;
    # classification, regression: over labelled rows; reward: a number for each answer of a pair
    kind: Literal["sft"] = "sft"

    @property
    def rows(self) -> RowKind:
        """Which rows it is minimized over."""
        return "answer"


class _OverPairs:
    @property
    def rows(self) -> RowKind:
        """Which rows it is minimized over."""
        return "pair"


Beta = Annotated[float, Field(gt=0, le=1e3)]
Weight = Annotated[float, Field(ge=0, le=1e3)]


@section
class DpoConfig(_OverPairs):
    """What is minimized over pairs: the chosen answer gains on the rejected one, relative to the model at the start."""

    kind: Literal["dpo"] = "dpo"  # https://arxiv.org/abs/2305.18290
    beta: Beta = 0.1  # higher: stays closer to the model at the start
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # the share of pairs that may be the wrong way round
    sft_weight: Weight = 0.0  # of the chosen answer's negative log-probability a token, beside the preference


@section
class IpoConfig(_OverPairs):
    """What is minimized over pairs: the margin of log-ratios a token goes to 1 / (2 beta), and not beyond."""

    kind: Literal["ipo"] = "ipo"  # https://arxiv.org/abs/2310.12036
    beta: Beta = 0.1  # higher: a smaller margin is enough


@section
class OrpoConfig(_OverPairs):
    """What is minimized over pairs: the chosen answer's cross-entropy, and its odds to the rejected one."""

    kind: Literal["orpo"] = "orpo"  # https://arxiv.org/abs/2403.07691
    beta: Beta = 0.1  # of the odds ratio, beside the cross-entropy


@section
class SimpoConfig(_OverPairs):
    """What is minimized over pairs: the mean log-probability a token of the chosen answer gains; no reference."""

    kind: Literal["simpo"] = "simpo"  # https://arxiv.org/abs/2405.14734
    beta: Beta = 2.0  # of the difference of mean log-probabilities
    gamma: Weight = 1.0  # the margin that is asked for


@section
class KtoConfig:
    """What is minimized over judged answers: good ones become more likely, bad ones less, by a value function."""

    kind: Literal["kto"] = "kto"  # https://arxiv.org/abs/2402.01306
    beta: Beta = 0.1  # higher: stays closer to the model at the start
    desirable_weight: Weight = 1.0  # of good answers; with the other one it balances rows of unequal numbers
    undesirable_weight: Weight = 1.0  # of bad answers

    @property
    def rows(self) -> RowKind:
        """Which rows it is minimized over."""
        return "judged"


class _OverLabels:
    @property
    def rows(self) -> RowKind:
        """Which rows it is minimized over."""
        return "labelled"


@section
class ClassificationConfig(_OverLabels):
    """What is minimized over labelled rows: the cross-entropy of the class, or of each class where labels are lists."""

    kind: Literal["classification"] = "classification"  # a head on the last token, over the classes of the rows
    class_weights: Literal["none", "balanced"] = "none"  # balanced: every class has the same share in the loss


@section
class RegressionConfig(_OverLabels):
    """What is minimized over labelled rows: the squared difference from a number."""

    kind: Literal["regression"] = "regression"  # a head on the last token


@section
class RewardConfig(_OverPairs):
    """What is minimized over pairs: a reward model, which gives the chosen answer the higher number."""

    kind: Literal["reward"] = "reward"  # a head on the last token; Bradley-Terry


# What is minimized is told apart by `kind`
ObjectiveConfig = Annotated[
    SftConfig | DpoConfig | IpoConfig | OrpoConfig | SimpoConfig | KtoConfig | ClassificationConfig | RegressionConfig
    | RewardConfig,
    Field(discriminator="kind"),
]  # fmt: skip


@section
class DataSource:
    """Rows of one file, folder or data set on the Hub."""

    path: Annotated[str, Field(min_length=1)]  # a file, a folder, book.xlsx:SHEET, or hub:NAME[:CONFIG][@REVISION]
    split: Annotated[str, Field(min_length=1)] | None = None  # of a data set on the Hub; null: train, or validation
    # share of the examples of an epoch; the sources without one have the rest, in proportion to their sizes
    share: Annotated[float, Field(gt=0, lt=1)] | None = None


def _form(value: object) -> str:
    """Which form of a source, or of several, is meant, so that a message speaks of this one alone."""
    return "<list>" if isinstance(value, (list, tuple)) else "<path>" if isinstance(value, str) else "<source>"


def _not_empty(value: tuple[T, ...]) -> tuple[T, ...]:
    if not value:
        raise ValueError("a list of at least one file, folder or data set")
    return value


_Path: TypeAlias = Annotated[str, Tag("<path>")]
_Source: TypeAlias = Annotated[DataSource, Tag("<source>")]
_Sources: TypeAlias = tuple[Annotated[_Path | _Source, Discriminator(_form)], ...]
# A file, a folder or a data set on the Hub, or several.
DataSources = Annotated[
    _Path | _Source | Annotated[_Sources, AfterValidator(_not_empty), Tag("<list>")], Discriminator(_form)
]  # fmt: skip
ColumnName = Annotated[str, Field(min_length=1)]


@section
class DataConfig:
    """Which rows are trained on, and how each becomes tokens."""

    train: DataSources  # rows to train on: a file, several, a folder, hub:NAME, or {path, split, share} of each
    validation: DataSources | None = None  # other rows to score; without them `validation_fraction` of `train`
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05  # share of `train` held out to score on
    max_length: Annotated[int, Field(ge=8)] = 2048  # tokens of a row
    # for longer rows; truncate cuts the beginning, split cuts plain texts into pieces and drops other rows
    too_long: Literal["drop", "truncate", "split", "error"] = "drop"
    template: Literal["auto", "chat", "plain", "thinking"] = "auto"  # auto: the tokenizer's own chat template, if any
    system: str | None = None  # system prompt for rows that have none
    columns: dict[ColumnName, ColumnName] | None = None  # keys for columns of other names, {question: prompt}
    faulty_rows: Literal["error", "skip"] = "error"  # skip: rows that cannot be used are dropped, counted and named


@section
class TrainConfig:
    """The optimization. One optimizer step trains on `batch_size` examples, summed over all processes."""

    epochs: Annotated[float, Field(gt=0, le=1e6)] = 3  # passes over the rows
    max_steps: Count | None = None  # overrules `epochs`
    batch_size: Count = 32  # examples an optimizer step, over all processes
    micro_batch_tokens: Count | Literal["auto"] = "auto"  # memory and speed only; never the result
    # adamw_8bit: its two moments in 8 bit through bitsandbytes, 2 bytes a trained weight instead of 8
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    # at its highest; small models take more; find: by a range test of 60 steps before the first one
    learning_rate: Annotated[float, Field(gt=0, le=10)] | Literal["find"] = 2.0e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # how the learning rate falls
    warmup_ratio: Fraction = 0.03  # share of the steps in which the learning rate rises
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # AdamW's
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0  # null: no clipping
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of the order of rows, dropout and the adapter's start
    gradient_checkpointing: bool | Literal["auto"] = "auto"  # less memory, slower; auto: where the memory needs it


@section
class EvaluationConfig:
    """When the validation rows are scored during training, and what is done with the result."""

    every_steps: Count | None = None  # null: only before the first and after the last step
    # which score chooses the best step, as the run shows it: loss, token_accuracy, macro_f1, …; null: loss
    metric: str | None = None
    patience: Count | None = None  # stop after so many evaluations without a better score
    keep_best: bool = True  # with `every_steps`: the saved adapter is that of the best step, not of the last
    score_base: bool = True  # score the base too, before the first step, to compare with
    exact_match_rows: Annotated[int, Field(ge=0)] = 64  # generate answers for so many rows; 0: none
    max_new_tokens: Count = 128  # where a generated answer that does not stop is cut


@section
class ReplicatedConfig:
    """How several processes share the work."""

    kind: Literal["replicated"] = "replicated"  # each holds the whole model; gradients are summed


@section
class FsdpConfig:
    """The layers' weights are shared out over the processes."""

    kind: Literal["fsdp"] = "fsdp"  # each holds a part of the layers' weights; gradients are summed


ParallelConfig = Annotated[ReplicatedConfig | FsdpConfig, Field(discriminator="kind")]


@section
class RunConfig:
    """Where the run lives on disk, and how often it is saved."""

    dir: Annotated[str, Field(min_length=1)] = "runs"  # the folder that runs are kept in
    name: RunName | None = None  # null: the config file's name without `.yaml`
    checkpoint_every_steps: Count = 100  # what a crash may cost at most
    checkpoint_every_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = 10  # also by time; null: by steps alone
    keep_checkpoints: Count = 2  # the newest; older ones are removed
    resume: Literal["auto", "never"] = "auto"  # never: an earlier run of this name is renamed, and a new one begins
    # tensorboard, trackio, wandb, mlflow: who else is told of each step; without rows, secrets and paths
    trackers: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = ()
    # With several processes: they wait so long for one that does not come; a week at most.
    process_timeout_seconds: Annotated[int, Field(ge=1, le=604_800)] = 1800


@section
class FinetuneConfig:
    """Everything about one fine-tuning run."""

    model: ModelConfig
    data: DataConfig
    tuning: TuningConfig = LoraConfig()
    objective: ObjectiveConfig = SftConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    parallel: ParallelConfig = ReplicatedConfig()
    run: RunConfig = RunConfig()

    def problems(self) -> list[str]:
        """What is wrong between settings that are each right alone."""
        patience = self.evaluation.patience
        found = _lora_problems(self.tuning, self.model) if isinstance(self.tuning, LoraConfig) else []
        if not isinstance(self.tuning, LoraConfig) and self.model.quantization != "none":
            found.append(
                f"model.quantization: {self.model.quantization} holds frozen weights, and tuning.kind: "
                f"{self.tuning.kind} trains the model's own; set model.quantization: none, or tuning.kind: lora"
            )
        if not isinstance(self.tuning, LoraConfig) and self.model.offload == "layers":
            found.append(
                f"model.offload: layers streams frozen weights, and tuning.kind: {self.tuning.kind} trains the model's "
                "own; set model.offload: none, or tuning.kind: lora"
            )
        if patience is not None and self.evaluation.every_steps is None:
            found.append("evaluation.patience: needs evaluation.every_steps, the interval at which it counts")
        if patience is not None and self.data.validation is None and not self.data.validation_fraction:
            found.append(
                f"evaluation.patience: {patience} waits for validation scores, and data.validation_fraction: 0.0 holds "
                "no row out; raise the fraction, name data.validation, or set evaluation.patience: null"
            )
        metric, known = self.evaluation.metric, METRICS[self.objective.kind]
        if metric is not None and metric not in known:
            found.append(
                f"evaluation.metric: got {shorten(metric)}; should be {_either(known)}, of objective.kind: "
                f"{self.objective.kind}"
            )
        if metric == GENERATED and not self.evaluation.exact_match_rows:
            found.append(f"evaluation.metric: {GENERATED} needs rows to answer; raise evaluation.exact_match_rows")
        found += _share_problems(self.data)
        if re.search(HUB_TOKEN, self.run.name or ""):
            found.append("run.name: looks like a token of the Hub, and would be written down; choose another name")
        return found


def _share_problems(data: DataConfig) -> list[str]:
    """What is wrong with the shares of sources together."""
    found = []
    shares, validation = ([one.share for one in sources_of(part)] for part in (data.train, data.validation or ()))
    given = [share for share in shares if share is not None]
    total = sum(given)
    if any(share is not None for share in validation):
        found.append("data.validation: share says how training rows are mixed; remove it, all rows are scored")
    if given and len(given) == len(shares) and abs(total - 1) > 1e-6:
        found.append(f"data.train: the shares of all sources sum to {total:g}; make it 1, or leave one source without")
    elif given and len(given) < len(shares) and total > 1 - 1e-6:
        found.append(f"data.train: the shares sum to {total:g}, which leaves nothing for the sources without one")
    return found


def _lora_problems(tuning: LoraConfig, model: ModelConfig) -> list[str]:
    """What is wrong between settings of an adapter and its base."""
    found = []
    if tuning.init_lora_weights == "pissa" and model.quantization != "none":
        found.append(
            f"tuning.init_lora_weights: pissa rewrites the base weights, which {model.quantization} cannot "
            "hold; set model.quantization: none, or init_lora_weights: default"
        )
    if tuning.init_lora_weights == "pissa" and model.offload == "layers":
        found.append(
            "tuning.init_lora_weights: pissa rewrites the base weights, which model.offload: layers only reads; set "
            "model.offload: none, or init_lora_weights: default"
        )
    if tuning.init_lora_weights == "pissa" and tuning.use_dora:
        found.append("tuning.use_dora: cannot be combined with init_lora_weights: pissa; choose one")
    if tuning.adapter is not None and tuning.init_lora_weights != "default":
        found.append(
            f"tuning.adapter: {tuning.adapter} gives the initial weights, and so does "
            f"tuning.init_lora_weights: {tuning.init_lora_weights}; choose one"
        )
    return found


def sources_of(value: DataSources) -> tuple[DataSource, ...]:
    """The sources that `data.train` or `data.validation` names."""
    several = value if isinstance(value, tuple) else (value,)
    return tuple(DataSource(path=one) if isinstance(one, str) else one for one in several)


# --- sections, also those of several types


def section_types(hint: Any) -> tuple[type[Any], ...]:
    """The types that a section may be, told apart by `kind`; none for the type of a plain setting."""
    return tuple(kind for kind in get_args(hint) or (hint,) if isinstance(kind, type) and is_dataclass(kind))


def kind_of(section: type[Any]) -> str:
    """The `kind` that stands for a type of a section."""
    return next(str(field.default) for field in fields(section) if field.name == "kind")


# --- what is wrong, in words


def settings_error(where: str, problems: Sequence[str]) -> ConfigError:
    """One error for all problems of a config."""
    count = f"{pluralize(len(problems), 'setting')} {'is' if len(problems) == 1 else 'are'} wrong"
    return ConfigError(f"{where}: {count}\n{format_list(problems)}")


def describe_all(schema: type[Any], error: ValidationError) -> list[str]:
    """One line for each key; what each branch of a union wants is joined by "or"."""
    lines: dict[str, str] = {}
    for item in error.errors():
        where, _, wanted = _describe(schema, dict(item)).partition("; should be ")
        key = where.partition(":")[0]
        if key in lines and wanted:
            lines[key] += f", or {wanted}"
        else:
            lines.setdefault(key, f"{where}; should be {wanted}" if wanted else where)
    return list(lines.values())


def _describe(schema: type[Any], error: dict[str, Any]) -> str:
    """One line for one pydantic error: where, what is wrong, what was found, what is meant."""
    location = [str(part) for part in error["loc"]]
    types = section_types(get_type_hints(schema)[location[0]]) if location and location[0] in _keys(schema) else ()
    if len(types) > 1 and len(location) > 1:
        tag = location.pop(1)  # which pydantic puts between
        types = tuple(one for one in types if kind_of(one) == tag)
    elif len(types) > 1 and error["type"].startswith("union_tag"):
        named = shorten(error["input"].get("kind"))
        return f"{location[0]}.kind: got {named}; should be {_either([repr(kind_of(one)) for one in types])}"
    known = _known_keys(schema)
    inside = ""
    while location and ".".join(location) not in known and len(location) > 2:
        part = location.pop()  # of a list or mapping, or a branch name that pydantic adds inside a union
        inside = ("" if part.startswith("<") else f"[{part}]" if part.isdecimal() else f".{part}") + inside
    is_own = ".".join(location) in ("data.train", "data.validation", "data.columns")
    key = (".".join(location) + inside * is_own) or "the file"
    got = error.get("input")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if is_own:
            return f"{key}: unknown key; known: {', '.join(_keys(DataSource))}"
        return f"{key}: unknown key{_hint(schema, location, types, known)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key}: missing; it has no default"
    if error["type"] == "dataclass_type" and is_own:
        return f"{key}: got {shorten(got)}; should be a path, or {{path: …, split: …, share: …}}"
    if error["type"] == "dataclass_type" or (len(types) > 1 and not isinstance(got, dict)):
        return f"{key}: must be a section of `key: value` lines, got {shorten(got)}"
    wanted = re.sub(r"^(Input|String) should (be )?", "", error["msg"])
    if error["type"] == "string_type" and isinstance(got, (bool, int, float)):
        wanted += " (put it in quotes, or YAML takes it for a number or a truth)"
    wanted = wanted.removeprefix("Value error, ")
    return f"{key}: got {shorten(got)}; should be {wanted}"


def _hint(schema: type[Any], location: list[str], types: Sequence[type[Any]], known: Sequence[str]) -> str:
    """What may be meant by a key that is unknown in its section, which is of one of `types` where it has several."""
    *above, last = location
    names = [name for one in types for name in _keys(one)] if above else _keys(schema)
    if near := difflib.get_close_matches(last, names, n=1):
        return f"; did you mean {near[0]}?"
    if above and ".".join(location) in known:
        owners = [kind_of(one) for one in section_types(get_type_hints(schema)[above[0]]) if last in _keys(one)]
        return f" of {above[0]}.kind: {kind_of(types[0])}; it belongs to {above[0]}.kind: {_either(owners)}"
    if elsewhere := [name for name in known if name.rpartition(".")[2] == last]:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known: {', '.join(names)}"


def _either(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _keys(schema: type[Any]) -> list[str]:
    return [field.name for field in fields(schema)]


def _known_keys(schema: type[Any], prefix: str = "") -> list[str]:
    """Every `section.key` of `schema`, of all kinds of a section."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        keys.append(prefix + name)
        keys += [key for one in section_types(hint) for key in _known_keys(one, f"{prefix}{name}.")]
    return list(dict.fromkeys(keys))
