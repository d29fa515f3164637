"""Arm's Ethos-U NPUs: the compiler Vela, its estimate of cycles, and the NPU if there is one.

    int8 .tflite --vela (child process)--> .tflite with operators "ethos-u" + estimate
                                              --delegate, /dev/ethosu0--> Engine

Where there is no Ethos-U the estimate is what can be had: Vela's own model of the NPU and its
memory, not a measurement.

Options:
    accelerator: "ethos-u55-128" (default), any of Vela's ``--accelerator-config``.
    system, memory: Vela's ``--system-config`` and ``--memory-mode``; default: Vela's own.
    seconds: Time limit of the compiler, default "120".
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ..accelerators import Accelerator
from ..tree import Tree
from . import interpreters
from .base import (
    BackendError,
    BackendMissingError,
    Engine,
    Found,
    Options,
    Package,
    Placement,
    ask_in_child,
    choose_options,
    devices,
    package,
    short,
)

CUSTOM: Final = "ethos-u"
LIBRARY: Final = "libethosu_delegate.so"
OPTIONS: Final = {
    "accelerator": "ethos-u55-128",
    "system": "",
    "memory": "",
    "seconds": "120",
}
ACCELERATORS: Final = (
    "ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256",
    "ethos-u65-512", "ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024",
    "ethos-u85-2048",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What Vela made of a model, and what it expects of it."""

    model: bytes
    """.tflite with one operator "ethos-u" for each part that the NPU takes."""
    accelerator: str
    version: str
    """Of Vela."""
    clock_hz: float
    """Of the NPU, as the system configuration says."""
    cycles: int
    """Of one inference on the NPU, memory included; what stays on the CPU is not in it."""
    npu_cycles: int
    """Of the NPU alone, were memory free."""
    inference_us: float
    """``cycles`` at that clock, in µs."""
    sram_bytes: int
    """For activations."""
    flash_bytes: int
    """For weights, off the chip."""
    macs: int
    """Multiplications of one inference."""
    placement: Placement
    """The share is Vela's count over the operators that it optimised; the nodes are those of the
    compiled file, one "ethos-u" for many operators."""


def _package() -> Package | None:
    return package("ethosu", "ethos-u-vela")


def _look(tree: Tree | None) -> tuple[list[Accelerator], list[str]]:
    """Return the NPUs, and what is needed to run on them."""
    found, needs = devices(tree, CUSTOM, need="an Ethos-U (/dev/ethosu0)")
    if interpreters.installed() is None:
        needs.append("the package ai-edge-litert")
    return found, needs


