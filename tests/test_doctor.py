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
from lmtune.doctor import Finding, check_disk, check_folder, check_package, run_probes

TOKEN = "hf_" + "CanaryTokenForTests0123456789abcdef"


def levels(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.name: finding.level for finding in findings}


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = levels(doctor.check_packages())
    assert {"python", *doctor.SHOWN_PACKAGES} <= set(found)
    assert set(found.values()) == {"ok"}
    assert check_package(Requirement("no-such-package>=1.2")).fix == 'pip install "no-such-package>=1.2"'
    for version, level in {"2.9.1": "warn", "2.10.0+cu130": "ok", "2.11rc1": "ok", "3.1+cpu": "warn"}.items():
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        assert check_package(Requirement("torch>=2.10,<3")).level == level, version


def test_folders_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_folder("runs", tmp_path / "new" / "runs", "fail", "fix").level == "ok"
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    found = check_folder("runs", tmp_path / "file" / "runs", "fail", "fix")
    assert (found.level, found.fix, "cannot be written" in found.text) == ("fail", "fix", True)
    for free, level in ((2**28, "fail"), (2**32, "warn"), (2**40, "ok")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert check_disk(tmp_path / "runs").level == level


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


def test_wrong_numbers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = torch.nn.Linear(128, 128, bias=False)
    monkeypatch.setattr(doctor, "_quantized_layer", lambda *_: wrong)
    with pytest.raises(ArithmeticError, match="off what it should compute"):
        list(doctor.try_quantization("nf4"))
    leaking = lambda module, q, k, v, *_, **__: (  # noqa: E731 - segments see each other
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

    for name in ("nf4", "int8"):
        monkeypatch.setitem(doctor.TRIALS, name, (broken, *doctor.TRIALS[name][1:]))
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
