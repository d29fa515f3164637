"""NVIDIA GPUs through ONNX Runtime's CUDA provider (package ``onnxruntime-gpu``).

Options:
    cpu_fallback: "off" (default): the GPU takes every operator or the model is refused. "on": the
        others run on the CPU; ONNX Runtime puts what computes shapes there on purpose.
    profile: "on" measures the time of each operator until the placement is asked for.
"""

from __future__ import annotations

from typing import Any, Final

from ..tree import Tree
from . import sessions
from .base import (
    BackendError,
    BackendMissingError,
    Engine,
    Found,
    Options,
    Placement,
    ask_in_child,
    choose_options,
    devices,
    switch,
)

OPTIONS: Final = {"cpu_fallback": "off", "profile": "off"}
KINDS: Final = ("nvidia-gpu", "jetson-gpu")


class GpuBackend:
    """A provider of ``onnxruntime-gpu``: CUDA itself, and TensorRT on top of it.

    Args:
        name: Of the backend.
        provider: As ONNX Runtime calls it.
        library: File of the provider in ONNX Runtime's package.
        options: Of the provider.
    """

    suffixes = (".onnx",)

    def __init__(
        self, name: str, *, provider: str, library: str, options: Options | None = None
    ) -> None:
        self.name = name
        self.library = library
        self.provider = sessions.Provider(name=provider, device="gpu", options=options or {})

    def _needs(self, tree: Tree | None) -> tuple[str, str]:
        """Return the version, and what is missing or an empty text."""
        runtime = sessions.installed()
        _, device_needs = devices(tree, *KINDS, need="an NVIDIA GPU with its driver (/dev/nvidia0)")
        needs = []
        if runtime is None or not (runtime.folder / "capi" / self.library).exists():
            needs.append(f"the package onnxruntime-gpu ({self.library})")
        return (runtime.version if runtime else ""), " and ".join(needs + device_needs)

    def probe(self, tree: Tree | None = None) -> Found:
        """See ``Backend``."""
        version, needs = self._needs(tree)
        if needs:
            return Found(name=self.name, state="missing", detail=f"needs {needs}", version=version)
        try:
            answer = ask_in_child(self.name)
        except BackendError as exc:
            return Found(name=self.name, state="broken", detail=str(exc), version=version)
        return Found(
            name=self.name,
            state="ready",
            version=version,
            devices=tuple(answer["devices"]),
            variants={"": {}, "split": {"cpu_fallback": "on"}},
        )

    def ask(self) -> dict[str, Any]:
        """Load the smallest model there is: CUDA's own libraries may be missing."""
        self._load(sessions.SMALLEST, threads=1, cpu_fallback=False, profile=False)
        import onnxruntime as ort

        seen = sessions.ep_devices(ort, self.provider.name)
        return {"devices": [sessions.describe(each) for each in seen] or [self.provider.name]}

    def prepare(self, model: bytes, *, threads: int = 1, options: Options | None = None) -> Engine:
        """See ``Backend``."""
        chosen = choose_options(self.name, options, OPTIONS)
        _, needs = self._needs(None)
        if needs:
            raise BackendMissingError(f"needs {needs}")
        return self._load(
            model,
            threads=threads,
            cpu_fallback=switch(self.name, chosen, "cpu_fallback"),
            profile=switch(self.name, chosen, "profile"),
        )

    def _load(self, model: bytes, *, threads: int, cpu_fallback: bool, profile: bool) -> Engine:
        import onnxruntime as ort

        if self.provider.name not in ort.get_available_providers():
            raise BackendError(
                f"the onnxruntime that is installed was built without {self.provider.name}",
                hint="uninstall onnxruntime: it hides onnxruntime-gpu, which has the same folder",
            )
        return sessions.load(
            model,
            backend=self.name,
            provider=self.provider,
            threads=threads,
            cpu_fallback=cpu_fallback,
            profile=profile,
        )

    def placement(self, model: bytes, engine: Engine) -> Placement:
        """See ``Backend``."""
        from .engines import attest

        return attest(engine)


def make_backend() -> GpuBackend:
    """Return the CUDA backend."""
    return GpuBackend(
        "cuda",
        provider="CUDAExecutionProvider",
        library="libonnxruntime_providers_cuda.so",
        # TF32 has 10 bits of mantissa: answers would differ from the CPU's by 1e-3.
        options={"use_tf32": "0"},
    )
