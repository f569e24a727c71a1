"""What a terminal shows of runs: scores with their 95 % intervals, some answers, a line for each run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from lmtune.data.report import describe_report
from lmtune.errors import LmtuneError
from lmtune.io.console import escape, out
from lmtune.io.text import is_finite_number, pluralize
from lmtune.runs.comparison import Comparison, best_of, shown_setting
from lmtune.runs.events import CheckpointSaved, Evaluated, Event, StepDone, Warned, best_so_far, shown_scores
from lmtune.runs.history import Overview, RunGroup, overview
from lmtune.runs.store import RunDirectory, ScoreValues

# key in summary.json: (name, the Hub's metric type)
SCORES = {
    "loss": ("Loss", "loss"),
    "perplexity": ("Perplexity", "perplexity"),
    "token_accuracy": ("Token accuracy", "accuracy"),
    "sequence_accuracy": ("Sequence accuracy", "accuracy"),
    "exact_match": ("Exact match", "exact_match"),
}
SHARES = ("token_accuracy", "sequence_accuracy", "exact_match")
_NOT_SHOWN = {*SCORES, "rows", "exact_match_rows"}
_MOST_COLUMNS = 12  # of classes
FEW_ROWS = 30  # of fewer held-out rows scores say little
NOT_MEASURED = "not measured"
_95 = 1.959964  # standard errors on each side of a 95 % interval


def format_score(key: str, value: object) -> str:
    """One score for people: shares in percent, `not measured` for what is absent or not a finite number."""
    if not isinstance(value, (int, float)) or not is_finite_number(value):
        return NOT_MEASURED
    if key in SHARES or key.endswith("accuracy"):
        return f"{100 * value:.1f} %"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def names_of(*scores: ScoreValues) -> dict[str, str]:
    """What is shown of some scores: the key and name of each that an objective has."""
    named = {"kl": "KL divergence", "macro_f1": "Macro F1", "auc": "AUC", "r2": "R²"}
    own = {
        key: named.get(key, key.replace("_", " ").capitalize())
        for part in scores for key in part if key not in _NOT_SHOWN
    }  # fmt: skip
    if not own or any(part.get("perplexity") is not None for part in scores):
        return {key: name for key, (name, _) in SCORES.items()}
    return {"loss": "Loss", **own}


def scores_table(base: ScoreValues | None, tuned: ScoreValues, baseline: object = None) -> Table:
    """The scores of a tuned model beside those of its base, by the keys of `SCORES`; no base leaves its column out.

    `baseline` says what stands for the base where it is not the model.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    if base is not None:
        table.add_column(str(baseline or "base"), justify="right", no_wrap=baseline is None)
    table.add_column("score" if base is None else "tuned", justify="right", no_wrap=True, style="bold")
    both = [tuned] if base is None else [base, tuned]
    for key, name in names_of(*both).items():
        table.add_row(name, *(format_score(key, scores.get(key)) for scores in both))
    return table


def print_classes(classes: object) -> None:
    """Show each class for itself, as `classes` of summary.json holds them: F1, and what its rows were taken for.

    Raises:
        LmtuneError: they are damaged.
    """
    if not isinstance(classes, Mapping):
        return
    try:
        labels, confusion = [str(label) for label in classes["labels"]], classes["confusion"]
        columns = labels if confusion and len(labels) <= _MOST_COLUMNS else []
        table = Table(box=None, pad_edge=False)
        for title in ("class", "rows", "precision", "recall", "F1", *(f"as {escape(label)}" for label in columns)):
            table.add_column(title, justify="left" if title == "class" else "right")
        for index, label in enumerate(labels):
            shares = [f"{classes[key][index]:.3f}" for key in ("precision", "recall", "f1")]
            taken = [str(confusion[index][place]) for place in range(len(columns))]
            table.add_row(escape(label), str(classes["rows"][index]), *shares, *taken)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise LmtuneError(f"summary.json: classes: damaged: {error}; delete the key or restore the file") from None
    out.print(table)


