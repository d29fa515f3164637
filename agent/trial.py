"""Try every way to run a model on this device, and choose one: `shoal-agent trial`.

    file --sealed--> memory --plan--> candidates --vectors--> reference answers (or --golden)
         --measure, one child after the other--> rows --choose--> choice --> cache

Whatever the file is, this ends inside the wall-clock time and the memory that were given: nothing
of the file is understood in this process. The file is read once, its digest is of the bytes read,
and children inherit those bytes as sealed memory, so that nothing can be swapped in between.

Not here: measuring (``hw.trial``), the policy (``hw.choice``), stopping a child (``confined``),
what is printed (``trial_table``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ..hw import cache, trial_child
from ..hw.choice import Candidate, Decision, Outcome, OutputError, Policy, Result, choose
from .confined import Stop, run
from .engines import default_folder
from .errors import AgentError
from .sealed import Sealed, memory, seal, sealed

CHILD: Final = (sys.executable, "-P", "-m", trial_child.__name__)
OWN_BYTES: Final = 64 << 20  # this process, numpy-free: 30 MB measured
PLAN_S_MAX: Final = 10.0  # probing every backend; a driver that needs longer is broken
END_S: Final = 0.5  # to kill a child, choose, and write
SHARE_S_MIN: Final = 0.5  # a child needs 0.3 s to start
PASSED: Final = ("HOME", "LD_LIBRARY_PATH", "PATH", "TMPDIR")  # drivers are found by these


class TrialError(AgentError):
    """No trial was made; nothing was cached, what was chosen before still is."""

    code = "agent.trial"


class NothingChosenError(TrialError):
    """Every way to run the model was stopped, refused, or wrong; nothing was cached."""

    code = "agent.trial.nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """What a trial may use, and how it chooses."""

    wall_s: float = 30.0
    """For everything, by the clock."""
    memory_bytes: int = 2 << 30
    """For everything at one time: this process, the model, and one child."""
    timed_s: float = 1.0
    """Of one candidate, for timing alone: 3000 calls of up to 0.3 ms. Less if its share is less."""
    golden_bytes_max: int = 256 << 20
    """Size of the file of golden vectors."""
    threads: tuple[int, ...] = ()
    """Numbers of threads to try; () = 1, 2, half and all of the CPUs."""
    seed: int = 0
    """Of generated inputs."""
    policy: Policy = field(default_factory=Policy)
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment of the children."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.wall_s <= 86_400:
            raise ValueError("wall_s must be 1 to 86400 s")
        if not 0 < self.timed_s <= self.wall_s:
            raise ValueError("timed_s must be above 0 and at most wall_s")
        if not 512 << 20 <= self.memory_bytes <= 1 << 44:
            raise ValueError("memory_bytes must be 512 MiB to 16 TiB")
        if not 1 << 10 <= self.golden_bytes_max <= self.memory_bytes // 2:
            raise ValueError("golden_bytes_max must be 1 KiB to half of memory_bytes")
        if not all(1 <= each <= 1024 for each in self.threads):
            raise ValueError("threads must be 1 to 1024 each")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a trial found."""

    model: str
    sha256: str
    size: int
    """Of the model, bytes."""
    board: str
    """Digest of the board."""
    versions: Mapping[str, str]
    compared_with: str
    """What the outputs were compared with, in words."""
    rows: tuple[Result, ...]
    decision: Decision
    took_s: float


