"""Say what a backend is: something that is probed, prepares a model, and attests where it runs.

    probe() -> Found      what is here, or what it needs; imports nothing heavy in this process
    prepare(model) -> Engine     the model, loaded; calls go through the engine
    placement(model, engine) -> Placement     which operator ran on which device

Rule 1: a probe never raises and never hangs. A vendor's library may do both, so it is asked in a
        child process, with a time limit, and only if its package is installed.
Rule 2: a backend runs a model where it was told to, or refuses. What still ended up on the CPU is
        in the placement, and is None, with the reason, where the vendor does not tell.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from ...ext._engine import Engine as Engine
from ..accelerators import Accelerator, find
from ..errors import HwError
from ..tree import Tree

State = Literal["ready", "missing", "broken"]
Options = Mapping[str, str]
Port = tuple[str, int, tuple[int, ...]]
"""Name, onnx.TensorProto.DataType, shape with -1 for a free axis."""

CHILD_S: Final = 20.0  # import and device search of the slowest library seen takes 2 s on a Pi 4
CPU: Final = "cpu"
DETAIL_CHARS_MAX: Final = 500  # of a vendor's message; some print the whole graph


class BackendError(HwError):
    """A backend cannot load the model as it was told to; nothing is loaded."""

    code = "hw.backend"


class BackendMissingError(BackendError):
    """What the backend needs is not on this device; the hint says what to install or attach."""

    code = "hw.backend.missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a probe found."""

    name: str
    """Of the backend, as in ``BACKENDS``."""
    state: State
    """missing: something is to be installed or attached; broken: it is there and does not work."""
    detail: str = ""
    """What it needs, what is broken, or what is to be known; for people."""
    version: str = ""
    """Of the vendor's package; empty if it is not installed."""
    devices: tuple[str, ...] = ()
    """What it can run on, as it names them; through ONNX Runtime, the plugin's EP devices."""
    variants: Mapping[str, Options] = field(default_factory=lambda: {"": {}})
    """Options of ``prepare`` that are worth a trial here, by a short name; "" = the defaults."""
    simulated: bool = False
    """The device is simulated: its numbers are to be trusted, its times are not."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One operator and where it ran."""

    name: str
    op: str
    device: str
    """``cpu``, or the device's name."""
    time_us: float | None = None
    """Of one call, in µs; None = not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the operators of a loaded model run."""

    nodes: tuple[Placed, ...]
    cpu_share: float | None
    """Share of the operators that fell back to the CPU, 0 to 1; 0 if the CPU is what was asked
    for; None = not knowable, and ``reason`` says why."""
    cpu_time_share: float | None = None
    """The same as a share of the time; None = it was not profiled."""
    reason: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """How many operators ran on which device."""
        return dict(Counter(each.device for each in self.nodes))

    @classmethod
    def of(cls, nodes: Sequence[Placed], reason: str = "") -> Placement:
        """Return the placement on an accelerator: what is on the CPU fell back."""
        if not nodes:
            return cls(nodes=(), cpu_share=None, reason=reason or "no operator was reported")
        on_cpu = [each for each in nodes if each.device == CPU]
        times = [each.time_us for each in nodes if each.time_us is not None]
        spent = sum(times)
        return cls(
            nodes=tuple(nodes),
            cpu_share=len(on_cpu) / len(nodes),
            cpu_time_share=sum(each.time_us or 0.0 for each in on_cpu) / spent if spent else None,
            reason=reason,
        )