def describe_scores(
    base: ScoreValues | None, tuned: ScoreValues, errors: Mapping[str, ScoreValues] | None = None
) -> list[str]:
    """On how many rows scores were measured, and their 95 % intervals, from the standard errors by `base` and `tuned`.

    Shares of rows have Wilson's interval; loss and token accuracy are taken over rows, since the tokens of a row are
    not independent.
    """
    num_rows = tuned.get("rows")
    if not isinstance(num_rows, int) or num_rows < 1:
        return []
    both: list[tuple[str, ScoreValues]] = [*([("base", base)] if base else []), ("tuned", tuned)]
    lines = []
    for key, name in names_of(tuned).items():
        found = [interval(key, scores, (errors or {}).get(part) or {}) for part, scores in both]
        if all(found):
            shown = [f"{format_score(key, low)} to {format_score(key, high)}" for low, high in filter(None, found)]
            lines.append(f"  {name.lower()}: {', '.join(shown)}")
    of_what = f"; 95 % intervals{', base and tuned' if base else ''}:" if lines else ""
    lines.insert(0, f"over {pluralize(num_rows)}{of_what}")
    if num_rows < FEW_ROWS:
        lines.append(f"  fewer than {FEW_ROWS} rows: a difference may be chance; hold out more (data.validation)")
    return lines