class VelaBackend:
    """See the module's head."""

    name = "vela"
    suffixes = (".tflite",)

    def probe(self, tree: Tree | None = None) -> Found:
        """See ``Backend``."""
        found = _package()
        if found is None:
            return Found(name=self.name, state="missing", detail="needs the package ethos-u-vela")
        nodes, needs = _look(tree)
        if needs:
            detail = f"compiles and estimates here; to run it needs {' and '.join(needs)}"
            return Found(name=self.name, state="missing", detail=detail, version=found.version)
        try:
            ask_in_child(self.name)
        except BackendError as exc:
            return Found(name=self.name, state="broken", detail=str(exc), version=found.version)
        return Found(
            name=self.name,
            state="ready",
            version=found.version,
            devices=tuple(each.node for each in nodes),
        )

    def ask(self) -> dict[str, Any]:
        """Open the delegate, which opens the device; see ``Backend``."""
        interpreters.load_delegate(LIBRARY)
        return {}

    def compile(self, model: bytes, *, options: Options | None = None) -> Compiled:
        """Compile a model and estimate it; needs no NPU.

        Args:
            model: An int8 .tflite.
            options: See the module's head.

        Raises:
            BackendMissingError: Vela is not installed.
            BackendError: The bytes are no .tflite, or Vela refuses it, crashes or takes too long.
        """
        chosen = choose_options(self.name, options, OPTIONS)
        found = _package()
        if found is None:
            raise BackendMissingError(
                "needs the package ethos-u-vela", hint="pip install ethos-u-vela"
            )
        if chosen["accelerator"] not in ACCELERATORS:
            raise BackendError(
                f"vela knows no accelerator {chosen['accelerator']!r}",
                hint=f"it knows {', '.join(ACCELERATORS)}",
            )
        interpreters.read_graph(model)  # Vela crashes on a file that is cut off
        with tempfile.TemporaryDirectory(prefix="shoal-vela-") as folder:
            made, summary, output = _run(model, Path(folder), chosen)
        return Compiled(
            model=made,
            accelerator=chosen["accelerator"],
            version=found.version,
            clock_hz=float(summary["core_clock"]),
            cycles=int(float(summary["cycles_total"])),
            npu_cycles=int(float(summary["cycles_npu"])),
            inference_us=float(summary["inference_time"]) * 1e6,
            sram_bytes=round(float(summary["sram_memory_used"]) * 1024),
            flash_bytes=round(float(summary["off_chip_flash_memory_used"]) * 1024),
            macs=int(float(summary["nn_macs"])),
            placement=_placement(made, output),
        )

    def prepare(self, model: bytes, *, threads: int = 1, options: Options | None = None) -> Engine:
        """Compile unless it is compiled already, and load it on the NPU; see ``Backend``."""
        placement, version = interpreters.custom_placement(model, CUSTOM, CUSTOM), ""
        if CUSTOM in placement.counts:
            choose_options(self.name, options, OPTIONS)
        else:
            compiled = self.compile(model, options=options)
            model, placement, version = compiled.model, compiled.placement, compiled.version
        _, needs = _look(None)
        if needs:
            raise BackendMissingError(
                f"needs {' and '.join(needs)}, and its delegate {LIBRARY}",
                hint="without one, Vela's estimate of cycles is what can be had",
            )
        return interpreters.load(
            model,
            backend=self.name,
            version=version,
            threads=threads,
            delegate=interpreters.load_delegate(LIBRARY),
            attest=lambda: placement,
        )

    def placement(self, model: bytes, engine: Engine) -> Placement:
        """See ``Backend``."""
        from .engines import attest

        return attest(engine)


def _placement(made: bytes, output: str) -> Placement:
    """Return the placement; `output` is what Vela printed."""
    found = interpreters.custom_placement(made, CUSTOM, CUSTOM)
    counts = [re.search(rf"^{where} operators = (\d+)", output, re.M) for where in ("CPU", "NPU")]
    if None in counts:
        return replace(found, cpu_share=None, reason="Vela did not print its count of operators")
    on_cpu, on_npu = (int(each[1]) for each in counts if each)
    reason = f"Vela: {on_cpu} operators on the CPU, {on_npu} on the NPU"
    return replace(found, cpu_share=on_cpu / max(1, on_cpu + on_npu), reason=reason)


def _run(model: bytes, folder: Path, chosen: Options) -> tuple[bytes, dict[str, str], str]:
    """Run the compiler; return its file, the row of its summary, and what it printed."""
    (folder / "model.tflite").write_bytes(model)
    command = [
        sys.executable, "-P", "-m", "ethosu.vela", "model.tflite", "--output-dir", "out",
        "--accelerator-config", chosen["accelerator"],
    ]  # fmt: skip
    for option, flag in (("system", "--system-config"), ("memory", "--memory-mode")):
        if chosen[option]:
            command += [flag, chosen[option]]
    try:
        seconds = float(chosen["seconds"])
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except ValueError as exc:
        raise BackendError(f"vela: seconds is a number, not {chosen['seconds']!r}") from exc
    except subprocess.TimeoutExpired as exc:
        raise BackendError(f"vela did not end within {seconds:g} s") from exc
    made = folder / "out" / "model_vela.tflite"
    if done.returncode or not made.exists():
        why = f"signal {-done.returncode}" if done.returncode < 0 else _complaint(done.stderr)
        raise BackendError(f"vela refuses the model: {why}")
    (summary,) = (folder / "out").glob("model_summary_*.csv")
    with summary.open(newline="") as file:
        (row,) = csv.DictReader(file)
    return made.read_bytes(), row, done.stdout.decode(errors="replace")


def _complaint(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return short(lines[-1] if lines else "it gave no reason")
