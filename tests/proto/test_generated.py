"""The committed stubs are what the .proto files say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import shoal.proto

PROTO = Path(next(iter(shoal.proto.__path__)))


def test_stubs_are_fresh(tmp_path: Path) -> None:
    """`make proto` was run after the last change of a .proto file."""
    pytest.importorskip("grpc_tools")
    module = runpy.run_path(str(PROTO / "generate.py"))
    module["generate"](tmp_path)
    made = module["stubs"](tmp_path)
    assert made
    for name, text in made.items():
        assert (PROTO / name).read_text() == text, f"{name} is stale: run make proto"