def interval(key: str, scores: ScoreValues, errors: ScoreValues) -> tuple[float, float] | None:
    """The 95 % interval of one of the `SCORES`, of which some need their standard error; None if it is not known."""
    value, num_rows = scores.get(key), scores.get("exact_match_rows" if key == "exact_match" else "rows")
    if value is None or not num_rows:
        return None
    if key in ("exact_match", "sequence_accuracy") or (key.endswith("accuracy") and key != "token_accuracy"):
        return wilson(value, num_rows)
    error, loss = errors.get("loss" if key == "perplexity" else key), scores.get("loss")
    if error is None or loss is None:
        return None
    if key == "token_accuracy":  # as of so many independent tokens as would have this standard error
        return wilson(value, value * (1 - value) / error**2 if error else num_rows)
    low, high = max(0.0, loss - _95 * error), loss + _95 * error
    return (low, high) if key == "loss" else (math.exp(min(low, 700.0)), math.exp(min(high, 700.0)))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was found in `count` independent trials.

    Source: https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval#Wilson_score_interval
    """
    square = _95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = _95 * math.sqrt(share * (1 - share) / count + square / count / 4) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def predictions_shown(rows: Sequence[Mapping[str, str]], count: int) -> list[str]:
    """Some held-out questions, evenly spread, with reference, base's and tuned model's answer; lines with markup."""
    lines = list[str]()
    for row in rows[:: max(1, len(rows) // count)][:count] if count else ():
        lines.append(f"\n[bold]{escape(row.get('question', '').strip())}[/]")
        reference = row.get("reference", "").strip()
        for name, key in (("reference", "reference"), ("base", "base"), ("tuned", "tuned")):
            if key in row:
                said = escape(row[key].strip() or "(nothing)")
                mark = "  [green]✓[/]" if key != "reference" and row[key].strip() == reference else ""
                lines.append(f"  {name + ':':<10} {said if key != 'base' else f'[dim]{said}[/]'}{mark}")
    return lines


def describe_event(event: Event) -> str:
    """One event in a line, as `lmtune runs follow` prints it, with markup."""
    if isinstance(event, StepDone):
        rate = event.tokens / max(1e-9, event.seconds)
        return f"step {event.step} · epoch {event.epoch:.2f} · loss {event.loss:.4f} · {rate:,.0f} tok/s"
    if isinstance(event, Evaluated):
        scores = [
            f"{name.replace('_', ' ')} {format_score(name, value)}"
            for name, value in shown_scores(event.scores, event.metric)
        ]
        note = f" ({best_so_far(event)})" if best_so_far(event) else ""
        return escape(f"step {event.step} · {event.of}: {', '.join(scores)}{note}")
    if isinstance(event, CheckpointSaved):
        return f"step {event.step} · saved {escape(event.folder)}"
    if isinstance(event, Warned):
        return f"[yellow]warning:[/] {escape(event.message)}"
    where = f" after step {event.step}" if event.step else ""
    return f"[bold]{event.status}[/]{where}" + (f": {escape(event.reason)}" if event.reason else "")


def runs_table(runs: Sequence[Overview | RunGroup], width: int) -> Table:
    """A line for each run or group; a terminal of few columns (`width`) gets the most important things only."""
    table = Table(box=None, pad_edge=False)
    columns = [
        ("run", 0), ("status", 0), ("model", 90), ("quantization", 90), ("steps", 0), ("train loss", 0),
        ("held-out loss", 145), ("score", 0), ("last change", 90),
    ]  # fmt: skip # title, and the least width that shows it
    for title, least in columns:
        is_text = title in ("run", "status", "model", "quantization")
        if width >= least:
            table.add_column(title, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for item in runs:
        run = item.runs[0] if isinstance(item, RunGroup) else item
        changed = max(one.changed for one in item.runs) if isinstance(item, RunGroup) else item.changed
        cells = [
            escape(item.name), escape(item.status), escape(run.model), escape(run.quantization),
            "" if run.steps is None else str(run.steps),
            "" if run.recent_loss is None else f"{run.recent_loss:.4f}",
            "" if run.validation_loss is None else f"{run.validation_loss:.4f}",
            _score_cell(run), f"{changed:%Y-%m-%d %H:%M}",
        ]  # fmt: skip
        table.add_row(*(cell for cell, (_, least) in zip(cells, columns, strict=True) if width >= least))
    return table


def _score_cell(run: Overview) -> str:
    """`exact match 2.5 → 92.5 %`, `accuracy 58.8 %`; of a base that was not scored nothing."""
    if run.metric is None:
        return ""
    base, tuned = (format_score(run.metric, score) for score in (run.base_score, run.tuned_score))
    if run.tuned_score is None:
        tuned = "?"
    before = "" if run.base_score is None else f"{base.removesuffix(' %') if tuned.endswith('%') else base} → "
    return f"{run.metric.replace('_', ' ')} {before}{tuned}"


def comparison_table(found: Comparison) -> Table:
    """Runs beside each other: settings that differ, scores with the best one bold, cost."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in found.runs:
        table.add_column(escape(name), justify="right", overflow="fold")
    table.add_row("status", *found.status)
    for key, values in found.settings.items():
        table.add_row(escape(key), *(escape(shown_setting(value)) for value in values), style="cyan")
    both = (*(("base", *one) for one in found.base.items()), *(("tuned", *one) for one in found.tuned.items()))
    for part, name, numbers in both:
        if name not in ("rows", "exact_match_rows"):
            best = best_of(name, numbers) if part == "tuned" else None
            shown = [
                f"[bold]{format_score(name, one)}[/]" if place == best else format_score(name, one)
                for place, one in enumerate(numbers)
            ]
            table.add_row(f"{part}: {escape(name.replace('_', ' '))}", *shown)
    for name, numbers in found.figures.items():
        table.add_row(name.replace("_", " "), *("–" if value is None else _figure(value) for value in numbers))
    return table


def _figure(value: float) -> str:
    """A number of `summary.json`, short."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def print_run(chosen: RunDirectory) -> None:
    """Show one run: scores, figures, settings and what became of the rows; LmtuneError if a file is damaged."""
    item, summary = overview(chosen), chosen.read_summary()
    out.print(f"[bold]{escape(item.name)}[/]  {escape(item.status)}  {item.changed:%Y-%m-%d %H:%M}")
    if summary.reason:
        out.print(escape(summary.reason))
    if summary.tuned or summary.base:
        out.print(scores_table(summary.base, summary.tuned or {}, summary.tree.get("baseline")))
        for line in describe_scores(summary.base, summary.tuned or {}, summary.standard_errors):
            out.print(escape(line))
    print_classes(summary.tree.get("classes"))
    for key, value in summary.figures.items():
        out.print(f"{escape(key.replace('_', ' '))}: {value:,}")
    out.print(f"\n[bold]settings[/]\n{escape(chosen.config.read_text('utf-8', 'replace').rstrip())}")
    if report := chosen.read_data_report():
        out.print(f"\n[bold]data[/]\n{escape(describe_report(report))}")