def trial(
    path: Path,
    *,
    golden: Path | None = None,
    config: TrialConfig | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Try every candidate on a model and choose.

    Args:
        path: Of the model, .onnx or .tflite.
        golden: A .npz file of vectors, see ``hw.vectors``; None = the reference's own answers to
            generated inputs.
        config: Limits and policy.
        progress: Is told what is being done.

    Returns:
        The rows and the decision; there may be no choice.

    Raises:
        FileError: A file is not one that may be read.
        TrialError: The children cannot work at all here.
    """
    return _Trial(path, golden, config or TrialConfig(), progress).run()


class _Trial:
    """One trial; the deadline is fixed when it is made."""

    def __init__(
        self, path: Path, golden: Path | None, config: TrialConfig, progress: Callable[[str], None]
    ) -> None:
        self._start = time.monotonic()
        self._deadline = self._start + config.wall_s - END_S
        self._path, self._golden, self._config = path, golden, config
        self._progress = progress

    def run(self) -> Report:
        config = self._config
        with sealed(self._path, config.memory_bytes // 2, deadline=self._deadline) as model:
            plan = self._plan(model)
            planned = [_planned(row) for row in plan["rows"]]
            with self._vectors(model, planned, str(plan["reference"])) as (vectors, compared_with):
                rows = [*self._rows(model, vectors, planned)]
        simplest = tuple(dict.fromkeys(each.candidate.backend for each in planned))
        return Report(
            model=str(self._path),
            sha256=model.sha256,
            size=model.size,
            board=str(plan["board"]),
            versions=cache.versions(),
            compared_with=compared_with,
            rows=tuple(rows),
            decision=choose(rows, replace(config.policy, simplest=simplest)),
            took_s=time.monotonic() - self._start,
        )

    def _plan(self, model: Sealed) -> dict[str, Any]:
        self._progress("looking for backends")
        request = {"job": "plan", "model_fd": model.fd, "threads": list(self._config.threads)}
        share_s = min(PLAN_S_MAX, self._left_s() / 3)
        plan = self._child({**request, "reference_only": False}, (model,), share_s)
        skipped = None
        if isinstance(plan, Stop) and plan.outcome in (Outcome.TIME, Outcome.DIED):
            # A driver that hangs or crashes must not keep a device from its own CPU.
            skipped = f"looking for other backends: {plan.reason}"
            plan = self._child({**request, "reference_only": True}, (model,), share_s)
        if isinstance(plan, Stop):
            raise TrialError(f"{self._path} was not tried: {plan.reason}", hint=plan.hint)
        if skipped is not None:
            row = Result(candidate=Candidate(backend="others"), outcome=Outcome.SKIPPED)
            plan["rows"].append({**asdict(row), "reason": skipped})
        return plan

    @contextmanager
    def _vectors(
        self, model: Sealed, planned: Sequence[Result], backend: str
    ) -> Iterator[tuple[Sealed | Stop, str]]:
        """Yield the golden vectors, or the reference's, or what stopped the reference."""
        config = self._config
        if self._golden is not None:
            with sealed(self._golden, config.golden_bytes_max, deadline=self._deadline) as golden:
                yield golden, f"golden vectors of {self._golden}"
            return
        ready = (each for each in planned if each.outcome is Outcome.MEASURED)
        reference = next((each for each in ready if each.candidate.backend == backend), None)
        if reference is None:
            reason = f"{backend} is not here to compare it with; give --golden"
            yield Stop(Outcome.SKIPPED, reason), f"nothing: {backend} is not here"
            return
        name = f"{reference.candidate}"
        self._progress(f"asking {name} for reference answers")
        with memory() as fd:
            share_s = self._left_s() / 2
            request = {
                "job": "vectors",
                "model_fd": model.fd,
                "vectors_fd": fd,
                "candidate": asdict(reference.candidate),
                "seconds": share_s / 3,
                "seed": config.seed,
            }
            answer = self._child(request, (model, Sealed(fd, "", 0)), share_s)
            if isinstance(answer, Stop):
                yield answer, f"nothing: {name} gave no reference answers"
            else:
                text = f"what {name} answers to {answer['text']}"
                yield Sealed(fd, "", seal(fd)), text

    def _rows(
        self, model: Sealed, vectors: Sealed | Stop, planned: Sequence[Result]
    ) -> Iterator[Result]:
        left = sum(each.outcome is Outcome.MEASURED for each in planned)
        stop = vectors if isinstance(vectors, Stop) else None
        for each in planned:
            if each.outcome is not Outcome.MEASURED:
                yield each
                continue
            if isinstance(vectors, Stop):
                # The first is the reference itself; without its answers the others prove nothing.
                assert stop is not None
                yield replace(each, outcome=stop.outcome, reason=stop.reason)
                stop = Stop(Outcome.SKIPPED, "there is nothing to compare it with")
                continue
            share_s = self._left_s() / left
            left -= 1
            if share_s < SHARE_S_MIN:
                yield replace(each, outcome=Outcome.SKIPPED, reason="no time was left for it")
                continue
            self._progress(f"trying {each.candidate}")
            yield self._row(model, vectors, each, share_s)

    def _row(self, model: Sealed, vectors: Sealed, planned: Result, share_s: float) -> Result:
        candidate, config = planned.candidate, self._config
        request = {
            "job": "measure",
            "model_fd": model.fd,
            "vectors_fd": vectors.fd,
            "candidate": asdict(candidate),
            "compare_s": share_s / 3,
            "time_s": min(config.timed_s, share_s / 4),
        }
        answer = self._child(request, (model, vectors), share_s, threads=candidate.threads)
        if isinstance(answer, Stop):
            return replace(planned, outcome=answer.outcome, reason=answer.reason)
        errors = tuple(OutputError(**each) for each in answer.pop("errors"))
        return replace(planned, errors=errors, **answer)

    def _child(
        self,
        request: Mapping[str, Any],
        inherited: Sequence[Sealed],
        wall_s: float,
        *,
        threads: int = 1,
    ) -> dict[str, Any] | Stop:
        taken = OWN_BYTES + sum(each.size for each in inherited)
        return run(
            CHILD,
            request,
            pass_fds=[each.fd for each in inherited],
            wall_s=min(wall_s, self._left_s()),
            memory_bytes=max(self._config.memory_bytes - taken, 1),
            threads=threads,
            env=self._config.env,
        )

    def _left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())


