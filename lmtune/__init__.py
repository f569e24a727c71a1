"""lmtune: parameter-efficient fine-tuning of language models, from a JSONL file to a chat in the browser.

    import lmtune

    run = lmtune.finetune(model="tiny", data="train.jsonl")
    print(run.load().chat("Where is my order?"))

What `__all__` names is the public interface. It is imported when it is first used, so that `import lmtune` is quick.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# OpenMP's threads wait for each other by spinning, and torch reads this when it is imported. Beside any other busy
# program a spinning thread keeps the one it waits for from running: small models then train up to eight times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from lmtune.api import Model, Run, RunScores, chat, evaluate, finetune, load, load_config, predict
    from lmtune.config.schema import FinetuneConfig
    from lmtune.errors import CheckpointError, ConfigError, DataError, LmtuneError, ModelError
    from lmtune.evaluation.evaluate import Evaluation
    from lmtune.evaluation.generative import Answer
    from lmtune.evaluation.scoring import Scores
    from lmtune.runs.log import StepRecord

__version__ = "0.1.0"
__all__ = [
    "Answer", "CheckpointError", "ConfigError", "DataError", "Evaluation", "FinetuneConfig", "LmtuneError", "Model",
    "ModelError", "Run", "RunScores", "Scores", "StepRecord", "__version__", "chat", "evaluate", "finetune", "load",
    "load_config", "predict",
]  # fmt: skip

_HOMES = {
    "lmtune.api": ("Model", "Run", "RunScores", "chat", "evaluate", "finetune", "load", "load_config", "predict"),
    "lmtune.config.schema": ("FinetuneConfig",),
    "lmtune.errors": ("CheckpointError", "ConfigError", "DataError", "LmtuneError", "ModelError"),
    "lmtune.evaluation.evaluate": ("Answer", "Evaluation", "Scores"),
    "lmtune.runs.log": ("StepRecord",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
