"""The device that every verb computes on, decided in one place; nothing heavy is imported with it.

A CUDA (or ROCm) GPU if there is one and `ACCELERATE_USE_CPU` does not ask for the CPU, else the CPU. Apple silicon
computes on its CPU too: nobody has shown yet that a run on `mps` gives the result of the others.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lmtune.errors import ConfigError

if TYPE_CHECKING:
    import torch

USE_CPU = "ACCELERATE_USE_CPU"
_YES, _NO = ("1", "true", "t", "yes", "y", "on"), ("", "0", "false", "f", "no", "n", "off")  # as Accelerate reads it


def asks_for_cpu() -> bool:
    """Whether `ACCELERATE_USE_CPU` asks for the CPU.

    Raises:
        ConfigError: it is neither true nor false.
    """
    value = os.environ.get(USE_CPU, "")
    if value.lower() not in (*_YES, *_NO):
        raise ConfigError(f"{USE_CPU}: {value!r}; expected true or false; unset it or set it to one of them")
    return value.lower() in _YES


def default_device() -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: `ACCELERATE_USE_CPU` is neither true nor false.
    """
    import torch

    if torch.cuda.is_available() and not asks_for_cpu():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")
