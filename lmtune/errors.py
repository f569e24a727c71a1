"""Every error that lmtune raises on purpose, as one tree.

    LmtuneError            failed while running               exit code 1
    ├── ConfigError        a setting is wrong                 exit code 2
    ├── DataError          a data file is wrong               exit code 2
    ├── ModelError         a model or adapter is wrong        exit code 2
    └── CheckpointError    a checkpoint cannot be resumed     exit code 2

The message is for the person who can fix it: what is wrong, where (`file:line` or `section.key`), what was found,
and what to do. Only the outermost layer (`lmtune.run`) turns an error into text and an exit code. The tree is
drawn after httpx's `_exceptions.py`.
"""

from __future__ import annotations


class LmtuneError(Exception):
    """Something went wrong that a user can understand; `exit_code` is what the command ends with."""

    exit_code = 1


class ConfigError(LmtuneError):
    """A setting in the YAML file or on the command line is wrong; names `section.key`."""

    exit_code = 2


class DataError(LmtuneError):
    """A data file is wrong; names `file:line`."""

    exit_code = 2


class ModelError(LmtuneError):
    """A model, tokenizer or adapter cannot be used as asked."""

    exit_code = 2


class CheckpointError(LmtuneError):
    """A run or checkpoint cannot be continued."""

    exit_code = 2


class UnavailableError(LmtuneError):
    """What should answer is gone or does not answer now; a later try may succeed."""


def is_failure(error: BaseException) -> bool:
    """Whether `error` is something that failed, not a request to stop: a Rust library's panic is not an Exception."""
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"