def _planned(row: Mapping[str, Any]) -> Result:
    """Read one row of the plan: MEASURED stands for what is yet to be measured."""
    return Result(
        candidate=Candidate(**row["candidate"]),
        outcome=Outcome(row["outcome"]),
        reason=str(row["reason"]),
        simulated=bool(row["simulated"]),
    )


# --- command ---------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    """Add `trial` to the subparsers of `shoal-agent`."""
    text = "Try every way to run a model on this device, and choose one."
    found = commands.add_parser("trial", help=text, description=text)
    found.add_argument("model", type=Path, help=".onnx or .tflite file")
    found.add_argument("--golden", type=Path, help=".npz with in.<name> and out.<name> arrays")
    found.add_argument("--wall-s", type=float, default=30.0, help="seconds for everything")
    found.add_argument(
        "--memory-bytes", type=_size, default=2 << 30, help="for everything; 2GiB, 512MiB or bytes"
    )
    found.add_argument(
        "--threads",
        type=_numbers,
        default=(),
        help="1,2,4; default 1, 2, half and all of the CPUs",
    )
    found.add_argument("--allow-cpu-fallback", action="store_true")
    found.add_argument(
        "--error-rel", type=float, default=Policy().error_rel_max, help="of an output's largest"
    )
    found.add_argument("--cache", type=Path, help="folder of choices; ~/.cache/shoal/trials")
    found.add_argument("-o", "--output", choices=("text", "json"), default="text")
    found.set_defaults(call=command)


def command(arguments: argparse.Namespace) -> int:
    """Run `shoal-agent trial`.

    Raises:
        TrialError: Nothing can be chosen; what was found is printed all the same.
    """
    try:
        config = TrialConfig(
            wall_s=arguments.wall_s,
            memory_bytes=arguments.memory_bytes,
            golden_bytes_max=min(256 << 20, arguments.memory_bytes // 2),
            threads=arguments.threads,
            policy=Policy(
                error_rel_max=arguments.error_rel, allow_cpu_fallback=arguments.allow_cpu_fallback
            ),
            env={name: os.environ[name] for name in PASSED if name in os.environ},
        )
    except ValueError as exc:
        raise TrialError(f"these limits make no trial: {exc}") from exc
    from .trial_table import Progress, to_json, to_text

    with Progress(sys.stderr) as progress:
        report = trial(
            arguments.model, golden=arguments.golden, config=config, progress=progress.say
        )
    kept = _keep(report, arguments.cache or default_folder(os.environ))
    if arguments.output == "json":
        print(json.dumps({**to_json(report), "kept": kept}, indent=1, allow_nan=False))
    else:
        print(to_text(report, kept=kept))
    if report.decision.choice is None:
        raise NothingChosenError(
            f"nothing can be chosen for {report.model}", hint="the verdicts above say why"
        )
    return 0


def _keep(report: Report, folder: Path) -> str:
    """Keep the choice; return its file, or "" if there is none or it cannot be written.

    Where nothing can be chosen any more, what was chosen before goes.
    """
    choice = report.decision.choice
    if choice is None:
        if cache.Cache(folder).forget(report.sha256, report.board, report.versions):
            print("warning: what an earlier trial chose was removed", file=sys.stderr)
        return ""
    try:
        kept = cache.Cache(folder).keep(report.sha256, report.board, report.versions, choice)
    except OSError as exc:
        print(f"warning: the choice was not kept in {folder}: {exc.strerror}", file=sys.stderr)
        return ""
    return str(kept)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(each) for each in text.split(",")}))
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2,4") from exc


def _size(text: str) -> int:
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "": 1}
    number = text.rstrip("BGKMi")
    try:
        return int(number) * units[text[len(number) :]]
    except (ValueError, KeyError) as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 2GiB or 512MiB") from exc
