"""OperatorService: the operator's face; it translates, and components decide.

Every JSON answer is a document of ``summary.py``, or one that the component named beside it
documents; the CLI's ``-o json`` prints it unchanged. Golden files in tests/server/api hold their
shapes.

    ListDevices    {"devices": [...]}   summary.fleet, chosen by selector.py
    ListModels     {"models": [...]}    summary.models
    GetRollout     {...}                summary.rollout
    ListRollouts   {"rollouts": [...]}  summary.rollouts
    GetSummary     {...}                summary.summary
    ShowDrift      {...}                server/drift, with summary.untold; grouped, server/lake
    ListAlerts     {"alerts": [...]}    summary.alerts
    GetTraining, GetRounds, GetEvaluation    {...}   learning, federated
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import grpc
from google.protobuf.message import Message
from sqlalchemy.orm import Session

from ...proto import operator_pb2 as pb
from ...proto.names import check_digest, check_name
from ...proto.operator_pb2_grpc import OperatorServiceServicer
from ..drift.profile import ReferenceProfile
from ..errors import ConflictError, InvalidError, NotFoundError
from ..registry import Artefacts, Models
from ..rollouts import Rollouts
from ..store import Store, audit
from . import summary
from .config import ApiConfig
from .selector import choose

CHUNK_BYTES_MAX: Final = 256 << 10
EVIDENCE_BYTES_MAX: Final = 256 << 10
REASON_CHARS_MAX: Final = 500

T = TypeVar("T")
R = TypeVar("R", bound=Message)


class Approver(Protocol):
    """Who signs approvals."""

    def approve(self, path: str, sha256: str, length: int, custom: dict[str, Any]) -> int:
        """List a bundle in the approval metadata; return its version. May be repeated."""


class Job(Protocol):
    """Training, rounds, or evaluations: started by keyword settings, then looked at."""

    @property
    def start(self) -> Callable[..., Awaitable[str]]:
        """Start one and return its id."""

    async def get(self, run_id: str, /) -> dict[str, Any]:
        """Return one as JSON; raises NotFoundError."""


class AlertControl(Protocol):
    """Acknowledges, silences and resolves alerts."""

    def __call__(
        self, alert_id: int, command: str, /, *, note: str, silence_s: int
    ) -> dict[str, Any]:
        """Return ``{id, state, silenced_until_ms}``; raises NotFoundError, ConflictError."""


class DriftTable(Protocol):
    """Merges the windows of a range and compares them with a reference."""

    def __call__(
        self,
        model: str,
        group_by: str,
        since_ms: int,
        until_ms: int,
        profile: ReferenceProfile,
        /,
        *,
        every: str,
    ) -> list[dict[str, Any]]:
        """Return one JSON row per group, step and feature; raises InvalidError, BusyError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """What the operator's calls are passed on to."""

    store: Store
    artefacts: Artefacts
    models: Models
    rollouts: Rollouts
    approval: Approver
    target_path: Callable[[str, str], str]
    """(name, sha256) of a model -> its path in the approval metadata."""
    create_token: Callable[[str, int], tuple[str, int]]
    """(device id, life in s or 0) -> (token, Unix ms of its end)."""
    revoke_device: Callable[[str, str], None]
    """(device id, reason); raises NotFoundError."""
    drift_report: Callable[[str], dict[str, Any]]
    """Digest of a model or "" -> report."""
    control_alert: AlertControl
    drift_table: DriftTable | None = None
    """None: this server keeps no history."""
    model_table: DriftTable | None = None
    """The same of the model as a whole: one row per group and step."""
    training: Job
    rounds: Job
    evaluations: Job


