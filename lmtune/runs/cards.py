"""What is told about a finished run: the table of scores, and the model card of an adapter or merged model.

    Path("README.md").write_text(adapter_card(config, summary, fates, "user/name"))

PEFT's own card is a form full of blanks, which nobody fills in. Ours holds only what is known: settings, row counts and
measured numbers; what was not measured is said to be so. No row of the data, no path and no machine is in it. The
front matter follows the Hub's model card specification, https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from rich.table import Table

from lmtune import __version__
from lmtune.io.console import escape
from lmtune.runs.history import Overview

# key in summary.json: (name, the Hub's metric type)
SCORES = {
    "loss": ("Loss", "loss"),
    "perplexity": ("Perplexity", "perplexity"),
    "token_accuracy": ("Token accuracy", "accuracy"),
    "sequence_accuracy": ("Sequence accuracy", "accuracy"),
    "exact_match": ("Exact match", "exact_match"),
}
FEW_ROWS = 30  # of fewer held-out rows scores say little
_95 = 1.959964  # standard errors on each side of a 95 % interval
NOT_MEASURED = "not measured"
_QUANTIZATIONS = {
    "none": "not quantised",
    "nf4": "4-bit NF4 (bitsandbytes)",
    "int8": "8-bit (bitsandbytes)",
}
_QUIET_KEYS = ("data.train", "data.validation", "data.system", "adapter.adapter")  # names and words of the user's own


def format_score(key: str, value: object) -> str:
    """One score for people: shares in percent, `not measured` for what is absent or no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return NOT_MEASURED
    if key in ("loss", "perplexity"):
        return f"{value:.4f}" if value < 1000 else f"{value:.4g}"
    return f"{100 * value:.1f} %"


