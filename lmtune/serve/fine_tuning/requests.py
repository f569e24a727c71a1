"""What clients ask of fine-tuning: the body of `POST /v1/fine_tuning/jobs`, checked field by field.

The names and bounds are those of OpenAI's API. A field that it does not have is refused, since it would have no effect.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lmtune.serve.openai.errors import FieldError

_MAX_PAIRS = 16

# A number, or `auto`, for which None stands here
_AUTO = BeforeValidator(lambda value: None if value == "auto" else value)
Count = Annotated[Annotated[int, Field(ge=1, le=1_000_000, strict=True)] | None, _AUTO]
Epochs = Annotated[Annotated[int, Field(ge=1, le=1000, strict=True)] | None, _AUTO]
Factor = Annotated[Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False, strict=True)] | None, _AUTO]
Text = Annotated[str, Field(min_length=1, max_length=512)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Hyperparameters(_Body):
    """How it is trained; None is what suits the rows and the model."""

    n_epochs: Epochs = None
    batch_size: Count = None
    learning_rate_multiplier: Factor = None


class DpoHyperparameters(Hyperparameters):
    """The same, for pairs; a higher `beta` stays closer to the model at the start."""

    beta: Factor = None


class SupervisedMethod(_Body):
    """Of `method.supervised`."""

    hyperparameters: Hyperparameters | None = None


class DpoMethod(_Body):
    """Of `method.dpo`."""

    hyperparameters: DpoHyperparameters | None = None


def _supported(kind: object) -> object:
    if kind == "reinforcement":
        raise ValueError(
            "reinforcement; lmtune has no objective over sampled answers and graders; expected supervised or dpo",
        )
    return kind


class Method(_Body):
    """What is minimized: over answers, or over pairs of answers."""

    type: Annotated[Literal["supervised", "dpo"], BeforeValidator(_supported)]
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None
    reinforcement: dict[str, object] | None = None

    @model_validator(mode="after")
    def _of_one_kind(self) -> Method:
        others = {"supervised": self.supervised, "dpo": self.dpo, "reinforcement": self.reinforcement}
        del others[self.type]
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"{given[0]} does not belong to type {self.type}; remove it")
        return self


class Wandb(_Body):
    """Where Weights & Biases shows the run."""

    project: Text
    name: Text | None = None
    entity: Text | None = None
    tags: Annotated[tuple[Text, ...], Field(max_length=64)] | None = None


class WandbIntegration(_Body):
    """Weights & Biases is told of each step."""

    type: Literal["wandb"]
    wandb: Wandb


class OtherIntegration(_Body):
    """Another tracker is told of each step."""

    type: Literal["tensorboard", "trackio", "mlflow"]


Integration = Annotated[WandbIntegration | OtherIntegration, Field(discriminator="type")]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=_MAX_PAIRS)
]


class JobRequest(_Body):
    """The body of `POST /v1/fine_tuning/jobs`."""

    model: Text
    training_file: Text
    validation_file: Text | None = None
    method: Method | None = None
    hyperparameters: DpoHyperparameters | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] | None = None
    integrations: Annotated[tuple[Integration, ...], Field(max_length=5)] | None = None
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _said_once(self) -> JobRequest:
        own = self.method and (self.method.supervised or self.method.dpo)
        if own and own.hyperparameters and self.hyperparameters:
            raise FieldError("hyperparameters", "stands in method too; remove the one beside it")
        if self.kind == "supervised" and self.asked.beta is not None:
            raise FieldError("hyperparameters.beta", "belongs to the method dpo; remove it")
        return self

    @property
    def kind(self) -> Literal["supervised", "dpo"]:
        """The method's type."""
        return "dpo" if self.method is not None and self.method.type == "dpo" else "supervised"

    @property
    def asked(self) -> DpoHyperparameters:
        """The hyperparameters, wherever they stand."""
        method = self.method and (self.method.supervised or self.method.dpo)
        given = (method and method.hyperparameters) or self.hyperparameters or Hyperparameters()
        return DpoHyperparameters(**given.model_dump())


def model_name(base: str, suffix: str | None, job: str) -> str:
    """The name of a job's model, `ft:BASE:lmtune:SUFFIX:ID`, in OpenAI's five parts."""
    plain = re.sub(r"[^\w.-]+", "-", suffix or "").strip("-")
    return f"ft:{base}:lmtune:{plain}:{job.removeprefix('ftjob-')[:8]}"
