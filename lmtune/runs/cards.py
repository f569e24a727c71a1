"""The model card of an adapter or a merged model: its README.md on the Hub.

    Path("README.md").write_text(adapter_card(config, summary, data, "user/name"))

PEFT's own card is a form full of blanks. Ours holds only what is known: settings, row counts and measured numbers, and
code that loads the model; what was not measured is said to be so. Of the data it has hashes and counts: no row, no name
of a file, no path and no machine.
The front matter follows the Hub's specification, https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from lmtune import __version__
from lmtune.config.load import to_tree
from lmtune.config.schema import (
    ClassificationConfig,
    FinetuneConfig,
    LoraConfig,
    ModelConfig,
    PartialConfig,
    RegressionConfig,
    RewardConfig,
)
from lmtune.data.report import DataReport, PartReport
from lmtune.runs.store import Summary
from lmtune.runs.tables import NOT_MEASURED, SCORES, format_score, names_of

_QUANTIZATIONS = {"none": "not quantized", "nf4": "4-bit NF4 (bitsandbytes)", "int8": "8-bit (bitsandbytes)"}
_PRIVATE_KEYS = ("data.train", "data.validation", "data.system", "tuning.adapter")  # names and words of the user's own
_MAX_HASHES = 10  # of the files of one part of the data
# The Hub's name of a metric, where it is another than ours
_METRICS = {key: kind for key, (_, kind) in SCORES.items()} | {"macro_f1": "f1", "auc": "roc_auc", "r2": "r_squared"}


@dataclass(frozen=True)
class GgufFile:
    """What a card says of a GGUF file.

    Attributes:
        name: of the file.
        kind: of its weights, `q8_0`; empty where it is not known.
        num_bytes: of the file.
        has_template: whether it holds a chat template.
    """

    name: str
    kind: str
    num_bytes: int
    has_template: bool


def adapter_card(
    config: FinetuneConfig, summary: Summary, data: DataReport | None, repository: str | None = None,
    stops: Sequence[str] = (),
) -> str:  # fmt: skip
    """The README.md of an adapter folder, on the Hub as `repository`; `stops` end an answer, the usual one first.

    Of the data nothing is taken but hashes and counts.
    """
    base, title = config.model.name, repository or config.run.name or "LoRA adapter"
    start = summary.started_from
    return join_parts(
        _front_matter(config, "peft", ["lora", "lmtune", "transformers"], title, _results(config, summary, data)),
        f"# {title.rpartition('/')[2]}",
        f"A LoRA adapter for {_linked(base)}, fine-tuned with lmtune {__version__}. "
        "It holds the change to the base model only, so it is loaded together with that model.",
        f"Training began from the adapter `{start}`, not from a new one." if start else "",
        _base_table(config.model),
        _scores_part(summary),
        _data_part(data),
        _settings_part(config),
        adapter_usage(config, repository or "path/to/adapter", repository, stops, summary.tree.get("labels")),
        _limits(base),
    )


def model_card(
    config: FinetuneConfig, summary: Summary, data: DataReport | None, repository: str | None = None,
    stops: Sequence[str] = (),
) -> str:  # fmt: skip
    """The README.md of a model whose own weights were trained."""
    base, title = config.model.name, repository or config.run.name or "tuned model"
    tuning = config.tuning
    learned = "Every weight was trained"
    if isinstance(tuning, PartialConfig):
        parts = (tuning.parts,) if isinstance(tuning.parts, str) else tuning.parts
        learned = f"Of its weights, these were trained: {', '.join(f'`{part}`' for part in parts)}"
    return join_parts(
        _front_matter(config, "transformers", [tuning.kind, "lmtune"], title, _results(config, summary, data)),
        f"# {title.rpartition('/')[2]}",
        f"{_linked(base)}, fine-tuned with lmtune {__version__}. {learned}. It is a whole model and needs no adapter.",
        _base_table(config.model),
        _scores_part(summary),
        _data_part(data),
        _settings_part(config),
        merged_usage(config, repository or "path/to/model", stops, repository),
        _limits(base),
    )


def result_card(
    config: FinetuneConfig, summary: Summary, data: DataReport | None, repository: str | None = None,
    stops: Sequence[str] = (),
) -> str:  # fmt: skip
    """The card of what a run has trained: an adapter, or the model itself."""
    card = adapter_card if isinstance(config.tuning, LoraConfig) else model_card
    return card(config, summary, data, repository, stops)


def merged_card(
    config: FinetuneConfig, summary: Summary, merge: Mapping[str, object], repository: str | None = None,
    stops: Sequence[str] = (), data: DataReport | None = None,
) -> str:  # fmt: skip
    """The README.md of a merged model; `merge` is what `merge.json` holds of its check."""
    base, title = config.model.name, repository or config.run.name or "merged model"
    return join_parts(
        _front_matter(config, "transformers", ["lora", "merged", "lmtune"], title, _results(config, summary, data)),
        f"# {title.rpartition('/')[2]}",
        f"{_linked(base)} with a LoRA adapter merged into its weights, fine-tuned with lmtune {__version__}. "
        "It is a whole model and needs no adapter.",
        _base_table(config.model),
        _merge_part(merge),
        _scores_part(summary),
        "These are the scores of base and adapter, measured before the merge." if summary.tuned else "",
        _data_part(data),
        _settings_part(config),
        merged_usage(config, repository or "path/to/merged", stops, repository),
        _limits(base),
    )


def gguf_card(
    config: FinetuneConfig, summary: Summary, data: DataReport | None, repository: str, files: Sequence[GgufFile],
    stops: Sequence[str] = (), why_not_ollama: str = "",
) -> str:  # fmt: skip
    """The README.md of a repository of GGUF files.

    It names no scores for the Hub to compare: those of the run were measured before the weights were rounded.
    """
    tags = ["gguf", "llama.cpp", *([] if why_not_ollama else ["ollama"]), "lmtune"]
    sizes = [(f"`{one.name}`", one.kind.upper(), f"{one.num_bytes / 2**20:,.1f} MiB") for one in files]
    return join_parts(
        _front_matter(config, "gguf", [*tags, *([] if _is_whole(files) else ["quantized"])], repository, []),
        f"# {repository.rpartition('/')[2]}",
        f"{_linked(config.model.name)}, fine-tuned with lmtune {__version__}, as GGUF for llama.cpp, Ollama and LM "
        "Studio. It is a whole model and needs no adapter.",
        _table(("file", "weights", "size"), sizes),
        gguf_usage(repository, files, stops, why_not_ollama),
        _base_table(config.model),
        _scores_part(summary),
        "These scores were measured before the export. Fewer bits change a model: score what you use."
        if summary.tuned else "",
        _data_part(data),
        _settings_part(config),
        _limits(config.model.name),
    )  # fmt: skip


def _is_whole(files: Sequence[GgufFile]) -> bool:
    """Whether all files hold weights in at least 16 bits."""
    return all(not one.kind.startswith("q") for one in files)


def _front_matter(
    config: FinetuneConfig, library: str, tags: Sequence[str], title: str, results: Sequence[Mapping[str, object]]
) -> str:
    """The YAML block that the Hub reads. It names the base; one from a folder of this machine has no place in it."""
    base, task = config.model.name, _task(config)
    tree: dict[str, object] = {"base_model": base} if is_hub_id(base) or base == "tiny" else {}
    tree |= {"pipeline_tag": task, "library_name": library, "tags": list(tags)}
    if is_hub_id(base):  # in GGUF too: its weights are not those of the base in fewer bits
        tree["base_model_relation"] = "adapter" if library == "peft" else "finetune"
    if results:
        tree["model-index"] = [{"name": title.rpartition("/")[2], "results": list(results)}]
    return f"---\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}---"


def _task(config: FinetuneConfig) -> str:
    """The Hub's name of what the model does."""
    return "text-classification" if is_classifier(config) else "text-generation"


