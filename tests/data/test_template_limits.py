"""A template without bound ends in an error within seconds, whatever it does."""

from __future__ import annotations

import pytest

from lmtune.data.rendering import Renderer
from lmtune.errors import ModelError
from lmtune.io import sandbox
from lmtune.io.sandbox import probe
from tests.tokenizers import CHAT_TEMPLATES, make_tokenizer

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

_LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# what is true in some real renderings only, or in none of a trial that leaves out what transformers passes
_SELDOM = (
    "{% if tools is defined %}", "{% if documents is defined %}", "{% if enable_thinking %}",
    "{% if messages[-1].reasoning_content is defined %}", "{% if messages[-1].thinking is defined %}",
    "{% if messages[0].role == 'system' and messages | length == 2 %}",
)  # fmt: skip


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    probe.cache_clear()
    monkeypatch.setattr(sandbox, "PROBE_CPU_SECONDS", 1)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not finish"),
        ("{{ 10 ** (10 ** 10) }}", "did not finish"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{% for i in range(99999) %}{{ f() }}{% endfor %}", ""),
        (
            "{% for i in range(99999) %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}",
            "(characters|did not finish)",
        ),
        (
            "{% set x = namespace(t='ab') %}{% for m in messages %}{% set x.t = x.t + x.t %}{% endfor %}{{ x.t }}",
            "(MiB|did not finish)",
        ),
        ("{{ 'a' * 10 ** 11 }}", "MiB"),
        ("{{ '%99999999999d' % 1 }}", "MiB"),
        *(
            pytest.param(f"{condition}{_LOOPS}{{% endif %}}", "did not finish", marks=[pytest.mark.long] * (number > 0))
            for number, condition in enumerate(_SELDOM)
        ),
    ],
)  # fmt: skip
def test_a_template_without_bound_is_refused(source: str, words: str) -> None:
    if not words:  # endless recursion is refused by Python itself, in the probe and for real
        with pytest.raises(ModelError):
            Renderer(make_tokenizer(source))
        return
    with pytest.raises(ModelError, match=rf"not safe to run.*{words}.*use data.template: plain"):
        Renderer(make_tokenizer(source))


@pytest.mark.parametrize(
    "source", [*CHAT_TEMPLATES.values(), "{% unknown %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"]
)
def test_other_templates_pass(source: str) -> None:
    probe(source, (("eos_token", "</s>"),))
