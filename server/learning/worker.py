"""Do heavy learning work in a child process, so that the server's loop and memory stay free.

    Executor --one JSON line--> stdin of `python -m shoal.server.learning.worker`
    stdout --{"progress": …}* then {"result": …} | {"error": "text"}--> Executor

Large things go through files in a folder of the job's own. Nothing is unpickled. Standard output
is for these lines alone: what libraries print goes to standard error, the server's log.

Not here: what is made (``pipeline``), queues and registration (``training``).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ... import ShoalError
from ..errors import ServerError
from .config import ProfileConfig

LINE_BYTES_MAX: Final = 1 << 20
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
NICE: Final = 5  # ingest and the API go first

Told = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """How much heavy work runs at once."""

    processes_max: int = 1
    """Child processes at a time; further jobs wait."""
    wall_s_max: float = 3600.0
    """A job that takes longer is killed."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.processes_max <= 1024 or not 0 < self.wall_s_max <= 604_800:
            raise ValueError("processes_max must be 1 to 1024, wall_s_max up to 604800 s")


class JobFailedError(ServerError):
    """A job said no; there is no result."""

    code = "server.learning.job"


class JobDiedError(ServerError):
    """The job's process died or was killed; there is no result, and trying again may help."""

    code = "server.learning.died"
    retry = True


class Executor:
    """Runs jobs in child processes of this machine."""

    def __init__(self, *, config: ExecutorConfig | None = None) -> None:
        self._config = config or ExecutorConfig()
        self._room = asyncio.Semaphore(self._config.processes_max)

    async def run(
        self, job: str, arguments: Mapping[str, Any], *, told: Told | None = None
    ) -> dict[str, Any]:
        """Run a job and return its result; cancelling kills it.

        Args:
            job: ``train`` or ``candidate``; see :data:`JOBS`.
            arguments: JSON; files are named by paths.
            told: Hears the progress, on the event loop.

        Raises:
            JobFailedError: The job's own error.
            JobDiedError: The process died or took too long.
        """
        async with self._room:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", __name__,
                str(os.getpid()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_BYTES_MAX,
            )  # fmt: skip
            try:
                async with asyncio.timeout(self._config.wall_s_max):
                    answer = await _converse(process, {"job": job, **arguments}, told)
            except TimeoutError as exc:
                raise JobDiedError(
                    f"job {job} took longer than {self._config.wall_s_max:g} s and was killed"
                ) from exc
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.communicate()
        if answer is None:
            raise JobDiedError(f"the process of job {job} died with status {process.returncode}")
        if "error" in answer:
            raise JobFailedError(answer["error"])
        found: dict[str, Any] = answer["result"]
        return found


async def _converse(
    process: asyncio.subprocess.Process, request: Mapping[str, Any], told: Told | None
) -> dict[str, Any] | None:
    """Send the request and return the last line's answer; None if there was none."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.write(json.dumps(request).encode() + b"\n")
        await process.stdin.drain()
    while line := await process.stdout.readline():
        message: dict[str, Any] = json.loads(line)
        if "progress" not in message:
            return message
        if told is not None:
            told(message["progress"])
    return None


# --- the child -----------------------------------------------------------------------------------


def train(
    *,
    dataset: str,
    name: str,
    epochs: int,
    seed: int,
    profile: dict[str, int],
    out: str,
    told: Told,
) -> Any:
    """Write ``bundle`` and ``source`` of a model trained on a data set; return its figures."""
    from . import pipeline
    from .dataset import read_dataset

    config = pipeline.PipelineConfig(profile=ProfileConfig(**profile))
    data = read_dataset(Path(dataset))
    source = pipeline.train(data, epochs=epochs, seed=seed, config=config, told=told)
    return _write(source, name=name, facts={"seed": str(seed)}, config=config, out=Path(out))


def candidate(
    *,
    source: str,
    parameters: str,
    name: str,
    facts: dict[str, str],
    profile: dict[str, int],
    out: str,
    told: Told,
) -> Any:
    """Write ``bundle`` and ``source`` of a source with other parameters; return its figures."""
    from . import pipeline
    from .dataset import Source, read_source

    config = pipeline.PipelineConfig(profile=ProfileConfig(**profile))
    old = read_source(Path(source))
    new = pipeline.with_vector(old.model, Path(parameters).read_bytes())
    made = Source(new, old.dataset)
    return _write(made, name=name, facts=facts, config=config, out=Path(out))


def _write(source: Any, *, name: str, facts: dict[str, str], config: Any, out: Path) -> Any:
    from . import pipeline

    bundle, figures = pipeline.build_bundle(source, name=name, facts=facts, config=config)
    (out / "bundle").write_bytes(bundle)
    (out / "source").write_bytes(source.to_bytes())
    return figures


JOBS: Final[Mapping[str, Callable[..., Any]]] = {"train": train, "candidate": candidate}


def main(arguments: list[str]) -> int:
    """Do one job: the process id of the parent is the argument, the job comes as a line."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(arguments[0]):
        return 1  # the server died before it could take this process with it
    os.nice(NICE)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    with out:
        request = json.loads(sys.stdin.readline())
        job = JOBS[request.pop("job")]
        try:
            result = job(**request, told=lambda progress: say({"progress": progress}))
        except ShoalError as exc:
            text = f"{exc}: {exc.hint}" if exc.hint else str(exc)
            say({"error": text[:1000]})
        except Exception as exc:  # a fault of ours: the log has all of it, the run a line
            traceback.print_exc()
            say({"error": f"a fault of the server, whose log says more: {exc!r:.900}"})
        else:
            say({"result": result})
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
