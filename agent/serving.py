"""Feed the source through the active model, and change models between two windows.

    source --window--> active model --prediction--> monitor --records--> spool
                          ^                             ^
            candidate in trial                late labels, after a delay

A window is answered by exactly one model. A candidate takes over between two windows; the model
before it stays loaded until the trial is over, and answers the very window on which a candidate
fails: nothing is dropped.

Not here: which bundle to run (updates/), what happens to records (spool), training (trainer).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..proto.bundle import Bundle
from .capture import CapturePolicy
from .errors import ModelError, ModelFormatError, ModelInputError
from .health import Health
from .monitor import Emit, MonitorConfig, WindowMonitor, WindowNumbers
from .profile import DeviceProfile
from .runtime import Model, Runtime
from .source import Recording, Sample, replay


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """What is replayed, and how fast."""

    path: Path | None = None
    """Recording to replay; without one the agent serves no windows of its own."""
    slices: str = ""
    """Name of the recording's array whose values tag each window with its slice: few distinct
    ones, each up to 40 characters; "" = no slices."""
    rate_hz: float = 1.0
    """Windows per second."""
    label_delay_s: float = 5.0
    """How long after its window a label arrives."""
    backlog_max: int = 100
    """Windows that may be late before the source skips ahead; skipped windows are counted."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 0 < self.rate_hz <= 10_000:
            raise ValueError("rate_hz must be above 0, at most 10000")
        if not 0 <= self.label_delay_s <= 86_400 or not 1 <= self.backlog_max <= 1_000_000:
            raise ValueError("label_delay_s must be 0 to 86400, backlog_max 1 to 1000000")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """What a new model must do on live windows before it is confirmed."""

    predictions: int = 100
    """Windows it must answer without an error."""
    latency_factor_max: float = 5.0
    """Its median latency may be this many times that of the model before it …"""
    latency_us_min: float = 1000.0
    """… unless it is below this many microseconds, where noise decides."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.predictions < 1 or self.latency_factor_max < 1 or self.latency_us_min < 0:
            raise ValueError("predictions and latency_factor_max must be at least 1")


@dataclass(slots=True, eq=False)
class ActiveModel:
    """A loaded bundle with its monitor."""

    bundle: Bundle
    model: Model
    monitor: WindowMonitor


@dataclass(slots=True, eq=False)
class _Trial:
    """A candidate that has taken over, and the model it would replace."""

    previous: ActiveModel | None
    done: asyncio.Future[None]


@dataclass(slots=True, eq=False)
class Counters:
    """Counts since the agent started; ``offered`` = ``answered`` unless a window had no model."""

    offered: int = 0
    answered: int = 0
    skipped: int = 0
    """Windows that the source gave up because the device was too slow for its rate."""
    labels: int = 0
    models: int = 0
    latency_us: deque[float] = field(default_factory=lambda: deque(maxlen=1000))


class Serving:
    """Made cheap, run in a task group, ended by cancellation."""

    def __init__(
        self,
        recording: Recording,
        *,
        source: SourceConfig,
        trial: TrialConfig,
        monitor: MonitorConfig,
        labelled: Labelled,
        emit: Emit,
        health: Health,
        clock: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._recording, self._source, self._trial_config = recording, source, trial
        self._monitor_config, self._emit, self._clock = monitor, emit, clock
        self._monotonic = monotonic
        self._numbers = WindowNumbers()
        self._captures = CapturePolicy(monitor.capture, now_s=monotonic())
        self._labelled, self._health = labelled, health
        self._runtime = Runtime()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._active: ActiveModel | None = None
        self._trial: _Trial | None = None
        self._leaving: list[ActiveModel] = []
        self._watching: set[WindowMonitor] = set()
        self._past = Counter(predictions_withheld=0, windows_bins_alone=0)  # of models that left
        self._some_model = asyncio.Event()
        self._late: deque[tuple[float, WindowMonitor, int, Sample]] = deque()
        self.counters = Counters()

    @property
    def active_sha256(self) -> str:
        """The bundle that answers windows now; "" = none."""
        return self._active.bundle.sha256 if self._active else ""

    async def load(self, bundle: Bundle) -> ActiveModel:
        """Load a bundle beside the active model, off the event loop.

        Raises:
            ModelFormatError: The bundle holds no model for this source.
        """
        manifest = bundle.manifest
        shape = (len(manifest.channels), manifest.samples)
        if self._recording.x__nct.shape[1:] != shape:
            raise ModelFormatError(
                f"model {manifest.name} takes windows of {shape}, the source has "
                f"{self._recording.x__nct.shape[1:]} (channels, samples)",
                hint="assign a model that was made for this sensor",
            )
        profile = DeviceProfile.from_json(
            bundle.parts["profile.json"], features=len(manifest.channels) + 1
        )
        monitor = WindowMonitor(
            model_sha256=bundle.sha256,
            inputs=[manifest.input],
            outputs=[manifest.output],
            input_name=manifest.input,
            output_name=manifest.output,
            samples=manifest.samples,
            classes=len(manifest.classes),
            profile=profile,
            config=self._monitor_config,
            emit=self._emit,
            clock=self._clock,
            numbers=self._numbers,
            captures=self._captures,
        )
        if monitor.capture_hindrance:
            self._health.warn(
                "monitor.capture", f"nothing is captured: {monitor.capture_hindrance}"
            )
        else:
            self._health.clear("monitor.capture")
        self._tell_hindrance(monitor)
        model = await asyncio.get_running_loop().run_in_executor(
            None,
            lambda: self._runtime.load(bundle.model, name=manifest.name, monitor=monitor),
        )
        if model.backend.endswith("-python"):
            self._health.warn(
                "runtime.slow",
                f"model {manifest.name} runs through {model.backend}: the library's C interface "
                "cannot be used, and calls are slower; see shoal-agent doctor",
            )
        else:
            self._health.clear("runtime.slow")
        names = [each.name for each in (*model.inputs, *model.outputs)]
        if names != [manifest.input, manifest.output]:
            raise ModelFormatError(
                f"model {manifest.name} has the tensors {names}, its manifest says "
                f"{[manifest.input, manifest.output]}"
            )
        return ActiveModel(bundle, model, monitor)

    def activate(self, candidate: ActiveModel) -> None:
        """Let a verified model answer from the next window on."""
        previous, self._active = self._active, candidate
        self._watching.add(candidate.monitor)
        self.counters.models += 1
        self._some_model.set()
        if previous is not None:
            self._leaving.append(previous)  # it may be answering a window just now

    async def trial(self, candidate: ActiveModel) -> None:
        """Let a candidate answer from the next window on, and return when its trial is passed.

        Raises:
            ModelError: It failed; the model before it answers again, and answered the window on
                which the candidate failed.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._trial = _Trial(self._active, done)
        self._active = candidate
        self._watching.add(candidate.monitor)
        self.counters.models += 1
        self._some_model.set()
        try:
            await done
        finally:
            self._trial = None

    async def run(self) -> None:
        """Serve windows at the source's rate until cancelled."""
        try:
            due_s = -1.0
            for sample in replay(self._recording):
                if self._active is None:
                    await self._some_model.wait()
                    due_s = self._monotonic()
                due_s = await self._pace(due_s)
                await self._serve(sample)
                self._let_leave()
                self._deliver_labels()
        finally:
            self._finish()

    def tick(self) -> None:
        """End the window whose time is over, though no prediction comes."""
        if self._active is not None:
            self._active.monitor.tick()
            self._tell_hindrance(self._active.monitor)

    def _tell_hindrance(self, monitor: WindowMonitor) -> None:
        if monitor.sketch_hindrance:
            self._health.warn("monitor.sketch", monitor.sketch_hindrance)
        else:
            self._health.clear("monitor.sketch")

    def monitored(self) -> dict[str, int | str]:
        """Return what the active model's monitor did not tell otherwise."""
        found: dict[str, int | str] = {"captures_refused": self._captures.refused}
        if (active := self._active) is not None:
            monitor = active.monitor
            found |= {
                "sketch_stride": monitor.sketch_stride,
                "labels_missed": monitor.labels_missed,
                "slices_over": monitor.slices_over,
                "withheld": monitor.withheld,
                "bins_alone": monitor.bins_alone,
                "curtailed": monitor.curtailed,
                "sketch_hindrance": monitor.sketch_hindrance,
            }
        return found

    def untold(self) -> dict[str, int]:
        """Return what windows of all models since the start did not tell."""
        found = self._past.copy()
        for monitor in self._watching:
            found.update(_untold(monitor))
        return dict(found)

    def flush(self) -> None:
        """End windows in progress and tell the labels that came, as before a stop."""
        for monitor in {id(m): m for _, m, _, _ in self._late}.values():
            monitor.flush_labels()
        if self._active is not None:
            self._active.monitor.finish()
            self._active.monitor.flush_labels()

    async def _pace(self, due_s: float) -> float:
        """Sleep until the window is due and return when the next one is."""
        interval_s = 1 / self._source.rate_hz
        late_s = self._monotonic() - due_s
        if late_s < 0:
            await asyncio.sleep(-late_s)
        elif late_s > self._source.backlog_max * interval_s:
            missed = int(late_s / interval_s)
            self.counters.skipped += missed
            due_s += missed * interval_s
        else:
            await asyncio.sleep(0)  # others get their turn while the backlog is worked off
        return due_s + interval_s

    async def _serve(self, sample: Sample) -> None:
        while (active := self._active) is not None:
            try:
                await asyncio.get_running_loop().run_in_executor(
                    self._pool, self._infer, active, sample
                )
            except ModelError as exc:
                if isinstance(exc, ModelInputError):
                    active.monitor.misfit(sample.slice or "")
                else:
                    active.monitor.failed(sample.slice or "")
                if self._trial is None:
                    self.counters.offered += 1
                    return
                self._fall_back(exc)
                continue
            due_s = self._monotonic() + self._source.label_delay_s
            self._late.append((due_s, active.monitor, active.monitor.predictions - 1, sample))
            self._judge(active)
            return

    def _infer(self, active: ActiveModel, sample: Sample) -> None:
        manifest = active.bundle.manifest
        inputs = {manifest.input: sample.x__1ct}
        active.monitor.tick()
        start_ns = time.perf_counter_ns()
        outputs = active.model.infer(inputs, slice=sample.slice)
        took_ns = time.perf_counter_ns() - start_ns
        if not np.isfinite(outputs[manifest.output]).all():
            raise ModelError(f"model {manifest.name} answered with a value that is not finite")
        # Counted here, where a stop of the agent cannot come between the two.
        self.counters.offered += 1
        self.counters.answered += 1
        self.counters.latency_us.append(took_ns / 1000)

    def _judge(self, active: ActiveModel) -> None:
        """End the trial when the candidate has answered enough windows."""
        trial = self._trial
        if trial is None or active.monitor.predictions < self._trial_config.predictions:
            return
        previous = trial.previous
        if previous is not None:
            median_us = active.model.stats().latency_p50_us
            before_us = previous.model.stats().latency_p50_us
            config = self._trial_config
            if median_us > max(config.latency_us_min, config.latency_factor_max * before_us):
                self._fall_back(
                    ModelError(f"median latency {median_us:.0f} us, {before_us:.0f} us before it")
                )
                return
            self._retire(previous)
        if not trial.done.done():
            trial.done.set_result(None)

    def _fall_back(self, exc: ModelError) -> None:
        trial = self._trial
        assert trial is not None
        candidate, self._active = self._active, trial.previous
        if candidate is not None:
            self._retire(candidate)
        if self._active is None:
            self._some_model.clear()
        if not trial.done.done():
            trial.done.set_exception(exc)

    def _retire(self, active: ActiveModel) -> None:
        """A model answers no more; its labels may still come."""
        active.monitor.finish()
        if active.monitor in self._watching:
            self._watching.remove(active.monitor)
            self._past.update(_untold(active.monitor))
        active.model.close()

    def _let_leave(self) -> None:
        """Retire the models that were replaced, between two windows."""
        while self._leaving:
            self._retire(self._leaving.pop())

    def _deliver_labels(self) -> None:
        now_s = self._monotonic()
        while self._late and self._late[0][0] <= now_s:
            _, monitor, prediction, sample = self._late.popleft()
            monitor.label(prediction, sample.label, sample.split)
            self._labelled.add(sample.row)
            self.counters.labels += 1

    def _finish(self) -> None:
        self._pool.shutdown(wait=True)
        self._let_leave()
        self.flush()
        self._runtime.close()


