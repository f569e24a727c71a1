"""Example data files that ship with lmtune."""
