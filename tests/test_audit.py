"""The dependency audit of `make check`: skipped without its data, failing on a finding, clean otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In place of pip-audit: knows the vulnerabilities that KNOWN names, from the services that REACHED names.
PIP_AUDIT = """
import json, os, sys
service = sys.argv[sys.argv.index("--vulnerability-service") + 1]
if service not in os.environ["REACHED"].split():
    sys.exit("ConnectionError: name or service not known")
pins = [line.strip() for line in open(sys.argv[sys.argv.index("--requirement") + 1]) if "==" in line]
found = [pin for pin in pins if pin in os.environ["KNOWN"].split()]
if "json" in sys.argv:
    print(json.dumps({"dependencies": [{"name": p, "vulns": [{"id": "X"}] if p in found else []} for p in pins]}))
else:
    print(f"{len(found)} known vulnerabilities")
sys.exit(bool(found))
"""
PROBE = "jinja2==2.4.1"


@pytest.mark.parametrize(
    ("reached", "known", "code", "said"),
    [
        ("", PROBE, 0, "dependency audit skipped: the data on known vulnerabilities cannot be reached"),
        ("osv pypi", "", 0, "dependency audit skipped"),  # answers, but knows of nothing, as a mirror of packages does
        ("pypi", PROBE, 0, "0 known vulnerabilities"),
        ("osv", f"{PROBE} torch==2.13.0", 1, "1 known vulnerabilities"),
    ],
)
def test_the_audit(tmp_path: Path, reached: str, known: str, code: int, said: str) -> None:
    (tmp_path / "pip_audit.py").write_text(PIP_AUDIT)
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "audit.py"), str(ROOT / "constraints.txt")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "REACHED": reached, "KNOWN": known}, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")
    assert said in done.stdout
    assert "Traceback" not in done.stdout
