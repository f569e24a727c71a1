"""A chat template or a regular expression from elsewhere, tried once in a child process with limits.

    probe(template)                                # TemplateLimitError if it runs or grows without bound
    match_too_slowly(["(a+)+b"], module_names)     # True: catastrophic backtracking

Jinja's sandbox keeps a template from the machine, but not from the clock: `{{ 10 ** (10 ** 10) }}` is one operation of
years that no Python code can interrupt, and `(a+)+b` matches for ever. So each runs first in a process of its own, with
limits on processor time, memory and output (0.2 s). A template that turns on particular words of the data is not found:
a deadline on every rendering made rendering half as fast.

This file also is the child's program, so at the top it imports the standard library only.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

PROBE_CPU_SECONDS = 5
PATTERN_CPU_SECONDS = 2
PROBE_WALL_SECONDS = 60  # a machine may be busy with something else
PROBE_MEMORY_BYTES = 1 << 30
PROBE_OUTPUT_CHARACTERS = 1_000_000  # the largest conversation tried holds 9,000
_TOO_SLOW, _TOO_LARGE, _OUT_OF_MEMORY = -1, 3, 4  # any other exit code: the real use reports the fault better
_REPEATS = re.compile(r"[*+{]")  # an expression without any of these ends soon


class TemplateLimitError(Exception):
    """The template takes too long, or writes too much."""


@functools.lru_cache(maxsize=64)
def probe(source: str, variables: tuple[tuple[str, str], ...] = ()) -> None:
    """Render a few small conversations with the chat template `source`; TemplateLimitError if that exceeds a limit.

    Other faults of the template are left to the real rendering.
    """
    code = _run({"source": source, "variables": dict(variables), "cpu_seconds": PROBE_CPU_SECONDS})
    limits = {
        _TOO_SLOW: f"did not finish a small conversation in {PROBE_CPU_SECONDS} s",
        _TOO_LARGE: f"writes over {PROBE_OUTPUT_CHARACTERS:,} characters for a small conversation",
        _OUT_OF_MEMORY: f"needs over {PROBE_MEMORY_BYTES >> 20} MiB for a small conversation",
    }
    if code in limits:
        raise TemplateLimitError(f"it {limits[code]}")


def match_too_slowly(patterns: Sequence[str], names: Sequence[str]) -> bool:
    """Whether matching regular expressions against `names` takes too long."""
    repeating = [pattern for pattern in patterns if _REPEATS.search(pattern)]
    request = {"patterns": repeating, "names": list(names), "cpu_seconds": PATTERN_CPU_SECONDS}
    return bool(repeating) and _run(request) == _TOO_SLOW


def _run(request: dict[str, Any]) -> int:
    """The exit code of a child that does what is requested; `_TOO_SLOW` if a limit on time ended it."""
    command = [sys.executable, "-I", __file__]  # -I: neither this folder nor Python's environment variables take part
    try:
        done = subprocess.run(
            command, input=json.dumps(request).encode(), capture_output=True, timeout=PROBE_WALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return _TOO_SLOW
    return _TOO_SLOW if done.returncode < 0 else done.returncode


# --- the child process


def _main() -> None:
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_seconds"], request["cpu_seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (PROBE_MEMORY_BYTES, PROBE_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        if "source" in request:
            _render_all(request["source"], request["variables"])
        else:
            _match_all(request["patterns"], request["names"])
    except MemoryError:
        sys.exit(_OUT_OF_MEMORY)


def _match_all(patterns: list[str], names: list[str]) -> None:
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            continue
        for name in names:
            compiled.match(name)
            compiled.fullmatch(name)


def _render_all(source: str, variables: dict[str, str]) -> None:
    """Render every conversation in an environment like that of transformers."""
    import jinja2.ext
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value)
    environment.globals.update(raise_exception=_refuse, strftime_now=time.strftime)
    template = environment.from_string(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source))
    for messages in _conversations():
        for add_generation_prompt, enable_thinking in itertools.product((False, True), repeat=2):
            size = 0
            try:
                # exactly the variables of a real rendering: a template can ask whether there are such
                for piece in template.generate(
                    messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
                    enable_thinking=enable_thinking, **variables,
                ):  # fmt: skip
                    size += len(piece)
                    if size > PROBE_OUTPUT_CHARACTERS:
                        sys.exit(_TOO_LARGE)
            except (MemoryError, SystemExit):
                raise
            except Exception:
                continue  # a template may refuse a system message, say; the real rendering tells


def _refuse(message: str) -> None:
    raise ValueError(message)


def _conversations() -> Iterator[list[dict[str, str]]]:
    turns = [{"role": role, "content": "word " * 40} for _ in range(20) for role in ("user", "assistant")]
    yield [{"role": "user", "content": "Hello"}]
    yield turns[:2]
    yield turns
    yield [{"role": "system", "content": "Be brief."}, *turns]
    yield [{"role": "system", "content": "Be brief."}, turns[0]]
    thought = "<think>" + "thought " * 20 + "</think>"
    yield [turns[0], {"role": "assistant", "content": f"{thought}Yes."}]
    # as transformers passes on what is given as `reasoning_content`
    yield [turns[0], {"role": "assistant", "content": "Yes.", "reasoning_content": "thought " * 20, "thinking": "too"}]


if __name__ == "__main__":
    _main()
