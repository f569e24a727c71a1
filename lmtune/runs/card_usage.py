"""The part of a model card that shows how the model is loaded, as code that runs as it stands.

The code differs by where the base is found: on the Hub, inside lmtune (`tiny`), or in a folder of the author's that a
reader does not have. It stops at the stop tokens of training, which PEFT alone does not take over from an adapter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

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
