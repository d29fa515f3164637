"""The demo's story, told to a running fleet server through its operator API.

Nothing here knows a figure in advance: each step asks the server, waits for what the server saw,
and decides by rules that a fleet operator could have written down beforehand. The loop is closed
when the better model, judged on windows that no training touched, runs on every device.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from ...proto import operator_pb2 as pb
from ...proto.operator_pb2_grpc import OperatorServiceStub
from ..errors import ServerError
from .display import Display
from .people import Wearer

CHUNK_BYTES: Final = 256 << 10
NAME: Final = "wearable"
CANARIES: Final = 2


class LoopError(ServerError):
    """The loop did not close; the message says at which step and why."""

    code = "server.demo.loop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Figures of the demo: how long it watches and how it learns."""

    seconds: float = 90.0
    """Length of the whole run that is aimed at, s; slow machines take what they need."""
    train_epochs: int = 0
    """Of the first model; 0 = the server's default."""
    rounds: int = 30
    """Federated rounds."""
    epochs: int = 2
    """Local epochs per round."""
    batch_size: int = 32
    """Local batch size."""
    learning_rate: float = 0.015
    """Local learning rate of the first round."""
    proximal_mu: float = 0.0
    """FedProx weight; 0 = FedAvg."""
    server_momentum: float = 0.9
    """Momentum of the server's step; 0 = FedAvg."""
    watch_windows_min: int = 11
    """Telemetry windows per device before drift is asked for."""
    bake_windows: int = 2
    """Telemetry windows a canary must report before its wave is judged."""
    gate_points_min: float = 0.0
    """Points by which the candidate must beat the champion on held-out windows."""


@dataclass(slots=True)
class Story:
    """What was seen, step by step; the report is made of it."""

    champion: str = ""
    candidate: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    drift: dict[str, Any] = field(default_factory=dict)
    rounds: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    first_rollout: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    marks_s: dict[str, float] = field(default_factory=dict)


