"""Watch one model on this device: windows of sketches out, labels joined when they come late.

    infer(inputs, slice=tag)           --window over-->     WINDOW record, one per slice
    label(prediction, truth, split)    --window labelled--> LABELS records, one per split
    a prediction worth it, if allowed  -------------------> CAPTURE record

A window is a number of predictions or an interval of time, whichever ends first, and carries
sketches of every input channel and of the confidence, class counts, quality counters, errors and
a latency histogram: about a kilobyte whatever the rate. What does not fit a record is left out by
the rule of ``window_fit``. Raw inputs leave the device only as ``capture`` allows, by default
never. LABELS records are increments: a window's labels may come in several of them.

Rule 1: a prediction is counted in exactly one window, whatever the clock does and however many
threads call the model; what is not sent is counted.
Rule 2: (boot, model, slice, index) names one window for ever, also when a model comes back.

Not here: which label belongs to which prediction (the application knows), and the spool.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .. import ShoalError
from ..ext.projection import RandomFeatures
from ..ext.sketch import SketchBank
from ..ext.tap import Journal, WindowTap
from ..proto.records import SLICE_CHARS_MAX, Kind
from .alignment import Alignment
from .capture import CaptureConfig, CapturePolicy
from .late_labels import LateLabels
from .profile import DeviceProfile
from .window_fit import Step, WindowFit

log = logging.getLogger(__name__)

Emit = Callable[[Kind, dict[str, Any]], None]

OTHER: Final = "other"  # slice of the tags beyond ``slice_max``
_CONFUSED_MAX: Final = 64  # classes whose confusion a record holds; more are told as right or wrong
_SKETCHES_PART: Final = 0.75  # of ``cpu_share_max``; the rest is for ends of windows


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """How telemetry is cut into windows, what it may cost, and what may leave the device."""

    window_predictions: int = 100
    """A window ends after this many predictions of its slice, or later if ``cpu_share_max`` would
    be exceeded; 0: by time alone."""
    window_s: float = 60.0
    """… or when the device's clock passes a multiple of this many seconds, if that is sooner;
    0.001 to 86400, 0: by count alone."""
    window_min: int = 1
    """A window of fewer predictions is not sent but goes on; at the end of a model it is withheld
    and counted. For privacy."""
    bins_only: bool = False
    """Send counts alone, no value that was seen nor a mean of values: no sketches, moments,
    random features or captures. For privacy."""
    pending_max: int = 20_000
    """Predictions that may wait for a label; the oldest gives up beyond it, and is counted."""
    slice_max: int = 8
    """Distinct slice tags that have windows of their own; later ones share the slice "other"."""
    stuck_min: int = 200
    """A run of so many equal values of a channel counts as a stuck sensor, in values."""
    rate_hz: float = 0.0
    """Predictions expected per second, which windows tell beside those seen; 0: not known."""
    cpu_share_max: float = 0.05
    """Bound of what watching costs, as a share of the inference time; a model faster than 100 us
    counts as one of 100 us, or may cost 0.5 % of the time that passes. Three quarters are for
    sketches: beyond them only every k-th prediction is sketched and the rest told as ``shed``. A
    quarter is for ends of windows by count, of the time that passes: sooner none ends. Counts and
    latencies, some 0.2 us, come on top. 1: no bound."""
    capture: CaptureConfig = field(default_factory=CaptureConfig)

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 0 <= self.window_predictions <= 1_000_000:
            raise ValueError("window_predictions must be 0 to 1000000")
        if self.window_s != 0 and not 0.001 <= self.window_s <= 86_400:
            raise ValueError("window_s must be 0.001 to 86400 s, or 0")
        if not self.window_predictions and not self.window_s:
            raise ValueError("a window must end by window_predictions or by window_s")
        if not 1 <= self.window_min <= (self.window_predictions or 1_000_000):
            raise ValueError("window_min must be 1 to window_predictions")
        if not 1 <= self.pending_max <= 10_000_000:
            raise ValueError("pending_max must be 1 to 10000000")
        if not 0 <= self.slice_max <= 256:
            raise ValueError("slice_max must be 0 to 256")
        if not 2 <= self.stuck_min <= 1 << 29:
            raise ValueError("stuck_min must be 2 to 2**29 values")
        if not 0 <= self.rate_hz <= 1e6:
            raise ValueError("rate_hz must be 0 to 1000000")
        if not 0.001 <= self.cpu_share_max <= 1:
            raise ValueError("cpu_share_max must be 0.001 to 1")
        if self.bins_only and self.capture.on:
            raise ValueError("bins_only lets no value leave the device, and capture is on")


class WindowNumbers:
    """Indices of the windows of one boot: a model that comes back goes on with its own.

    Any thread may call it.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def take(self, model: str, tag: str) -> int:
        """Return the next index of a model's slice, from 0."""
        with self._lock:
            index = self._next.get((model, tag), 0)
            self._next[model, tag] = index + 1
            return index


