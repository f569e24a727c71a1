"""A disk that is full or must not be written: a clear error, what was there is untouched, and the run goes on later."""

import ctypes
import errno
import json
import os
import resource
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from lmtune.errors import LmtuneError
from lmtune.io.atomic import name_disk_errors
from lmtune.training.checkpoint import checkpoint_folders, problem_of
from tests.processes import Trouble, at_call, lmtune, said, wrap
from tests.workplace import checkpoints, lasting, written_files


def limit_files(size: int) -> None:
    """From now on no file of this process can become larger: what a write to a full disk meets, but exact."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def in_save(count: int, action: Trouble) -> Trouble:
    """`action` when the checkpoint number `count` is about to be written."""
    return at_call("lmtune.training.hooks", "save_checkpoint", action, count)


def steps(place: Path) -> list[int]:
    """The run's checkpoints; all must be whole."""
    folders = checkpoint_folders(place / "runs/trial/checkpoints")
    assert all(problem_of(path) is None for path in folders)
    assert len(checkpoints(place)) == len(folders)  # no staging either
    return [int(path.name[5:]) for path in folders]


def assert_failed_clearly(place: Path, *parts: str) -> None:
    """One message that says what could not be written, why, and what to do; the summary says it too."""
    text = said(place)
    assert text.count("\nerror: ") == 1
    assert "Traceback" not in text
    for part in (*parts, "make room or permit"):
        assert part in text
    assert json.loads((place / "runs/trial/summary.json").read_text())["status"] == "failed"


# The adapter takes 34 kB, the optimizer's file twice as much.
@pytest.mark.parametrize(
    "size", [pytest.param(20_000, id="07 the adapter"), pytest.param(50_000, id="08 the optimizer")]
)
def test_07_and_08_a_disk_that_is_full_while_a_checkpoint_is_saved(
    place: Path, undisturbed: dict[str, Any], size: int
) -> None:
    assert lmtune(place, "finetune", "run.yaml", trouble=in_save(2, partial(limit_files, size))) == 1
    assert_failed_clearly(place, "cannot write the checkpoint runs/trial/checkpoints/step-000003", "File too large")
    assert steps(place) == [2]
    assert lmtune(place, "finetune", "run.yaml") == 0, said(place)
    assert "resumes after step 2" in said(place)
    assert lasting(place) == undisturbed


def test_07_a_disk_that_is_full_while_a_step_is_recorded(place: Path, undisturbed: dict[str, Any]) -> None:
    """The metrics' line is cut in its middle."""
    trouble = at_call("lmtune.runs.log", "Records.add", partial(limit_files, 900), 5)
    assert lmtune(place, "finetune", "run.yaml", trouble=trouble) == 1
    text = said(place)
    assert "error: runs/trial/metrics.jsonl: File too large; make room or permit it" in text
    assert "Traceback" not in text
    assert lmtune(place, "finetune", "run.yaml") == 0, said(place)
    assert lasting(place) == undisturbed


def full() -> None:
    """What the system says on a full disk: no name."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_when_flushed() -> None:
    """Every flush finds the disk full, as on one that takes up in memory what is written."""
    wrap("os", "fsync", lambda *_: full())


# The output of the command is a file too, so only large files are limited in fact.
SAVING: dict[str, tuple[Trouble, str]] = {
    "the weights": (
        at_call("lmtune.models.tuning.lora", "save_adapter", partial(limit_files, 20_000)),
        "runs/trial/adapter/adapter_model.safetensors: File too large",
    ),
    "the flush": (
        at_call("lmtune.training.run", "write_adapter_texts", full_when_flushed),
        "runs/trial/adapter: No space left on device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SAVING)
def test_07_a_disk_that_is_full_while_the_result_is_saved(place: Path, undisturbed: dict[str, Any], what: str) -> None:
    trouble, message = SAVING[what]
    assert lmtune(place, "finetune", "run.yaml", trouble=trouble) == 1
    text = said(place)
    assert f"error: {message}" in text
    assert "make room or permit it, then start the same command again" in " ".join(text.split())
    assert text.count("\nerror: ") == 1
    assert "Traceback" not in text
    assert not (place / "runs/trial/adapter").exists()
    assert lmtune(place, "finetune", "run.yaml") == 0, said(place)
    assert lasting(place) == undisturbed


FULL = "File too large"
RAISED: dict[str, tuple[Exception, str | None]] = {  # and the file that is then named
    "the system, without a name": (OSError(errno.EFBIG, FULL), "out"),
    "the system, with one": (OSError(errno.EFBIG, FULL, ".staging-out/part"), "out/part"),
    "a file that is written beside its place": (OSError(errno.EACCES, FULL, "out/.a.json.12.tmp"), "out/a.json"),
    "safetensors": (SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 27)"), "out"),
    "no disk": (OSError(errno.ECONNRESET, "Connection reset"), None),
    "an error that says it already": (LmtuneError(f"no checkpoint: {FULL} (os error 27)"), None),
    "something else": (ValueError("27"), None),
}


@pytest.mark.parametrize("what", RAISED)
def test_07_what_could_not_be_written_is_named_whoever_wrote_it(what: str) -> None:
    error, name = RAISED[what]
    with pytest.raises(type(error) if name is None else OSError) as caught, name_disk_errors(Path(".staging-out")):
        raise error
    assert caught.value is error if name is None else caught.value.filename == name


def no_rights() -> None:
    """The `runs` folder cannot be written, and this process has no right to do it all the same, whoever it runs as."""
    Path("runs").mkdir(mode=0o555)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, nothing) == 0


def test_09_an_output_folder_that_is_read_only_from_the_start(place: Path) -> None:
    assert lmtune(place, "finetune", "run.yaml", trouble=no_rights) == 2
    assert "error: run.dir: runs/trial cannot be written (Permission denied); permit it or choose another" in said(
        place
    )
    assert "Traceback" not in said(place)
    assert written_files(place / "runs") == {}