class Scenario:
    """Tells the story once."""

    def __init__(
        self,
        socket: Path,
        wearers: Sequence[Wearer],
        *,
        plan: Plan,
        display: Display,
        seed: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._socket, self._wearers, self._plan = socket, wearers, plan
        self._display, self._seed, self._monotonic = display, seed, monotonic
        self._start_s = monotonic()
        self.story = Story()

    async def tokens(self) -> dict[str, str]:
        """Return an enrolment token for each device; waits until the server answers."""
        found = {}
        for wearer in self._wearers:
            reply = await self._call("CreateToken", pb.CreateTokenRequest(device_id=wearer.device))
            found[wearer.device] = reply.token
        return found

    async def run(self, dataset: Path) -> Story:
        """Tell the story from the enrolled fleet to the confirmed better model.

        Raises:
            LoopError: A step failed or took too long.
        """
        await self._train(dataset)
        await self._deploy()
        await self._watch()
        await self._learn()
        await self._gate()
        await self._rollout()
        return self.story

    # --- the steps -------------------------------------------------------------------------

    async def _train(self, dataset: Path) -> None:
        self._begin("train")
        sha256 = await self._upload(dataset)
        started = await self._call(
            "StartTraining",
            pb.StartTrainingRequest(
                name=NAME,
                dataset_sha256=sha256,
                epochs=self._plan.train_epochs,
                seed=self._seed,
                note="first model: the people it may see",
            ),
        )

        async def look() -> dict[str, Any] | None:
            run = await self._json("GetTraining", pb.GetTrainingRequest(run_id=started.run_id))
            self._display.detail(_training_text(run))
            if run["state"] == "failed":
                raise LoopError(f"the first training failed: {run.get('reason')}")
            return run if run["state"] == "done" else None

        self.story.training = await self._until(look, "the first model", wait_s=180)
        self.story.champion = self.story.training["model_sha256"]
        await self._call(
            "ApproveModel",
            pb.ApproveModelRequest(
                sha256=self.story.champion,
                evidence_json=json.dumps({"training": self.story.training["progress"]}).encode(),
            ),
        )

    async def _deploy(self) -> None:
        self._begin("deploy")
        self.story.first_rollout = await self._roll_out(
            self.story.champion, waves=[0], bake_windows=0, wait_s=180
        )

    async def _watch(self) -> None:
        """Watch until the server has judged every device, and something is wrong with some."""
        self._begin("watch")
        plan = self._plan
        patience_s = self._monotonic() + max(60.0, plan.seconds)

        async def look() -> dict[str, Any] | None:
            report = await self._drift(self.story.champion)
            devices = report["devices"]
            windows = [each["windows"] for each in devices]
            flagged = [each["device"] for each in devices if each["drifting"]]
            self._display.detail(
                f"{min(windows, default=0)}–{max(windows, default=0)} windows per device; "
                + (f"drifting: {', '.join(flagged)}" if flagged else "no drift yet")
            )
            enough = len(devices) == len(self._wearers) and min(windows) >= plan.watch_windows_min
            return report if enough and (flagged or self._monotonic() > patience_s) else None

        self.story.drift = await self._until(look, "a drift verdict", wait_s=300)
        for device in self.story.drift["devices"]:
            if device["drifting"]:
                self._display.note(device["text"])
        if not any(each["drifting"] for each in self.story.drift["devices"]):
            raise LoopError("no device was found to drift; nothing asked for a better model")

    async def _learn(self) -> None:
        self._begin("learn")
        plan = self._plan
        started = await self._call(
            "StartRounds",
            pb.StartRoundsRequest(
                bundle_sha256=self.story.champion,
                rounds=plan.rounds,
                epochs=plan.epochs,
                batch_size=plan.batch_size,
                learning_rate=plan.learning_rate,
                proximal_mu=plan.proximal_mu,
                server_momentum=plan.server_momentum,
                devices_min=max(2, len(self._wearers) // 2),
                deadline_s=30,
                seed=self._seed,
            ),
        )

        async def look() -> dict[str, Any] | None:
            run = await self._json("GetRounds", pb.GetRoundsRequest(run_id=started.run_id))
            last = run["history"][-1] if run["history"] else {}
            loss = f", loss {last['loss_last']:.3f}" if "loss_last" in last else ""
            self._display.detail(f"round {run['round']} of {plan.rounds}{loss} · {run['state']}")
            if run["state"] == "failed":
                raise LoopError(f"the federated rounds failed: {run.get('reason')}")
            return run if run["state"] == "done" else None

        self.story.rounds = await self._until(look, "the federated rounds", wait_s=400)
        self.story.candidate = self.story.rounds["candidate_sha256"]

    async def _gate(self) -> None:
        """Compare both models on what devices hold out: validation decides, test only reports."""
        self._begin("gate")
        pair = [self.story.champion, self.story.candidate]
        self.story.gate = await self._evaluate(pair, "validation")
        before, after = (_accuracy(self.story.gate, sha256) for sha256 in pair)
        self._display.detail(f"held-out accuracy {before:.1%} → {after:.1%}")
        if 100 * (after - before) <= self._plan.gate_points_min:
            raise LoopError(
                f"the candidate does not beat the champion on held-out windows: "
                f"{before:.3f} -> {after:.3f}"
            )
        evidence = {"split": "validation", "champion": before, "candidate": after}
        await self._call(
            "ApproveModel",
            pb.ApproveModelRequest(
                sha256=self.story.candidate, evidence_json=json.dumps(evidence).encode()
            ),
        )
        self.story.test = await self._evaluate(pair, "test")

    async def _rollout(self) -> None:
        self._begin("rollout")
        flagged = [each["device"] for each in self.story.drift["devices"] if each["drifting"]]
        steady = [each.device for each in self._wearers if each.device not in flagged]
        # One canary that drifts and one that does not: both must be no worse for it.
        canaries = [*flagged[:1], *steady, *flagged[1:]][:CANARIES]
        self.story.rollout = await self._roll_out(
            self.story.candidate,
            waves=[min(CANARIES, len(self._wearers)), 0],
            canaries=canaries,
            bake_windows=self._plan.bake_windows,
            wait_s=300,
        )

    async def settle(self) -> None:
        """Keep watching the better model until the run has its length."""
        self._begin("settle")
        while (left_s := self._plan.seconds - (self._monotonic() - self._start_s)) > 0:
            self._display.detail(f"watching the better model for {left_s:.0f} s more")
            await asyncio.sleep(min(1.0, left_s))
        self._display.detail("draining what devices still hold")

    async def summary(self) -> dict[str, Any]:
        """Return the server's own summary of the fleet."""
        return await self._json("GetSummary", pb.GetSummaryRequest())

    # --- asking ----------------------------------------------------------------------------

    async def _roll_out(
        self,
        sha256: str,
        *,
        waves: Sequence[int],
        bake_windows: int,
        wait_s: float,
        canaries: Sequence[str] = (),
    ) -> dict[str, Any]:
        created = await self._call(
            "CreateRollout",
            pb.CreateRolloutRequest(
                sha256=sha256,
                device_ids=[each.device for each in self._wearers],
                waves=waves,
                canary_ids=canaries,
                bake_windows=bake_windows,
                deadline_s=120,
            ),
        )

        async def look() -> dict[str, Any] | None:
            found = await self._json(
                "GetRollout", pb.GetRolloutRequest(rollout_id=created.rollout_id)
            )
            counts = found["counts"]
            shown = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
            self._display.detail(f"wave {found['wave'] + 1} of {len(found['waves'])}: {shown}")
            if found["state"] in ("failed", "aborted", "superseded"):
                raise LoopError(f"the rollout {found['state']}: {found.get('reason')}")
            return found if found["state"] == "completed" else None

        return await self._until(look, "the rollout", wait_s=wait_s)

    async def _evaluate(self, bundles: Sequence[str], split: str) -> dict[str, Any]:
        started = await self._call(
            "StartEvaluation",
            pb.StartEvaluationRequest(
                bundle_sha256=bundles,
                split=split,
                device_ids=[each.device for each in self._wearers],
                deadline_s=60,
            ),
        )

        async def look() -> dict[str, Any] | None:
            found = await self._json(
                "GetEvaluation", pb.GetEvaluationRequest(evaluation_id=started.evaluation_id)
            )
            self._display.detail(
                f"{split} windows: {len(found['devices'])} of {len(self._wearers)} devices"
            )
            if found["state"] == "failed":
                raise LoopError(f"the federated evaluation failed: {found}")
            return found if found["state"] == "done" else None

        return await self._until(look, f"the {split} evaluation", wait_s=90)

    async def _drift(self, sha256: str) -> dict[str, Any]:
        return await self._json("ShowDrift", pb.ShowDriftRequest(model_sha256=sha256))

    async def _upload(self, path: Path) -> str:
        async def chunks() -> AsyncIterator[pb.UploadArtefactRequest]:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield pb.UploadArtefactRequest(chunk=chunk)

        async with self._channel() as channel:
            reply = await OperatorServiceStub(channel).UploadArtefact(chunks(), timeout=60)
        return str(reply.sha256)

    async def _json(self, method: str, request: Any) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((await self._call(method, request)).json)
        return found

    async def _call(self, method: str, request: Any) -> Any:
        """Call the operator API; a server that is being started again is waited for."""
        deadline_s = self._monotonic() + 60
        while True:
            try:
                async with self._channel() as channel:
                    return await getattr(OperatorServiceStub(channel), method)(request, timeout=20)
            except grpc.aio.AioRpcError as exc:
                if exc.code() != grpc.StatusCode.UNAVAILABLE or self._monotonic() > deadline_s:
                    raise LoopError(f"{method} failed: {exc.code().name}: {exc.details()}") from exc
                await asyncio.sleep(0.2)

    def _channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(
            f"unix:{self._socket}", options=[("grpc.max_receive_message_length", 64 << 20)]
        )

    async def _until(self, look: Callable[[], Any], what: str, *, wait_s: float) -> dict[str, Any]:
        deadline_s = self._monotonic() + wait_s
        while self._monotonic() < deadline_s:
            found: dict[str, Any] | None = await look()
            if found is not None:
                return found
            await asyncio.sleep(0.25)
        raise LoopError(f"gave up waiting {wait_s:.0f} s for {what}")

    def _begin(self, step: str) -> None:
        self._display.begin(step)
        self.story.marks_s[step] = round(self._monotonic() - self._start_s, 2)


def _training_text(run: dict[str, Any]) -> str:
    progress = run["progress"]
    parts = [run["state"]]
    if "epoch" in progress:
        parts.append(f"epoch {progress['epoch']} of {progress.get('epochs', '?')}")
    if "loss" in progress:
        parts.append(f"loss {progress['loss']:.3f}")
    return " · ".join(parts)


def _accuracy(evaluation: dict[str, Any], sha256: str) -> float:
    """Return the share of correct windows over all devices that answered."""
    scores = [each for each in evaluation["scores"] if each["bundle_sha256"] == sha256]
    windows = sum(each["windows"] for each in scores)
    return sum(each["correct"] for each in scores) / windows if windows else 0.0