def _results(config: FinetuneConfig, summary: Summary, data: DataReport | None) -> list[Mapping[str, object]]:
    """The measured scores, those of the base named as such, for the `model-index` of the front matter.

    The rows are named by the hash of their file, so that only scores over the same rows are beside each other.
    """
    base, tuned = summary.base or {}, summary.tuned or {}
    first = str(summary.tree.get("baseline") or "base model")
    metrics = [
        {"name": name + suffix, "type": _METRICS.get(key, key), "value": float(f"{scores[key]:.6g}")}
        for scores, suffix in ((tuned, ""), (base, f" ({first})"))
        for key, name in names_of(base, tuned).items()
        if format_score(key, scores.get(key)) != NOT_MEASURED
    ]
    if not tuned or not metrics:
        return []
    dataset: dict[str, object] = {"name": "held-out rows", "type": "custom"}
    if data is not None and data.validation is not None:
        is_own = isinstance(data.validation, PartReport)
        hashes = (data.validation if isinstance(data.validation, PartReport) else data.train).sha256
        whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        dataset = {"name": "held-out rows" if is_own else "rows held out of the training data",
                   "type": f"sha256-{whole}"}  # fmt: skip
    if (num_rows := tuned.get("rows")) is not None:
        dataset["args"] = {"rows": num_rows}
    return [{"task": {"type": _task(config)}, "dataset": dataset, "metrics": metrics}]


