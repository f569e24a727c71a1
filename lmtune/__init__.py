"""lmtune: parameter-efficient fine-tuning of language models, from a JSONL file to a chat in the browser."""

__version__ = "0.1.0"
