"""Choose which backend a device runs a model on, from what a trial measured.

    results --(wrong, stopped, fell back: out)--> right ones --(p99, RAM, energy, simple)--> one

Rule 1: a backend whose numbers are wrong, or were never compared, is not chosen.
Rule 2: operators that ran on the CPU instead of the accelerator are an error unless allowed.
Rule 3: each step keeps what lies within the tie of the step's best; the order of the results does
        not matter.
Not here: measuring (``trial``), keeping a choice (``cache``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

MIB = 1 << 20


class Outcome(StrEnum):
    """How the trial of one candidate ended."""

    MEASURED = "measured"
    ABSENT = "absent"  # the backend is not on this device
    REFUSED = "refused"  # it cannot load or run the model; the reason is its own
    TIME = "time"  # stopped at the wall-clock or CPU limit
    MEMORY = "memory"  # stopped at the memory limit
    DIED = "died"  # the process crashed
    SKIPPED = "skipped"  # not tried; the reason says why


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run the model."""

    backend: str
    variant: str = ""
    """Name of the options; "" = the backend's defaults."""
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        variant = f" {self.variant}" if self.variant else ""
        return f"{self.backend}{variant} on {self.threads} thread{'s'[: self.threads > 1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """How far one output is from what it should be, over all vectors."""

    name: str
    abs_max: float | None
    """Largest difference; None = not comparable: other shape, other text, NaN on one side."""
    rel_max: float | None
    """The same as a share of the largest expected magnitude of this output."""
    note: str = ""
    """What is wrong where there is no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the trial of one candidate found."""

    candidate: Candidate
    outcome: Outcome
    reason: str = ""
    p50_us: float | None = None
    p99_us: float | None = None
    calls: int = 0
    """Calls that were timed."""
    ram_bytes: int | None = None
    """Peak memory that backend, model and calls took on top of a bare interpreter."""
    energy_uj: float | None = None
    """Of one call, in µJ, whole processor package; None = this device cannot tell."""
    errors: tuple[OutputError, ...] = ()
    """One for each output; () = nothing was compared."""
    top1: float | None = None
    """Share of rows whose best class is right, 0 to 1; None = no output has classes."""
    fallback: float | None = None
    """Share of operators on the CPU instead of the accelerator, 0 to 1; None = not known."""
    placement: Mapping[str, int] = field(default_factory=dict)
    """How many operators ran on which device."""
    placement_note: str = ""
    """Why the placement is not known, or what is to be known of it."""
    simulated: bool = False
    """The device is simulated: its numbers are to be trusted, its times are not."""
    compared: int = 0
    """Vectors that were compared: less than there are if the time was up."""

    @property
    def error_rel(self) -> float | None:
        """Largest relative error over the outputs; None where one is not comparable."""
        found = [each.rel_max for each in self.errors]
        if not found or None in found:
            return None
        return max(each for each in found if each is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What counts as right, and which of the right ones is best."""

    error_rel_max: float = 0.01
    """Of any output, as a share of its largest magnitude: two steps of an int8 output."""
    top1_min: float = 0.99
    """Share of rows whose best class must be right."""
    allow_cpu_fallback: bool = False
    """Whether operators may run on the CPU instead of the accelerator."""
    tie_rel: float = 0.05
    """Figures within this share of the best are as good: p99 of two runs differs by as much."""
    tie_ram_bytes: int = MIB
    """RAM within this of the least is as good: pages of the allocator."""
    simplest: tuple[str, ...] = ("ort", "kernel", "litert")
    """Backends from the simplest on; others come after these."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 0 <= self.error_rel_max < 1 or not 0 <= self.top1_min <= 1:
            raise ValueError("error_rel_max must be 0 to below 1, top1_min 0 to 1")
        if not 0 <= self.tie_rel < 1 or self.tie_ram_bytes < 0:
            raise ValueError("tie_rel must be 0 to below 1, tie_ram_bytes at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How this device runs the model."""

    backend: str
    variant: str
    threads: int
    options: Mapping[str, Any]
    p50_us: float
    p99_us: float
    ram_bytes: int | None
    energy_uj: float | None
    error_rel: float
    """Largest relative error over the outputs."""
    fallback: float | None
    why: str

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return found | {"options": dict(self.options)}

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Return the choice that `to_json` described.

        Raises:
            ValueError: It is not one; hostile values of any kind end here.
        """
        if not isinstance(found, dict) or found.keys() != set(cls.__dataclass_fields__):
            raise ValueError("not a choice")
        texts = all(
            isinstance(found[name], str) and len(found[name]) <= 1000
            for name in ("backend", "variant", "why")
        )
        figures = all(_positive(found[name]) for name in ("p50_us", "p99_us", "error_rel"))
        maybe = all(
            found[name] is None or _positive(found[name])
            for name in ("ram_bytes", "energy_uj", "fallback")
        )
        threads, options = found["threads"], found["options"]
        if not texts or not figures or not maybe or type(threads) is not int:
            raise ValueError("a choice has values of the wrong kind")
        if not 1 <= threads <= 1024 or not isinstance(options, dict) or len(options) > 64:
            raise ValueError("a choice has values out of range")
        return cls(**found)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one result."""

    word: str
    """chosen, slower, more RAM, energy, equal; wrong, simulated, fallback, unplaced; or its
    outcome."""
    why: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The choice, and for every result why it is or is not the one."""

    choice: Choice | None
    verdicts: tuple[Verdict, ...]
    """In the order of the results."""


def choose(results: Sequence[Result], policy: Policy) -> Decision:
    """Choose the best of the right results.

    First what is not right goes; then p99, RAM, energy (where all that are left have a figure),
    and the simpler backend decide in this order, each among those within the tie of its best. What
    is still equal after that is settled by fewer threads, then by p99 itself.

    Args:
        results: What was measured, in any order.
        policy: What counts as right and as equal.
    """
    verdicts = [_fault(result, policy) for result in results]
    left = [index for index, verdict in enumerate(verdicts) if verdict is None]
    if not left:
        return Decision(None, tuple(each for each in verdicts if each))
    why: list[str] = []

    def keep(figures: Mapping[int, float], word: str, unit: str, *, slack: float = 0.0) -> None:
        best = min(figures.values())
        limit = max(best * (1 + policy.tie_rel), best + slack)
        out = [index for index in left if figures[index] > limit]
        for index in out:
            text = f"{figures[index]:.4g} {unit} against {best:.4g}"
            verdicts[index] = Verdict(word, text)
            left.remove(index)
        if out:
            why.append(f"least {unit} ({best:.4g})")

    keep({index: results[index].p99_us or 0.0 for index in left}, "slower", "µs p99")
    rams = {index: results[index].ram_bytes for index in left}
    if None not in rams.values():
        slack = policy.tie_ram_bytes / MIB
        known = {index: (ram or 0) / MIB for index, ram in rams.items()}
        keep(known, "more RAM", "MiB of RAM", slack=slack)
    energies = {index: results[index].energy_uj for index in left}
    if None not in energies.values():
        spent = {index: energy or 0.0 for index, energy in energies.items()}
        keep(spent, "energy", "µJ per call")

    def simplicity(index: int) -> tuple[int, int, float, str]:
        candidate = results[index].candidate
        known = candidate.backend in policy.simplest
        rank = policy.simplest.index(candidate.backend) if known else len(policy.simplest)
        return rank, candidate.threads, results[index].p99_us or 0.0, str(candidate)

    best = min(left, key=simplicity)
    for index in left:
        verdicts[index] = Verdict(
            "equal", f"as good, but less simple than {results[best].candidate}"
        )
    if len(left) > 1:
        why.append(f"the simplest of {len(left)} that are equal within {policy.tie_rel:.0%}")
    chosen = Verdict("chosen", ", then ".join(why) or "the only one that is right")
    verdicts[best] = chosen
    return Decision(
        _choice(results[best], chosen.why), tuple(each for each in verdicts if each is not None)
    )


def _fault(result: Result, policy: Policy) -> Verdict | None:
    """Say why a result cannot be chosen; None if it can."""
    if result.outcome is not Outcome.MEASURED:
        return Verdict(result.outcome, result.reason or "no reason was given")
    if result.p99_us is None or result.p50_us is None:
        return Verdict("refused", "it was not timed")
    if not result.errors:
        return Verdict("wrong", "its numbers were not compared with anything")
    for each in result.errors:
        if each.rel_max is None or each.abs_max is None:
            return Verdict("wrong", f"output {each.name}: {each.note or 'not comparable'}")
        if not each.rel_max <= policy.error_rel_max:
            return Verdict(
                "wrong",
                f"output {each.name} is off by {each.abs_max:.3g}, "
                f"{each.rel_max:.2%} of its largest value",
            )
    if result.top1 is not None and not result.top1 >= policy.top1_min:
        return Verdict("wrong", f"only {result.top1:.1%} of the best classes are right")
    if result.simulated:
        return Verdict("simulated", "its device is simulated, and so are its times")
    if policy.allow_cpu_fallback:
        return None
    if result.fallback is None:
        note = f": {result.placement_note}" if result.placement_note else ""
        return Verdict("unplaced", f"it does not say where its operators ran{note}")
    if result.fallback > 0:
        return Verdict("fallback", f"{result.fallback:.0%} of its operators ran on the CPU")
    return None


def _choice(result: Result, why: str) -> Choice:
    candidate = result.candidate
    return Choice(
        backend=candidate.backend,
        variant=candidate.variant,
        threads=candidate.threads,
        options=candidate.options,
        p50_us=result.p50_us or 0.0,
        p99_us=result.p99_us or 0.0,
        ram_bytes=result.ram_bytes,
        energy_uj=result.energy_uj,
        error_rel=result.error_rel or 0.0,
        fallback=result.fallback,
        why=why,
    )


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e18