def _base_table(model: ModelConfig) -> str:
    rows = [
        ("Base model", _linked(model.name)),
        ("Revision", model.revision or "not pinned" if is_hub_id(model.name) else "not on the Hub"),
        ("Base weights while training", _QUANTIZATIONS[model.quantization]),
    ]
    return _table(("", ""), rows)


def _scores_part(summary: Summary) -> str:
    base, tuned = summary.base or {}, summary.tuned or {}
    if not tuned and not base:
        return f"## Scores\n\nThe scores were {NOT_MEASURED}."
    num_rows = tuned.get("rows", base.get("rows"))
    over = f"{num_rows:,} rows" if num_rows is not None else "rows"
    rows = [
        (name, format_score(key, base.get(key)), format_score(key, tuned.get(key)))
        for key, name in names_of(base, tuned).items()
    ]  # fmt: skip
    first, own = str(summary.tree.get("baseline") or "base"), ""
    if first == "base" and any(scores.get("perplexity") is not None for scores in (base, tuned)):
        own = (
            " Loss and accuracies are of the answers' tokens with the right text before them; exact match is of "
            "answers that the model wrote by itself."
        )
    return join_parts(
        "## Scores",
        f"Measured by lmtune on {over} that were not trained on.{own}",
        _table(("", first, "tuned"), rows),
    )


def _merge_part(merge: Mapping[str, object]) -> str:
    names = {
        "into": "Weights merged into", "dtype": "Stored as", "rows": "Held-out rows compared",
        "logits_difference": "Largest difference of a logit, as a share of the largest logit",
        "bound": "Allowed difference", "top1_agreement": "Top-1 agreement",
        "kl": "KL divergence from the model as trained, nats a token",
        "update_kept": "Share of the adapter's update left after rounding",
        "difference_to_trained": "Difference to the quantized model that was trained",
        "rerouted_tokens": "Tokens that rounding sent to other experts, or that follow one",
        "rerouted_difference": "Largest difference among those",
    }  # fmt: skip
    known = {"trained": "the weights that were trained over, dequantized", "original": "the base as published"}
    merge = {**merge, "into": known.get(str(merge.get("into")))}
    if not merge.get("rerouted_tokens"):
        merge.pop("rerouted_tokens", None)
    rows = []
    for key, name in names.items():
        value = merge.get(key)
        if isinstance(value, float):
            rows.append((name, f"{100 * value:.2f} %" if key in ("top1_agreement", "update_kept") else f"{value:.2g}"))
        elif value is not None:
            rows.append((name, str(value)))
    lead = "The logits of the merged model were compared with those of base and adapter:"
    kept = "They differ by more than allowed, and the model was kept on request." if merge.get("accepted") else ""
    return join_parts("## Check of the merge", lead, _table(("", ""), rows), kept)


def _data_part(data: DataReport | None) -> str:
    if data is None:
        return "## Data\n\nThe number of rows was not recorded."
    rows = [*_hashes("train", data.train), *_counts("train", data.train)]
    if isinstance(data.validation, PartReport):
        rows += [*_hashes("validation", data.validation), *_counts("validation", data.validation)]
    elif data.validation is not None:
        rows.append(("validation: held out", f"{data.validation.held_out:,}"))
    return join_parts(
        "## Data",
        "The data are not part of this repository; this is what became of their rows. Whoever has a file can compare "
        "its SHA-256 (`sha256sum FILE`; of a data set on the Hub it is that over its files).",
        _table(("", ""), rows),
    )


