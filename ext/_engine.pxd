"""C face of an engine: one loaded model in one backend, run without the GIL.

    Engine.bind(inputs, outputs) -> Binding --run--> outputs written --unbind-->

Rule 1: an engine may be used by any number of threads, a binding by one at a time.
Rule 2: memory that a binding was made on stays valid until it is unbound; an engine never frees
        memory that it did not place, and a caller never frees what the engine placed.
Rule 3: nothing here raises: a failure fills a Reason and returns -1, and the engine stays usable.
"""

from libc.stdint cimport int32_t, int64_t

cdef enum:
    DIMS_MAX = 8                # axes of a tensor; ONNX models in the field have 6 at most
    REASON_BYTES = 1024

cdef enum Type:                 # numbers of onnx.TensorProto.DataType, which are ORT's too
    FLOAT = 1
    UINT8 = 2
    INT8 = 3
    UINT16 = 4
    INT16 = 5
    INT32 = 6
    INT64 = 7
    STRING = 8                  # data: for each string its length, 4 bytes little-endian, and it
    BOOL = 9
    FLOAT16 = 10
    DOUBLE = 11
    UINT32 = 12
    UINT64 = 13
    BFLOAT16 = 16
    FLOAT8_FIRST = 17           # four kinds of one byte
    FLOAT8_LAST = 20
    UINT4 = 21                  # two in a byte, the first in the low half
    INT4 = 22

cdef struct Tensor:             # plain data, C-contiguous; owned by whoever made it
    void* data                  # of an output: NULL when bound lets the engine choose the place
    int64_t size                # bytes at data
    int32_t type                # Type
    int32_t ndim
    int64_t[DIMS_MAX] dims      # each >= 0, but for outputs that the engine places (-1 before run)
    void* owner                 # the engine's own, of an output that it placed; else NULL

cdef struct Reason:             # why something failed
    int32_t refused             # the inputs were at fault, not the engine
    char[REASON_BYTES] text     # UTF-8, ends in 0

cdef struct Binding:            # inputs and outputs of calls; made by bind, freed by unbind
    int64_t inputs_n
    int64_t outputs_n
    Tensor* inputs              # copies of what was bound
    Tensor* outputs             # after run: data, size, dims are those of the result
    void* state                 # the engine's own

cdef int64_t tensor_size(int32_t type, int64_t count) noexcept nogil
cdef int64_t tensor_count(const Tensor* tensor) noexcept nogil
cdef void reason_set(Reason* reason, const char* text, bint refused) noexcept nogil
cdef Binding* binding_new(
    const Tensor* inputs, int64_t inputs_n, const Tensor* outputs, int64_t outputs_n,
    Reason* reason,
) noexcept nogil
cdef void binding_free(Binding* binding) noexcept nogil

cdef class Engine:
    cdef readonly str backend       # "ort", "litert", "kernel", ...
    cdef readonly str version       # of the backend's library
    cdef readonly tuple inputs      # (name, Type, shape); a shape's free axes are -1
    cdef readonly tuple outputs
    cdef readonly bint stateful     # a call changes later ones: none may be repeated or reordered

    cdef Binding* bind(
        self, const Tensor* inputs, const Tensor* outputs, Reason* reason
    ) noexcept nogil
    cdef int run(self, Binding* binding, Reason* reason) noexcept nogil
    cdef void unbind(self, Binding* binding) noexcept nogil
