"""A run for another engine: `export RUN --to gguf|ollama|vllm`.

    EXPORTERS["gguf"](Request(run, kind="q8_0"))      # what to say of it

What is exported is the merged model, which is made and verified first if it is not there, or the adapter alone. What an
engine cannot hold is refused with the reason, since it would answer otherwise than the model that was trained.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from lmtune.config.schema import LoraConfig
from lmtune.errors import ConfigError, ModelError
from lmtune.export.base import Engine, Exporter, Request
from lmtune.export.merged import check_merged, merge_run
from lmtune.io.atomic import new_folder, write_text
from lmtune.models.locate import run_config

# Every option after it goes to vLLM: `serve.sh --port 8001`
_SERVE = '#!/bin/sh\ncd "$(dirname "$0")" || exit\nexec {command} "$@"\n'


def export_gguf(request: Request) -> list[str]:
    """One file; what to say of it.

    Raises:
        ModelError: GGUF cannot hold this model.
        ConfigError: the file is there already.
    """
    from lmtune.export.gguf import write_adapter, write_model

    name = request.run.name
    if request.adapter:
        target = request.place(f"{name}-lora.gguf")
        written = write_adapter(_adapter(request), _base_config(request), target, name)
        return [
            f"the adapter is in {target} ({written.num_bytes / 2**20:,.1f} MiB), for llama.cpp's --lora over its base",
            "it holds neither chat template nor stop tokens: those in the base's file must be the ones of training",
            *_quantized_base(request),
        ]
    target = request.place(f"{name}-{request.kind}.gguf")
    folder = merged_folder(request)
    written = write_model(folder, target, request.kind, name)
    lines = [f"{target}: {written.num_bytes / 2**20:,.1f} MiB, {request.kind}, architecture {written.architecture}"]
    if written.kept:
        lines.append(f"{written.kept} weights do not fit the blocks of {request.kind} and are in 16 bits")
    if written.has_template:
        return [*lines, f"llama-server -m {shlex.quote(str(target))} --jinja"]
    return [*lines, "the model has no chat template: send it plain prompts (/completion), as it was trained"]


def export_ollama(request: Request) -> list[str]:
    """A folder with a GGUF file and a Modelfile; what to say of it.

    Raises:
        ModelError: GGUF cannot hold this model, or Ollama's templates cannot say its template.
        ConfigError: the folder is there already.
    """
    from lmtune.export.gguf import write_model
    from lmtune.export.ollama import modelfile
    from lmtune.inference.load import saved_tokenizer, stop_tokens
    from lmtune.models.tuning.adapter_files import Metadata

    _refuse_adapter(request, "Ollama")
    target = _free(request.place("ollama"))
    folder, name = merged_folder(request), request.run.name
    tokenizer = saved_tokenizer(folder)
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(list(stop_tokens(folder)))]
    text = modelfile(tokenizer, f"{name}.gguf", stops, Metadata.read(folder).system)  # before a gigabyte is written
    with new_folder(target) as staging:
        write_model(folder, staging / f"{name}.gguf", request.kind, name)
        write_text(staging / "Modelfile", text)
    return [
        f"{target} holds {name}.gguf and its Modelfile",
        f"ollama create {name} -f {shlex.quote(str(target / 'Modelfile'))}",
    ]


def export_vllm(request: Request) -> list[str]:
    """A folder with the adapter, or the merged model, and the command that serves it; what to say of it.

    Raises:
        ModelError: vLLM does not serve this adapter.
        ConfigError: the folder is there already.
    """
    from lmtune.export import vllm
    from lmtune.models.base import resolve_name

    config = run_config(request.run, request.base)
    name, dtype = request.run.name, request.run.trained_dtype() or "auto"
    if not isinstance(config.tuning, LoraConfig) or not request.adapter:
        if request.output is not None:
            raise ConfigError("--output: vLLM serves the merged folder itself; leave it out, or add --adapter")
        return [shlex.join(vllm.command(str(merged_folder(request)), name, dtype))]
    target = _free(request.place("vllm"))
    adapter = _adapter(request)
    base = resolve_name(config.model.name, with_weights=True)
    with new_folder(target) as staging:
        renamed = vllm.write_adapter(adapter, staging, str((_whole_config(request).architectures or [""])[0]))
        from_there = os.path.relpath(base, target) if os.path.isdir(base) else base
        itself = vllm.adapter_command(from_there, name, staging, ".", dtype)
        write_text(staging / "serve.sh", _SERVE.format(command=shlex.join(itself)))
    said = [
        f"{target} holds the adapter for vLLM; sh {shlex.quote(str(target / 'serve.sh'))} serves it by this command:"
    ]
    if renamed:
        said.insert(0, f"{renamed} weights have the names of the base's text part in its model of pictures and text")
    said += _quantized_base(request)
    return [*said, shlex.join(vllm.adapter_command(base, name, target, str(target), dtype))]


EXPORTERS: dict[Engine, Exporter] = {
    "gguf": export_gguf, "ollama": export_ollama, "vllm": export_vllm,
}  # fmt: skip


def merged_folder(request: Request) -> Path:
    """The run's model as one plain folder: merged now, unless it was after the last training.

    Raises:
        ModelError: the run has no result, or its merged model differs.
    """
    run = request.run
    tuning = run_config(run, request.base).tuning
    if not run.has_result(tuning):
        raise ModelError(f"{run.path}: no result to export; finish the run with `lmtune finetune` first")
    if isinstance(tuning, LoraConfig):
        weights, merged = run.adapter / "adapter_model.safetensors", run.merged / "config.json"
        if not merged.is_file() or merged.stat().st_mtime < weights.stat().st_mtime:
            merge_run(run, run.merged, base=request.base)
    check_merged(run)
    return run.merged


def _adapter(request: Request) -> Path:
    """The run's adapter.

    Raises:
        ModelError: it trained the model's own weights.
    """
    tuning = run_config(request.run, request.base).tuning
    if not isinstance(tuning, LoraConfig) or not request.run.has_result(tuning):
        raise ModelError(f"{request.run.path}: no adapter; leave out --adapter to export the model")
    return request.run.adapter


def _quantized_base(request: Request) -> list[str]:
    """What to say where the engine's base is another than that of training."""
    kind = run_config(request.run, request.base).model.quantization
    return [] if kind == "none" else [
        f"it was trained over the base in {kind}; over another precision answers differ a little: lmtune verify tells"
    ]  # fmt: skip


def _whole_config(request: Request) -> Any:
    """The base's config, of all its parts."""
    from transformers import AutoConfig

    from lmtune.models.base import resolve_name

    model = run_config(request.run, request.base).model
    return AutoConfig.from_pretrained(resolve_name(model.name), revision=model.revision, trust_remote_code=False)


def _base_config(request: Request) -> Any:
    """The config of the base's text part."""
    return _whole_config(request).get_text_config()


def _refuse_adapter(request: Request, engine: str) -> None:
    if request.adapter:
        raise ConfigError(f"--adapter: {engine} takes the merged model; leave it out, or use --to gguf --adapter")


def _free(target: Path) -> Path:
    """`target`, which is not there yet."""
    if os.path.lexists(target):
        raise ConfigError(f"--output: {target} is there already, and is not replaced; give another --output")
    return target
