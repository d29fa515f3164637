"""Names that go into topics, paths and certificates: one grammar for all of them."""

from __future__ import annotations

import re
from typing import Final

from .errors import ContractError

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def check_name(name: str, *, what: str = "device id") -> str:
    """Return ``name`` if it is a legal id of a device, fleet or model.

    Args:
        name: 1 to 40 characters of ``[a-z0-9-]``, no hyphen at either end, so that it is safe as
            a topic level, a path component, a DNS label and a certificate's CN.
        what: What the name names, for the message.

    Raises:
        ContractError: The name is not legal.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ContractError(
            f"{what} {name!r:.60} is not a legal name",
            hint="use 1 to 40 of a-z, 0-9 and '-', with no '-' at either end",
        )
    return name


def check_digest(digest: str, *, what: str = "digest") -> str:
    """Return ``digest`` if it is a SHA-256 in 64 lowercase hex digits.

    Raises:
        ContractError: It is not.
    """
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ContractError(
            f"{what} {digest!r:.80} is not a SHA-256", hint="use 64 lowercase hex digits"
        )
    return digest