class Backend(Protocol):
    """One way to run models. Without state of its own; any thread may use it."""

    @property
    def name(self) -> str:
        """As in ``BACKENDS``, and of the engines that it prepares."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Kinds of file that it takes: ".onnx", ".tflite"."""

    def probe(self, tree: Tree | None = None) -> Found:
        """Say whether it can run here.

        Args:
            tree: Where to look for device nodes; None = this machine.
        """

    def prepare(self, model: bytes, *, threads: int = 1, options: Options | None = None) -> Engine:
        """Load a model.

        Args:
            model: The file's bytes.
            threads: Of the CPU for one call, at least 1; without meaning on an accelerator.
            options: As listed in the backend's class; None = the defaults.

        Raises:
            BackendMissingError: The backend is not here; the text says what it needs.
            BackendError: It refuses the model or the options; the text has the vendor's message.
        """

    def placement(self, model: bytes, engine: Engine) -> Placement:
        """Say where the operators of an engine of `prepare` run."""

    def ask(self) -> dict[str, Any]:
        """Ask the vendor's library; runs in a child process of ``probe`` and may crash there."""


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package, not imported."""

    version: str
    folder: Path


def package(module: str, *distributions: str) -> Package | None:
    """Find a package without importing it.

    Args:
        module: Its top-level module.
        distributions: Names under which it is distributed; the first that is installed has the
            version.

    Returns:
        Its version ("" if no distribution is known) and folder; None if it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        return None
    places = list(spec.submodule_search_locations or ())
    folder = Path(places[0]) if places else Path(spec.origin or "").parent
    for name in distributions or (module,):
        try:
            return Package(importlib.metadata.version(name), folder)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Package("", folder)


def devices(tree: Tree | None, *kinds: str, need: str) -> tuple[list[Accelerator], list[str]]:
    """Look for accelerators that can be opened.

    Args:
        tree: Where to look; None = this machine.
        kinds: As ``accelerators`` names them.
        need: What is needed if there is none, for people.

    Returns:
        The accelerators, and what is needed: nothing, or one text.
    """
    tree = tree or Tree(Path("/"))
    compatible = (tree.text("/proc/device-tree/compatible") or "").split("\0")
    seen = [each for each in find(tree, tuple(filter(None, compatible))) if each.kind in kinds]
    usable = [each for each in seen if not each.problem]
    if usable:
        return usable, []
    problems = "; ".join(f"{each.name}: {each.problem}" for each in seen)
    return [], [f"access to the device ({problems})" if problems else need]


def ask_in_child(name: str, *, seconds: float = CHILD_S) -> dict[str, Any]:
    """Run a backend's ``ask`` in a child process.

    Args:
        name: Of the backend.
        seconds: Time limit; the child is killed at its end.

    Returns:
        What it answered.

    Raises:
        BackendError: It crashed, hung, or raised; the text says which.
    """
    command = [sys.executable, "-P", "-m", f"{__package__}.child", name]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise BackendError(f"its library did not answer within {seconds:g} s") from exc
    except OSError as exc:
        raise BackendError(f"no child process could be started: {exc}") from exc
    if done.returncode < 0:
        raise BackendError(f"its library crashed the process (signal {-done.returncode})")
    try:
        answer = json.loads(done.stdout)
    except ValueError as exc:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise BackendError(f"its library ended the process: {short(last)}") from exc
    if "error" in answer:
        raise BackendError(str(answer["error"]))
    return dict(answer)


def check_onnx(model: bytes) -> None:
    """Refuse bytes that are no ONNX model, or one that names other files.

    A vendor's reader would look for those below the working directory, whatever is there.

    Raises:
        BackendError: It is one of both.
    """
    from ...ext.onnx_graph import OnnxFormatError, read_model

    try:
        external = read_model(model).external
    except OnnxFormatError as exc:
        raise BackendError(f"not an ONNX model: {exc}") from exc
    if external:
        raise BackendError(
            f"the model keeps weights in other files: {short(', '.join(external))}",
            hint="save it as one file: a model is verified as a whole",
        )


def short(message: object) -> str:
    """Return a vendor's message on one line, bounded."""
    text = " ".join(str(message).split())
    return text if len(text) <= DETAIL_CHARS_MAX else text[: DETAIL_CHARS_MAX - 1] + "…"


def choose_options(name: str, given: Options | None, allowed: Mapping[str, str]) -> dict[str, str]:
    """Return the options with their defaults.

    Raises:
        BackendError: One is not known.
    """
    unknown = sorted(set(given or ()) - set(allowed))
    if unknown:
        raise BackendError(
            f"{name} has no option {', '.join(unknown)}",
            hint=f"it has {', '.join(allowed) or 'none'}",
        )
    return {**allowed, **(given or {})}


def switch(name: str, options: Options, key: str) -> bool:
    """Return an option that is "on" or "off".

    Raises:
        BackendError: It is neither.
    """
    if options[key] not in ("on", "off"):
        raise BackendError(f"{name}: option {key} is on or off, not {options[key]!r}")
    return options[key] == "on"
