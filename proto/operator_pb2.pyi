from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RolloutCommand(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLLOUT_COMMAND_UNSPECIFIED: _ClassVar[RolloutCommand]
    ROLLOUT_COMMAND_PAUSE: _ClassVar[RolloutCommand]
    ROLLOUT_COMMAND_RESUME: _ClassVar[RolloutCommand]
    ROLLOUT_COMMAND_ABORT: _ClassVar[RolloutCommand]

class DriftGrouping(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRIFT_GROUPING_UNSPECIFIED: _ClassVar[DriftGrouping]
    DRIFT_GROUPING_DEVICE: _ClassVar[DriftGrouping]
    DRIFT_GROUPING_SITE: _ClassVar[DriftGrouping]
    DRIFT_GROUPING_HARDWARE: _ClassVar[DriftGrouping]
    DRIFT_GROUPING_SLICE: _ClassVar[DriftGrouping]
    DRIFT_GROUPING_FLEET: _ClassVar[DriftGrouping]

class DriftStep(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRIFT_STEP_UNSPECIFIED: _ClassVar[DriftStep]
    DRIFT_STEP_HOUR: _ClassVar[DriftStep]
    DRIFT_STEP_DAY: _ClassVar[DriftStep]

class AlertCommand(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ALERT_COMMAND_UNSPECIFIED: _ClassVar[AlertCommand]
    ALERT_COMMAND_ACKNOWLEDGE: _ClassVar[AlertCommand]
    ALERT_COMMAND_SILENCE: _ClassVar[AlertCommand]
    ALERT_COMMAND_RESOLVE: _ClassVar[AlertCommand]
ROLLOUT_COMMAND_UNSPECIFIED: RolloutCommand
ROLLOUT_COMMAND_PAUSE: RolloutCommand
ROLLOUT_COMMAND_RESUME: RolloutCommand
ROLLOUT_COMMAND_ABORT: RolloutCommand
DRIFT_GROUPING_UNSPECIFIED: DriftGrouping
DRIFT_GROUPING_DEVICE: DriftGrouping
DRIFT_GROUPING_SITE: DriftGrouping
DRIFT_GROUPING_HARDWARE: DriftGrouping
DRIFT_GROUPING_SLICE: DriftGrouping
DRIFT_GROUPING_FLEET: DriftGrouping
DRIFT_STEP_UNSPECIFIED: DriftStep
DRIFT_STEP_HOUR: DriftStep
DRIFT_STEP_DAY: DriftStep
ALERT_COMMAND_UNSPECIFIED: AlertCommand
ALERT_COMMAND_ACKNOWLEDGE: AlertCommand
ALERT_COMMAND_SILENCE: AlertCommand
ALERT_COMMAND_RESOLVE: AlertCommand

class CreateTokenRequest(_message.Message):
    __slots__ = ("device_id", "ttl_s")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    ttl_s: int
    def __init__(self, device_id: _Optional[str] = ..., ttl_s: _Optional[int] = ...) -> None: ...

class CreateTokenResponse(_message.Message):
    __slots__ = ("token", "expires_unix_ms")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    token: str
    expires_unix_ms: int
    def __init__(self, token: _Optional[str] = ..., expires_unix_ms: _Optional[int] = ...) -> None: ...

class ListDevicesRequest(_message.Message):
    __slots__ = ("selector",)
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    selector: str
    def __init__(self, selector: _Optional[str] = ...) -> None: ...

class ListDevicesResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class RevokeDeviceRequest(_message.Message):
    __slots__ = ("device_id", "reason")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    reason: str
    def __init__(self, device_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RevokeDeviceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UploadArtefactRequest(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    def __init__(self, chunk: _Optional[bytes] = ...) -> None: ...

class UploadArtefactResponse(_message.Message):
    __slots__ = ("sha256", "size")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    size: int
    def __init__(self, sha256: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class RegisterModelRequest(_message.Message):
    __slots__ = ("name", "sha256", "note", "parent_sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    PARENT_SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    note: str
    parent_sha256: str
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., note: _Optional[str] = ..., parent_sha256: _Optional[str] = ...) -> None: ...

class RegisterModelResponse(_message.Message):
    __slots__ = ("sha256", "version")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    version: int
    def __init__(self, sha256: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class ApproveModelRequest(_message.Message):
    __slots__ = ("sha256", "evidence_json")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_JSON_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    evidence_json: bytes
    def __init__(self, sha256: _Optional[str] = ..., evidence_json: _Optional[bytes] = ...) -> None: ...

class ApproveModelResponse(_message.Message):
    __slots__ = ("targets_version",)
    TARGETS_VERSION_FIELD_NUMBER: _ClassVar[int]
    targets_version: int
    def __init__(self, targets_version: _Optional[int] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class CreateRolloutRequest(_message.Message):
    __slots__ = ("sha256", "device_ids", "waves", "canary_ids", "bake_windows", "deadline_s")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    DEVICE_IDS_FIELD_NUMBER: _ClassVar[int]
    WAVES_FIELD_NUMBER: _ClassVar[int]
    CANARY_IDS_FIELD_NUMBER: _ClassVar[int]
    BAKE_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    device_ids: _containers.RepeatedScalarFieldContainer[str]
    waves: _containers.RepeatedScalarFieldContainer[int]
    canary_ids: _containers.RepeatedScalarFieldContainer[str]
    bake_windows: int
    deadline_s: int
    def __init__(self, sha256: _Optional[str] = ..., device_ids: _Optional[_Iterable[str]] = ..., waves: _Optional[_Iterable[int]] = ..., canary_ids: _Optional[_Iterable[str]] = ..., bake_windows: _Optional[int] = ..., deadline_s: _Optional[int] = ...) -> None: ...

class CreateRolloutResponse(_message.Message):
    __slots__ = ("rollout_id",)
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    def __init__(self, rollout_id: _Optional[str] = ...) -> None: ...

class GetRolloutRequest(_message.Message):
    __slots__ = ("rollout_id",)
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    def __init__(self, rollout_id: _Optional[str] = ...) -> None: ...

class GetRolloutResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class ListRolloutsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRolloutsResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class ControlRolloutRequest(_message.Message):
    __slots__ = ("rollout_id", "command")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    command: RolloutCommand
    def __init__(self, rollout_id: _Optional[str] = ..., command: _Optional[_Union[RolloutCommand, str]] = ...) -> None: ...

class ControlRolloutResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: str
    def __init__(self, state: _Optional[str] = ...) -> None: ...

class ShowDriftRequest(_message.Message):
    __slots__ = ("model_sha256", "group_by", "since_unix_ms", "until_unix_ms", "every", "reference_sha256")
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    GROUP_BY_FIELD_NUMBER: _ClassVar[int]
    SINCE_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    UNTIL_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    EVERY_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_SHA256_FIELD_NUMBER: _ClassVar[int]
    model_sha256: str
    group_by: DriftGrouping
    since_unix_ms: int
    until_unix_ms: int
    every: DriftStep
    reference_sha256: str
    def __init__(self, model_sha256: _Optional[str] = ..., group_by: _Optional[_Union[DriftGrouping, str]] = ..., since_unix_ms: _Optional[int] = ..., until_unix_ms: _Optional[int] = ..., every: _Optional[_Union[DriftStep, str]] = ..., reference_sha256: _Optional[str] = ...) -> None: ...

class ShowDriftResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class ListAlertsRequest(_message.Message):
    __slots__ = ("all", "model_sha256", "alert_id")
    ALL_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    ALERT_ID_FIELD_NUMBER: _ClassVar[int]
    all: bool
    model_sha256: str
    alert_id: int
    def __init__(self, all: _Optional[bool] = ..., model_sha256: _Optional[str] = ..., alert_id: _Optional[int] = ...) -> None: ...

class ListAlertsResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class ControlAlertRequest(_message.Message):
    __slots__ = ("alert_id", "command", "note", "silence_s")
    ALERT_ID_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    SILENCE_S_FIELD_NUMBER: _ClassVar[int]
    alert_id: int
    command: AlertCommand
    note: str
    silence_s: int
    def __init__(self, alert_id: _Optional[int] = ..., command: _Optional[_Union[AlertCommand, str]] = ..., note: _Optional[str] = ..., silence_s: _Optional[int] = ...) -> None: ...

class ControlAlertResponse(_message.Message):
    __slots__ = ("state", "silenced_until_unix_ms")
    STATE_FIELD_NUMBER: _ClassVar[int]
    SILENCED_UNTIL_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    state: str
    silenced_until_unix_ms: int
    def __init__(self, state: _Optional[str] = ..., silenced_until_unix_ms: _Optional[int] = ...) -> None: ...

class GetSummaryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetSummaryResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class VerifyAuditRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifyAuditResponse(_message.Message):
    __slots__ = ("entries", "head_sha256")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    HEAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    entries: int
    head_sha256: str
    def __init__(self, entries: _Optional[int] = ..., head_sha256: _Optional[str] = ...) -> None: ...

class StartTrainingRequest(_message.Message):
    __slots__ = ("name", "dataset_sha256", "epochs", "seed", "note")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATASET_SHA256_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dataset_sha256: str
    epochs: int
    seed: int
    note: str
    def __init__(self, name: _Optional[str] = ..., dataset_sha256: _Optional[str] = ..., epochs: _Optional[int] = ..., seed: _Optional[int] = ..., note: _Optional[str] = ...) -> None: ...

class StartTrainingResponse(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class GetTrainingRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class GetTrainingResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class StartRoundsRequest(_message.Message):
    __slots__ = ("bundle_sha256", "rounds", "epochs", "batch_size", "learning_rate", "proximal_mu", "clip_norm", "devices_min", "deadline_s", "seed", "server_momentum")
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_MU_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    DEVICES_MIN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SERVER_MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    bundle_sha256: str
    rounds: int
    epochs: int
    batch_size: int
    learning_rate: float
    proximal_mu: float
    clip_norm: float
    devices_min: int
    deadline_s: int
    seed: int
    server_momentum: float
    def __init__(self, bundle_sha256: _Optional[str] = ..., rounds: _Optional[int] = ..., epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ..., proximal_mu: _Optional[float] = ..., clip_norm: _Optional[float] = ..., devices_min: _Optional[int] = ..., deadline_s: _Optional[int] = ..., seed: _Optional[int] = ..., server_momentum: _Optional[float] = ...) -> None: ...

class StartRoundsResponse(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class GetRoundsRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class GetRoundsResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class StartEvaluationRequest(_message.Message):
    __slots__ = ("bundle_sha256", "split", "device_ids", "deadline_s")
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_IDS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    bundle_sha256: _containers.RepeatedScalarFieldContainer[str]
    split: str
    device_ids: _containers.RepeatedScalarFieldContainer[str]
    deadline_s: int
    def __init__(self, bundle_sha256: _Optional[_Iterable[str]] = ..., split: _Optional[str] = ..., device_ids: _Optional[_Iterable[str]] = ..., deadline_s: _Optional[int] = ...) -> None: ...

class StartEvaluationResponse(_message.Message):
    __slots__ = ("evaluation_id",)
    EVALUATION_ID_FIELD_NUMBER: _ClassVar[int]
    evaluation_id: str
    def __init__(self, evaluation_id: _Optional[str] = ...) -> None: ...

class GetEvaluationRequest(_message.Message):
    __slots__ = ("evaluation_id",)
    EVALUATION_ID_FIELD_NUMBER: _ClassVar[int]
    evaluation_id: str
    def __init__(self, evaluation_id: _Optional[str] = ...) -> None: ...

class GetEvaluationResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...
