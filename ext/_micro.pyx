# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# distutils: extra_compile_args = -ffp-contract=off
"""The micro engine: a flat program of small layers, run sample by sample.

Nothing here knows ONNX: ``micro_plan.py`` makes the steps, ``_micro_kernels.h`` runs them.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from ._engine cimport (
    DIMS_MAX, FLOAT, Binding, Engine, Reason, Tensor, binding_free, binding_new, reason_set,
    tensor_count,
)

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void** place, size_t alignment, size_t size)

cdef extern from "_micro_kernels.h" nogil:
    ctypedef struct MicroView:
        int64_t at, h, w, c, row
    ctypedef struct MicroPanel:
        int64_t first, vectors, count, weights, lane
    ctypedef struct MicroStep:
        int64_t kind, flag
        MicroView src, dst
        int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w
        int64_t groups, src_group, dst_group, weights_group, lanes_group
        int64_t panels_n, runs_n, run_length
        const MicroPanel* panels
        const int64_t* runs
        const void* weights
        const void* bias
        const float* scale
        int64_t constants, room
        float low, high, step
    ctypedef void (*MicroRun)(const MicroStep*, int64_t, char*, const char*, char*, int64_t)
    ctypedef struct MicroVariant:
        const char* name
        int64_t lanes
        MicroRun run
    const MicroVariant[4] MICRO_VARIANTS
    int MICRO_VARIANTS_N
    int micro_supported(int64_t variant)

cdef enum:
    ALIGNED = 64                # bytes: a cache line, the widest vector


def variants():
    """Return (name, lanes, whether this machine runs it) of each variant compiled, best last."""
    return tuple(
        (MICRO_VARIANTS[i].name.decode(), MICRO_VARIANTS[i].lanes, bool(micro_supported(i)))
        for i in range(MICRO_VARIANTS_N)
    )


def pack(const uint8_t[::1] weights, Py_ssize_t outs, Py_ssize_t runs, Py_ssize_t length,
         Py_ssize_t item, Py_ssize_t lanes, panels):
    """Return a group's weights, (outs, runs, length), in the order of the inner loop.

    Args:
        weights: Bytes of C-ordered elements.
        outs: Output channels.
        runs: Runs of a window.
        length: Elements of a run.
        item: 4 for float32, or 2 for int16, which are packed in pairs.
        lanes: Channels of a vector.
        panels: (first channel, vectors) of each panel.

    Returns:
        Bytes; what is beyond the channels or a run is 0.

    Raises:
        ValueError: The weights have another size.
    """
    if item not in (2, 4) or weights.shape[0] != outs * runs * length * item:
        raise ValueError("the weights do not fit outs x runs x length")
    cdef Py_ssize_t per = 4 // item                             # elements beside each other
    cdef Py_ssize_t steps = (length + per - 1) // per
    cdef Py_ssize_t total = 0, at = 0, run, step, lane, p, channel, k, first, width
    for _, vectors in panels:
        total += vectors * lanes * runs * steps * 4
    found = bytearray(total)
    cdef uint8_t[::1] to = found
    for first, vectors in panels:
        width = vectors * lanes
        for run in range(runs):
            for step in range(steps):
                for lane in range(width):
                    channel = first + lane
                    for p in range(per):
                        k = step * per + p
                        if channel < outs and k < length:
                            memcpy(&to[at], &weights[((channel * runs + run) * length + k) * item],
                                   item)
                        at += item
    return bytes(found)


cdef MicroView view_of(tuple view):
    cdef MicroView found
    found.at, found.h, found.w, found.c, found.row = view
    return found


cdef class MicroEngine(Engine):
    """One compiled chain of layers; see the rules at the head of ``_engine.pxd``.

    The program is only read: any number of threads may run it, each with its own binding. Made by
    ``micro.compile`` alone.

    Attributes:
        variant: Which of the compiled loops it runs.
        steps: Number of steps of the program.
        scratch_bytes: Memory that a binding takes.
    """

    cdef readonly str variant
    cdef readonly Py_ssize_t steps
    cdef readonly Py_ssize_t scratch_bytes
    cdef MicroStep* program
    cdef char* constants
    cdef MicroRun loop
    cdef int64_t zero_bytes, input_size, output_size
    cdef int32_t input_rank, output_rank
    cdef int64_t[DIMS_MAX] input_dims, output_dims

    def __cinit__(self):
        self.program = NULL
        self.constants = NULL

    def __init__(self, str version, Py_ssize_t variant, inputs, outputs, program,
                 Py_ssize_t scratch_bytes, Py_ssize_t zero_bytes):
        """Copy a program that ``micro_plan.Program`` has laid out.

        Args:
            version: Of this backend.
            variant: Index in ``variants()``.
            inputs: One (name, type, shape); axis 0 is the batch.
            outputs: Likewise.
            program: Dicts with the fields of MicroStep; panels, runs, weights, bias, scale are
                bytes of the C arrays.
            scratch_bytes: Of one binding.
            zero_bytes: At its start, which must be 0 before a run: borders.
        """
        if self.program is not NULL:
            raise RuntimeError("an engine is made once")
        if not 0 <= variant < MICRO_VARIANTS_N or not micro_supported(variant):
            raise ValueError("this machine does not run that variant")
        cdef Py_ssize_t total = ALIGNED, at = 0, i
        cdef MicroStep* step
        cdef char* place
        for row in program:
            for name in ("panels", "runs", "weights", "bias", "scale"):
                total += (len(row[name]) + 2 * ALIGNED - 1) // ALIGNED * ALIGNED
        self.program = <MicroStep*>calloc(max(len(program), 1), sizeof(MicroStep))
        if self.program is NULL or posix_memalign(<void**>&self.constants, ALIGNED, total):
            raise MemoryError
        memset(self.constants, 0, total)
        for i, row in enumerate(program):
            step = &self.program[i]
            places = {}
            for name in ("panels", "runs", "weights", "bias", "scale"):
                data = row[name]
                places[name] = at if data else -1
                memcpy(self.constants + at, <const char*>data, len(data))
                at += (len(data) + 2 * ALIGNED - 1) // ALIGNED * ALIGNED
            step.kind, step.flag = row["kind"], row["flag"]
            step.src, step.dst = view_of(row["src"]), view_of(row["dst"])
            step.kernel_h, step.kernel_w = row["kernel"]
            step.stride_h, step.stride_w = row["stride"]
            step.dilation_h, step.dilation_w = row["dilation"]
            step.pad_h, step.pad_w = row["pad"]
            step.groups, step.src_group, step.dst_group = row["groups"]
            step.weights_group, step.lanes_group = row["weights_group"], row["lanes_group"]
            step.panels_n, step.runs_n = row["panels_n"], row["runs_n"]
            step.run_length, step.constants = row["run_length"], row["constants"]
            step.room = row["room"]
            step.low, step.high, step.step = row["low"], row["high"], row["step"]
            if places["panels"] >= 0:
                place = self.constants + <Py_ssize_t>places["panels"]
                step.panels = <const MicroPanel*>place
            if places["runs"] >= 0:
                place = self.constants + <Py_ssize_t>places["runs"]
                step.runs = <const int64_t*>place
            if places["weights"] >= 0:
                step.weights = self.constants + <Py_ssize_t>places["weights"]
            if places["bias"] >= 0:
                step.bias = self.constants + <Py_ssize_t>places["bias"]
            if places["scale"] >= 0:
                place = self.constants + <Py_ssize_t>places["scale"]
                step.scale = <const float*>place
        self.backend, self.version = "kernel", version
        self.variant = MICRO_VARIANTS[variant].name.decode()
        self.loop = MICRO_VARIANTS[variant].run
        self.steps, self.scratch_bytes, self.zero_bytes = len(program), scratch_bytes, zero_bytes
        self.inputs, self.outputs, self.stateful = tuple(inputs), tuple(outputs), False
        (_, _, shape), = self.inputs
        self.input_rank, self.input_size = len(shape), sizeof(float)
        for i, dim in enumerate(shape):
            self.input_dims[i] = dim
            self.input_size *= dim if i else 1
        (_, _, shape), = self.outputs
        self.output_rank, self.output_size = len(shape), sizeof(float)
        for i, dim in enumerate(shape):
            self.output_dims[i] = dim
            self.output_size *= dim if i else 1

    def __dealloc__(self):
        free(self.program)
        free(self.constants)

    cdef Binding* bind(
        self, const Tensor* inputs, const Tensor* outputs, Reason* reason
    ) noexcept nogil:
        cdef Binding* binding
        cdef Tensor* made
        cdef int64_t batch, size
        cdef int32_t i
        if self.program is NULL:
            reason_set(reason, b"this engine has no model", False)
            return NULL
        if inputs.type != FLOAT or inputs.ndim != self.input_rank:
            reason_set(reason, b"the input has another type or rank than the model's", True)
            return NULL
        batch = inputs.dims[0]
        for i in range(self.input_rank):
            if inputs.dims[i] != self.input_dims[i] and (i or self.input_dims[0] >= 0):
                reason_set(reason, b"the input has another shape than the model's", True)
                return NULL
        if tensor_count(inputs) < 0 or inputs.size != batch * self.input_size:
            reason_set(reason, b"the input's bytes do not fit its shape", True)
            return NULL
        size = batch * self.output_size
        if outputs.data is not NULL:
            if outputs.type != FLOAT or outputs.ndim != self.output_rank or outputs.size != size:
                reason_set(reason, b"the output has another type, rank or size", True)
                return NULL
            for i in range(self.output_rank):
                if outputs.dims[i] != (self.output_dims[i] if i else batch):
                    reason_set(reason, b"the output has another shape than the model's", True)
                    return NULL
        binding = binding_new(inputs, 1, outputs, 1, reason)
        if binding is NULL:
            return NULL
        if posix_memalign(&binding.state, ALIGNED, self.scratch_bytes + ALIGNED + size):
            binding_free(binding)
            reason_set(reason, b"no memory for a binding", False)
            return NULL
        memset(binding.state, 0, self.zero_bytes)
        made = &binding.outputs[0]
        made.type, made.ndim, made.size = FLOAT, self.output_rank, size
        for i in range(self.output_rank):
            made.dims[i] = self.output_dims[i] if i else batch
        if made.data is NULL:
            made.data = <char*>binding.state + self.scratch_bytes
        return binding

    cdef int run(self, Binding* binding, Reason* reason) noexcept nogil:
        cdef const char* source = <const char*>binding.inputs[0].data
        cdef char* target = <char*>binding.outputs[0].data
        cdef int64_t sample
        for sample in range(binding.inputs[0].dims[0]):
            self.loop(self.program, self.steps, <char*>binding.state,
                      source + sample * self.input_size, target + sample * self.output_size,
                      sample)
        return 0

    cdef void unbind(self, Binding* binding) noexcept nogil:
        free(binding.state)
        binding_free(binding)

    def call(self, shape, data):
        """Run once, for tools and tests; the runtime binds.

        Args:
            shape: Of the input.
            data: Buffer of its float32 elements in C order.

        Returns:
            Shape and bytes of the output.

        Raises:
            ValueError: The input does not fit the model.
            MemoryError: No memory for a binding.
        """
        cdef Py_buffer view
        cdef Tensor given, wanted
        cdef Binding* binding
        cdef Reason reason
        if len(shape) > DIMS_MAX:
            raise ValueError("the input has too many axes")
        memset(&given, 0, sizeof(Tensor))
        memset(&wanted, 0, sizeof(Tensor))
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            given.data, given.size, given.type, given.ndim = view.buf, view.len, FLOAT, len(shape)
            for axis, dim in enumerate(shape):
                given.dims[axis] = dim
            with nogil:
                binding = self.bind(&given, &wanted, &reason)
                if binding is not NULL:
                    self.run(binding, &reason)
            if binding is NULL:
                text = reason.text.decode(errors="replace")
                raise ValueError(text) if reason.refused else MemoryError(text)
            try:
                wanted = binding.outputs[0]
                return (
                    tuple(wanted.dims[axis] for axis in range(wanted.ndim)),
                    PyBytes_FromStringAndSize(<char*>wanted.data, wanted.size),
                )
            finally:
                self.unbind(binding)
        finally:
            PyBuffer_Release(&view)