def _hashes(name: str, part: PartReport) -> Iterator[tuple[str, str]]:
    """The hash of each file, by its number and not its name; of many files one hash over theirs."""
    if len(part.sha256) > _MAX_HASHES:
        whole = hashlib.sha256("\n".join(part.sha256).encode()).hexdigest()
        yield f"{name}: SHA-256 over those of {len(part.sha256)} files", f"`{whole}`"
        return
    for number, one in enumerate(part.sha256, start=1):
        yield f"{name}: file{f' {number}' if len(part.sha256) > 1 else ''}, SHA-256", f"`{one}`"


def _counts(name: str, part: PartReport) -> Iterator[tuple[str, str]]:
    """The counts of one part of the data: no name of a file, no line, no text."""
    counts = {key: getattr(part, key) for key in ("rows", "kept", "tokens", "trained_tokens", "longest_row_tokens")}
    found = {f"dropped, {reason}": counter.count for reason, counter in part.dropped.items()}
    found |= {"truncated": part.truncated.count, "duplicates": part.duplicates.count}
    for key, count in (counts | {key: count for key, count in found.items() if count}).items():
        yield f"{name}: {key.replace('_', ' ')}", f"{count:,}"


def _settings_part(config: FinetuneConfig) -> str:
    tree = to_tree(config)
    rows = [
        (f"`{part}.{key}`", f"`{', '.join(map(str, value)) if isinstance(value, list) else value}`")
        for part in ("tuning", "data", "train")
        for key, value in tree[part].items()
        if value is not None and f"{part}.{key}" not in _PRIVATE_KEYS
    ]
    return "## Settings\n\n" + _table(("setting", "value"), rows)


def _limits(base: str) -> str:
    demo = "The base is a demo model of a small invented world; it has no general ability. " if base == "tiny" else ""
    return (
        f"## Limits\n\n{demo}The model was trained on one data set and scored on rows of the same kind; "
        "nothing is known about other questions. It can state wrong things with confidence, and it keeps the limits "
        "and the licence of its base model. Its safety and bias were not examined."
    )


def _linked(base: str) -> str:
    if is_hub_id(base):
        return f"[{base}](https://huggingface.co/{base})"
    return "`tiny`, lmtune's embedded demo model" if base == "tiny" else f"`{os.path.basename(base.rstrip('/'))}`"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in line) + " |" for line in lines)


# --- how the model is used -------------------------------------------------------------------------------------------

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
_PEFT_CLASSIFIER = """
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
{imports}
base = AutoModelForSequenceClassification.from_pretrained({base}, num_labels={outputs})
model = PeftModel.from_pretrained(base, "{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
print(model(**tokenizer("Your text", return_tensors="pt")).logits)"""
_MERGED_CLASSIFIER = """
from transformers import pipeline

classify = pipeline("text-classification", "{place}")
print(classify("Your text"))"""
_MERGED_CODE = (
    """
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
{prompt}"""
    + _GENERATE
)


def is_classifier(config: FinetuneConfig) -> bool:
    """Whether a run trains a head that reads rows, and not a model that writes."""
    return isinstance(config.objective, (ClassificationConfig, RegressionConfig, RewardConfig))


def is_hub_id(name: str) -> bool:
    """Whether others can find a base of this name on the Hub: not a folder of this machine, not the embedded model."""
    return name != "tiny" and _HUB_ID.fullmatch(name) is not None and not os.path.isdir(name)


