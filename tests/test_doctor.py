"""`lmtune doctor`: what is tried is truly tried, and whatever breaks becomes a line and an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from lmtune import doctor
from lmtune.doctor import Finding, check_disk, check_folder, check_hub_token, check_package, run_probes

TOKEN = "hf_" + "CanaryTokenForTests0123456789abcdef"


def levels(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.name: finding.level for finding in findings}


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = levels(doctor.check_packages())
    assert {"python", *doctor.SHOWN_PACKAGES} <= set(found)
    assert set(found.values()) == {"ok"}
    assert check_package(Requirement("no-such-package>=1.2")) == Finding(
        "no-such-package", "fail", "not installed", 'pip install "no-such-package>=1.2"'
    )
    versions = {"2.9.1": "fail", "2.10": "ok", "2.10.0+cu130": "ok", "2.11rc1": "ok", "3.0": "warn", "3.1+cpu": "warn"}
    for version, level in versions.items():
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        assert check_package(Requirement("torch>=2.10,<3")).level == level, version


def test_a_folder_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    assert check_folder("runs", tmp_path / "new" / "runs", "fail", "fix").level == "ok"
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    found = check_folder("runs", tmp_path / "file" / "runs", "fail", "fix")
    assert (found.level, found.fix) == ("fail", "fix")
    assert "cannot be written" in found.text


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, level in ((2**28, "fail"), (2**32, "warn"), (2**40, "ok")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert check_disk(tmp_path / "runs").level == level


def test_token_is_seen_and_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert check_hub_token() == Finding("Hub token", "ok", "there is one")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "none" in check_hub_token().text


def test_embedded_model_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lmtune.demo.tiny_path", lambda: tmp_path)
    assert doctor.check_demo().level == "fail"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"x" * 1000)
    assert doctor.check_demo().level == "ok"


CHILDREN = {
    "killed": (
        'print(\'{"begin": "nf4"}\', flush=True); import os; os.kill(os.getpid(), 4)',
        {"nf4": r"killed its process (SIGILL): a library does not fit this machine"},
    ),
    "import fails": ("import no_such_library", {"torch": "ModuleNotFoundError: No module named 'no_such_library'"}),
    "endless": ('print(\'{"begin": "int8"}\', flush=True); import time; time.sleep(60)', {"int8": "no end after 2 s"}),
    "chatty": ('print(\'hello\\n{"name": "CPU", "level": "ok", "text": "2"}\\n{}\')', {"CPU": "2"}),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_a_probe_that_dies_is_a_finding(name: str) -> None:
    code, wanted = CHILDREN[name]
    findings = list(run_probes([sys.executable, "-c", code], seconds=2))
    assert [finding.name for finding in findings] == list(wanted)
    for finding in findings:
        assert wanted[finding.name] in finding.text
        assert finding.level == ("ok" if name == "chatty" else "fail")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_layers_are_computed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(doctor.try_quantization(kind)) == {kind: "ok"}
    wrong = torch.nn.Linear(128, 128, bias=False)
    monkeypatch.setattr(doctor, "_quantized_layer", lambda *_: wrong)
    with pytest.raises(ArithmeticError, match="off what it should compute"):
        list(doctor.try_quantization(kind))


def test_attention_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = doctor.try_attention()
    assert finding.level == "ok"
    assert "math" in finding.text
    leaking = lambda module, q, k, v, *_, **__: (  # noqa: E731 - documents see each other
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None,
    )  # fmt: skip
    monkeypatch.setattr("lmtune.kernels.attention.segment_attention", leaking)
    with pytest.raises(ArithmeticError, match="differs"):
        list(doctor.try_attention())


def test_one_failing_trial_does_not_stop_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[Finding]:
        raise RuntimeError("no kernel\nfor this")
        yield

    monkeypatch.setattr(doctor, "TRIALS", {"nf4": broken, "int8": broken, "CPU": doctor.find_processor})
    doctor.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {line["name"]: line for line in lines if "level" in line}
    assert (found["nf4"]["level"], found["int8"]["level"], found["CPU"]["level"]) == ("fail", "warn", "ok")
    assert found["nf4"]["text"] == "RuntimeError: no kernel for this"
    assert "model.quantization=none" in found["nf4"]["fix"]


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    env = {**os.environ, "HF_TOKEN": TOKEN, "COLUMNS": "60"}
    command = [sys.executable, "-m", "lmtune", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("      → ")]
    names = {line[6:].split("  ")[0].split(" 0")[0].strip() for line in lines}
    assert {"python", "torch", "CPU", "GPU", "nf4", "int8", "attention", "processes", "disk"} <= names
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}
    assert TOKEN not in done.stdout + done.stderr
    assert "fine-tuning works here" in done.stderr

    (tmp_path / "file").write_text("")
    broken = {**env, "LMTUNE_CACHE": str(tmp_path / "file" / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=broken, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "fail  row cache" in done.stdout
    assert "name another folder in LMTUNE_CACHE" in done.stdout