def _untold(monitor: WindowMonitor) -> dict[str, int]:
    return {
        "predictions_withheld": monitor.withheld,
        "windows_bins_alone": monitor.bins_alone,
    }


class Labelled:
    """The windows of the recording whose labels have arrived; survives a restart.

    The file is an append-only list of row numbers (u32, little-endian). It is written without
    fsync: a label that a power cut takes away comes again with the next pass.
    """

    def __init__(self, path: Path, recording: Recording) -> None:
        self._path, self._recording = path, recording
        self._known = np.zeros(len(recording), np.bool_)
        data = path.read_bytes() if path.exists() else b""
        rows = np.frombuffer(data[: len(data) // 4 * 4], "<u4")
        self._known[rows[rows < len(recording)]] = True

    def add(self, row: int) -> None:
        """Note that the label of a row has arrived."""
        if not self._known[row]:
            self._known[row] = True
            with self._path.open("ab") as file:
                file.write(int(row).to_bytes(4, "little"))

    def count(self, split: int) -> int:
        """Return how many windows of a split are labelled."""
        return int((self._known & (self._recording.split__n == split)).sum())

    def windows(self, split: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return (x__nct, y__n) of the labelled windows of a split, in the recording's order."""
        chosen = self._known & (self._recording.split__n == split)
        return self._recording.x__nct[chosen], self._recording.y__n[chosen]
