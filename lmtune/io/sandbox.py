"""A chat template is a program from a stranger: what keeps one that runs or grows without bound from hanging us.

Jinja's sandbox keeps a template from the machine, but not from the clock: `{{ 10 ** (10 ** 10) }}` is one operation of
years that no Python code can interrupt, `{{ "a" * 10 ** 11 }}` fills the memory. So a template is first run once in a
process of its own, with short and long conversations and a limit on processor time, memory and output: 0.2 s, once for
each template. Not covered is one that turns on particular words of the data or numbers of messages; a deadline on every
rendering (through the interpreter's profiling hook) was tried and made rendering half as fast.

This file also is that other process's program, so at the top it imports the standard library only.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator

PROBE_CPU_SECONDS = 5
PROBE_WALL_SECONDS = 60  # a machine may be busy with something else
PROBE_MEMORY_BYTES = 1 << 30
PROBE_OUTPUT_CHARACTERS = 1_000_000  # the largest conversation tried holds 9,000
_TOO_LARGE, _OUT_OF_MEMORY = 3, 4  # exit codes of the probe; any other failure is told better by the real rendering


class TemplateLimitError(Exception):
    """The template takes too long, or writes too much."""


@functools.lru_cache(maxsize=64)
def probe(source: str, variables: tuple[tuple[str, str], ...] = ()) -> None:
    """Render a few small conversations with the template `source` in a process of its own.

    Raises:
        TemplateLimitError: it went over a limit. Other faults of the template are left to the real rendering.
    """
    if not sys.executable:
        return
    request = json.dumps({"source": source, "variables": dict(variables), "cpu_seconds": PROBE_CPU_SECONDS})
    try:
        # -I: neither this folder nor the environment's Python settings take part.
        done = subprocess.run(
            [sys.executable, "-I", __file__], input=request.encode(), capture_output=True, timeout=PROBE_WALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise TemplateLimitError(f"it did not finish a small conversation in {PROBE_WALL_SECONDS} s") from None
    if done.returncode < 0:
        raise TemplateLimitError(f"it did not finish a small conversation in {PROBE_CPU_SECONDS} s")
    if done.returncode == _TOO_LARGE:
        raise TemplateLimitError(f"it writes over {PROBE_OUTPUT_CHARACTERS:,} characters for a small conversation")
    if done.returncode == _OUT_OF_MEMORY:
        raise TemplateLimitError(f"it needs over {PROBE_MEMORY_BYTES >> 20} MiB for a small conversation")


# --- the other process -----------------------------------------------------------------------------------------------


def _limit_this_process(cpu_seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows, where the wall clock of the parent remains
        return
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_AS, (PROBE_MEMORY_BYTES, PROBE_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


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


def _refuse(message: str) -> None:
    raise ValueError(message)


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


def _main() -> None:
    request = json.load(sys.stdin)
    _limit_this_process(request["cpu_seconds"])
    try:
        _render_all(request["source"], request["variables"])
    except MemoryError:
        sys.exit(_OUT_OF_MEMORY)


if __name__ == "__main__":
    _main()
