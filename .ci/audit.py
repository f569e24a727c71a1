"""Look the pinned dependencies up among known vulnerabilities; fails on a finding, and says so where it cannot look.

The data is on the network. A version known to be vulnerable is looked up first: if that is not reported, the data
cannot be reached, or the service in reach has none, and a clean result for our own pins would mean nothing.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

KNOWN_VULNERABLE = "jinja2==2.4.1\n"
SERVICES = ("osv", "pypi")  # pip-audit's names
SKIPPED = "dependency audit skipped: the data on known vulnerabilities cannot be reached from here"


def main(requirements: str) -> int:
    """Exit code: 0 for no finding, or no data; else pip-audit's own."""
    if importlib.util.find_spec("pip_audit") is None:
        print("dependency audit: pip-audit is not installed; pip install -c constraints.txt '.[check]'")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "requirements.txt"
        probe.write_text(KNOWN_VULNERABLE)
        service = next((name for name in SERVICES if finds_something(name, str(probe))), None)
    if service is None:
        print(SKIPPED)
        return 0
    return subprocess.run(command(service, requirements), check=False).returncode


def command(service: str, requirements: str, *more: str) -> list[str]:
    """pip-audit on a file of pins, without installing or resolving anything."""
    audit = [sys.executable, "-m", "pip_audit", "--requirement", requirements, "--no-deps", "--disable-pip"]
    return [*audit, "--vulnerability-service", service, "--timeout", "10", "--progress-spinner", "off", *more]


def finds_something(service: str, requirements: str) -> bool:
    """Whether pip-audit reports a vulnerability in the file."""
    try:
        done = subprocess.run(
            command(service, requirements, "--format", "json"), capture_output=True, text=True, timeout=60, check=False
        )
        return any(found["vulns"] for found in json.loads(done.stdout)["dependencies"] if "vulns" in found)
    except (subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
