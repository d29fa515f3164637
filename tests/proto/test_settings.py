"""Configuration files: a typing error is an error, not a default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shoal.proto.settings import SettingsError, read


@dataclass(frozen=True, slots=True, kw_only=True)
class Spool:
    """A table."""

    bytes_max: int = 64

    def __post_init__(self) -> None:
        if self.bytes_max < 1:
            raise ValueError("bytes_max must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A file."""

    state_dir: Path
    rate_hz: float = 1.0
    name: str | None = None
    names: tuple[str, ...] = ()
    on: bool = True
    spool: Spool = field(default_factory=Spool)


def written(tmp_path: Path, text: str) -> Path:
    """Write a configuration file."""
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def test_reads_every_type(tmp_path: Path) -> None:
    """Paths are relative to the file; whole numbers do for floats."""
    path = written(
        tmp_path,
        'state_dir = "state"\nrate_hz = 2\nname = "n"\nnames = ["a", "b"]\non = false\n'
        "[spool]\nbytes_max = 7\n",
    )
    assert read(path, Settings) == Settings(
        state_dir=tmp_path / "state",
        rate_hz=2.0,
        name="n",
        names=("a", "b"),
        on=False,
        spool=Spool(bytes_max=7),
    )


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ('state_dir = "s"\nrate_hs = 2.0', "unknown key rate_hs", "did you mean rate_hz?"),
        ('state_dir = "s"\n[spool]\nbyte_max = 1', "unknown key spool.byte_max", "spool.bytes_max"),
        ('state_dir = "s"\nxyzzy = 1', "unknown key xyzzy", "known keys: name, names"),
        ("rate_hz = 1.0", "key state_dir is missing", ""),
        ('state_dir = "s"\nrate_hz = "fast"', "rate_hz must be float, not str", ""),
        ('state_dir = "s"\non = 1', "on must be bool, not int", ""),
        ('state_dir = "s"\nnames = "a"', "names must be", ""),
        ('state_dir = "s"\nnames = [1]', "names must be str, not int", ""),
        ('state_dir = "s"\nspool = 1', "spool must be a table", ""),
        ('state_dir = "s"\n[spool]\nbytes_max = true', "spool.bytes_max must be int", ""),
        ('state_dir = "s"\n[spool]\nbytes_max = 0', "bytes_max must be at least 1", ""),
        ("state_dir = ", "not valid TOML", ""),
    ],
)
def test_refuses_and_says_why(text: str, said: str, hint: str, tmp_path: Path) -> None:
    """The message names the file and the key; the hint names the nearest one."""
    with pytest.raises(SettingsError, match=said) as caught:
        read(written(tmp_path, text), Settings)
    assert "agent.toml" in str(caught.value)
    assert hint in caught.value.hint


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    """The commonest mistake of all."""
    with pytest.raises(SettingsError, match="No such file"):
        read(tmp_path / "missing.toml", Settings)
