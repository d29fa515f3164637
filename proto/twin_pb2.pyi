from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetDesiredRequest(_message.Message):
    __slots__ = ("version_seen",)
    VERSION_SEEN_FIELD_NUMBER: _ClassVar[int]
    version_seen: int
    def __init__(self, version_seen: _Optional[int] = ...) -> None: ...

class GetDesiredResponse(_message.Message):
    __slots__ = ("version", "assignment")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    version: int
    assignment: SignedAssignment
    def __init__(self, version: _Optional[int] = ..., assignment: _Optional[_Union[SignedAssignment, _Mapping]] = ...) -> None: ...

class SignedAssignment(_message.Message):
    __slots__ = ("payload", "signature")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    signature: bytes
    def __init__(self, payload: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...
