"""`report.html`: what a run was, how it went and what came of it, on one page that needs nothing else.

    write_report([run], run.report, token_f1)

The page holds its style, its script and its pictures; it loads nothing, and a policy in its head forbids it. All that
comes from rows, settings and models is escaped. Its size does not grow with the number of steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from lmtune.data.report import PartReport, describe_report
from lmtune.io.atomic import write_text
from lmtune.io.text import is_finite_number, pluralize
from lmtune.runs.charts import Mark, Series, bar_chart, line_chart, short, stacked_bars
from lmtune.runs.comparison import best_of, compare_runs, settings_of, shown_setting
from lmtune.runs.curves import Curves, charts_of, loss_png
from lmtune.runs.events import CheckpointSaved, Event, StatusChanged, Warned, read_events
from lmtune.runs.history import overview
from lmtune.runs.log import read_predictions
from lmtune.runs.pictures import confusion_svg
from lmtune.runs.store import RunDirectory, Summary
from lmtune.runs.tables import format_score, interval, names_of

Similarity = Callable[[str, str], float]  # of a reference and an answer, from 0 to 1
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_MOST_ANSWERS, _MOST_LETTERS = 400, 3000
_MOST_CLASSES = 60  # of a drawn confusion matrix
_MOST_WARNINGS = 50
_STYLES = 6  # colours of runs beside each other


def write_report(runs: Sequence[RunDirectory], page: Path, similarity: Similarity) -> Path:
    """Write the page of one run, or of several beside each other, and the loss as a picture beside it.

    Args:
        runs: one or more.
        page: the file to write; the picture is `loss.png` in a run's own folder, else the page's name with `.png`.
        similarity: by which answers are compared with their reference.

    Returns:
        The picture's path.

    Raises:
        LmtuneError: a file of a run is damaged.
        OSError: a file cannot be written.
    """
    events = [read_events(run) for run in runs]
    curves = [Curves.of(run, own) for run, own in zip(runs, events, strict=True)]
    sections = [_run(*one, similarity) for one in zip(runs, events, curves, strict=True)]
    title = ", ".join(run.name for run in runs)
    if len(runs) == 1:
        body = sections[0]
    else:
        parts = [
            f"<details><summary>{escape(run.name)}</summary>{part}</details>"
            for run, part in zip(runs, sections, strict=True)
        ]
        body = f"<h1>{escape(title)}</h1>{_beside(runs, curves)}{''.join(parts)}"
    write_text(page, _page(f"{title} · lmtune", body))
    picture = runs[0].loss_picture if page == runs[0].report else page.with_suffix(".png")
    loss_png(curves, [run.name for run in runs], picture)
    return picture


def _page(title: str, body: str) -> str:
    here = Path(__file__).parent
    style, script = (here.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<style>{style}</style></head>\n<body>{body}\n<script>{script}</script></body></html>\n"
    )


# --- one run ---------------------------------------------------------------------------------------------------------


def _run(run: RunDirectory, events: Sequence[Event], curves: Curves, similarity: Similarity) -> str:
    """All that is told of a run; a part without anything to tell is left out, also from the line of links."""
    summary, item, settings = run.read_summary(), overview(run), settings_of(run)
    clip = settings.get("train.max_grad_norm")
    charts = charts_of(curves, float(clip) if isinstance(clip, (int, float)) else None)
    memory = _memory(summary)
    parts = {
        "Scores": _scores(summary),
        "Curves": f'<div class="charts">{"".join(charts)}</div>' if charts else "",
        "Memory": f'<div class="charts">{memory}</div>' if memory else "",
        "Answers": _answers(read_predictions(run), similarity),
        "Classes": _classes(summary),
        "Data": _data(run),
        "Tokens": _tokens(run),
        "Events": _events(events),
        "Settings": f"<pre>{escape(run.config.read_text('utf-8', 'replace'))}</pre>",
        "Environment": _environment(run),
    }
    known = {name: part for name, part in parts.items() if part}
    anchors = {name: f"{name.lower()}-{escape(run.name)}" for name in known}
    links = "".join(f'<a href="#{anchors[name]}">{name}</a>' for name in known)
    reason = f"<p>{escape(summary.reason)}</p>" if summary.reason else ""
    return (
        f'<h1>{escape(run.name)} <span class="badge {escape(item.status)}">{escape(item.status)}</span></h1>'
        f'<p class="soft">{escape(item.model)}, {_held(item.quantization)}; '
        f"last written {item.changed:%Y-%m-%d %H:%M}</p>"
        f"{reason}<nav>{links}</nav>{_tiles(summary, curves)}"
        + "".join(f'<section><h2 id="{anchors[name]}">{name}</h2>{part}</section>' for name, part in known.items())
    )


def _held(quantization: str) -> str:
    return "not quantized" if quantization == "none" else f"in {escape(quantization)}"


def _tiles(summary: Summary, curves: Curves) -> str:
    """The few numbers that are asked for first."""
    figures, tiles = summary.figures, []
    tuned, base = summary.tuned or {}, summary.base or {}
    for name, title in list(names_of(tuned).items())[:6] if tuned else ():
        if (value := tuned.get(name)) is not None:
            before = base.get(name)
            tiles.append(
                (format_score(name, value), title, "" if before is None else f"base {format_score(name, before)}")
            )
    steps = summary.steps if summary.steps is not None else len(curves.steps) or None
    if steps is not None:
        kept = f"best step {curves.best_step}" if curves.best_step is not None else ""
        tiles.append((f"{steps:,}", "steps", kept))
    if "train_seconds" in figures:
        tiles.append((_duration(figures["train_seconds"]), "training", ""))
    if "tokens_per_second" in figures:
        tiles.append((short(figures["tokens_per_second"]), "tokens a second", ""))
    if "peak_memory_gib" in figures:
        expected = figures.get("estimated_memory_gib")
        tiles.append(
            (
                f"{figures['peak_memory_gib']:.2f} GiB",
                "peak memory",
                "" if expected is None else f"estimated {expected:.2f}",
            )
        )
    shown = (
        f'<div class="tile"><b>{escape(value)}</b>{escape(name)}<small>{escape(more)}</small></div>'
        for value, name, more in tiles
    )
    return f'<div class="tiles">{"".join(shown)}</div>' if tiles else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{seconds:.1f} s"
        if seconds < 60
        else f"{minutes} min {rest} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60} min"
    )


def _scores(summary: Summary) -> str:
    """Base beside tuned, with 95 % intervals."""
    both = [(name, scores) for name, scores in (("base", summary.base), ("tuned", summary.tuned)) if scores]
    if not both:
        return ""
    titles = {"base": str(summary.tree.get("baseline") or "base"), "tuned": "tuned"}
    rows = []
    for key, title in names_of(*(scores for _, scores in both)).items():
        cells = []
        for part, scores in both:
            known = interval(key, scores, summary.standard_errors.get(part) or {})
            between = "" if known is None else f"{format_score(key, known[0])} to {format_score(key, known[1])}"
            value = escape(format_score(key, scores.get(key)))
            cells.append(f'<td class="number">{value}<small>{between}</small></td>')
        rows.append([f"<td>{escape(title)}</td>", *cells])
    heads = "".join(f'<th class="number">{escape(titles[part])}</th>' for part, _ in both)
    number = both[-1][1].get("rows")
    over = f" over {pluralize(int(number), 'held-out row')}" if is_finite_number(number) and number else ""
    explained = f'<p class="soft">Scores{over}; below them their 95 % intervals.</p>'
    return _table(f"<th></th>{heads}", rows, "scores") + explained


def _table(heads: str, rows: Sequence[Sequence[str]], style: str = "") -> str:
    """A table that scrolls by itself where the page is narrow."""
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return (
        f'<div class="wide"><table class="{style}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _memory(summary: Summary) -> str:
    """What was expected, by part, beside what was measured."""
    measured, estimate = summary.figures.get("peak_memory_gib"), summary.tree.get("estimate")
    if measured is None or not isinstance(estimate, Mapping):
        return ""
    parts = [
        (str(name).removesuffix("_gib").replace("_", " "), float(size))
        for name, size in estimate.items() if name != "memory_gib" and is_finite_number(size)
    ]  # fmt: skip
    chart = stacked_bars(
        "Memory of one process", [("estimated", parts), ("measured peak", [("measured", measured)])], "GiB"
    )
    return chart.replace(
        "</figure>", "<small>On a CPU the measured peak holds Python and its libraries, too.</small></figure>"
    )


def _answers(rows: Sequence[Mapping[str, str]], similarity: Similarity) -> str:
    """The held-out rows with reference and answers, what got worse first."""
    has_tuned, has_base = (any(key in row for row in rows) for key in ("tuned", "base"))
    if not has_tuned and not has_base:
        return ""
    scored = []
    for number, row in enumerate(rows, start=1):
        likeness = {key: similarity(row.get("reference", ""), row[key]) for key in ("base", "tuned") if key in row}
        both = len(likeness) == 2
        gain = likeness["tuned"] - likeness["base"] if both else next(iter(likeness.values()), 0.0)
        scored.append((gain, number, row, likeness))
    scored.sort(key=lambda one: one[:2])
    worse, better = (sum(sign * gain > 1e-9 for gain, *_ in scored) for sign in (-1, 1))
    said = "The least like the reference comes first."
    if has_base and has_tuned:
        said = f"The tuned model is nearer to the reference in {better} of {pluralize(len(rows), 'held-out row')}, "
        said += f"farther from it in {worse}. What got worse comes first."
    if len(scored) > _MOST_ANSWERS:
        said += f" The first {_MOST_ANSWERS} are shown; all are in predictions.jsonl."
    columns = [key for key, is_there in (("base", has_base), ("tuned", has_tuned)) if is_there]
    titles = ["row", "question", "reference", *columns, "change" if len(columns) == 2 else "likeness"]
    heads = "".join(
        f"<th{' aria-sort=ascending' if title in ('change', 'likeness') else ''}><button>{title}</button></th>"
        for title in titles
    )
    body = []
    for gain, number, row, _ in scored[:_MOST_ANSWERS]:
        mark = "" if abs(gain) <= 1e-9 or len(columns) < 2 else "better" if gain > 0 else "worse"
        sign = f"{gain:+.2f}" if mark else f"{gain:.2f}"
        texts = [f"<td>{escape(_cut(row.get(key, '')))}</td>" for key in ("question", "reference", *columns)]
        change = f'<td class="number {mark}" data-key="{gain:.6f}">{sign}</td>'
        body.append([f'<td class="number">{number}</td>', *texts, change])
    explained = f'<p class="soft">{said} Likeness is F1 over words, from 0 to 1.</p>'
    return explained + _table(heads, body, "answers sortable")


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else text[:_MOST_LETTERS] + " …"


def _classes(summary: Summary) -> str:
    """The confusion matrix; of many classes those that are mistaken for each other the most."""
    classes = summary.tree.get("classes")
    if not isinstance(classes, Mapping) or not classes.get("confusion"):
        return ""
    labels, confusion = [str(label) for label in classes["labels"]], classes["confusion"]
    if len(labels) <= _MOST_CLASSES and (picture := confusion_svg(classes)):
        return f'<div class="picture">{picture}</div>'
    wrong = [
        (count, labels[row], labels[column])
        for row, counts in enumerate(confusion) for column, count in enumerate(counts) if count and row != column
    ]  # fmt: skip
    rows = [
        [f"<td>{escape(right)}</td>", f"<td>{escape(taken)}</td>", f'<td class="number">{count:,}</td>']
        for count, right, taken in sorted(wrong, reverse=True)[:_MOST_CLASSES]
    ]
    return _table('<th>right class</th><th>taken for</th><th class="number">rows</th>', rows)


def _data(run: RunDirectory) -> str:
    """What became of the rows, and how long they are."""
    report = run.read_data_report()
    if report is None:
        return ""
    lengths, chart = run.read_json(run.preview).get("lengths"), ""
    if isinstance(lengths, Mapping):
        groups = [
            (name, lengths[key], style)
            for name, key, style in (("training", "train", "smooth"), ("validation", "validation", "validation"))
            if lengths.get(key)
        ]
        name, is_near = f"data.max_length {lengths['limit']:,}", lengths["limit"] <= lengths["edges"][-1]
        limit = Mark(name, lengths["limit"]) if is_near else None
        chart = f'<div class="charts">{bar_chart("Tokens of a sequence", lengths["edges"], groups, limit)}</div>'
        said = [_over_limit(report.train), "" if is_near else f"{name} is far beyond the longest of them."]
        chart += f'<p class="soft">{" ".join(filter(None, said))}</p>' if any(said) else ""
    return f"{chart}<pre>{escape(describe_report(report))}</pre>"


def _over_limit(part: PartReport) -> str:
    """What became of the rows beyond the limit, which the bars show as they are trained."""
    counts = {
        "left out": sum(rows.count for rows in part.dropped.values()),
        "cut": part.truncated.count,
        "split": part.split.count,
    }
    said = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    return f"Rows that did not fit: {said}. The longest row has {part.longest_row_tokens:,} tokens." if said else ""


def _tokens(run: RunDirectory) -> str:
    """The first rows token by token."""
    rows = run.read_json(run.preview).get("rows")
    if not isinstance(rows, list) or not rows:
        return ""
    has_targets = any(is_target for row in rows for _, is_target in row["tokens"])
    what = "Trained tokens are green." if has_targets else "It learns what to say of each row as a whole."
    parts = [f'<p class="soft">The first training rows as the model reads them. {what}</p>']
    for row in rows:
        pieces = "".join(
            f"<b>{escape(text)}</b>" if is_target else f"<i>{escape(text)}</i>" for text, is_target in row["tokens"]
        )
        more = f" … {row['more']:,} more tokens" if row.get("more") else ""
        parts.append(f'<h3>{escape(row["where"])}</h3><div class="tokens">{pieces}<small>{more}</small></div>')
    return "".join(parts)


def _events(events: Sequence[Event]) -> str:
    """How the run began, was continued and ended, and what was unusual."""
    told = [event for event in events if isinstance(event, (StatusChanged, Warned))]
    saved = sum(isinstance(event, CheckpointSaved) for event in events)
    if not told:
        return ""
    rows = []
    for event in told[:_MOST_WARNINGS]:
        text = (
            event.message if isinstance(event, Warned) else event.status + (f": {event.reason}" if event.reason else "")
        )
        style = "warning" if isinstance(event, Warned) else ""
        rows.append([
            f'<td class="soft">{escape(event.time[:19].replace("T", " "))}</td>',
            f'<td class="number">{event.step:,}</td>', f'<td class="{style}">{escape(text)}</td>',
        ])  # fmt: skip
    left = f" {len(told) - _MOST_WARNINGS:,} more are in events.jsonl." if len(told) > _MOST_WARNINGS else ""
    table = _table('<th>time (UTC)</th><th class="number">step</th><th></th>', rows, "events")
    return f'{table}<p class="soft">{pluralize(saved, "checkpoint")} saved.{left}</p>'


def _environment(run: RunDirectory) -> str:
    made = run.read_json(run.environment)
    return f"<pre>{escape(json.dumps(made, indent=2, ensure_ascii=False))}</pre>" if made else ""


# --- several runs ----------------------------------------------------------------------------------------------------


def _beside(runs: Sequence[RunDirectory], curves: Sequence[Curves]) -> str:
    """Settings that differ, scores and cost, and the losses in one chart."""
    found = compare_runs(runs)
    rows = [["<td>status</td>", *(f"<td>{escape(status)}</td>" for status in found.status)]]
    for key, values in found.settings.items():
        rows.append(
            [
                f"<td>{escape(key)}</td>",
                *(f"<td>{escape(shown_setting(value))}</td>" for value in values),
            ]
        )
    for part, scores in (("base", found.base), ("tuned", found.tuned)):
        for name, numbers in scores.items():
            if name == "exact_match_rows" or (part, name) == ("base", "rows"):
                continue
            best = best_of(name, numbers) if part == "tuned" else None
            texts = [
                "–" if value is None else f"{value:,}" if name == "rows" else format_score(name, value)
                for value in numbers
            ]
            cells = (
                f"<td{' class=best' if place == best else ''}>{escape(text)}</td>" for place, text in enumerate(texts)
            )
            rows.append([f"<td>{part}: {escape(name.replace('_', ' '))}</td>", *cells])
    for name, numbers in found.figures.items():
        rows.append(
            [
                f"<td>{name.replace('_', ' ')}</td>",
                *(f"<td>{'–' if value is None else short(value)}</td>" for value in numbers),
            ]
        )
    heads = "".join(f"<th>{escape(name)}</th>" for name in found.runs)
    notes = "".join(f'<p class="warning">{escape(note)}</p>' for note in found.notes)
    training, validation = list[Series](), list[Series]()
    for number, (name, own) in enumerate(zip(found.runs, curves, strict=True)):
        style = f"run{number % _STYLES}"
        if own.steps:
            smooth = own.loss()[1]
            training.append(Series(name, smooth.x, smooth.y, style))
        validation += own.scored("loss", name, style)
    charts = [
        line_chart(title, lines)
        for title, lines in (("Training loss, smoothed", training), ("Validation loss", validation))
        if lines
    ]
    return f'{notes}<div class="charts">{"".join(charts)}</div>{_table(f"<th></th>{heads}", rows)}'