@dataclass(slots=True, eq=False)
class _Window:
    """A window in progress, or one whose labels are awaited."""

    tag: str
    start_ms: int
    start_s: float
    aligned_ms: int
    index: int = -1
    """Taken when the first record needs it."""
    errors: int = 0
    carried: int = 0


@dataclass(slots=True, eq=False)
class _Slice:
    tag: str
    bank: SketchBank
    tap: WindowTap
    serial: int = 0
    """Number of its window in progress, among all of the monitor's."""


class WindowMonitor:
    """Monitor of one loaded model. Any thread may call any method.

    A caller that labels must know the ids of its predictions: ``predictions`` - 1 after a call is
    the newest one's, so it calls the model from one thread.

    Attributes:
        tap: What counts inside the runtime's step; ``Runtime.load(monitor=...)`` takes it.
        errors: Calls that failed.
        labels_missed: Labels of a prediction that had given up, was unknown or withheld, or of a
            class that the model does not know; or they could not be told.
        slices_over: Calls whose tag came after ``slice_max`` others.
        withheld: Predictions of windows that were never sent: too few, or the window could not be
            told, and the log says why.
        bins_alone: Windows told without the sketches, which did not fit a record.
        curtailed: Windows told without scores or projection, likewise.
        sketch_hindrance: What windows do without for want of room in a record, at worst so far,
            and why; "" = nothing hinders.
        capture_hindrance: Why nothing is captured though a rule is on; "" = nothing hinders.
    """

    def __init__(
        self,
        *,
        model_sha256: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        input_name: str,
        output_name: str,
        samples: int,
        classes: int,
        profile: DeviceProfile,
        config: MonitorConfig,
        emit: Emit,
        clock: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
        values: int = 1,
        numbers: WindowNumbers | None = None,
        captures: CapturePolicy | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Start the first window.

        Args:
            model_sha256: The bundle that the windows belong to.
            inputs: Names of the model's inputs, in its order.
            outputs: … and of its outputs.
            input_name: Input tensor, float32 (1, C, T).
            output_name: Output tensor, float32: (1, classes) probabilities, or ``values`` numbers.
            samples: T.
            classes: Number of classes; 0: the model is no classifier.
            profile: Of the C channels and, last, of the confidence, or of the output's values.
            config: Sizes and bounds.
            emit: Takes finished records.
            clock: Unix ms; may jump.
            monotonic: Seconds that only grow.
            values: Numbers in the output if there are no classes; a classifier ignores it.
            numbers: Of this boot, shared by all monitors whose records go to one spool.
            captures: Budget of captures, shared likewise; None: one of its own.
            chance: Uniform numbers, 0 <= chance < 1.
        """
        self._model, self._input, self._output = model_sha256, input_name, output_name
        self._samples, self._classes = samples, classes
        self._values = 1 if classes else values
        self._channels = len(profile.edges) - self._values
        self._positions = list(inputs).index(input_name), list(outputs).index(output_name)
        self._profile, self._config, self._emit = profile, config, emit
        self._clock, self._monotonic, self._chance = clock, monotonic, chance
        self._numbers = numbers or WindowNumbers()
        self._projector = _projector(profile)
        self._lock = threading.RLock()
        share = config.cpu_share_max
        self._journal = Journal(
            config.pending_max, cpu_share_max=1 if share >= 1 else share * _SKETCHES_PART
        )
        self._labels = LateLabels(classes, pending_max=config.pending_max)
        self._windows: dict[int, _Window] = {}
        self._serial = 0
        self._slices: dict[str, _Slice] = {}
        self.errors = self.labels_missed = self.slices_over = self.withheld = 0
        self.bins_alone = self.curtailed = 0
        self.sketch_hindrance, self._worst = "", Step.WHOLE
        now_ms, mono_s = self._now_ms(), monotonic()
        self._alignment = Alignment(config.window_s, now_ms=now_ms, mono_s=mono_s)
        self._rated_s, self._rated = mono_s, 0
        self._end_ns = 0.0  # CPU time of a window's end, moving mean
        self._captures = captures or CapturePolicy(config.capture, now_s=mono_s)
        self.capture_hindrance = self._watch()
        whole = self._slice("")
        self._fit = WindowFit(
            whole.bank.to_bytes,
            features=len(profile.edges),
            edges=max(len(each) for each in profile.edges),
            bins_only=config.bins_only,
        )
        self._hinder(self._fit.best)
        self.tap = whole.tap

    @property
    def predictions(self) -> int:
        """Predictions seen; the id of the newest is one less."""
        return self._journal.predictions

    @property
    def sketch_stride(self) -> int:
        """Of how many predictions one is sketched now: above 1 the CPU budget sheds."""
        return self._journal.stride

    # ---- what the model's owner says -----------------------------------------------------------

    def observe(
        self,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        latency_ns: int,
        slice: str = "",
    ) -> None:
        """Count one prediction from arrays, in the window of this moment."""
        self.tick()
        tap = self._tap_of(slice)
        x, said = inputs[self._input], outputs[self._output]
        if x.dtype == said.dtype == np.float32 and (x.size, said.size) == (
            self._channels * self._samples,
            self._classes or self._values,
        ):
            tap.put(
                np.ascontiguousarray(x).reshape(-1),
                np.ascontiguousarray(said).reshape(-1),
                latency_ns,
            )
        else:
            tap.misfit()

    def failed(self, slice: str = "") -> None:
        """Count a call that the engine refused."""
        self.tick()
        with self._lock:
            self._tap_of(slice)
            self.errors += 1
            found = self._slices.get(slice) or self._slices[OTHER]
            self._windows[found.serial].errors += 1

    def misfit(self, slice: str = "") -> None:
        """Count a call whose tensors do not fit, which the runtime refused."""
        self.tick()
        self._tap_of(slice).misfit()

    def label(self, prediction: int, truth: int, split: int) -> None:
        """Join a label that arrived.

        Args:
            prediction: Id of the prediction: its number since the model was loaded, from 0.
            truth: Class index; one that the model does not know counts as missed.
            split: 0 train, 1 validation, 2 test.
        """
        with self._lock:
            found = self._journal.claim(prediction)
            if found is None:
                self.labels_missed += 1
                return
            predicted, decile, serial = found
            if not self._labels.join(
                serial, predicted=predicted, decile=decile, truth=truth, split=split
            ):
                self.labels_missed += 1
            if self._labels.complete(serial):
                self._settle(serial)

    def tick(self) -> None:
        """End windows whose time is over; the runtime's step calls this about once a second."""
        with self._lock:
            now_ms, mono_s = self._now_ms(), self._monotonic()
            if self._alignment.over(now_ms=now_ms, mono_s=mono_s):
                self._alignment.begin(now_ms=now_ms, mono_s=mono_s)
                for each in list(self._slices.values()):
                    self._end(each)
            look_ns = int(self._alignment.look_s(now_ms=now_ms, mono_s=mono_s) * 1e9)
            for each in self._slices.values():
                each.tap.deadline_ns = look_ns

    def finish(self) -> None:
        """End the windows in progress, as when another model takes over; labels may still come."""
        with self._lock:
            for each in list(self._slices.values()):
                self._end(each, final=True)

    def flush_labels(self) -> None:
        """Tell the labels that came so far; the rest, if it comes, follows as an increment."""
        with self._lock:
            in_progress = {each.serial: each.tap for each in self._slices.values()}
            for serial in self._labels.waiting():
                tap = in_progress.get(serial)
                if tap is None or tap.seen >= self._config.window_min:
                    self._tell(serial)

    # ---- slices and windows --------------------------------------------------------------------

    def _tap_of(self, tag: str) -> WindowTap:
        found = self._slices.get(tag)
        return found.tap if found is not None else self._slice(tag).tap

    def _slice(self, tag: str) -> _Slice:
        """Return the slice of a tag that comes for the first time, or comes too late."""
        if not isinstance(tag, str) or len(tag) > SLICE_CHARS_MAX:
            raise ValueError(f"a slice tag is text of up to {SLICE_CHARS_MAX} characters")
        with self._lock:
            own = len(self._slices.keys() - {"", OTHER})
            if tag not in ("", OTHER) and own >= self._config.slice_max:
                self.slices_over += 1
                tag = OTHER
            if tag not in self._slices:
                self._slices[tag] = self._made(tag)
            return self._slices[tag]

    def _made(self, tag: str) -> _Slice:
        profile, config = self._profile, self._config
        bank = SketchBank(len(profile.edges), edges=profile.edges, kinds=profile.kinds)
        position_in, position_out = self._positions
        tap = WindowTap(
            bank,
            self._journal,
            input=position_in,
            output=position_out,
            samples=self._samples,
            classes=self._classes,
            values=self._values,
            low__c=profile.low__d[: self._channels],
            high__c=profile.high__d[: self._channels],
            deciles__9=profile.deciles__9,
            stuck_min=config.stuck_min,
            limit=config.window_predictions,
            projector=self._projector,
            row_stride=profile.projection.stride if profile.projection else 1,
            ready=partial(self._ready, tag),
            tick=self.tick,
            sliced=self._tap_of,
        )
        tap.deadline_ns = int(self._monotonic() * 1e9)
        made = _Slice(tag, bank, tap)
        self._begin(made)
        return made

    def _ready(self, tag: str) -> None:
        """A window is full, or a capture waits."""
        with self._lock:
            self._collect(tag)
            found = self._slices[tag]
            tap = found.tap
            if not tap.limit or tap.seen < tap.limit:
                return
            if self._affords_end(found):
                self._end(found)
            else:
                tap.limit = tap.seen + max(1, tap.seen // 8)

    def _affords_end(self, each: _Slice) -> bool:
        """Return whether the window has lasted long enough for what its end costs."""
        share = self._config.cpu_share_max
        lasted_s = self._monotonic() - self._windows[each.serial].start_s
        return share >= 1 or self._end_ns <= share * (1 - _SKETCHES_PART) * lasted_s * 1e9

    def _begin(self, each: _Slice) -> None:
        """Begin a window of a slice; the caller keeps predictions away, or there are none yet."""
        each.serial = self._serial
        self._serial = (self._serial + 1) % (1 << 32)
        self._windows[each.serial] = _Window(
            each.tag, self._now_ms(), self._monotonic(), self._alignment.aligned_ms
        )
        self._labels.open(each.serial)
        each.tap.limit = self._config.window_predictions
        each.tap.begin(each.serial)

    def _end(self, each: _Slice, *, final: bool = False) -> None:
        """End a slice's window and tell it, unless there is nothing or too little to tell."""
        serial, tap, window = each.serial, each.tap, self._windows[each.serial]
        with self._journal:
            seen, made = tap.seen, self._journal.predictions
            rate = self._rate(made) if each.tag == "" or seen else None
            told = seen or window.errors or tap.misfits or (rate is not None and rate[0] > 0)
            if told and 0 < seen < self._config.window_min and not final:
                window.carried += 1
                return
            withheld = 0 < seen < self._config.window_min
            if not told or withheld:
                self._lose(serial, seen)
                self._begin(each)
                return
            start_ns = time.thread_time_ns()
            try:
                body = self._body(each, window, rate)
            except ShoalError as exc:
                log.warning("a window of %d predictions is not sent: %s", seen, exc)
                body = None
            self._end_ns += (time.thread_time_ns() - start_ns - self._end_ns) / 4
            self._begin(each)
        if body is None or not self._send(Kind.WINDOW, body):
            self._lose(serial, seen)
            return
        if rate is not None:
            self._rated_s += rate[0] / self._config.rate_hz
            self._rated = made
        self._labels.close(serial, predictions=seen, made=made)
        for settled in self._labels.given_up(made):
            self._settle(settled)
        if self._labels.complete(serial):
            self._settle(serial)

    def _send(self, kind: Kind, body: dict[str, Any]) -> bool:
        """Hand a record on and return whether it was taken; whoever called the model hears not."""
        try:
            self._emit(kind, body)
        except ShoalError as exc:
            log.warning("a %s record is not sent: %s", kind, exc)
            return False
        return True

    def _lose(self, serial: int, seen: int) -> None:
        """Count what a window that is not told would have told."""
        self.withheld += seen
        self.labels_missed += sum(
            int(tally.table__kk.sum()) for _, tally in self._labels.take(serial)
        )
        self._labels.drop(serial)
        del self._windows[serial]

    def _hinder(self, step: Step) -> None:
        """Say once for each step, not for each window, what windows do without."""
        if step <= self._worst:
            return
        self._worst, self.sketch_hindrance = step, self._fit.hindrance(step)
        log.warning(
            "model %.12s: %s; make its profile with fewer bins, or let windows end sooner",
            self._model,
            self.sketch_hindrance,
        )

    def _body(
        self, each: _Slice, window: _Window, rate: tuple[int, int] | None
    ) -> dict[str, Any] | None:
        """Return the record's body as far as it fits; None if nothing of it does."""
        found = each.tap.read()
        quality = {
            name: [*found[name], *([0] * self._values)] for name in ("below", "above", "stuck")
        }
        length_ms = int((self._monotonic() - window.start_s) * 1000)
        body: dict[str, Any] = {
            "model": self._model,
            "index": self._number(window),
            "start_ms": window.start_ms,
            "end_ms": window.start_ms + max(0, length_ms),
            "predictions": found["predictions"],
            "errors": window.errors,
            "classes": found["classes"],
            "latency_us": found["latency_us"],
            "aligned_ms": window.aligned_ms,
            "quality": {**quality, "schema": [found["schema"]]},
        }
        if rate is not None:
            body["quality"]["rate"] = list(rate)
        optional = {
            "slice": window.tag,
            "scores": found["scores"],
            "shed": found["shed"],
            "carried": window.carried,
        }
        if found["projected"] and not self._config.bins_only:
            optional["projection"] = np.array(found["projection"], "<f4").tobytes()
            optional["projected"] = found["projected"]
        body |= {name: value for name, value in optional.items() if value}
        step, fitted = self._fit.fit(body, each.bank.to_bytes)
        self._hinder(step)
        if fitted is not None:
            self.bins_alone += step >= Step.BINS_ALONE and not self._config.bins_only
            self.curtailed += step > Step.BINS_ALONE
        return fitted

    def _rate(self, made: int) -> tuple[int, int] | None:
        """Return predictions (expected, seen), over all slices, since a window last told them."""
        if not self._config.rate_hz:
            return None
        elapsed_s = max(0.0, self._monotonic() - self._rated_s)
        return int(elapsed_s * self._config.rate_hz), made - self._rated

    def _number(self, window: _Window) -> int:
        if window.index < 0:
            window.index = self._numbers.take(self._model, window.tag)
        return window.index

    def _now_ms(self) -> int:
        return max(0, self._clock())  # a clock before 1970 has no records

    # ---- labels --------------------------------------------------------------------------------

    def _settle(self, serial: int) -> None:
        """Tell a window's labels: no more can come."""
        self._tell(serial)
        self._labels.drop(serial)
        del self._windows[serial]

    def _tell(self, serial: int) -> None:
        window = self._windows[serial]
        for split, tally in self._labels.take(serial):
            labelled = int(tally.table__kk.sum())
            body = {
                "model": self._model,
                "index": self._number(window),
                "split": split,
                "labelled": labelled,
                "correct": int(tally.table__kk.trace()),
                "confusion": [int(count) for count in tally.table__kk.reshape(-1)]
                if self._classes <= _CONFUSED_MAX
                else [],
                "calibration": [int(count) for count in tally.calibration__2d.reshape(-1)],
            }
            if not self._send(Kind.LABELS, body | ({"slice": window.tag} if window.tag else {})):
                self.labels_missed += labelled

    # ---- captures ------------------------------------------------------------------------------

    def _watch(self) -> str:
        """Let the tap look for inputs to capture; return why not, if a rule is on."""
        rules = self._config.capture
        if not rules.on:
            return ""
        values = self._channels * self._samples
        if not self._captures.fits(values * 4):
            return f"an input of {values * 4} bytes never fits into the captures' budget"
        self._journal.watch(
            values=values,
            random_in=self._captures.random_in(self._chance()),
            margin_below=rules.margin_below,
            outside_above=rules.outside_above,
        )
        return ""

    def _collect(self, tag: str) -> None:
        if not self._config.capture.on:
            return
        found = self._journal.captured(self._captures.random_in(self._chance()))
        if found is None:
            return
        prediction, reason, serial, data = found
        if not self._captures.spend(len(data), now_s=self._monotonic()):
            return
        window = self._windows.get(serial)
        body = {
            "model": self._model,
            "slice": window.tag if window else tag,
            "prediction": prediction,
            "reason": reason,
            "shape": [1, self._channels, self._samples],
            "data": data,
        }
        if not self._send(Kind.CAPTURE, body):
            self._captures.refuse()


def _projector(profile: DeviceProfile) -> RandomFeatures | None:
    found = profile.projection
    if found is None:
        return None
    return RandomFeatures(found.weights__fc, found.phases__f, found.mean__c, found.scale__c)
