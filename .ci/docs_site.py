"""The pages of the documentation site: docs/, README, SECURITY and CHANGELOG in one folder, links rewritten to match.

    python .ci/docs_site.py build/docs

Files outside docs/ that a page links to (a config, a notebook) are copied along. mkdocs then builds the site and checks
every link and anchor.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")


def main(output: Path) -> None:
    """Write the folder anew."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(ROOT / "docs", output)
    for source in [*PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]:
        folder = posixpath.dirname(source)

        def place(found: re.Match[str], folder: str = folder) -> str:
            target = posixpath.normpath(posixpath.join(folder, found[1]))
            if target not in PAGES and not target.startswith("docs/"):
                (output / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / target, output / target)
            return _in_site(target)

        text = (ROOT / source).read_text(encoding="utf-8")
        (output / _in_site(source)).write_text(LINK.sub(place, text), encoding="utf-8")


def _in_site(path: str) -> str:
    """Where a file of the repository is in the site."""
    return PAGES.get(path, path.removeprefix("docs/"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
