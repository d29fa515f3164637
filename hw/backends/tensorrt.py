"""NVIDIA's TensorRT through ONNX Runtime's provider: a plan for this GPU, made when a model loads.

Making the plan takes seconds to minutes at every load, because a plan that is kept on disk is
code that nobody signed. The options are those of ``cuda``.
"""

from __future__ import annotations

from .cuda import GpuBackend


def make_backend() -> GpuBackend:
    """Return the TensorRT backend."""
    return GpuBackend(
        "tensorrt",
        provider="TensorrtExecutionProvider",
        library="libonnxruntime_providers_tensorrt.so",
        options={"trt_engine_cache_enable": "0"},
    )
