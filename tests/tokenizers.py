"""Tiny tokenizers with the chat templates that models in the field have, made in milliseconds, offline."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "What is the capital of France? Paris is the capital of France.",
    "Be brief.\n\nHello, how are you? I am fine, thank you.\n",
    "user assistant system <think> reasoning </think> answer question ### Instruction: ### Response:",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION_MARKS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ message['role'] }}{{ '\n' }}{{ message['content'] }}<|im_end|>{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
# As Qwen3: reasoning is dropped from history; the last answer has a think block, empty if there was no reasoning.
QWEN3 = """
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content = message.content %}
{%- set reasoning = '' %}
{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if loop.last %}{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
{{- content.lstrip('\n') }}
{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}
{{- '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
# As Llama 2: no prompt for the answer, a blank before and after it, EOS at its end, contents trimmed.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
# As DeepSeek-R1: the reasoning of every answer is thrown away.
DROPS_REASONING = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
# A prompt for the answer that no answer begins with.
OPENS_THINKING = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")

# As DeepSeek-R1: the prompt opens the reasoning, which every rendered answer has lost.
R1 = OPENS_THINKING.replace("message['content']", "message['content'].split('</think>')[-1]")
# As GLM: an answer ends where the next turn begins.
NEXT_TURN_ENDS = (
    "{% for message in messages %}{{ ('<|im_start|>' if message['role'] == 'user' else '<|im_end|>') + '\n' }}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<|im_end|>{% endif %}"
)

_TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + CONTENT + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}PROMPT{% endif %}"
)


def turns(content: str = "message['content']", prompt: str = "") -> str:
    """ChatML with the expression `content` for each content, and `prompt` at the end of a prompt for an answer."""
    return _TURNS.replace("CONTENT", content).replace("PROMPT", prompt)


# As gpt-oss: <pad> begins a channel's name and <s> ends it; analysis goes before the last answer, which ends in </s>.
CHANNELS = """
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- if message.thinking and loop.last %}{{- '<|im_start|>assistant<pad>analysis<s>' + message.thinking + '<|im_end|>' }}
{%- endif %}
{{- '<|im_start|>assistant<pad>final<s>' + message.content + ('</s>' if loop.last else '<|im_end|>') }}
{%- else %}{{- '<|im_start|>' + message.role + '<s>' + message.content + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"""
# A word between control tokens before every answer.
WORD = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + ('<pad>final<s>' if message.role == 'assistant' else '<s>') + message.content }}
{{- '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"""
# A mark on both sides of every answer.
WRAPPED = WORD.replace("message.content }}", "message.content + ('<s>' if message.role == 'assistant' else '') }}")
# As Gemma 4: without thinking the prompt, and it alone, ends in an empty thought.
EMPTY_THOUGHT = turns(prompt="{% if not enable_thinking | default(false) %}{{ '<pad>thought\n<s>' }}{% endif %}")
# The same where thinking is on unless it is switched off, and reasoning has a field.
EMPTY_THOUGHT_FIELD = turns(
    "(('<pad>thought\n' + message['reasoning_content'] + '\n<s>') if message['reasoning_content'] else '')"
    " + message['content']",
    "{% if not enable_thinking | default(true) %}{{ '<pad>thought\n<s>' }}{% endif %}",
)
# As Qwen3.5: the prompt opens the reasoning, or holds an empty one.
QWEN35 = turns(
    "(('<think>\n' + (message['reasoning_content'] or '') + '\n</think>\n\n')"
    " if message['role'] == 'assistant' and loop.last else '') + message['content']",
    "{{ '<think>\n' if enable_thinking | default(true) else '<think>\n\n</think>\n\n' }}",
)
# As Qwen3.8: reasoning only from its field, and in history too; what is in the content is taken for the answer.
KEEPS_REASONING = QWEN35.replace(" and loop.last", "")
TRIMS = turns("(message['content'] | trim)")
PREFILLED = turns(prompt="Sure:{{ ' ' }}")
DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '.<|im_end|>\n' }}" + CHATML

_TOOLS = """
{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
{{- '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}TURN{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
_CALLING = """{{- '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls %}{%- set call = call.function %}CALL{%- endfor %}{{- '<|im_end|>\n' }}"""


def calling(call: str) -> str:
    """ChatML with tools, and `call` for each `call` of a turn."""
    return _TOOLS.replace("TURN", _CALLING.replace("CALL", call))


# As Qwen3: a call is one JSON object.
CALLS_AS_JSON = calling(
    """{{- '\n<call>{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}</call>' }}"""
)
# As DeepSeek V3: the arguments must come as text.
CALLS_AS_TEXT = calling("{{- '<pad>' + call.name + '\n```json\n' + call.arguments + '\n```' }}")
# As Qwen3.5: no JSON.
CALLS_AS_XML = calling(
    "{{- '<f=' + call.name + '>' }}{%- for key, value in call.arguments | items %}"
    "{{- '<p=' + key + '>' + (value | string) + '</p>' }}{%- endfor %}{{- '</f>' }}"
)
# As gpt-oss: of several calls one is rendered, its text is dropped, and it ends in a token of its own.
CALLS_END_APART = _TOOLS.replace("assistant\n", "assistant").replace(
    "TURN",
    """{{- '<|im_start|>' + message.role }}
{%- if message.tool_calls %}{%- set call = message.tool_calls[0].function %}
{{- ' to=' + call.name + '<pad>' + (call.arguments | tojson) + '</s>' }}
{%- else %}{{- '<pad>' + message.content + '<|im_end|>' }}{%- endif %}""",
)

CHAT_TEMPLATES = {
    "chatml": CHATML, "generation-marks": GENERATION_MARKS, "qwen3": QWEN3, "llama2": LLAMA2, "no-end": NO_END,
    "no-system": NO_SYSTEM,
}  # fmt: skip


@lru_cache
def _backend(bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    # "\n\n" becomes one token, so that a prompt's last newline can merge with an answer's first.
    tokenizer.train_from_iterator([*_SENTENCES, "\n\n\n\n" * 20], trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return str(tokenizer.to_str())


def make_tokenizer(chat_template: str | None = None, bos: bool = False, **special: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens; `bos`: it begins every text with <s>."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **special}
    special["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(bos)), **{k: v for k, v in special.items() if v is not None}
    )
    tokenizer.chat_template = chat_template
    return tokenizer
