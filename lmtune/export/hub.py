"""Sharing through the Hugging Face Hub: `push` the files of a run, `pull` an adapter or a model back.

    url = push(prepare_push(RunDirectory("runs/support"), "anna/support"))
    folder = pull("anna/support")              # adapters/anna--support, which `lmtune chat` loads

What is sent is chosen and searched before (`export/uploads.py`). What is downloaded is checked before any library reads
it. The token is huggingface_hub's own (`hf auth login` or HF_TOKEN), never an argument.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from lmtune import __version__
from lmtune.errors import ConfigError, LmtuneError, ModelError
from lmtune.export.private import is_absolute
from lmtune.export.uploads import Form, Upload
from lmtune.io.atomic import new_folder
from lmtune.io.console import warn
from lmtune.models.hub import LOGIN, MODEL_WEIGHT_FILES, download, explained, hub_api, hub_token, is_among, look_up
from lmtune.models.tuning.adapter_files import CONFIG, check_adapter
from lmtune.models.validate import CONFIG as MODEL_CONFIG
from lmtune.models.validate import check_base
from lmtune.runs.store import require_possible

# What says that a repository holds a form, and what that form is called
_MARKS: dict[Form, tuple[str, str]] = {
    "adapter": (CONFIG, "an adapter"), "model": (MODEL_CONFIG, "a whole model"), "gguf": ("*.gguf", "GGUF files"),
}  # fmt: skip
# Files that a later push of the same form may leave behind: they would be loaded beside the new ones
_REPLACED: dict[Form, tuple[str, ...]] = {"model": MODEL_WEIGHT_FILES, "space": ("models/*", "lmtune/*")}


def push(upload: Upload, private: bool = True, revision: str | None = None, message: str | None = None) -> str:
    """Upload what was prepared; returns the address of the commit.

    Args:
        upload: files and their repository, which is made if it is not there.
        private: whether a new repository is private, and that an existing public one is not written to.
        revision: a branch, made if it is not there; None is the main one.
        message: of the commit.

    Raises:
        ConfigError: the repository is public, or holds something else, beside which the files would be misread.
        LmtuneError: the Hub cannot be reached, or does not permit it.
    """
    repository = upload.repository
    if hub_token() is None:
        raise LmtuneError(f"cannot upload to {repository} without a Hub token: {LOGIN}; it needs the write permission")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    is_space = upload.form == "space"
    kind = "space" if is_space else "model"
    with explained(repository, "upload to"):
        api = hub_api()
        sdk = "gradio" if is_space else None
        api.create_repo(repository, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk)
        is_private = bool(api.repo_info(repository, repo_type=kind).private)
        if private and not is_private:
            raise ConfigError(f"{repository} exists and is public: everyone could read it; --public permits it")
        if not private and is_private:
            warn(f"{repository} exists and stays private; its settings on the Hub can change that")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True, repo_type=kind)
        info = api.repo_info(repository, repo_type=kind, revision=revision)
        there = [str(file.rfilename) for file in info.siblings or []]
        _check_form(upload, there)
        stale = [name for name in there if is_among(name, _REPLACED.get(upload.form, ())) and name not in upload.files]
        added = [CommitOperationAdd(name, source) for name, source in upload.files.items()]
        commit = api.create_commit(
            repository, [*added, *map(CommitOperationDelete, stale)], revision=revision, repo_type=kind,
            commit_message=message or f"Upload {upload.run.name} with lmtune {__version__}",
        )  # fmt: skip
    return str(commit.commit_url)


def _check_form(upload: Upload, there: Sequence[str]) -> None:
    """Raise ConfigError where the repository holds another form: transformers would load that, or the card be wrong."""
    for form, (mark, what) in _MARKS.items():
        if upload.form not in (form, "space") and (found := [name for name in there if is_among(name, (mark,))]):
            raise ConfigError(
                f"{upload.repository} holds {what} already ({found[0]}), which would be loaded in place of what is "
                f"uploaded; give another name, for example {upload.repository}-{upload.form}"
            )


def pull(repository: str, revision: str | None = None, output: Path | None = None) -> Path:
    """Download an adapter or a whole model, check it, and put it where `lmtune chat` can load it.

    Args:
        repository: `user/name`.
        revision: a branch, tag or commit; None is the main branch.
        output: the folder to make; None is `adapters/user--name` or `models/user--name`.

    Returns:
        The folder, which plain PEFT or transformers loads too.

    Raises:
        ConfigError: the name is not `user/name`, or the folder is there already.
        ModelError: there is no such repository or revision, or it holds nothing that can be used safely.
        LmtuneError: the Hub cannot be reached.
    """
    if output is not None:
        _check_free(output)
    found = look_up(repository, revision)
    folder = output or Path(f"{found.form}s") / repository.replace("/", "--")
    _check_free(folder)
    try:
        with new_folder(folder) as staging:
            download(found, staging)
            shutil.rmtree(staging / ".cache", ignore_errors=True)  # huggingface_hub's notes about the download
            try:
                if found.form == "adapter":
                    _check_adapter(staging, folder)
                else:
                    check_base(repository, staging)
            except ModelError as error:
                raise ModelError(f"{repository}: {str(error).removeprefix(f'model.name: {repository}: ')}") from None
    except OSError as error:
        raise LmtuneError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return folder


def _check_adapter(staging: Path, folder: Path) -> None:
    """Raise ModelError unless PEFT can read the adapter safely; warn where nobody else has its base."""
    base = check_adapter(staging).get("base_model_name_or_path")
    if not base or base.startswith(".") or is_absolute(base):
        warn(
            f"its base model is {base or 'not named'}: a folder of its author; you need that very model, and say where "
            f"it is: lmtune chat {shlex.quote(str(folder))} --base FOLDER_OR_ID"
        )


def _check_free(folder: Path) -> None:
    """Raise ConfigError unless a folder can be made here."""
    require_possible(folder, "--output")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; delete it, or give another folder with --output")