def adapter_usage(
    config: FinetuneConfig, place: str, repository: str | None, stops: Sequence[str] = (), labels: object = None
) -> str:  # fmt: skip
    """The part that shows how the adapter is loaded, as code that runs; `labels` are those of a classifier."""
    base, revision = config.model.name, config.model.revision
    if base == "tiny":
        imports, argument = "from lmtune.demo import tiny_path\n", "tiny_path()"
        note = "The base model is lmtune's embedded demo model: it comes with `pip install lmtune`, not from the Hub."
    elif is_hub_id(base):
        imports, argument, note = "", f'"{base}"' + (f', revision="{revision}"' if revision else ""), ""
    else:
        imports, argument = "", '"path/to/the/base/model"'
        note = "The base model was a folder on the author's machine: you need that very model."
    if is_classifier(config):
        outputs = str(len(labels)) if isinstance(labels, list) else "1"
        return join_parts(
            "## How to use it", note, "With PEFT:",
            _python(_PEFT_CLASSIFIER, imports=imports, base=argument, place=place, outputs=outputs),
            f"The outputs are {', '.join(map(str, labels))}, in this order." if isinstance(labels, list) else "",
            _with_lmtune("predict", "adapters", place, repository, " ROWS.jsonl"),
        )  # fmt: skip
    words = {"imports": imports, "base": argument, "place": place, "prompt": _prompt(config)}
    return join_parts(
        "## How to use it",
        note,
        "With PEFT:",
        _python(_PEFT_CODE, **words),
        _system_note(config),
        stops_note(stops),
        "With transformers alone (PEFT must be installed), the rest as above:",
        _python(_TRANSFORMERS_CODE, **words),
        _with_lmtune("chat", "adapters", place, repository),
    )


def merged_usage(
    config: FinetuneConfig, place: str, stops: Sequence[str] = (), repository: str | None = None
) -> str:  # fmt: skip
    """The same for a merged model in `place`, a repository or folder."""
    if is_classifier(config):
        return join_parts(
            "## How to use it", _python(_MERGED_CLASSIFIER, place=place),
            _with_lmtune("predict", "models", place, repository, " ROWS.jsonl"),
        )  # fmt: skip
    return join_parts(
        "## How to use it",
        _python(_MERGED_CODE, place=place, prompt=_prompt(config)),
        _system_note(config),
        stops_note(stops),
        _with_lmtune("chat", "models", place, repository),
    )


def _with_lmtune(verb: str, folder: str, place: str, repository: str | None, more: str = "") -> str:
    """The commands that load a model from `place`, or from `repository` once it was pulled into `folder`."""
    own = f"lmtune {verb} {place}{more}"
    if repository:
        own = f"lmtune pull {repository}\nlmtune {verb} {folder}/{repository.replace('/', '--')}{more}"
    lead = "With lmtune, which also takes over the system prompt and the stop tokens of training:"
    return f"{lead}\n\n```bash\n{own}\n```"


def gguf_usage(repository: str, files: Sequence[GgufFile], stops: Sequence[str], why_not_ollama: str) -> str:
    """How the GGUF files of a repository are run."""
    kinds = [one.kind.upper() for one in files if one.kind]
    tag = f":{kinds[0]}" if kinds else ""
    jinja = " --jinja" if all(one.has_template for one in files) else ""
    ollama = f"```bash\nollama run hf.co/{repository}{tag}\n```"
    if why_not_ollama:
        ollama = f"Ollama cannot prompt it as in training: {why_not_ollama}. Use llama.cpp."
    more = f"In place of `{kinds[0]}`: {', '.join(f'`{kind}`' for kind in kinds[1:])}." if kinds[1:] else ""
    own = f"hf download {repository} {files[0].name} --local-dir .\nlmtune chat {files[0].name}"
    return join_parts(
        "## How to use it",
        "With Ollama, which reads template, stop tokens and system prompt from this repository:"
        if not why_not_ollama else "",
        ollama,
        "With llama.cpp:",
        f"```bash\nllama-server -hf {repository}{tag}{jinja}\n```",
        more,
        "" if jinja else "It has no chat template: send it plain prompts (`/completion`), as it was trained.",
        stops_note(stops),
        "With lmtune:",
        f"```bash\n{own}\n```",
    )  # fmt: skip


def _prompt(config: FinetuneConfig) -> str:
    """The lines that turn a question into `inputs`, as training did."""
    template = config.data.template
    return _PLAIN_PROMPT if template == "plain" else _PROMPT.format(thinking=template == "thinking")


def _system_note(config: FinetuneConfig) -> str:
    if not config.data.system:
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


def _python(code: str, **words: str) -> str:
    return f"```python\n{code.format(**words).strip()}\n```"


def join_parts(*parts: str) -> str:
    """The parts that are not empty, a blank line between; ends in a newline where it is a whole card."""
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"
