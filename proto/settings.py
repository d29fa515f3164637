"""Read a TOML file into a tree of frozen dataclasses; an unknown key is an error.

A typing error in a configuration must not become a default that nobody notices, so every key is
checked: its name against the dataclass (with the nearest name as a hint), its type, and its
limits by the dataclass's own ``__post_init__``. Both commands read their files with this.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from .. import ShoalError

T = TypeVar("T")
FILE_BYTES_MAX = 1 << 20


class SettingsError(ShoalError):
    """A configuration file is not acceptable; nothing was started."""

    code = "config"


def read(path: Path, kind: type[T]) -> T:
    """Return the settings in a TOML file.

    Args:
        path: The file, at most 1 MiB. Relative paths inside it are relative to its folder.
        kind: A frozen keyword-only dataclass. Fields may be bool, int, float, str, Path,
            tuples of these, optional (``| None``), or further dataclasses (tables).

    Raises:
        SettingsError: The file cannot be read, is not TOML, has a key that ``kind`` lacks, lacks
            one that it needs, or a value has the wrong type or is out of range.
    """
    try:
        data = path.read_bytes()
        if len(data) > FILE_BYTES_MAX:
            raise SettingsError(f"{path} is larger than {FILE_BYTES_MAX} bytes")
        raw = tomllib.loads(data.decode())
    except OSError as exc:
        raise SettingsError(
            f"cannot read the configuration {path}: {exc.strerror}", hint="check --config"
        ) from exc
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise SettingsError(f"{path} is not valid TOML: {exc}") from exc
    return build(raw, kind, where=str(path), base=path.resolve().parent)


def build(raw: dict[str, Any], kind: type[T], *, where: str, base: Path, prefix: str = "") -> T:
    """Return ``kind`` built from a table; errors name ``where`` and the dotted key.

    Raises:
        SettingsError: As for :func:`read`.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    for name in raw:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            known = ", ".join(sorted(fields))
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {known}"
            raise SettingsError(f"{where}: unknown key {prefix}{name}", hint=hint)
    values = {
        name: _value(value, hints[name], where=where, base=base, key=f"{prefix}{name}")
        for name, value in raw.items()
    }
    for name, field in fields.items():
        missing = field.default is field.default_factory is dataclasses.MISSING
        if missing and name not in values:
            raise SettingsError(f"{where}: key {prefix}{name} is missing")
    try:
        return kind(**values)
    except ValueError as exc:
        raise SettingsError(f"{where}: {prefix.rstrip('.') or 'settings'}: {exc}") from exc


def _value(value: Any, kind: Any, *, where: str, base: Path, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise SettingsError(f"{where}: {key} must be a table")
        return build(value, typing.cast(Any, kind), where=where, base=base, prefix=f"{key}.")
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        (inner,) = [arm for arm in typing.get_args(kind) if arm is not type(None)]
        return _value(value, inner, where=where, base=base, key=key)
    if origin is tuple and isinstance(value, list):
        inner = typing.get_args(kind)[0]
        return tuple(_value(item, inner, where=where, base=base, key=key) for item in value)
    if kind is Path and isinstance(value, str):
        return base / value
    if kind is float and type(value) is int:
        return float(value)
    if origin is not tuple and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind))
    raise SettingsError(
        f"{where}: {key} must be {name}, not {type(value).__name__} ({value!r:.60})"
    )
