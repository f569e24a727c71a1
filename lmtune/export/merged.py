"""Merging a run: its adapter into its base, with the card, the notes and the report of the merged folder."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig, LoraConfig
from lmtune.errors import ConfigError, ModelError
from lmtune.io.atomic import new_folder, write_json, write_text
from lmtune.io.console import escape, out
from lmtune.io.text import pluralize
from lmtune.runs.store import RunDirectory, checkpoint_folders, require_possible

if TYPE_CHECKING:
    from lmtune.models.tuning.adapter_files import Into
    from lmtune.models.verify import MergeReport


def merge_run(
    run_directory: RunDirectory,
    output: Path,
    into: Into = "trained",
    accept_difference: bool = False,
    base: str | None = None,
    exact: bool = False,
) -> dict[str, Any]:
    """Merge the adapter of a run into its base, verify the result, and return the report, also in `merge.json`.

    Args:
        run_directory: of a run that has an adapter, or a checkpoint of one.
        output: the folder to write.
        into: `trained`: the weights that were trained over, dequantized. `original`: as published.
        accept_difference: keep the merged model even where its logits differ by more than rounding explains.
        base: where the base model is now, a folder or Hub id, if it was moved.
        exact: write what the adapter changes in fp32, whatever the base is stored in.

    Raises:
        ConfigError: `output` cannot be written, or holds something else.
        ModelError: there is no adapter, the base is not the one trained over, or the merged model differs.
    """
    require_possible(output, "--output")
    if output.is_symlink():
        raise ConfigError(f"--output: {output} is a link; give the folder itself")
    tuning = load_config(FinetuneConfig, run_directory.config).tuning
    is_own = output == run_directory.merged and not isinstance(tuning, LoraConfig)
    if output.exists() and not is_own and not (output / "merge.json").is_file():
        raise ConfigError(f"--output: {output} exists and was not made by lmtune merge; choose another folder")

    if not run_directory.has_result(tuning) and not checkpoint_folders(run_directory.checkpoints):
        raise ModelError(f"{run_directory.path}: no adapter to merge; finish the run with `lmtune finetune` first")
    if not isinstance(tuning, LoraConfig):
        _write_whole(run_directory, output, base)
        return {}

    from lmtune.inference.load import usable_adapter

    with usable_adapter(run_directory, base) as adapter:
        return _merge(run_directory, adapter, output, into, accept_difference, base, exact)


def check_merged(run: RunDirectory) -> None:
    """Look at the files of a run's merged model, of which some may be gone or damaged.

    Raises:
        ModelError: with every problem.
    """
    from lmtune.models.validate import check_base

    try:
        check_base(str(run.merged), run.merged)
    except ModelError as error:
        said = str(error).removeprefix("model.name: ")
        raise ModelError(f"{said}\nmake it again: lmtune merge {shlex.quote(str(run.path))}") from None


def _write_whole(run: RunDirectory, output: Path, base: str | None) -> None:
    """Write the model of a run that trained the model's own weights: there is nothing to merge."""
    from lmtune.inference.load import saved_weights, write_model

    saved = saved_weights(run)
    if saved is None and output == run.merged:
        out.print(f"{escape(str(output))} is the trained model already: the run has no adapter")
        return
    with new_folder(output) as staging:
        if saved is None:
            shutil.copytree(run.merged, staging, dirs_exist_ok=True)
        else:
            write_model(run, saved, staging, base)
        write_json(staging / "merge.json", {"run": run.name})  # the folder may be replaced by another merge
    out.print(f"{escape(str(output))} is the trained model: the run has no adapter, so nothing was merged")


def _merge(
    run_directory: RunDirectory,
    adapter: Path,
    output: Path,
    into: Into,
    accept_difference: bool,
    base: str | None,
    exact: bool,
) -> dict[str, Any]:
    from lmtune.inference.load import saved_tokenizer, stop_tokens
    from lmtune.models.locate import run_config, shareable_name
    from lmtune.models.merge import merge
    from lmtune.models.tuning.adapter_files import Metadata
    from lmtune.runs.cards import merged_card

    config = run_config(run_directory, base)
    metadata = Metadata.read(adapter)
    tokenizer = saved_tokenizer(adapter)
    stops = stop_tokens(adapter)
    names = [str(tokenizer.convert_ids_to_tokens(index)) for index in stops]
    sequences = run_directory.read_verification()
    summary, data = run_directory.read_summary(), run_directory.read_data_report()

    def describe(folder: Path, report: MergeReport) -> None:
        merged = replace(
            metadata, base_model=shareable_name(config.model.name, output), quantization="none", merged=into
        )
        write_json(folder / "lmtune.json", merged.as_dict())
        write_json(folder / "merge.json", asdict(report))
        write_text(folder / "README.md", merged_card(config, summary, asdict(report), stops=names, data=data))

    report = asdict(
        merge(config.model, adapter, output, into, sequences, tokenizer, stops, describe, accept_difference, exact)
    )
    if output == run_directory.merged and summary.status == "complete":  # else it is the run's own to write
        write_json(run_directory.summary, {**summary.tree, "merge": report})
    out.print(f"merged into {escape(str(output))} ({report['dtype']}, {into} weights)")
    bound = (
        "reported, not enforced" if report["bound_to_trained"] is None else f"bound {report['bound_to_trained']:.0e}"
    )
    out.print(
        f"verified on {pluralize(report['rows'])}, as a share of the largest logit:\n"
        f"  {report['logits_difference']:.1e} from the adapter over the same weights (bound {report['bound']:.0e})\n"
        f"  {report['difference_to_trained']:.1e} from the model as trained ({bound}; "
        f"top-1 agreement {report['top1_agreement']:.1%}, KL {report['kl']:.1e} nats a token)\n"
        f"  {report['update_kept']:.2%} of the adapter's update is left after rounding to {report['dtype']}"
    )
    return report
