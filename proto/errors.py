"""Errors of the contracts: what a peer sent is not what the contract says."""

from __future__ import annotations

from .. import ShoalError


class ContractError(ShoalError):
    """Bytes or values break a contract; nothing of them was used."""

    code = "proto.contract"


class TopicError(ContractError):
    """A topic is not in the grammar; the message was not looked at."""

    code = "proto.topic"


class RecordError(ContractError):
    """A batch or record is malformed; none of the batch was taken."""

    code = "proto.record"


class BundleError(ContractError):
    """A model bundle is malformed; nothing was unpacked."""

    code = "proto.bundle"


class SignatureError(ContractError):
    """A signature or a signed value is not acceptable; nothing changed."""

    code = "proto.signature"
