from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Split(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPLIT_UNSPECIFIED: _ClassVar[Split]
    SPLIT_TRAIN: _ClassVar[Split]
    SPLIT_VALIDATION: _ClassVar[Split]
    SPLIT_TEST: _ClassVar[Split]
SPLIT_UNSPECIFIED: Split
SPLIT_TRAIN: Split
SPLIT_VALIDATION: Split
SPLIT_TEST: Split

class GetTaskRequest(_message.Message):
    __slots__ = ("wait_ms", "bundle_sha256", "labelled_windows")
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    LABELLED_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    wait_ms: int
    bundle_sha256: str
    labelled_windows: int
    def __init__(self, wait_ms: _Optional[int] = ..., bundle_sha256: _Optional[str] = ..., labelled_windows: _Optional[int] = ...) -> None: ...

class GetTaskResponse(_message.Message):
    __slots__ = ("task", "retry_after_ms")
    TASK_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    task: Task
    retry_after_ms: int
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("task_id", "round_id", "expires_in_ms", "train", "evaluate")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    round_id: str
    expires_in_ms: int
    train: TrainTask
    evaluate: EvaluateTask
    def __init__(self, task_id: _Optional[str] = ..., round_id: _Optional[str] = ..., expires_in_ms: _Optional[int] = ..., train: _Optional[_Union[TrainTask, _Mapping]] = ..., evaluate: _Optional[_Union[EvaluateTask, _Mapping]] = ...) -> None: ...

class TrainTask(_message.Message):
    __slots__ = ("bundle_sha256", "parameters_sha256", "parameters_size", "epochs", "batch_size", "learning_rate", "proximal_mu", "clip_norm", "seed")
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_SHA256_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_SIZE_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_MU_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    bundle_sha256: str
    parameters_sha256: str
    parameters_size: int
    epochs: int
    batch_size: int
    learning_rate: float
    proximal_mu: float
    clip_norm: float
    seed: int
    def __init__(self, bundle_sha256: _Optional[str] = ..., parameters_sha256: _Optional[str] = ..., parameters_size: _Optional[int] = ..., epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ..., proximal_mu: _Optional[float] = ..., clip_norm: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class EvaluateTask(_message.Message):
    __slots__ = ("bundle_sha256", "split")
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    bundle_sha256: _containers.RepeatedScalarFieldContainer[str]
    split: Split
    def __init__(self, bundle_sha256: _Optional[_Iterable[str]] = ..., split: _Optional[_Union[Split, str]] = ...) -> None: ...

class SubmitResultRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ResultHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[ResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ResultHeader(_message.Message):
    __slots__ = ("task_id", "train", "evaluate", "failure")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    train: TrainResult
    evaluate: EvaluateResult
    failure: TaskFailure
    def __init__(self, task_id: _Optional[str] = ..., train: _Optional[_Union[TrainResult, _Mapping]] = ..., evaluate: _Optional[_Union[EvaluateResult, _Mapping]] = ..., failure: _Optional[_Union[TaskFailure, _Mapping]] = ...) -> None: ...

class TrainResult(_message.Message):
    __slots__ = ("windows", "loss_first", "loss_last", "delta_sha256", "delta_size", "train_ms")
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIRST_FIELD_NUMBER: _ClassVar[int]
    LOSS_LAST_FIELD_NUMBER: _ClassVar[int]
    DELTA_SHA256_FIELD_NUMBER: _ClassVar[int]
    DELTA_SIZE_FIELD_NUMBER: _ClassVar[int]
    TRAIN_MS_FIELD_NUMBER: _ClassVar[int]
    windows: int
    loss_first: float
    loss_last: float
    delta_sha256: str
    delta_size: int
    train_ms: int
    def __init__(self, windows: _Optional[int] = ..., loss_first: _Optional[float] = ..., loss_last: _Optional[float] = ..., delta_sha256: _Optional[str] = ..., delta_size: _Optional[int] = ..., train_ms: _Optional[int] = ...) -> None: ...

class EvaluateResult(_message.Message):
    __slots__ = ("scores",)
    SCORES_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedCompositeFieldContainer[BundleScore]
    def __init__(self, scores: _Optional[_Iterable[_Union[BundleScore, _Mapping]]] = ...) -> None: ...

class BundleScore(_message.Message):
    __slots__ = ("bundle_sha256", "windows", "correct", "loss_sum", "confusion", "latency_p50_us")
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    CORRECT_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    CONFUSION_FIELD_NUMBER: _ClassVar[int]
    LATENCY_P50_US_FIELD_NUMBER: _ClassVar[int]
    bundle_sha256: str
    windows: int
    correct: int
    loss_sum: float
    confusion: _containers.RepeatedScalarFieldContainer[int]
    latency_p50_us: int
    def __init__(self, bundle_sha256: _Optional[str] = ..., windows: _Optional[int] = ..., correct: _Optional[int] = ..., loss_sum: _Optional[float] = ..., confusion: _Optional[_Iterable[int]] = ..., latency_p50_us: _Optional[int] = ...) -> None: ...

class TaskFailure(_message.Message):
    __slots__ = ("code", "text")
    CODE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    code: str
    text: str
    def __init__(self, code: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class SubmitResultResponse(_message.Message):
    __slots__ = ("accepted",)
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    def __init__(self, accepted: _Optional[bool] = ...) -> None: ...
