"""A short fingerprint of a base model's weights, so that an adapter is never put on another base unnoticed.

PEFT loads an adapter made for fewer layers, or for a different model of the same shape, without a word. The
fingerprint is a SHA-256 over each safetensors file's header (names, shapes, dtypes) and evenly spaced samples of its
data: stable across machines and folders, and quick for a model of any size.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from lmtune.config.schema import ModelConfig
from lmtune.models.base import weight_files

_SAMPLES, _SAMPLE_BYTES = 64, 4096


def base_fingerprint(model: ModelConfig) -> str:
    """32 hex digits that stand for the stored weights of `model`, whatever the quantization they are loaded in."""
    digest = hashlib.sha256()
    for path in weight_files(model):
        digest.update(_file_digest(path))
    return digest.hexdigest()[:32]


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header_bytes, size)))
        start = min(8 + header_bytes, size)
        if size - start <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for index in range(_SAMPLES):
                file.seek(start + (size - start - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    digest.update(str(size).encode())
    return digest.digest()
