"""Count false alarms and delays of the e-CUSUM and of other tools' rules on the same streams.

    python bench/drift.py [--quick] [--json FILE] [--seed 0]

1. No drift: 20,000 streams (1,000 devices x 20 features), 500 rows a window in 16 bins.
2. A shift of 0.2 standard deviations in 5 % of the streams, after 10 windows without.
3. Streams as sensors make them, without drift: neighbouring rows alike (AR(1), 0.9), a daily
   cycle, windows that scatter; then a shift of 1 standard deviation in 5 % of them.

Ours raises an alarm where a stream's score passes its threshold, or e-BH over device x feature
calls it a discovery; each of both is allowed one false alarm in 2,000 windows of the whole fleet.
Nulls are fitted on 72 windows without drift. Every rule sees the same counts. How the other
tools' rules were restated is in ``bench/_streams.py``; an alarm about a data set counts for its
20 columns. Exits with 0 whatever comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _streams import (
    Array,
    Autoregressive,
    Counts,
    Daily,
    Independent,
    Mask,
    Scattered,
    Source,
    peers,
)

from shoal.server.drift import e_cusum_null, multiplicity
from shoal.server.drift.e_cusum import ECusum, ECusumConfig
from shoal.server.drift.e_cusum_null import StreamNulls

FEATURES, ROWS, BINS = 20, 500, 16
BASELINE, REFERENCE, REFERENCE_SMALL = 72, 10_000, 1_000
CALM, AFTER, SOON = 10, 20, 5
CONFIG = ECusumConfig(windows_per_false_alarm=2000)

OURS = "e-CUSUM + e-BH"
PLAIN = "e-CUSUM, multinomial null"

Judge = Callable[[Counts], dict[str, Mask]]


class Ours:
    """The e-CUSUM and e-BH as one judge of windows; forgets what it has raised an alarm for."""

    def __init__(self, nulls: StreamNulls, *, name: str = OURS, forget: bool = True) -> None:
        self._nulls, self._name, self._forget = nulls, name, forget
        self._state = ECusum.new(len(nulls), BINS, config=CONFIG)
        self.seconds, self.windows = 0.0, 0

    def __call__(self, counts: Counts) -> dict[str, Mask]:
        """Return which streams raise an alarm after this window."""
        begin = time.process_time()
        state = self._state
        state.fold(counts, self._nulls, now_ms=self.windows, config=CONFIG)
        found = state.alarms(config=CONFIG)
        share = 1 / CONFIG.windows_per_false_alarm
        found |= multiplicity.e_bh(state.e_values(), share)
        if self._forget and found.any():
            state.reset(found)
        self.seconds += time.process_time() - begin
        self.windows += 1
        return {self._name: found}


class Fleet:
    """Streams of one kind with their references and baselines."""

    def __init__(self, source: Source, devices: int, *, reference_windows: int) -> None:
        self.source, self.streams = source, devices * FEATURES
        self.still = np.zeros(self.streams)
        drawn = [source.draw(self.still) for _ in range(reference_windows)]
        self.reference = np.sum(drawn, 0)
        self.small = np.sum(drawn[: REFERENCE_SMALL // ROWS], 0)
        baseline = np.stack([source.draw(self.still) for _ in range(BASELINE)], 1)
        arrays = np.empty((self.streams, BINS)), *(np.empty(self.streams) for _ in range(3))
        for feature in range(FEATURES):  # of all devices in one fit: they moderate each other
            each = slice(feature, None, FEATURES)
            part = e_cusum_null.fit(self.reference[each], baseline[each])
            arrays[0][each], arrays[1][each] = part.centre__sb, part.radius__s
            arrays[2][each], arrays[3][each] = part.inflation__s, part.concentration__s
        self.nulls = StreamNulls(*arrays)

    def peers(self, counts: Counts) -> dict[str, Mask]:
        """Return which streams drift by each of the other rules."""
        return peers(counts, self.reference, self.small, features=FEATURES)

    def plain(self) -> Ours:
        """Return ours with what is not known of real streams: multinomial, without tolerance."""
        count, centre = self.streams, self.nulls.centre__sb
        nulls = StreamNulls(centre, np.zeros(count), np.ones(count), np.full(count, 1e6))
        return Ours(nulls, name=PLAIN)


def judged(counts: Counts, judges: list[Judge]) -> dict[str, Mask]:
    """Return the verdicts of all judges by the name of the rule."""
    return {name: mask for judge in judges for name, mask in judge(counts).items()}


def calm(fleet: Fleet, windows: int, judges: list[Judge]) -> list[dict[str, Any]]:
    """Return for each rule how often it raised alarms where nothing had changed."""
    alarms: dict[str, list[int]] = {}
    for _ in range(windows):
        for name, found in judged(fleet.source.draw(fleet.still), judges).items():
            alarms.setdefault(name, []).append(int(found.sum()))
    return [
        {
            "rule": name,
            "windows": windows,
            "streams": fleet.streams,
            "false_alarms": sum(each),
            "windows_with_false_alarm": sum(count > 0 for count in each),
        }
        for name, each in alarms.items()
    ]


def shifted(
    fleet: Fleet, size: float, repeats: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Return for each judge how soon it found a shift in 5 % of the streams."""
    delays: dict[str, list[Array]] = {}
    false: dict[str, int] = {}
    for _ in range(repeats):
        judges: list[Judge] = [Ours(fleet.nulls, forget=False), fleet.peers]
        moved = rng.permutation(fleet.streams) < fleet.streams // 20
        first: dict[str, Array] = {}
        for window in range(1 - CALM, AFTER + 1):
            counts = fleet.source.draw(np.where(moved & (window > 0), size, 0.0))
            for name, found in judged(counts, judges).items():
                false[name] = false.get(name, 0) + int((found & ~moved).sum())
                soonest = first.setdefault(name, np.full(fleet.streams, np.inf))
                if window > 0:
                    soonest[found & np.isinf(soonest)] = window
        for name, soonest in first.items():
            delays.setdefault(name, []).append(soonest[moved])
    rows = []
    for name, parts in delays.items():
        each = np.concatenate(parts)
        median = float(np.sort(each)[len(each) // 2])
        worst = max(float(part.min()) for part in parts)
        rows.append(
            {
                "rule": name,
                "shift_sigma": size,
                "delay_windows_median": median if np.isfinite(median) else None,
                "found_within_5": float((each <= SOON).mean()),
                "fleet_found_at_worst": worst if np.isfinite(worst) else None,
                "false_alarms_per_window": false[name] / (repeats * (CALM + AFTER)),
            }
        )
    return rows


def show_calm(rows: list[dict[str, Any]]) -> None:
    """Print how often nothing was taken for something."""
    print(f"  {'rule':<34}{'false alarms':>14}{'per window':>12}{'windows with one':>19}")
    for row in rows:
        each = row["false_alarms"] / row["windows"]
        share = f"{row['windows_with_false_alarm']} of {row['windows']}"
        print(f"  {row['rule']:<34}{row['false_alarms']:>14,}{each:>12.2f}{share:>19}")


def show_shifted(rows: list[dict[str, Any]]) -> None:
    """Print how soon something was found; a delay is the number of the window that shows it."""
    print(
        f"  {'rule':<34}{'median delay':>13}{'found in <= 5':>15}{'fleet, worst':>14}"
        f"{'false/window':>14}"
    )
    for row in rows:
        delay, worst = (
            f"> {AFTER}" if row[name] is None else f"{row[name]:.0f}"
            for name in ("delay_windows_median", "fleet_found_at_worst")
        )
        print(
            f"  {row['rule']:<34}{delay:>13}{row['found_within_5']:>14.1%}{worst:>15}"
            f"{row['false_alarms_per_window']:>14.2f}"
        )


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = named[0].split(":", 1)[1].strip() if named else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load_1min": os.getloadavg()[0],
    }


def main() -> None:
    """Print the tables; write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--quick", action="store_true", help="fewer windows, < 1 min")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    options = parser.parse_args()
    begin = time.perf_counter()
    windows, repeats = (60, 1) if options.quick else (1000, 3)
    devices, windows_real = (10, 60) if options.quick else (50, 300)
    rng = np.random.default_rng(options.seed)
    here = machine()
    print("  ".join(f"{name}: {value}" for name, value in here.items()))

    fleet = Fleet(Independent(rng, ROWS, BINS), 1000, reference_windows=REFERENCE // ROWS)
    ours = Ours(fleet.nulls)
    print(f"\nno drift: {fleet.streams:,} streams, {ROWS} rows a window, {windows} windows")
    report: dict[str, Any] = {"machine": here, "calm": calm(fleet, windows, [ours, fleet.peers])}
    show_calm(report["calm"])
    report["fold_ms_per_window"] = 1000 * ours.seconds / ours.windows
    print(f"  {OURS}: {report['fold_ms_per_window']:.0f} ms of CPU for a window of all streams")

    print(f"\nshift of 0.2 sigma in 5 % of {fleet.streams:,} streams, {repeats} times")
    report["shifted"] = shifted(fleet, 0.2, repeats, rng)
    show_shifted(report["shifted"])

    streams = devices * FEATURES
    kinds: dict[str, Source] = {
        "neighbouring rows alike (AR(1), 0.9)": Autoregressive(rng, streams, ROWS, BINS, 0.9),
        "a daily cycle of 0.3 sigma": Daily(rng, streams, ROWS, BINS, 0.3),
        "windows that scatter (Dirichlet, 100)": Scattered(rng, ROWS, BINS, 100.0),
    }
    report["real"] = {}
    for name, source in kinds.items():
        fleet = Fleet(source, devices, reference_windows=24)  # whole days: 12,000 rows
        print(f"\n{name}: {fleet.streams:,} streams, no drift, {windows_real} windows")
        rows = calm(fleet, windows_real, [Ours(fleet.nulls), fleet.plain(), fleet.peers])
        show_calm(rows)
        moved = shifted(fleet, 1.0, repeats, rng)
        found = f"{moved[0]['found_within_5']:.0%} within 5 windows"
        print(f"  then a shift of 1 sigma in 5 % of them, {OURS}: {found}")
        report["real"][name] = {"calm": rows, "shifted": moved}

    report["seconds"] = time.perf_counter() - begin
    print(f"\n{report['seconds']:.0f} s in all")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
