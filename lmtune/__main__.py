"""`python -m lmtune` is the `lmtune` command."""

from lmtune.cli import main

main()
