"""The regular expressions of an adapter from elsewhere, tried once in a process of its own with a limit on its time.

PEFT matches `target_modules` and the keys of `rank_pattern` and `alpha_pattern` against the name of every module. An
expression such as `(a+)+b` takes longer than anyone waits, and a thread cannot be stopped in the middle of it.

This file also is that other process's program, so at the top it imports the standard library only.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CPU_SECONDS = 2
_WALL_SECONDS = 60  # a machine may be busy with something else
_REPEATS = re.compile(r"[*+{]")  # an expression without any of these ends soon


def endless_patterns(config: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether matching the expressions in an adapter's config against `names` takes too long."""
    patterns = [pattern for _, _, pattern in _patterns(config) if _REPEATS.search(pattern)]
    if not patterns or not sys.executable:
        return False
    request = json.dumps({"patterns": patterns, "names": list(names), "cpu_seconds": CPU_SECONDS})
    try:
        done = subprocess.run(  # -I: neither this folder nor the environment's Python settings take part
            [sys.executable, "-I", __file__], input=request.encode(), capture_output=True, timeout=_WALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return True
    return done.returncode < 0


def pattern_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """By key, what in an adapter's config is no regular expression, or none that Python can hold."""
    for key, given, pattern in _patterns(config):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield f"{key}: {shown(given)} is no regular expression: {error}"


def shown(pattern: Any) -> str:
    """An expression for a message, shortened."""
    text = repr(pattern)
    return text if len(text) <= 60 else text[:57] + "…"


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Key and text of each expression, and the expression as PEFT matches it."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            yield key, config[key], config[key]
    for key in ("rank_pattern", "alpha_pattern"):
        yield from ((key, name, rf"(.*\.)?({name})$") for name in config.get(key) or {})
    key = "layers_pattern"
    layers = config.get(key) or []
    yield from ((key, name, rf".*\.{name}\.(\d+)\.") for name in ([layers] if isinstance(layers, str) else layers))


# --- the other process -----------------------------------------------------------------------------------------------


def _main() -> None:
    request = json.load(sys.stdin)
    try:
        import resource
    except ImportError:  # not on Windows, where the wall clock of the parent remains
        pass
    else:
        resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_seconds"], request["cpu_seconds"]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for pattern in request["patterns"]:
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            continue  # PEFT says it better
        for name in request["names"]:
            compiled.match(name)
            compiled.fullmatch(name)


if __name__ == "__main__":
    _main()