def scores_table(base: Mapping[str, Any] | None, tuned: Mapping[str, Any]) -> Table:
    """The scores of a tuned model beside those of its base.

    Args:
        base: scores by the keys of `SCORES`; None leaves the column out.
        tuned: the same for the model itself.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    if base is not None:
        table.add_column("base", justify="right", no_wrap=True)
    table.add_column("score" if base is None else "tuned", justify="right", no_wrap=True, style="bold")
    for key, (name, _) in SCORES.items():
        both = [tuned] if base is None else [base, tuned]
        table.add_row(name, *(format_score(key, scores.get(key)) for scores in both))
    return table


def describe_scores(
    base: Mapping[str, Any] | None, tuned: Mapping[str, Any], errors: Mapping[str, Any] | None = None
) -> list[str]:
    """On how many rows scores were measured, and between which values they lie: 95 % intervals, base and tuned.

    `errors` are the standard errors of `base` and `tuned`, by the names of the scores, as a summary holds them.

    Shares of rows have Wilson's interval; loss and token accuracy are taken over rows, since the tokens of a row are
    not independent.
    """
    num_rows = tuned.get("rows")
    if not isinstance(num_rows, int) or num_rows < 1:
        return []
    rows = f"{num_rows:,} row{'' if num_rows == 1 else 's'}"
    lines = [f"over {rows}; 95 % intervals{', base and tuned' if base else ''}:"]
    for key, (name, _) in SCORES.items():
        both = [("base", base), ("tuned", tuned)] if base else [("tuned", tuned)]
        found = [interval(key, scores, section(errors or {}, part)) for part, scores in both]
        if all(found):
            shown = [f"{format_score(key, low)} to {format_score(key, high)}" for low, high in filter(None, found)]
            lines.append(f"  {name.lower()}: {', '.join(shown)}")
    if num_rows < FEW_ROWS:
        lines.append(f"  fewer than {FEW_ROWS} rows: a difference may be chance; hold out more (data.validation)")
    return lines


def interval(key: str, scores: Mapping[str, Any], errors: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of one of the `SCORES`, of which some need their standard error; None if it is not known."""
    value, num_rows = scores.get(key), scores.get("exact_match_rows" if key == "exact_match" else "rows")
    if not isinstance(value, (int, float)) or not isinstance(num_rows, int) or num_rows < 1:
        return None
    if key in ("exact_match", "sequence_accuracy"):
        return wilson(float(value), num_rows)
    error = errors.get("loss" if key == "perplexity" else key)
    if not isinstance(error, (int, float)):
        return None
    if key == "token_accuracy":  # as of so many independent tokens as would have this standard error
        counted = value * (1 - value) / error**2 if error else num_rows
        return wilson(float(value), counted)
    loss = scores.get("loss")
    if not isinstance(loss, (int, float)):
        return None
    low, high = max(0.0, loss - _95 * error), loss + _95 * error
    return (low, high) if key == "loss" else (math.exp(min(low, 700.0)), math.exp(min(high, 700.0)))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was found in `count` independent trials."""
    square = _95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = _95 * math.sqrt(share * (1 - share) / count + square / count / 4) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def answers_shown(rows: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """Some held-out questions, evenly spread, with reference, base's and tuned model's answer; lines with markup."""
    lines = list[str]()
    for row in rows[:: max(1, len(rows) // count)][:count] if count else ():
        lines.append(f"\n[bold]{escape(str(row.get('question', '')).strip())}[/]")
        for name, key in (("reference", "wanted"), ("base", "base"), ("tuned", "tuned")):
            if key in row:
                said = escape(str(row[key]).strip() or "(nothing)")
                right = key == "wanted" or str(row[key]).strip() == str(row.get("wanted", "")).strip()
                mark = "  [green]✓[/]" if right and key != "wanted" else ""
                lines.append(f"  {name + ':':<10} {said if key != 'base' else f'[dim]{said}[/]'}{mark}")
    return lines


def runs_table(runs: Sequence[Overview], width: int) -> Table:
    """A line for each run; the training loss is the mean of the last 20 steps, for one step's rows may be odd.

    Args:
        runs: as `list_runs` gives them.
        width: columns of the terminal; a narrow one gets the most important things only.
    """
    wide, widest = width >= 90, width >= 120
    table = Table(box=None, pad_edge=False)
    for title in ("run", "status", *(("model", "bits") if wide else ())):
        table.add_column(title, overflow="fold")
    for title in (
        "steps",
        "train loss",
        *(("held-out loss",) if widest else ()),
        "exact match",
        *(("last change",) if wide else ()),
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for run in runs:
        scores = (run.base_exact_match, run.tuned_exact_match)
        base, tuned = ("?" if share is None else f"{100 * share:.1f}" for share in scores)
        table.add_row(
            escape(run.name), escape(run.status), *((escape(run.model), escape(run.quantization)) if wide else ()),
            "" if run.steps is None else str(run.steps), _loss(run.recent_loss),
            *((_loss(run.validation_loss),) if widest else ()),
            "" if scores == (None, None) else f"{base} → {tuned} %",
            *((f"{run.changed:%Y-%m-%d %H:%M}",) if wide else ()),
        )  # fmt: skip
    return table


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def adapter_card(
    config: Mapping[str, Any], summary: Mapping[str, Any], fates: Mapping[str, Any], repository: str | None = None,
    stops: Sequence[str] = (),
) -> str:  # fmt: skip
    """The README.md of an adapter folder.

    Args:
        config: the run's settings as `lmtune.config.load.to_tree` gives them.
        summary: the run's `summary.json`.
        fates: the run's `data.json`; counts are taken from it and nothing else.
        repository: `user/name` on the Hub, if it is known already.
        stops: the tokens that generation stops at, the end of an answer first.
    """
    model = section(config, "model")
    base, place = str(model.get("name", "unknown")), repository or "path/to/adapter"
    title = repository or str(section(config, "run").get("name") or "LoRA adapter")
    head = {"library_name": "peft", "tags": ["lora", "lmtune", "transformers"]}
    return joined(
        _front_matter(base, head, summary, title),
        f"# {title.rpartition('/')[2]}",
        f"A LoRA adapter for {_linked(base)}, fine-tuned with lmtune {__version__}. "
        "It holds the change to the base model only, so it is loaded together with that model.",
        _start_part(summary),
        _base_table(model),
        _scores_part(summary),
        _data_part(fates),
        _settings_part(config),
        adapter_usage(config, place, repository, stops),
        _limits(base),
    )


def merged_card(
    config: Mapping[str, Any], summary: Mapping[str, Any], merge: Mapping[str, Any], repository: str | None = None,
    stops: Sequence[str] = (),
) -> str:  # fmt: skip
    """The README.md of a merged model: the base with the adapter's change added to its weights.

    Args:
        config: the run's settings as `lmtune.config.load.to_tree` gives them.
        summary: the run's `summary.json`.
        merge: what `merge.json` holds: how the merged model was compared with base and adapter.
        repository: `user/name` on the Hub, if it is known already.
        stops: the tokens that generation stops at, the end of an answer first.
    """
    model = section(config, "model")
    base, place = str(model.get("name", "unknown")), repository or "path/to/merged"
    title = repository or str(section(config, "run").get("name") or "merged model")
    head = {"library_name": "transformers", "tags": ["lora", "merged", "lmtune"], "base_model_relation": "finetune"}
    return joined(
        _front_matter(base, head, summary, title),
        f"# {title.rpartition('/')[2]}",
        f"{_linked(base)} with a LoRA adapter merged into its weights, fine-tuned with lmtune {__version__}. "
        "It is a whole model and needs no adapter.",
        _base_table(model),
        _merge_part(merge),
        _scores_part(summary),
        "These are the scores of base and adapter, measured before the merge." if section(summary, "tuned") else "",
        _settings_part(config),
        merged_usage(config, place, stops),
        _limits(base),
    )


def _start_part(summary: Mapping[str, Any]) -> str:
    start = summary.get("started_from")
    return f"Training began from the adapter `{start}`, not from a new one." if isinstance(start, str) else ""


def _front_matter(base: str, head: Mapping[str, Any], summary: Mapping[str, Any], title: str) -> str:
    """The YAML block that the Hub reads. It names the base; one from a folder of this machine has no place in it."""
    tree: dict[str, Any] = {"base_model": base} if is_hub_id(base) or base == "tiny" else {}
    tree |= {"pipeline_tag": "text-generation", **head}
    if not is_hub_id(base):
        tree.pop("base_model_relation", None)
    tuned = section(summary, "tuned")
    metrics = [
        {"name": name, "type": kind, "value": float(f"{tuned[key]:.6g}")}
        for key, (name, kind) in SCORES.items()
        if format_score(key, tuned.get(key)) != NOT_MEASURED
    ]
    if metrics:
        tree["model-index"] = [{
            "name": title.rpartition("/")[2],
            "results": [{
                "task": {"type": "text-generation"},
                "dataset": {"name": "held-out rows", "type": "custom"},
                "metrics": metrics,
            }],
        }]  # fmt: skip
    return f"---\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}---"


def _base_table(model: Mapping[str, Any]) -> str:
    base, kind = str(model.get("name", "unknown")), str(model.get("quantization", "none"))
    rows = [
        ("Base model", _linked(base)),
        ("Revision", str(model.get("revision") or "not pinned") if is_hub_id(base) else "not on the Hub"),
        ("Base weights while training", _QUANTIZATIONS.get(kind, kind)),
    ]
    return _table(("", ""), rows)


def _scores_part(summary: Mapping[str, Any]) -> str:
    base, tuned = section(summary, "base"), section(summary, "tuned")
    if not tuned and not base:
        return f"## Scores\n\nThe scores were {NOT_MEASURED}."
    num_rows = tuned.get("rows", base.get("rows"))
    over = f"{num_rows:,} rows" if isinstance(num_rows, int) else "rows"
    rows = [
        (name, format_score(key, base.get(key)), format_score(key, tuned.get(key)))
        for key, (name, _) in SCORES.items()
    ]  # fmt: skip
    return joined(
        "## Scores",
        f"Measured by lmtune on {over} that were not trained on. Loss and accuracies are of the answers' tokens with "
        "the right text before them; exact match is of answers that the model wrote by itself.",
        _table(("", "base", "tuned"), rows),
    )


def _merge_part(merge: Mapping[str, Any]) -> str:
    names = {
        "into": "Weights merged into", "dtype": "Stored as", "rows": "Held-out rows compared",
        "logits_difference": "Largest difference of a logit, as a share of the largest logit",
        "bound": "Allowed difference", "top1_agreement": "Top-1 agreement",
        "difference_to_trained": "Difference to the quantised model that was trained",
        "rerouted_tokens": "Tokens that rounding sent to other experts, or that follow one",
        "rerouted_difference": "Largest difference among those",
    }  # fmt: skip
    known = {"trained": "the weights that were trained over, dequantised", "original": "the base as published"}
    merge = {**merge, "into": known.get(str(merge.get("into")), merge.get("into"))}
    if not merge.get("rerouted_tokens"):
        merge.pop("rerouted_tokens", None)
    rows = [(name, _measure(key, merge[key])) for key, name in names.items() if merge.get(key) is not None]
    lead = "The logits of the merged model were compared with those of base and adapter:"
    kept = "They differ by more than allowed, and the model was kept on request." if merge.get("accepted") else ""
    lead = lead if rows else f"The merge was {NOT_MEASURED}."
    return joined("## Check of the merge", lead, _table(("", ""), rows), kept)


def _measure(key: str, value: object) -> str:
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if key == "top1_agreement" else f"{value:.2g}"
    return str(value)


def _data_part(fates: Mapping[str, Any]) -> str:
    rows = [
        (f"{part}: {name}", f"{count:,}") for part in ("train", "validation") for name, count in _counts(fates, part)
    ]
    if not rows:
        return "## Data\n\nThe number of rows was not recorded."
    return joined("## Data", "Its content is not part of this repository; this is what became of its rows.",
                   _table(("", "count"), rows))  # fmt: skip


def _counts(fates: Mapping[str, Any], part: str) -> Iterator[tuple[str, int]]:
    """The counts of one part of `data.json`, and nothing else of it: no name of a file, no line, no text."""
    tree = section(fates, part)
    for key in ("held_out", "rows", "kept", "tokens", "trained_tokens", "longest_row_tokens"):
        if isinstance(tree.get(key), int):
            yield _words(key), tree[key]
    dropped = section(tree, "dropped")
    tallies = {f"dropped, {_words(str(reason))}": section(dropped, reason) for reason in dropped}
    tallies |= {key: section(tree, key) for key in ("truncated", "duplicates")}
    for name, tally in tallies.items():
        if isinstance(tally.get("count"), int) and tally["count"]:
            yield name, tally["count"]


def _settings_part(config: Mapping[str, Any]) -> str:
    rows = [
        (f"`{part}.{key}`", f"`{', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}`")
        for part in ("adapter", "data", "train")
        for key, value in section(config, part).items()
        if value is not None and f"{part}.{key}" not in _QUIET_KEYS
    ]
    return "## Settings\n\n" + (_table(("setting", "value"), rows) if rows else "The settings were not recorded.")


def _limits(base: str) -> str:
    demo = "The base is a demo model of a small invented world; it has no general ability. " if base == "tiny" else ""
    return (
        f"## Limits\n\n{demo}The model learned the answers of one data set and was scored on rows of the same kind; "
        "nothing is known about other questions. It can state wrong things with confidence, and it keeps the limits "
        "and the licence of its base model. Its safety and bias were not examined."
    )


def _linked(base: str) -> str:
    if is_hub_id(base):
        return f"[{base}](https://huggingface.co/{base})"
    return "`tiny`, lmtune's embedded demo model" if base == "tiny" else f"`{os.path.basename(base.rstrip('/'))}`"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in line) + " |" for line in lines)


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PROMPT = """
text = "Your question"
if tokenizer.chat_template:
    message = {{"role": "user", "content": text}}
    text = tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True, enable_thinking={thinking}
    )
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)"""
_PLAIN_PROMPT = """
inputs = tokenizer("Your question", return_tensors="pt")"""
_GENERATE = """
stops = GenerationConfig.from_pretrained("{place}")
output = model.generate(**inputs, generation_config=stops, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_PEFT_CODE = (
    """
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
{imports}
base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
{prompt}"""
    + _GENERATE
)
_TRANSFORMERS_CODE = """
from transformers import AutoModelForCausalLM
{imports}
model = AutoModelForCausalLM.from_pretrained({base})
model.load_adapter("{place}")"""
_MERGED_CODE = (
    """
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
{prompt}"""
    + _GENERATE
)


def is_hub_id(name: str) -> bool:
    """Whether others can find a base model of this name on the Hub: no folder of this machine, not the embedded one."""
    return name != "tiny" and _HUB_ID.fullmatch(name) is not None and not os.path.isdir(name)


def adapter_usage(
    config: Mapping[str, Any], place: str, repository: str | None, stops: Sequence[str] = ()
) -> str:  # fmt: skip
    """The part that shows how the adapter is loaded, as code that runs."""
    base, revision = str(section(config, "model").get("name", "unknown")), section(config, "model").get("revision")
    if base == "tiny":
        imports, argument = "from lmtune.demo import tiny_path\n", "tiny_path()"
        note = "The base model is lmtune's embedded demo model: it comes with `pip install lmtune`, not from the Hub."
    elif is_hub_id(base):
        imports, argument, note = "", f'"{base}"' + (f', revision="{revision}"' if revision else ""), ""
    else:
        imports, argument = "", '"path/to/the/base/model"'
        note = "The base model was a folder on the author's machine: you need that very model."
    words = {"imports": imports, "base": argument, "place": place, "prompt": _prompt(config)}
    folder = repository.replace("/", "--") if repository else ""
    own = f"lmtune pull {repository}\nlmtune chat adapters/{folder}" if repository else f"lmtune chat {place}"
    return joined(
        "## How to use it",
        note,
        "With PEFT:",
        _python(_PEFT_CODE, **words),
        _system_note(config),
        stops_note(stops),
        "With transformers alone (PEFT must be installed), the rest as above:",
        _python(_TRANSFORMERS_CODE, **words),
        "With lmtune, which also takes over the system prompt and the stop tokens of training:",
        f"```bash\n{own}\n```",
    )


def merged_usage(config: Mapping[str, Any], place: str, stops: Sequence[str] = ()) -> str:
    """The same for a merged model in `place`, a repository or folder."""
    return joined(
        "## How to use it",
        _python(_MERGED_CODE, place=place, prompt=_prompt(config)),
        _system_note(config),
        stops_note(stops),
        f"With lmtune: `lmtune chat {place}`.",
    )


def _prompt(config: Mapping[str, Any]) -> str:
    """The lines that turn a question into `inputs`, as training did."""
    template = section(config, "data").get("template")
    return _PLAIN_PROMPT if template == "plain" else _PROMPT.format(thinking=template == "thinking")


def _system_note(config: Mapping[str, Any]) -> str:
    if not section(config, "data").get("system"):
        return ""
    return "It was trained with a system prompt, which is `system` in `lmtune.json`: put it before the question."


def stops_note(stops: Sequence[str]) -> str:
    """At which tokens an answer ends, for programs that do not read generation_config.json."""
    if not stops:
        return ""
    more = f", and generation also stops at {' and '.join(f'`{token}`' for token in stops[1:])}" if stops[1:] else ""
    return (
        f"An answer ends in `{stops[0]}`{more} (`eos_token_id` in `generation_config.json`). A program that asks for a "
        "stop token needs the first one."
    )


def section(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping under `key`, or an empty one where there is none."""
    value = tree.get(key)
    return value if isinstance(value, Mapping) else {}


def _python(code: str, **words: str) -> str:
    return f"```python\n{code.format(**words).strip()}\n```"


def joined(*parts: str) -> str:
    """The parts that are not empty, a blank line between; ends in a newline where it is a whole card."""
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"
