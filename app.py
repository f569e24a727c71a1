"""The chat app: `python app.py [RUN_OR_MODEL…]`, the same as `lmtune app`, and what a Hub Space runs.

The work is in `recipes/app.py` (which model, at which address) and `lmtune/serve/` (the page, and who may use it).
"""

from __future__ import annotations

from lmtune.recipes.app import main
from lmtune.run import run

if __name__ == "__main__":
    run(main)
