"""Settings as people write them: `lmtune finetune` ends with 2, names `file:line` or `section.key`, and writes nothing.

Single keys and values are in tests/test_config.py and tests/test_yaml_reader.py.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lmtune.io import sandbox
from tests.bad_input.conftest import Outcome
from tests.sample_run import write_records, write_run
from tests.workplace import make_workplace

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

LEAST = "model: {name: tiny}\ndata: {train: train.jsonl}\n"
TAGS = r"trial\.yaml:3: .*tags .* not supported"
BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 40))

REFUSED: dict[str, tuple[str, str]] = {  # lines after LEAST, what is said
    "an unknown key": ("train: {learning_rat: 1e-4}", r"train\.learning_rat: unknown key; did you mean learning_rate"),
    "a key twice": ("train:\n  epochs: 1\n  epochs: 2", r"trial\.yaml:5: .*duplicate key 'epochs'"),
    "a tag that names code": ("run: {name: !!python/object/apply:os.system [id]}", TAGS),
    "an alias bomb": (f"a0: &a0 [x, x]\n{BOMB}", r"trial\.yaml:4: .*aliases \(\*name\) are not supported"),
    "a merge": ("train: {<<: {epochs: 1}}", r"train\.<<: unknown key"),
    "a run name that climbs": ("run: {name: ../x}", r"run\.name: got '\.\./x'; should be one folder name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_config_ends_with_2_and_its_place(place: Path, refused: Callable[..., Outcome], name: str) -> None:
    more, said = REFUSED[name]
    (place / "trial.yaml").write_text(LEAST + more + "\n")
    begin = time.perf_counter()
    assert re.search(said, refused("finetune", "trial.yaml").err)
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("override", ["train.epochs=\udcff", "run.\udcff=1", "\udcff=1", "model.name=\udcff"])
def test_an_argument_that_is_not_text_is_a_message_too(
    place: Path, refused: Callable[..., Outcome], override: str
) -> None:
    """Bytes that are no UTF-8 come from the shell as halves of characters, which no terminal can print."""
    (place / "trial.yaml").write_text(LEAST)
    refused("finetune", "trial.yaml", override).err.encode()


@pytest.mark.parametrize("name", ["https://me:{}@huggingface.co/me/x", "{}", "https://{}@hf.co/x"])
def test_a_token_in_a_name_is_not_repeated(place: Path, refused: Callable[..., Outcome], name: str) -> None:
    token = "hf_" + "CanaryTokenForTests0123456789abcdef"
    (place / "trial.yaml").write_text(LEAST)
    (place / "train.jsonl").write_text('{"prompt": "p", "completion": "c"}')
    said = refused("finetune", "trial.yaml", f"model.name={name.format(token)}").said
    assert "model.name: " in said
    assert "…" in said
    assert token not in said


def test_a_token_is_no_name_of_a_run(place: Path, refused: Callable[..., Outcome]) -> None:
    token = "hf_" + "CanaryTokenForTests0123456789abcdef"
    (place / "trial.yaml").write_text(LEAST)
    assert "run.name: looks like a token of the Hub" in refused("finetune", "trial.yaml", f"run.name={token}").err


def test_a_config_that_is_not_a_file(place: Path, refused: Callable[..., Outcome]) -> None:
    (place / "large.yaml").write_bytes(b"a: " + b"x" * 50_000_000)
    (place / "bytes.yaml").write_bytes(b"\x80\x04\x95")
    for name, said in ((".", "no such config file"), ("none.yaml", "no such"),
                       ("large.yaml", "too large for a config"), ("bytes.yaml", "not UTF-8")):  # fmt: skip
        assert said in refused("finetune", name).err


# --- settings that only the disk or the model can judge

LONG = "n" * 5000
PLACES: dict[str, tuple[tuple[str, ...], str]] = {  # arguments, what is said
    "a config": (("finetune", LONG), f"{LONG}: no such config file"),
    "runs": (("finetune", "trial.yaml", f"run.dir={LONG}"), f"run.dir: {LONG}/trial: File name too long"),
    "runs below a file": (("finetune", "trial.yaml", "run.dir=trial.yaml/x"), "run.dir: trial.yaml/x/trial: Not a dir"),
    "a run to merge": (("merge", LONG), f"{LONG}: no such run"),
    "a merged model": (("merge", "done", "--output", LONG), f"--output: {LONG}: File name too long"),
    "an adapter to pull": (("pull", "a/b", "--output", LONG), f"--output: {LONG}: File name too long"),
    "a model to make": (("pretrain", "new.yaml", f"output.dir={LONG}"), f"output.dir: {LONG}: File name too long"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_cannot_be_is_named(place: Path, refused: Callable[..., Outcome], name: str) -> None:
    (place / "trial.yaml").write_text("model: {name: tiny}\ndata: {train: trial.yaml}\n")
    (place / "new.yaml").write_text("data: {path: texts}\noutput: {dir: new}\n")
    run = write_records(place / "runs" / "done")
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").touch()
    arguments, said = PLACES[name]
    assert said in refused(*arguments).err


def test_merging_into_a_link_is_refused(place: Path, refused: Callable[..., Outcome]) -> None:
    write_run(place / "runs" / "trial")
    (place / "elsewhere").mkdir()
    for name in ("merged", "runs/trial/merged"):
        (place / name).symlink_to(place / "elsewhere")
    assert "--output: merged is a link" in refused("merge", "trial", "--output", "merged").err
    assert "--output: runs/trial/merged is a link" in refused("merge", "trial").err


@pytest.mark.parametrize(
    ("targets", "unknown"),
    [
        ("[q_prj]", "q_prj"),
        (r"'([\w.]+)+!'", "catastrophic backtracking"),
        ("[q_proj, v_prj]", "v_prj"),
        ("(q", "not a regular"),
    ],
)
def test_targets_that_match_nothing_or_partly(
    place: Path, refused: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, targets: str, unknown: str
) -> None:
    monkeypatch.setattr(sandbox, "PATTERN_CPU_SECONDS", 1)
    make_workplace(place)
    (place / "trial.yaml").write_text(
        "model: {name: base, quantization: none}\ndata: {train: train.jsonl}\n"
        f"adapter: {{target_modules: {targets}}}\n"
    )
    said = refused("finetune", "trial.yaml").err
    assert "tuning.target_modules: " in said
    assert unknown in said


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantization_that_nothing_here_can_serve(
    place: Path, refused: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    make_workplace(place)
    (place / "trial.yaml").write_text(
        f"model: {{name: base, quantization: {quantization}}}\ndata: {{train: train.jsonl}}\n"
    )
    said = refused("finetune", "trial.yaml").err
    assert f"error: model.quantization: {quantization}: bitsandbytes is not installed; `pip install" in said
    assert "or set model.quantization=none" in said
