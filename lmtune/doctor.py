"""What works on this machine, found by trying it, and how to mend what does not.

    for finding in examine():
        print(finding.level, finding.name, finding.text)

Nothing heavy is imported here: whatever needs torch is tried by `lmtune.probes` in a process of its own, so a library
that cannot be loaded, or a kernel that kills its process, becomes a finding and not the end of the examination.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

Level = Literal["ok", "warn", "fail"]

SHOWN_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "gradio", "huggingface_hub",
)  # fmt: skip
_PROBES = (sys.executable, "-m", "lmtune.probes")
_PROBE_SECONDS = 180.0
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        level: `ok`; `warn`: something is missing that the main job does not need; `fail`: it needs it.
        text: what was found.
        mend: what to do about it.
    """

    name: str
    level: Level
    text: str
    mend: str = ""

    def as_json(self) -> str:
        """One line, as `lmtune.probes` hands it over."""
        return json.dumps(asdict(self))


def examine(runs_dir: Path = Path()) -> Iterator[Finding]:
    """Everything, one by one as it is found: packages, machine, quantization, attention, processes, disk, Hub.

    Args:
        runs_dir: where runs would be written.
    """
    yield from check_packages()
    yield check_demo()
    yield from run_probes(_PROBES, _PROBE_SECONDS)
    yield check_folder("runs", runs_dir, "fail", "work in a folder you can write to, or set run.dir")
    yield check_disk(runs_dir)
    yield from check_caches()
    yield check_hub_token()


def check_packages() -> Iterator[Finding]:
    """Python and the libraries, against what lmtune asks for; small ones are named only if they are wrong."""
    yield Finding("python", "ok", platform.python_version())
    for line in importlib.metadata.requires("lmtune") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        finding = check_package(needed)
        if needed.name in SHOWN_PACKAGES or finding.level != "ok":
            yield finding


def check_package(needed: Requirement) -> Finding:
    """Whether a package is there, in a version that lmtune was written for."""
    install = f'pip install "{needed}"'
    try:
        found = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(needed.name, "fail", "not installed", install)
    if needed.specifier.contains(found, prereleases=True):
        return Finding(needed.name, "ok", found)
    least = SpecifierSet(",".join(str(bound) for bound in needed.specifier if bound.operator == ">="))
    if least.contains(found, prereleases=True):
        return Finding(needed.name, "warn", f"{found} is newer than lmtune was tried with", install)
    return Finding(needed.name, "fail", f"{found} is too old", install)


def check_demo() -> Finding:
    """Whether the embedded model is where `model.name: tiny` looks for it."""
    from lmtune.demo import tiny_path

    missing = [n for n in ("config.json", "model.safetensors", "tokenizer.json") if not (tiny_path() / n).is_file()]
    if missing:
        return Finding("model tiny", "fail", f"no {', '.join(missing)}", "install lmtune again")
    return Finding("model tiny", "ok", f"{(tiny_path() / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


def run_probes(command: Sequence[str], seconds: float) -> Iterator[Finding]:
    """The findings of a process that prints them as JSON lines, `{"begin": name}` before each part.

    A part in which the process dies, or does not come to an end, is a finding too.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    part, late = "torch", threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)

        def stop() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for line in child.stdout or ():
                tree = json.loads(line) if line.startswith("{") else {}  # a library may print something of its own
                if "begin" in tree:
                    part = tree["begin"]
                elif "level" in tree:
                    yield Finding(**tree)
            child.wait()
        finally:
            timer.cancel()
            child.kill()
            child.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1][:300]
    if child.returncode != 0:
        mend = "the parts after it were not tried; install with the versions of constraints.txt, which are tested"
        why = f"no end after {seconds:.0f} s" if late.is_set() else _how_it_ended(child.returncode, last)
        yield Finding(part, "fail", why, mend)


def check_folder(name: str, folder: Path, level: Level, mend: str) -> Finding:
    """Whether a file can be made in `folder`, or the nearest folder above it that exists."""
    shown = _shown(folder)
    place = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding(name, "ok", f"{shown} can be written")
    except OSError as error:
        return Finding(name, level, f"{shown} cannot be written ({error.strerror or error})", mend)


def check_disk(folder: Path) -> Finding:
    """Room for runs, and for models of the size people tune."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free / _GIB
    if free < 0.5:
        return Finding("disk", "fail", f"{free:.2f} GiB free", "make room for checkpoints and merged models")
    if free < 10:
        return Finding("disk", "warn", f"{free:.1f} GiB free", "enough for the demo; a 7B model takes 15 GiB")
    return Finding("disk", "ok", f"{free:,.0f} GiB free")


def check_caches() -> Iterator[Finding]:
    """The folders where tokenised rows and downloaded models are kept."""
    from lmtune.io.cache import cache_folder

    yield check_folder("row cache", cache_folder(), "fail", "name another folder in LMTUNE_CACHE")
    try:
        from huggingface_hub import constants
    except ImportError as error:
        yield Finding("model cache", "fail", f"huggingface_hub cannot be imported: {error}", "install it again")
        return
    yield check_folder("model cache", Path(constants.HF_HUB_CACHE), "warn", "name another folder in HF_HOME")
    if constants.HF_HUB_OFFLINE:
        yield Finding(
            "network", "warn", "HF_HUB_OFFLINE is set", "only models in the cache are found; unset it for others"
        )


def check_hub_token() -> Finding:
    """Whether there is a Hub token; what it is stays unsaid, and the Hub is not asked."""
    try:
        from huggingface_hub import get_token

        token = get_token()
    except (ImportError, OSError) as error:
        return Finding("Hub token", "warn", f"cannot be read: {type(error).__name__}", "log in again: hf auth login")
    if token is None:
        return Finding(
            "Hub token", "ok", "none; only `lmtune push` and private or gated models need one (hf auth login)"
        )
    return Finding("Hub token", "ok", "there is one")


def _how_it_ended(code: int, last: str) -> str:
    if code < 0:
        return f"killed its process ({signal.Signals(-code).name}): a library does not fit this machine"
    return f"ended with an error: {last}"


def _shown(path: Path) -> str:
    """A path with the home folder as `~`."""
    path = path.absolute()
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
