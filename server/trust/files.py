"""Write and read the files of keys and signed metadata, durably and for the owner alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..errors import ConfigError, StoreError

FILE_BYTES_MAX: Final = 1 << 20


def make_private_dir(path: Path) -> None:
    """Make a folder, and those above it, with mode 0700."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _sync_dir(path.parent)


def write(path: Path, data: bytes) -> None:
    """Replace a file (mode 0600) so that a power cut leaves the old or the new one.

    Raises:
        StoreError: The disk refused; the old file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        _sync_dir(path.parent)
    except OSError as exc:
        raise StoreError(
            f"cannot write {path.name}: {exc.strerror}", hint="check the disk of the state folder"
        ) from exc


def read_private(path: Path) -> bytes:
    """Return the bytes of a key file.

    Raises:
        ConfigError: It cannot be read, or others may read it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(FILE_BYTES_MAX)
    except OSError as exc:
        raise ConfigError(
            f"cannot read the key {path}: {exc.strerror}",
            hint="restore the state folder from its backup; a lost key cannot be made again",
        ) from exc
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            f"the key {path} may be read by others (mode {stat.S_IMODE(mode):04o})",
            hint=f"chmod 600 {path}, and think of who may have read it",
        )
    return data


def write_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Write an ed25519 key as unencrypted PKCS#8, mode 0600."""
    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write(path, data)


def read_key(path: Path) -> Ed25519PrivateKey:
    """Return the ed25519 key of a file.

    Raises:
        ConfigError: The file is missing, damaged, or may be read by others.
    """
    try:
        key = serialization.load_pem_private_key(read_private(path), None)
    except ValueError as exc:
        raise ConfigError(f"the key {path} is damaged", hint="restore it from a backup") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"the key {path} is not an ed25519 key")
    return key


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
