"""The objective that a section of the config stands for, by the section's type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmtune.config.schema import (
    DpoConfig,
    IpoConfig,
    KtoConfig,
    ObjectiveConfig,
    OrpoConfig,
    SftConfig,
    SimpoConfig,
)
from lmtune.objectives.base import Objective
from lmtune.objectives.preference import Dpo, Ipo, Kto, Orpo, Simpo
from lmtune.objectives.sft import Sft

_OBJECTIVES: dict[type, Callable[[Any], Objective]] = {
    SftConfig: lambda section: Sft(),
    DpoConfig: Dpo,
    IpoConfig: Ipo,
    OrpoConfig: Orpo,
    SimpoConfig: Simpo,
    KtoConfig: Kto,
}


def objective_of(section: ObjectiveConfig) -> Objective:
    """The objective with the section's settings."""
    return _OBJECTIVES[type(section)](section)
