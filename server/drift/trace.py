"""Keep how unlike a device was in its last judgements, for the heat map. Pure.

A point is (Unix ms, evidence of each feature); evidence is -log10 of the p-value, 0 = as usual.
It is what a person looks at; nothing is decided by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .detectors import Finding

POINTS_MAX: Final = 24  # judgements that are shown; a day of hourly windows
FEATURES_MAX: Final = 64  # of a model; what comes after them is not drawn
EVIDENCE_MAX: Final = 9.9  # one chance in ten billion: nothing looks different beyond it


def extended(trace: Mapping[str, Any], found: Sequence[Finding], *, now_ms: int) -> dict[str, Any]:
    """Return the trace with one more judgement.

    Args:
        trace: ``{"features": [name], "points": [[unix_ms, [evidence or null]]]}``, or {}.
        found: All findings of the judgement, each feature once; none = it could not be judged.
        now_ms: Unix ms.
    """
    if not found:
        return dict(trace)
    evidence = {each.feature: _evidence(each) for each in found[:FEATURES_MAX]}
    known = [name for name in trace.get("features", []) if isinstance(name, str)]
    features = [*known, *(name for name in evidence if name not in known)][:FEATURES_MAX]
    points = [
        [at, [*row, *([None] * (len(features) - len(row)))]] for at, row in trace.get("points", [])
    ]
    points.append([now_ms, [evidence.get(name) for name in features]])
    return {"features": features, "points": points[-POINTS_MAX:]}


def _evidence(found: Finding) -> float:
    if found.effect <= found.normal and found.feature != "accuracy":
        return 0.0
    return round(min(EVIDENCE_MAX, -math.log10(max(found.p_value, 1e-12))), 1)