class OperatorServicer(OperatorServiceServicer):
    """Registered on the operator's socket; raises ShoalErrors."""

    def __init__(
        self, components: Components, *, clock: Callable[[], int], config: ApiConfig
    ) -> None:
        """Take the components, a clock of Unix ms, and the bounds."""
        self._to, self._clock, self._config = components, clock, config

    # --- devices -----------------------------------------------------------------------------

    async def CreateToken(
        self, request: pb.CreateTokenRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateTokenResponse:
        """Mint an enrolment token."""
        check_name(request.device_id)
        token, expires_ms = await asyncio.to_thread(
            self._to.create_token, request.device_id, request.ttl_s
        )
        return pb.CreateTokenResponse(token=token, expires_unix_ms=expires_ms)

    async def ListDevices(
        self, request: pb.ListDevicesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListDevicesResponse:
        """Return the fleet's table."""
        found = await self._read(lambda session: summary.fleet(session, self._clock()))
        rows = choose(found["devices"], request.selector)
        return pb.ListDevicesResponse(json=_json({"devices": rows}))

    async def RevokeDevice(
        self, request: pb.RevokeDeviceRequest, context: grpc.aio.ServicerContext
    ) -> pb.RevokeDeviceResponse:
        """Shut a device out."""
        check_name(request.device_id)
        if len(request.reason) > REASON_CHARS_MAX:
            raise InvalidError(f"the reason exceeds {REASON_CHARS_MAX} characters")
        await asyncio.to_thread(self._to.revoke_device, request.device_id, request.reason)
        return pb.RevokeDeviceResponse()

    # --- artefacts and models ----------------------------------------------------------------

    async def UploadArtefact(
        self,
        requests: AsyncIterator[pb.UploadArtefactRequest],
        context: grpc.aio.ServicerContext,
    ) -> pb.UploadArtefactResponse:
        """Store the bytes of all chunks."""
        loop = asyncio.get_running_loop()
        source = aiter(requests)

        async def take() -> bytes | None:
            request = await anext(source, None)
            return None if request is None else request.chunk

        def chunks() -> Iterator[bytes]:
            while True:
                coming = asyncio.run_coroutine_threadsafe(take(), loop)
                try:
                    chunk = coming.result(timeout=self._config.upload_idle_s)
                except TimeoutError:
                    coming.cancel()
                    raise InvalidError(
                        f"the upload sent nothing for {self._config.upload_idle_s:g} s"
                    ) from None
                if chunk is None:
                    return
                if not 0 < len(chunk) <= CHUNK_BYTES_MAX:
                    raise InvalidError("a chunk is empty or longer than 256 KiB")
                yield chunk

        sha256 = await asyncio.to_thread(self._to.artefacts.put, chunks(), "dataset")
        size = await asyncio.to_thread(self._to.artefacts.size, sha256)
        return pb.UploadArtefactResponse(sha256=sha256, size=size)

    async def RegisterModel(
        self, request: pb.RegisterModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.RegisterModelResponse:
        """Check a bundle and give it a version."""
        version = await asyncio.to_thread(
            self._to.models.register,
            request.name,
            request.sha256,
            note=request.note,
            parent_sha256=request.parent_sha256,
        )
        return pb.RegisterModelResponse(sha256=request.sha256, version=version)

    async def ApproveModel(
        self, request: pb.ApproveModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.ApproveModelResponse:
        """Sign a bundle into the approval metadata, then note it; each may be repeated."""
        evidence = _document(request.evidence_json)
        version = await asyncio.to_thread(self._approve, request.sha256, evidence)
        return pb.ApproveModelResponse(targets_version=version)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """Return the registered models."""
        found = await self._read(summary.models)
        return pb.ListModelsResponse(json=_json({"models": found}))

    # --- rollouts ----------------------------------------------------------------------------

    async def CreateRollout(
        self, request: pb.CreateRolloutRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateRolloutResponse:
        """Make a rollout."""
        rollout_id = await asyncio.to_thread(
            self._to.rollouts.create,
            request.sha256,
            device_ids=[*request.device_ids],
            waves=[*request.waves],
            canary_ids=[*request.canary_ids],
            bake_windows=request.bake_windows,
            deadline_s=request.deadline_s,
        )
        return pb.CreateRolloutResponse(rollout_id=rollout_id)

    async def GetRollout(
        self, request: pb.GetRolloutRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetRolloutResponse:
        """Return one rollout with its devices."""
        found = await self._read(lambda session: summary.rollout(session, request.rollout_id))
        if found is None:
            raise NotFoundError(
                f"there is no rollout {request.rollout_id!r:.80}", hint="shoal rollouts list"
            )
        return pb.GetRolloutResponse(json=_json(found))

    async def ListRollouts(
        self, request: pb.ListRolloutsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListRolloutsResponse:
        """Return the newest rollouts."""
        found = await self._read(summary.rollouts)
        return pb.ListRolloutsResponse(json=_json({"rollouts": found}))

    async def ControlRollout(
        self, request: pb.ControlRolloutRequest, context: grpc.aio.ServicerContext
    ) -> pb.ControlRolloutResponse:
        """Pause, resume or abort a rollout."""
        commands = {
            pb.ROLLOUT_COMMAND_PAUSE: "pause",
            pb.ROLLOUT_COMMAND_RESUME: "resume",
            pb.ROLLOUT_COMMAND_ABORT: "abort",
        }
        if request.command not in commands:
            raise InvalidError("the rollout command is not pause, resume or abort")
        state = await asyncio.to_thread(
            self._to.rollouts.control, request.rollout_id, commands[request.command]
        )
        return pb.ControlRolloutResponse(state=state)

    # --- watching ----------------------------------------------------------------------------

    async def ShowDrift(
        self, request: pb.ShowDriftRequest, context: grpc.aio.ServicerContext
    ) -> pb.ShowDriftResponse:
        """Return the drift report, or a table of the history."""
        if request.model_sha256:
            check_digest(request.model_sha256, what="model")
        if request.group_by:
            found = await asyncio.to_thread(self._drift_table, request)
        else:
            found = await asyncio.to_thread(self._to.drift_report, request.model_sha256)
            lacking = await self._read(
                lambda session: summary.untold(session, model_sha256=request.model_sha256)
            )
            found = {**found, "untold": lacking}
        return pb.ShowDriftResponse(json=_json(found))

    async def ListAlerts(
        self, request: pb.ListAlertsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAlertsResponse:
        """Return the alerts, the newest first."""
        if request.model_sha256:
            check_digest(request.model_sha256, what="model")
        found = await self._read(
            lambda session: summary.alerts(
                session,
                every=request.all,
                model_sha256=request.model_sha256,
                alert_id=request.alert_id,
            )
        )
        if request.alert_id and not found:
            raise NotFoundError(f"there is no alert {request.alert_id}", hint="shoal alerts list")
        return pb.ListAlertsResponse(json=_json({"alerts": found}))

    async def ControlAlert(
        self, request: pb.ControlAlertRequest, context: grpc.aio.ServicerContext
    ) -> pb.ControlAlertResponse:
        """Acknowledge, silence or resolve an alert."""
        commands = {
            pb.ALERT_COMMAND_ACKNOWLEDGE: "acknowledge",
            pb.ALERT_COMMAND_SILENCE: "silence",
            pb.ALERT_COMMAND_RESOLVE: "resolve",
        }
        if request.command not in commands:
            raise InvalidError("the alert command is not acknowledge, silence or resolve")
        if not 1 <= request.alert_id < 1 << 63:  # beyond it no database has a row
            raise NotFoundError(f"there is no alert {request.alert_id}", hint="shoal alerts list")
        control = partial(
            self._to.control_alert,
            request.alert_id,
            commands[request.command],
            note=request.note,
            silence_s=request.silence_s,
        )
        made = await asyncio.to_thread(control)
        return pb.ControlAlertResponse(
            state=made["state"], silenced_until_unix_ms=made["silenced_until_ms"] or 0
        )

    async def GetSummary(
        self, request: pb.GetSummaryRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetSummaryResponse:
        """Return the summary of the fleet."""
        found = await self._read(lambda session: summary.summary(session, now_ms=self._clock()))
        return pb.GetSummaryResponse(json=_json(found))

    async def VerifyAudit(
        self, request: pb.VerifyAuditRequest, context: grpc.aio.ServicerContext
    ) -> pb.VerifyAuditResponse:
        """Check the whole chain of the audit log."""
        entries, head = await self._read(audit.verify)
        return pb.VerifyAuditResponse(entries=entries, head_sha256=head)

    # --- learning ----------------------------------------------------------------------------

    async def StartTraining(
        self, request: pb.StartTrainingRequest, context: grpc.aio.ServicerContext
    ) -> pb.StartTrainingResponse:
        """Start a central training."""
        return pb.StartTrainingResponse(run_id=await self._start(self._to.training, request))

    async def GetTraining(
        self, request: pb.GetTrainingRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetTrainingResponse:
        """Return a central training."""
        return pb.GetTrainingResponse(json=_json(await self._to.training.get(request.run_id)))

    async def StartRounds(
        self, request: pb.StartRoundsRequest, context: grpc.aio.ServicerContext
    ) -> pb.StartRoundsResponse:
        """Start a run of federated rounds."""
        return pb.StartRoundsResponse(run_id=await self._start(self._to.rounds, request))

    async def GetRounds(
        self, request: pb.GetRoundsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetRoundsResponse:
        """Return a run of federated rounds."""
        return pb.GetRoundsResponse(json=_json(await self._to.rounds.get(request.run_id)))

    async def StartEvaluation(
        self, request: pb.StartEvaluationRequest, context: grpc.aio.ServicerContext
    ) -> pb.StartEvaluationResponse:
        """Start a federated evaluation."""
        evaluation_id = await self._start(self._to.evaluations, request)
        return pb.StartEvaluationResponse(evaluation_id=evaluation_id)

    async def GetEvaluation(
        self, request: pb.GetEvaluationRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetEvaluationResponse:
        """Return a federated evaluation."""
        found = await self._to.evaluations.get(request.evaluation_id)
        return pb.GetEvaluationResponse(json=_json(found))

    # --- the edge ----------------------------------------------------------------------------

    async def _read(self, look: Callable[[Session], T]) -> T:
        def work() -> T:
            with self._to.store.read() as session:
                return look(session)

        return await asyncio.to_thread(work)

    async def _start(self, job: Job, request: Message) -> str:
        """Start a job with the fields of a request; one that is 0 or "" takes the default."""
        settings = {
            field.name: [*value] if field.is_repeated else value
            for field, value in request.ListFields()
        }
        return await job.start(**settings)

    def _drift_table(self, request: pb.ShowDriftRequest) -> dict[str, Any]:
        table = self._to.drift_table
        group_by = _word(pb.DriftGrouping, request.group_by, "DRIFT_GROUPING_")
        every = _word(pb.DriftStep, request.every, "DRIFT_STEP_") if request.every else ""
        if table is None:
            raise ConflictError("this server keeps no history to group")
        check_digest(request.model_sha256, what="model")
        reference = request.reference_sha256 or request.model_sha256
        check_digest(reference, what="reference")
        until_ms = request.until_unix_ms or self._clock()
        if not 0 <= request.since_unix_ms < until_ms:
            raise InvalidError("the range of time is empty: it ends where it starts, or before")
        self._to.models.get(request.model_sha256)
        profile = ReferenceProfile.from_dict(self._to.models.profile(reference))
        asked = (request.model_sha256, group_by, request.since_unix_ms, until_ms)
        rows = table(*asked, profile, every=every)
        models: list[dict[str, Any]] = []
        if self._to.model_table is not None:
            own = ReferenceProfile.from_dict(self._to.models.profile(request.model_sha256))
            models = self._to.model_table(*asked, own, every=every)
        return {
            "model_sha256": request.model_sha256,
            "reference_sha256": reference,
            "group_by": group_by,
            "every": every,
            "since_ms": request.since_unix_ms,
            "until_ms": until_ms,
            "rows": rows,
            "models": models,
        }

    def _approve(self, sha256: str, evidence: dict[str, Any]) -> int:
        check_digest(sha256)
        model = self._to.models.get(sha256)
        version = self._to.approval.approve(
            self._to.target_path(model.name, sha256),
            sha256,
            model.size,
            {"version": model.version},
        )
        self._to.models.approved(sha256, evidence=evidence, targets_version=version)
        return version


def _document(data: bytes) -> dict[str, Any]:
    if len(data) > EVIDENCE_BYTES_MAX:
        raise InvalidError(f"the evidence exceeds {EVIDENCE_BYTES_MAX} bytes")
    try:
        found: Any = json.loads(data, parse_constant=_refuse) if data else {}
    except (ValueError, RecursionError) as exc:
        raise InvalidError(f"the evidence is not JSON: {exc!s:.200}") from exc
    if not isinstance(found, dict):
        raise InvalidError("the evidence is not a JSON object")
    return found


def _word(enum: Any, number: int, prefix: str) -> str:
    """Return the last word of an enum's value, in small letters."""
    if number not in enum.values():
        raise InvalidError(f"{prefix.lower().rstrip('_')} has no value {number}")
    return str(enum.Name(number)).removeprefix(prefix).lower()


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _json(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
