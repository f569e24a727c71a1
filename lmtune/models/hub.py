"""The Hugging Face Hub as a source of adapters and models: what is downloaded, and what its errors mean in words.

    found = look_up("anna/support")               # an adapter, at its newest commit
    download(found, Path("adapters/anna--support"))
    folder = cached_adapter("anna/support")       # in the Hub's own cache; found offline after the first time

Only safetensors and text files are downloaded. The token is huggingface_hub's own (`hf auth login` or HF_TOKEN).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from lmtune import __version__
from lmtune.errors import ConfigError, LmtuneError, ModelError
from lmtune.io.text import one_line
from lmtune.models.model_folder import GENERATION, TOKENIZER_FILES
from lmtune.models.tuning.adapter_files import CONFIG, METADATA, WEIGHTS
from lmtune.models.validate import CONFIG as MODEL_CONFIG
from lmtune.models.validate import INDEX
from lmtune.models.validate import WEIGHTS as MODEL_WEIGHTS

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
CARD = "README.md"
VOCABULARY = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.json",
    "vocab.txt", "merges.txt",
)  # fmt: skip
# Patterns of names; what matches none of them is neither downloaded nor uploaded
MODEL_WEIGHT_FILES = (MODEL_WEIGHTS, INDEX, "model-*-of-*.safetensors")
_TEXT_FILES = (METADATA, CARD, GENERATION, *TOKENIZER_FILES)
ADAPTER_FILES = (WEIGHTS, CONFIG, *_TEXT_FILES)
MODEL_FILES = (MODEL_CONFIG, *MODEL_WEIGHT_FILES, *_TEXT_FILES)
Form = Literal["adapter", "model"]
FILES: dict[Form, tuple[str, ...]] = {"adapter": ADAPTER_FILES, "model": MODEL_FILES}
_PICKLES = (".bin", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class Found:
    """A repository that holds something of use.

    Attributes:
        repository: `user/name`.
        form: an adapter, or a whole model.
        commit: in hex.
    """

    repository: str
    form: Form
    commit: str


def look_up(repository: str, revision: str | None = None) -> Found:
    """What a repository holds.

    Args:
        repository: `user/name`.
        revision: a branch, tag or commit; None is the main branch.

    Raises:
        ConfigError: the name is not `user/name`.
        ModelError: there is no such repository or revision, or it holds neither adapter nor model in safetensors.
        LmtuneError: the Hub cannot be reached.
    """
    checked_repository(repository)
    with explained(repository, "download", revision):
        info = hub_api().model_info(repository, revision=revision)
        return Found(repository, _form(repository, [str(file.rfilename) for file in info.siblings or []]), info.sha)


def download(found: Found, folder: Path) -> None:
    """Download the files of an adapter or model into `folder`.

    Raises:
        ModelError, LmtuneError: as `look_up`.
    """
    with explained(found.repository, "download"):
        from huggingface_hub import snapshot_download

        wanted = list(FILES[found.form])
        snapshot_download(found.repository, revision=found.commit, local_dir=folder, allow_patterns=wanted)


def cached_adapter(repository: str) -> Path:
    """An adapter of the Hub in its cache, downloaded where it is not there or is newer; offline, as it was last.

    Raises:
        ConfigError, ModelError, LmtuneError: as `look_up`; the repository holds no adapter.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        if look_up(repository).form != "adapter":
            raise ModelError(f"{repository} holds no {WEIGHTS}; it is a whole model: use it as model.name")
        with explained(repository, "download"):
            # not by its commit: the cache would not know that it is the newest, and offline not find it
            return Path(snapshot_download(repository, allow_patterns=list(ADAPTER_FILES)))
    except ModelError:
        raise
    except LmtuneError:
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(repository, local_files_only=True, allow_patterns=list(ADAPTER_FILES)))
        raise


def is_among(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of `patterns`, as the Hub's client reads them, matches the name of a file."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def checked_repository(name: str) -> str:
    """`name` if it is spelled as the Hub spells repositories.

    Raises:
        ConfigError: it is not `user/name`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with contextlib.suppress(HFValidationError):
        validate_repo_id(name)
        if all(name.partition("/")[::2]):
            return name
    raise ConfigError(f"{name!r} is not a repository name; expected user/name, for example anna/support")


def _form(repository: str, names: list[str]) -> Form:
    """What files of these names are.

    Raises:
        ModelError: neither an adapter nor a model in safetensors.
    """
    if WEIGHTS in names and CONFIG in names:
        return "adapter"
    if CONFIG not in names and MODEL_CONFIG in names and any(is_among(name, MODEL_WEIGHT_FILES) for name in names):
        return "model"
    missing = [name for name in (WEIGHTS, CONFIG) if name not in names]
    fix = "it is neither an adapter nor a model in safetensors"
    if pickled := [name for name in names if name.endswith(_PICKLES)]:
        fix = f"pickled weights ({pickled[0]}) can run code when read; ask its author for safetensors"
    elif files := [name for name in names if name.endswith(".gguf")]:
        fix = (
            f"it holds GGUF files: choose one, `hf download {repository} {files[0]} --local-dir models`, then "
            f"`lmtune chat models/{files[0]}`"
        )
    raise ModelError(f"{repository} holds no {' and no '.join(missing)}; {fix}")


def hub_token() -> str | None:
    """The token of whoever is logged in."""
    from huggingface_hub import get_token

    return get_token()


def hub_api() -> Any:
    """huggingface_hub's client."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="lmtune", library_version=__version__)


@contextlib.contextmanager
def explained(repository: str, action: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises inside the block into an error that says what to do."""
    from huggingface_hub import errors

    network_error = errors.HTTPError  # type: ignore[attr-defined]  # of the HTTP library that huggingface_hub uses
    failed = f"cannot {action} {repository}"
    try:
        yield
    except LmtuneError:
        raise
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repository} is gated: accept its conditions on its page on the Hub, then {LOGIN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repository} has no revision {revision or 'main'}; give a branch, tag or commit") from error
    except errors.RepositoryNotFoundError as error:
        who = "with your token" if hub_token() else f"without a token; if it is private, {LOGIN}"
        raise ModelError(f"there is no repository {repository} to be seen {who}. Check its spelling") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: f"the Hub does not accept your token; get another one and {LOGIN}",
            403: f"your token may not do that; it needs the write permission, and you must be "
            f"{repository.partition('/')[0]} or a member of it",
        }
        answer = f"the Hub answered {status}, {error.server_message or 'no reason given'}; try again later"
        raise LmtuneError(f"{failed}: {reasons.get(status, answer)}") from error
    except errors.OfflineModeIsEnabled as error:
        raise LmtuneError(f"{failed}: HF_HUB_OFFLINE is set; unset it to use the network") from error
    except (network_error, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise LmtuneError(
            f"{failed}: the Hub does not answer ({_short(error)}); check the network, the proxy and HF_ENDPOINT"
        ) from error
    except ValueError as error:
        raise LmtuneError(f"{failed}: {_short(error)}") from error


def _short(error: Exception) -> str:
    """An exception's text in one line of moderate length, the token cut out of it."""
    token = hub_token()
    return one_line(ValueError(str(error).replace(token, "***")) if token and str(error) else error)
