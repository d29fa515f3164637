"""An engine behind a Python function, for backends that have no C interface.

It takes the GIL for every call and costs some microseconds; NumPy is imported with it.
"""

import numpy as np

from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from ._engine cimport (
    STRING, Binding, Engine, Reason, Tensor, binding_free, binding_new, reason_set,
)

cdef dict DTYPES = {
    1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2",
    11: "<f8", 12: "<u4", 13: "<u8", 16: "<u2",
}


cdef class PyEngine(Engine):
    """Calls ``call(list of arrays) -> list of arrays``; thread-safe if ``call`` is."""

    cdef object _call

    def __init__(self, backend, version, inputs, outputs, call, *, stateful=False):
        """Make an engine.

        Args:
            backend: Name of the backend.
            version: Of its library.
            inputs: Tuple of (name, type, shape); see ``Engine``. Strings are not supported.
            outputs: Likewise.
            call: Takes one array for each input, views that are valid during the call; returns
                one C-contiguous array for each output.
            stateful: Whether a call changes what later calls answer.
        """
        for name, kind, _ in (*inputs, *outputs):
            if kind not in DTYPES:
                raise ValueError(f"{name} has type {kind}, which this engine cannot pass on")
        self.backend, self.version = backend, version
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.stateful = stateful
        self._call = call

    cdef Binding* bind(
        self, const Tensor* inputs, const Tensor* outputs, Reason* reason
    ) noexcept nogil:
        cdef int64_t i
        cdef Binding* binding
        with gil:
            binding = binding_new(
                inputs, len(self.inputs), outputs, len(self.outputs), reason
            )
            if binding is not NULL:
                for i in range(binding.outputs_n):
                    if outputs[i].data is NULL:
                        binding.outputs[i].size = -1
        return binding

    cdef int run(self, Binding* binding, Reason* reason) noexcept nogil:
        with gil:
            try:
                self._run(binding)
                return 0
            except Exception as exc:
                text = f"{type(exc).__name__}: {exc}".encode()[:900]
                reason_set(reason, text, False)
                return -1

    cdef int _run(self, Binding* binding) except -1:
        cdef int64_t i, d
        cdef Tensor* tensor
        cdef const char* source
        arrays = []
        for i in range(binding.inputs_n):
            tensor = &binding.inputs[i]
            shape = tuple([tensor.dims[d] for d in range(tensor.ndim)])
            if tensor.size:
                view = <char[:tensor.size]>(<char*>tensor.data)
                array = np.frombuffer(view, DTYPES[tensor.type]).reshape(shape)
            else:
                array = np.empty(shape, DTYPES[tensor.type])
            arrays.append(array)
        results = self._call(arrays)
        if len(results) != binding.outputs_n:
            raise ValueError(f"the backend gave {len(results)} outputs, not {binding.outputs_n}")
        for i in range(binding.outputs_n):
            tensor = &binding.outputs[i]
            array = np.ascontiguousarray(results[i])
            if array.dtype.itemsize != np.dtype(DTYPES[tensor.type]).itemsize or array.ndim > 8:
                raise ValueError(f"output {i} is {array.dtype} of {array.ndim} axes")
            if tensor.size < 0 or tensor.owner is not NULL:
                free(tensor.owner)
                tensor.data = tensor.owner = malloc(array.nbytes + 1)
                if tensor.data is NULL:
                    tensor.size = -1
                    raise MemoryError("no memory for an output")
                tensor.size = array.nbytes
                tensor.ndim = array.ndim
                for d in range(array.ndim):
                    tensor.dims[d] = array.shape[d]
            elif tensor.size != array.nbytes:
                raise ValueError(f"output {i} has {array.nbytes} bytes, not {tensor.size}")
            source = <const char*><uintptr_t>array.ctypes.data
            memcpy(tensor.data, source, array.nbytes)
        return 0

    cdef void unbind(self, Binding* binding) noexcept nogil:
        cdef int64_t i
        for i in range(binding.outputs_n):
            free(binding.outputs[i].owner)
        binding_free(binding)
