"""``python -m shoal.server.cli``: the same as ``shoal``."""

from __future__ import annotations

from . import main

main(prog_name="shoal")
