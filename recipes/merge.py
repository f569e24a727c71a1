"""Merge a run's adapter into its base model: a plain model folder that any tool loads, proven equal.

lmtune merge runs/support
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lmtune.checkpoints import checkpoint_folders
from lmtune.cli import run
from lmtune.config import to_tree
from lmtune.console import escape, out
from lmtune.errors import ConfigError, ModelError
from lmtune.history import choose_run
from lmtune.runs import RunDirectory, require_possible
from lmtune.writing import write_json, write_text


def main(
    target: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its name in runs/.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write; RUN/merged if not given.")] = None,
    into: Annotated[
        Literal["trained", "original"],
        typer.Option(help="trained: the weights that were trained over, dequantised. original: as published."),
    ] = "trained",
    base: Annotated[
        str | None, typer.Option(metavar="FOLDER_OR_ID", help="Where the base model is now, if it was moved.")
    ] = None,
    accept_difference: Annotated[
        bool,
        typer.Option(
            "--accept-difference",
            help="Keep the merged model even where its logits differ by more than rounding explains; the card says it.",
        ),
    ] = False,
) -> None:
    """Merge the adapter of RUN into its base, and verify the result against the adapter model.

    Example: lmtune merge runs/support --output support-model
    """
    run_directory = choose_run(target)
    merge_run(run_directory, output or run_directory.merged, into, accept_difference, base)


def merge_run(
    run_directory: RunDirectory,
    output: Path,
    into: Literal["trained", "original"],
    accept_difference: bool = False,
    base: str | None = None,
) -> dict[str, Any]:
    """Merge and verify; returns the report that is also written to `merge.json`."""
    require_possible(output, "--output")
    if output.is_symlink():
        raise ConfigError(f"--output: {output} is a link; give the folder itself")
    if output.exists() and not (output / "merge.json").is_file():
        raise ConfigError(f"--output: {output} exists and was not made by lmtune merge; choose another folder")

    has_adapter = (run_directory.adapter / "adapter_model.safetensors").is_file()
    if not has_adapter and not checkpoint_folders(run_directory.checkpoints):
        raise ModelError(f"{run_directory.path}: no adapter to merge; finish the run with `lmtune finetune` first")

    from lmtune.models.unfinished import usable_adapter

    with usable_adapter(run_directory, base) as adapter:
        return _merge(run_directory, adapter, output, into, accept_difference, base)


def _merge(
    run_directory: RunDirectory,
    adapter: Path,
    output: Path,
    into: Literal["trained", "original"],
    accept_difference: bool, base: str | None,
) -> dict[str, Any]:  # fmt: skip
    from lmtune.models.adapters import read_notes
    from lmtune.models.base_place import run_config, shareable_name
    from lmtune.models.inference import saved_tokenizer, stop_tokens
    from lmtune.models.merging import MergeReport, merge
    from lmtune.report import merged_card

    config = run_config(run_directory, base)
    notes = read_notes(adapter)
    tokenizer = saved_tokenizer(adapter)
    stops = stop_tokens(adapter)
    names = [str(tokenizer.convert_ids_to_tokens(index)) for index in stops]
    sequences = run_directory.read_verification(max(tokenizer.get_vocab().values()) + 1)
    summary = run_directory.read_summary()

    def describe(folder: Path, report: MergeReport) -> None:
        merged = {"base_model": shareable_name(config.model.name, output), "quantization": "none", "merged": into}
        write_json(folder / "lmtune.json", {**notes, **merged})
        write_json(folder / "merge.json", report.as_dict())
        write_text(folder / "README.md", merged_card(to_tree(config), summary, report.as_dict(), stops=names))

    report = merge(
        config.model, adapter, output, into, sequences, tokenizer, stops, describe, accept_difference
    ).as_dict()
    if output == run_directory.merged and summary.get("status") == "complete":  # else it is the run's own to write
        write_json(run_directory.summary, {**summary, "merge": report})
    out.print(f"merged into {escape(str(output))} ({report['dtype']}, {into} weights)")
    bound = "said only" if report["bound_to_trained"] is None else f"bound {report['bound_to_trained']:.0e}"
    out.print(
        f"verified on {report['rows']} rows, as a share of the largest logit:\n"
        f"  {report['logits_difference']:.1e} from the adapter over the same weights (bound {report['bound']:.0e})\n"
        f"  {report['difference_to_trained']:.1e} from the model as trained ({bound}; "
        f"first choice equal for {report['same_first_choice']:.1%} of tokens)"
    )
    return report


if __name__ == "__main__":
    run(main)
