"""A folder that runs as a Space of the Hugging Face Hub: lmtune's chat page over a run's model.

    upload = prepare_space(run, "anna/support")      # README.md, app.py, requirements.txt, models/support/, lmtune/

A Space installs `requirements.txt` before the other files are there, so a wheel beside it would not be found. lmtune
itself is therefore in the folder as source, and Python finds it beside `app.py`. The model is in the folder too: a
private Space needs no token to read it. Front matter: https://huggingface.co/docs/hub/spaces-config-reference.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from lmtune import __version__
from lmtune.config.schema import FinetuneConfig, LoraConfig, RewardConfig
from lmtune.errors import LmtuneError, ModelError
from lmtune.export.private import check_private
from lmtune.export.uploads import Upload, prepare_push, shared_config
from lmtune.io.console import warn
from lmtune.models.hub import CARD, hub_token
from lmtune.runs.cards import is_hub_id
from lmtune.runs.store import RunDirectory

_SOURCES = {".py", ".css", ".js", ".txt", ".yaml", ".jsonl", ".typed"}
_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_WARN_BYTES = 10**9
_APP = '''\
"""The chat page of the model in models/{name}: lmtune's own, whose source is in lmtune/. Run it: python app.py"""

import sys
from pathlib import Path

from lmtune.recipes.app import main
from lmtune.run import run

if __name__ == "__main__":
    sys.argv[1:] = sys.argv[1:] or [str(Path(__file__).parent / "models" / "{name}")]
    run(main)
'''
_README = """
# {title}

A page to chat with {base}, fine-tuned with lmtune {version}. This repository holds all of it: `app.py`, {what} in
`models/{name}`, and lmtune itself in `lmtune`.

To run it on your own computer, with Python {python}:

```bash
python -m venv .venv
.venv/bin/pip install -r requirements.txt
.venv/bin/python app.py
```

`requirements.txt` installs PyTorch for CPUs. For a Space with a GPU, remove its line `--extra-index-url` and the
`+cpu`.{gated}
"""


def prepare_space(run: RunDirectory, repository: str, merged: bool = False) -> Upload:
    """Choose, write and check the files of a Space that chats with what a run has trained.

    Args:
        run: whose model answers messages: a language model, or a classifier.
        repository: `user/name` of the Space.
        merged: the model that `lmtune merge` has made, in place of the adapter.

    Raises:
        ConfigError: the repository's name is not `user/name`.
        ModelError: as `prepare_push`; or a Space cannot load the base, or the model does not chat.
        LmtuneError: lmtune is not installed as a package, so that what it needs is not known.
    """
    config = shared_config(run)
    if isinstance(config.objective, RewardConfig):
        raise ModelError(f"{run.path}: a reward model, which scores an answer to a prompt; expected a model that chats")
    base, is_adapter = config.model.name, isinstance(config.tuning, LoraConfig) and not merged
    if is_adapter and base != "tiny" and not is_hub_id(base):
        raise ModelError(
            f"{run.path}: its base model is a folder of yours, which a Space cannot load; merge it first with "
            f"`lmtune merge {run.path}`, then add --merged"
        )
    model = prepare_push(run, repository, merged)
    own: dict[str, Path | bytes] = {
        CARD: _readme(config, run.name, repository, is_adapter).encode(),
        "app.py": _APP.format(name=run.name).encode(),
        "requirements.txt": requirements().encode(),
    }
    check_private(str(run.path), own, hub_token())
    weights = {f"models/{run.name}/{name}": source for name, source in model.files.items() if name != CARD}
    source = dict(package_files(with_tiny=is_adapter and base == "tiny"))
    from huggingface_hub.constants import ENDPOINT

    address = f"{ENDPOINT}/spaces/{repository}"
    space = Upload(run, repository, "space", own | weights | source, model.kept_here, address)
    if (size := sum(space.sizes.values())) > _WARN_BYTES:
        warn(f"the Space holds {size / 10**9:.1f} GB; the Hub may allow less, 1 GB where no storage was bought")
    return space


def _readme(config: FinetuneConfig, name: str, repository: str, is_adapter: bool) -> str:
    """The page of the Space, and how it is run."""
    base, title = config.model.name, repository.rpartition("/")[2]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    tree: dict[str, object] = {
        "title": title, "sdk": "gradio", "sdk_version": version("gradio"), "python_version": python,
        "app_file": "app.py", "pinned": False, "tags": ["lmtune"],
    }  # fmt: skip
    gated = ""
    if is_hub_id(base):
        tree["models"] = [base]
        if is_adapter:
            gated = f" If `{base}` is gated, give the Space a secret `HF_TOKEN` that may read it."
    shown = "lmtune's embedded demo model" if base == "tiny" else Path(base).name if base.startswith(".") else base
    text = _README.format(
        title=title, base=shown, version=__version__, what="the adapter" if is_adapter else "the model", name=name,
        python=python, gated=gated,
    )  # fmt: skip
    return f"---\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}---\n{text}"


def requirements() -> str:
    """What lmtune needs, as a Space installs it.

    A library whose next versions lmtune does not accept has the version that is installed here. The others may differ,
    since a Space adds requirements of its own. PyTorch is the build for CPUs: that for GPUs is gigabytes larger.

    Raises:
        LmtuneError: lmtune is not installed as a package.
    """
    try:
        needed = [Requirement(line) for line in requires("lmtune") or ()]
    except PackageNotFoundError:
        raise LmtuneError("lmtune is not installed as a package; `pip install .` in its checkout") from None
    lines = [f"--extra-index-url {_CPU_INDEX}"]
    for one in needed:
        if one.marker is not None and "extra" in str(one.marker):
            continue
        if any(part.operator == "<" for part in one.specifier):
            found = Version(version(one.name)).public
            lines.append(f"{one.name}=={found}{'+cpu' if one.name == 'torch' else ''}")
        else:
            lines.append(str(one))
    return "\n".join([*lines, ""])


def package_files(with_tiny: bool) -> Iterator[tuple[str, Path]]:
    """The name in a Space and the place of each file that lmtune's page needs; `with_tiny`: the embedded model too."""
    for package, place in (("lmtune", "lmtune"), ("lmtune.recipes", "lmtune/recipes")):
        folder = Path(str(files(package)))
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            is_tiny = name.parts[:2] == ("demo", "tiny") and path.is_file()
            if (with_tiny and is_tiny) or (path.suffix in _SOURCES and path.is_file() and not is_tiny):
                yield f"{place}/{name.as_posix()}", path
