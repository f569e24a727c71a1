"""The libraries of the extra `prepare`, imported when a step needs them; a missing one is named with its command."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

from lmtune.errors import ConfigError

LIBRARIES = ("ftfy", "datasketch", "jieba", "py3langid")


def require_libraries() -> None:
    """ConfigError that names every library of the extra that is not installed."""
    if missing := [each for each in LIBRARIES if importlib.util.find_spec(each) is None]:
        raise ConfigError(
            f"{', '.join(missing)}: not installed; the steps of prepare need "
            f"{'it' if len(missing) == 1 else 'them'}: pip install {' '.join(missing)}"
        )


@functools.cache
def library(name: str) -> Any:
    """The module `name`. Errors as of `require_libraries`."""
    require_libraries()
    return importlib.import_module(name)
