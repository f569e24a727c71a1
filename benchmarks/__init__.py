"""Measurements of lmtune against plain loops and against the machine's own limit; each prints its numbers."""
