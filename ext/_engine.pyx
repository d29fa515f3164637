# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What every engine shares: sizes of tensors, bindings, and an engine that calls Python."""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, strncpy

cdef extern from *:
    """
    #include <stdlib.h>
    #ifdef __GLIBC__
    #include <malloc.h>
    static void memory_trim(void) { malloc_trim(0); }
    #else
    static void memory_trim(void) {}
    #endif
    """
    void memory_trim() nogil

cdef int64_t BYTES_MAX = <int64_t>1 << 40    # of one tensor; what is larger is a broken shape


cdef int64_t tensor_size(int32_t type, int64_t count) noexcept nogil:
    """Return the bytes of `count` elements; -1 for strings and unknown types."""
    if type == DOUBLE or type == INT64 or type == UINT64:
        return 8 * count
    if type == FLOAT or type == INT32 or type == UINT32:
        return 4 * count
    if type == FLOAT16 or type == BFLOAT16 or type == INT16 or type == UINT16:
        return 2 * count
    if type == INT8 or type == UINT8 or type == BOOL or FLOAT8_FIRST <= type <= FLOAT8_LAST:
        return count
    if type == INT4 or type == UINT4:
        return (count + 1) // 2
    return -1


cdef int64_t tensor_count(const Tensor* tensor) noexcept nogil:
    """Return the number of elements; -1 if an axis is free or the product is beyond reason."""
    cdef int64_t count = 1
    cdef int32_t i
    for i in range(tensor.ndim):
        if tensor.dims[i] < 0:
            return -1
        if tensor.dims[i] and count > BYTES_MAX // tensor.dims[i]:
            return -1
        count *= tensor.dims[i]
    return count


cdef void reason_set(Reason* reason, const char* text, bint refused) noexcept nogil:
    reason.refused = refused
    strncpy(reason.text, text, REASON_BYTES - 1)
    reason.text[REASON_BYTES - 1] = 0


cdef Binding* binding_new(
    const Tensor* inputs, int64_t inputs_n, const Tensor* outputs, int64_t outputs_n,
    Reason* reason,
) noexcept nogil:
    """Return a binding with copies of the tensors; NULL and a reason if memory is out."""
    cdef Binding* made = <Binding*>calloc(
        1, sizeof(Binding) + (inputs_n + outputs_n) * sizeof(Tensor)
    )
    if made is NULL:
        reason_set(reason, b"no memory for a binding", False)
        return NULL
    made.inputs_n, made.outputs_n = inputs_n, outputs_n
    made.inputs = <Tensor*>(made + 1)
    made.outputs = made.inputs + inputs_n
    memcpy(made.inputs, inputs, inputs_n * sizeof(Tensor))
    memcpy(made.outputs, outputs, outputs_n * sizeof(Tensor))
    return made


cdef void binding_free(Binding* binding) noexcept nogil:
    free(binding)


cdef class Engine:
    """One loaded model in one backend; see the rules at the head of ``_engine.pxd``.

    Attributes:
        backend: Which backend this is.
        version: Of the backend's library.
        inputs: (name, type, shape) each; the type is a number of onnx.TensorProto.DataType, a
            free axis of the shape is -1.
        outputs: Likewise.
        stateful: Whether a call changes what later calls answer.
    """

    cdef Binding* bind(
        self, const Tensor* inputs, const Tensor* outputs, Reason* reason
    ) noexcept nogil:
        reason_set(reason, b"this engine cannot run", False)
        return NULL

    cdef int run(self, Binding* binding, Reason* reason) noexcept nogil:
        reason_set(reason, b"this engine cannot run", False)
        return -1

    cdef void unbind(self, Binding* binding) noexcept nogil:
        binding_free(binding)


def trim_memory():
    """Give freed memory back to the system, where the C library keeps it (glibc)."""
    with nogil:
        memory_trim()
