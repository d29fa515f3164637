# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Call an engine: check what comes, run without the GIL, give what comes out; count and watch.

    arrays --check--> lane: memory bound once --+
    large arrays --check--> bound for the call --+--> convert, run, tap, histogram --> arrays
                                                 (one stretch without the GIL)

A lane is a binding on memory of its own, kept for the next call with the same shapes: for small
tensors copying is cheaper than binding (40 bytes: 5 ns against 90). A model has as many lanes as
calls ever ran at once. The GIL protects the list of lanes and the counters.

NumPy's C interface is used because the buffer protocol costs 150 ns for each array; it is loaded
with the first array, so that a server that passes bytes never loads it.
"""

from array import array

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_CheckExact, PyDict_GetItemWithError, PyDict_Size
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.math cimport isfinite, pow
from libc.stdint cimport INT64_MAX, int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from ._engine cimport (
    BFLOAT16, BOOL, DIMS_MAX, DOUBLE, FLOAT, FLOAT8_FIRST, FLOAT8_LAST, FLOAT16, INT4, INT8, INT16,
    INT32, INT64, STRING, UINT4, UINT8, UINT16, UINT32, UINT64, Binding, Engine, Reason, Tensor,
    reason_set, tensor_count, tensor_size,
)

cdef extern from "time.h" nogil:
    ctypedef long time_t
    struct timespec:
        time_t tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec* now)
    int CLOCK_MONOTONIC

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void** memory, size_t alignment, size_t size)

cdef extern from *:
    """
    #define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
    #include <numpy/arrayobject.h>
    """

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyArrayObject
    int _import_array() except -1
    bint PyArray_Check(object)
    int PyArray_TYPE(PyArrayObject*)
    int PyArray_NDIM(PyArrayObject*)
    Py_ssize_t* PyArray_DIMS(PyArrayObject*)
    void* PyArray_DATA(PyArrayObject*)
    Py_ssize_t PyArray_NBYTES(PyArrayObject*)
    int PyArray_ISCARRAY_RO(PyArrayObject*)
    int PyArray_ISCARRAY(PyArrayObject*)
    int PyArray_EquivTypenums(int, int)
    object PyArray_SimpleNew(int ndim, Py_ssize_t* dims, int typenum)
    int NPY_BOOL, NPY_INT8, NPY_UINT8, NPY_INT16, NPY_UINT16, NPY_INT32, NPY_UINT32, NPY_INT64
    int NPY_UINT64, NPY_FLOAT16, NPY_FLOAT32, NPY_FLOAT64, NPY_OBJECT, NPY_UNICODE

cdef enum:
    LANE_BYTES = 64 << 10   # inputs and outputs that are copied; beyond it binding is cheaper
    NEAR = 8                # tensors of a call that fit on the stack
    ALIGN = 64              # of memory in a lane: a cache line, and the widest vector
    DIM_MAX = 0x7FFFFFFF    # of an axis that comes as a number
    LANES_MAX = 64          # lanes kept for a model; more calls at once make theirs anew

cdef struct Port:
    int32_t type            # of the engine's tensor
    int32_t face            # of the caller's: another one if the step converts
    int32_t typenum         # NumPy's number for it
    int32_t ndim
    int64_t[DIMS_MAX] dims
    int64_t size            # bytes, -1 if an axis is free
    float* scale            # NULL or `channels` factors of the conversion
    float* bias
    int32_t axis            # which axis counts the channels
    int64_t channels

cdef struct Lane:
    Lane* next
    Binding* binding
    char* memory
    PyObject* engine        # owned: a lane may outlive the call's own engine

LATENCY_BINS_N = LATENCY_BINS

cdef double[LATENCY_BINS - 1] latency_edges_us
cdef bint numpy_ready = False


cdef int latency_init() noexcept:
    cdef int i
    for i in range(LATENCY_BINS - 1):
        latency_edges_us[i] = pow(2.0, i / 3.0)
    return 0

latency_init()


cdef int latency_bin(int64_t latency_ns) noexcept nogil:
    """Return the bin of a latency: the number of edges 2**(i/3) us at or below it."""
    cdef double us = latency_ns / 1000.0
    cdef int low = 0, half = 32
    while half:
        if low + half <= LATENCY_BINS - 1 and us >= latency_edges_us[low + half - 1]:
            low += half
        half >>= 1
    return low


cdef int64_t now_ns() noexcept nogil:
    cdef timespec at
    clock_gettime(CLOCK_MONOTONIC, &at)
    return <int64_t>at.tv_sec * 1000000000 + at.tv_nsec


cdef int typenum_of(int32_t type) noexcept:
    if type == FLOAT: return NPY_FLOAT32
    if type == UINT8 or FLOAT8_FIRST <= type <= FLOAT8_LAST: return NPY_UINT8
    if type == INT8 or type == INT4: return NPY_INT8
    if type == UINT4: return NPY_UINT8
    if type == UINT16 or type == BFLOAT16: return NPY_UINT16
    if type == INT16: return NPY_INT16
    if type == INT32: return NPY_INT32
    if type == INT64: return NPY_INT64
    if type == BOOL: return NPY_BOOL
    if type == FLOAT16: return NPY_FLOAT16
    if type == DOUBLE: return NPY_FLOAT64
    if type == UINT32: return NPY_UINT32
    if type == UINT64: return NPY_UINT64
    return NPY_OBJECT


cdef inline int64_t padded(int64_t size) noexcept nogil:
    return (size + ALIGN) & -ALIGN      # never 0: a tensor without elements has an address too


cdef void convert(const Port* port, const Tensor* given, float* out) noexcept nogil:
    """Write value * scale[channel] + bias[channel] for every element."""
    cdef int64_t outer = 1, inner = 1, o, c, i, at = 0
    cdef int32_t d
    cdef float scale, bias
    for d in range(given.ndim):
        if d < port.axis:
            outer *= given.dims[d]
        elif d > port.axis or port.channels == 1:
            inner *= given.dims[d]
    for o in range(outer):
        for c in range(port.channels):
            scale, bias = port.scale[c], port.bias[c]
            if port.face == UINT8:
                for i in range(inner):
                    out[at + i] = (<const uint8_t*>given.data)[at + i] * scale + bias
            elif port.face == INT8:
                for i in range(inner):
                    out[at + i] = (<const int8_t*>given.data)[at + i] * scale + bias
            elif port.face == UINT16:
                for i in range(inner):
                    out[at + i] = (<const uint16_t*>given.data)[at + i] * scale + bias
            elif port.face == INT16:
                for i in range(inner):
                    out[at + i] = (<const int16_t*>given.data)[at + i] * scale + bias
            else:
                for i in range(inner):
                    out[at + i] = (<const float*>given.data)[at + i] * scale + bias
            at += inner


cdef bint pack(const Tensor* given, bint signed, uint8_t* out) noexcept nogil:
    """Put two 4-bit values into each byte; return whether all were in range."""
    cdef int64_t i, count = tensor_count(given)
    cdef const int8_t* values = <const int8_t*>given.data
    cdef bint fits = True
    for i in range(count):
        if signed and not -8 <= values[i] <= 7 or not signed and (<uint8_t>values[i]) > 15:
            fits = False
        if i & 1:
            out[i >> 1] |= <uint8_t>((values[i] & 0xF) << 4)
        else:
            out[i >> 1] = <uint8_t>(values[i] & 0xF)
    return fits


cdef void unpack(const uint8_t* packed, int64_t count, bint signed, int8_t* out) noexcept nogil:
    cdef int64_t i
    cdef int value
    for i in range(count):
        value = (packed[i >> 1] >> (4 * (i & 1))) & 0xF
        out[i] = <int8_t>(value - 16 if signed and value > 7 else value)


cdef bint all_finite(const Tensor* tensor) noexcept nogil:
    cdef int64_t i
    cdef uint16_t exponent
    if tensor.type == FLOAT:
        for i in range(tensor.size // 4):
            if not isfinite((<const float*>tensor.data)[i]):
                return False
    elif tensor.type == DOUBLE:
        for i in range(tensor.size // 8):
            if not isfinite((<const double*>tensor.data)[i]):
                return False
    elif tensor.type == FLOAT16 or tensor.type == BFLOAT16:
        exponent = 0x7C00 if tensor.type == FLOAT16 else 0x7F80     # all ones: NaN or infinity
        for i in range(tensor.size // 2):
            if ((<const uint16_t*>tensor.data)[i] & exponent) == exponent:
                return False
    return True


cdef class Tap:
    """Sees each call of a model inside the step without the GIL; see ``_tap.pyx``."""

    def __cinit__(self, *args, **kwargs):
        self.deadline = INT64_MAX

    cdef void take(self, const Binding* binding, int64_t latency_ns) noexcept nogil:
        pass

    def ready(self):
        """Called with the GIL after a call in which ``take`` set ``due``."""
        self.due = False

    def tick(self):
        """Called with the GIL before a call that starts at the deadline or later."""
        self.deadline = INT64_MAX

    def sliced(self, tag):
        """Return the tap that counts the calls of a slice."""
        raise ValueError("this monitor keeps no slices")

    @property
    def deadline_ns(self):
        """When ``tick`` is called next, nanoseconds of CLOCK_MONOTONIC."""
        return self.deadline

    @deadline_ns.setter
    def deadline_ns(self, int64_t at):
        self.deadline = at


cdef class Call:
    """Calls one engine, from any thread. ``shoal.agent.runtime.Model`` is one.

    Attributes:
        name: How errors call the model.
        backend, version: Of the engine.
    """

    cdef Engine _engine
    cdef readonly str name
    cdef readonly str backend
    cdef readonly str version
    cdef readonly bint stateful
    cdef tuple _input_names
    cdef tuple _output_names
    cdef Port* _inputs
    cdef Port* _outputs
    cdef Py_ssize_t _inputs_n
    cdef Py_ssize_t _outputs_n
    cdef Lane* _lanes
    cdef Py_ssize_t _lanes_n
    cdef bint _special          # an input is converted or packed: always through a lane
    cdef bint _strings
    cdef bint _nan_refused
    cdef bint _closed
    cdef object _refused
    cdef object _failed
    cdef object _shut
    cdef Tap _tap
    cdef object _monitor
    cdef int64_t _calls
    cdef int64_t _errors
    cdef int64_t[LATENCY_BINS] _latency

    def __init__(
        self, Engine engine not None, *, str name="model", refused=ValueError, failed=RuntimeError,
        closed=RuntimeError, monitor=None, prepare=None, bint nan_refused=False,
    ):
        """Wrap an engine.

        Args:
            engine: What runs.
            name: How errors call it.
            refused: Error class for inputs that do not fit; takes a message and ``hint``.
            failed: … for an engine that fails.
            closed: … for a call after ``close``.
            monitor: A ``Tap``, or anything with observe(inputs, outputs, latency_ns), or None.
            prepare: {input name: (face type, axis, scale list, bias list)}: the caller passes
                another type, and the step converts it to float32 as value * scale + bias.
            nan_refused: Refuse inputs of 16, 32 and 64 bit floats that hold NaN or an infinity.
        """
        if self._engine is not None or self._closed:
            raise RuntimeError("a call is made once")
        self.name, self.backend, self.version = name, engine.backend, engine.version
        self.stateful = engine.stateful
        self._refused, self._failed, self._shut = refused, failed, closed
        self._input_names = tuple([port[0] for port in engine.inputs])
        self._output_names = tuple([port[0] for port in engine.outputs])
        self._inputs_n, self._outputs_n = len(engine.inputs), len(engine.outputs)
        self._inputs = <Port*>calloc(self._inputs_n + self._outputs_n + 1, sizeof(Port))
        if self._inputs is NULL:
            raise MemoryError("no memory for a model's ports")
        self._outputs = self._inputs + self._inputs_n
        for i, port in enumerate((*engine.inputs, *engine.outputs)):
            self._port(&self._inputs[i], port)
        for input_name, entry in (prepare or {}).items():
            self._prepare(&self._inputs[self._input_names.index(input_name)], entry)
        if isinstance(monitor, Tap):
            self._tap = monitor
        else:
            self._monitor = monitor
        self._nan_refused = nan_refused
        self._engine = engine

    cdef int _port(self, Port* port, entry) except -1:
        cdef Tensor shape
        cdef int32_t d
        _, type, dims = entry
        port.type = port.face = type
        port.typenum = typenum_of(type)
        port.ndim = len(dims)
        if port.ndim > DIMS_MAX:
            raise ValueError(f"{port.ndim} axes, {DIMS_MAX} at most")
        shape.ndim = port.ndim
        for d in range(port.ndim):
            port.dims[d] = shape.dims[d] = dims[d]
        port.size = tensor_size(type, tensor_count(&shape)) if tensor_count(&shape) >= 0 else -1
        if type == STRING:
            self._strings = True
            port.size = -1
        elif type == INT4 or type == UINT4:
            self._special = True
        return 0

    cdef int _prepare(self, Port* port, entry) except -1:
        cdef Py_ssize_t c
        face, axis, scale, bias = entry
        if port.type != FLOAT or face not in (FLOAT, UINT8, INT8, UINT16, INT16):
            raise ValueError("only float32 inputs are prepared, from (u)int8, (u)int16 or float32")
        if len(scale) != len(bias) or not scale:
            raise ValueError("scale and bias must have one entry for each channel")
        if len(scale) > 1 and not (0 <= axis < port.ndim and port.dims[axis] == len(scale)):
            raise ValueError(f"axis {axis} does not have {len(scale)} channels")
        port.scale = <float*>calloc(2 * len(scale), sizeof(float))
        if port.scale is NULL:
            raise MemoryError("no memory for a conversion")
        port.bias = port.scale + len(scale)
        port.channels = len(scale)
        port.axis = axis if len(scale) > 1 else -1
        for c in range(port.channels):
            port.scale[c], port.bias[c] = scale[c], bias[c]
        port.face = face
        port.typenum = typenum_of(face)
        self._special = True
        return 0

    def __dealloc__(self):
        cdef Py_ssize_t i
        self._free_lanes()
        if self._inputs is not NULL:
            for i in range(self._inputs_n):
                free(self._inputs[i].scale)
            free(self._inputs)

    # ---- the faces -----------------------------------------------------------------------------

    def infer(self, inputs, *, slice=None):
        """Run the model once.

        Args:
            inputs: A mapping with one C-contiguous NumPy array for each input, of exactly its
                dtype and shape (any size where the shape says -1). Text inputs are arrays of
                ``str`` or ``bytes``; 4-bit ones int8 or uint8, one value each; bfloat16 and
                8-bit floats the raw bits as uint16 and uint8.
            slice: Tag under which the monitor counts this call, up to 40 characters, with few
                distinct values (a shift, a machine, a group of people); None: no tag.

        Returns:
            A dict with one array for each output, owned by the caller.

        Raises:
            ModelInputError: A name, dtype, shape or layout is wrong; says what was expected.
            ModelClosedError: The model was closed.
            ModelError: The engine failed in the middle; the model stays usable.
            ValueError: The tag is too long, or the model has no monitor that keeps slices.
        """
        return self._arrays(inputs, None, self._tap if slice is None else self._sliced(slice))

    def infer_into(self, inputs, outputs, *, slice=None):
        """Run the model once and write results into arrays that the caller made.

        Args:
            inputs: As in ``infer``.
            outputs: A mapping from some or all outputs to C-contiguous, writeable arrays of
                their dtype and of the shape that the result has.
            slice: As in ``infer``.

        Raises:
            ModelInputError: As in ``infer``, or an output array does not fit; if that was seen
                only after the run, arrays before it in the model's order were written.
            ModelClosedError: The model was closed.
            ModelError: The engine failed in the middle; the arrays' content is undefined.
        """
        self._arrays(inputs, outputs, self._tap if slice is None else self._sliced(slice))

    def infer_raw(self, inputs, outputs=None, *, slice=None):
        """Run the model once on bytes, without NumPy; for servers.

        Args:
            inputs: {name: (shape, bytes-like)}: C-contiguous, little-endian. A text tensor holds
                for each element its length, 4 bytes little-endian, and its bytes; a 4-bit one
                two values in a byte.
            outputs: Names of the outputs that are wanted; None: all.
            slice: As in ``infer``.

        Returns:
            {name: (shape, bytes)}, in the model's order, or that of ``outputs``.

        Raises:
            As ``infer``.
        """
        cdef Tensor[NEAR] near
        cdef Py_buffer[NEAR] near_views
        cdef Tensor* given = near
        cdef Py_buffer* views = near_views
        cdef Py_ssize_t i, viewed = 0
        cdef int64_t total = 0
        cdef Tap tap = self._tap if slice is None else self._sliced(slice)
        if self._closed:
            raise self._shut(f"model {self.name} is closed")
        if self._monitor is not None:
            return self._raw_watched(inputs, outputs)
        if outputs is not None:
            for name in outputs:
                if name not in self._output_names:
                    raise self._refused(
                        f"model {self.name} has the outputs {sorted(self._output_names)}, "
                        f"not {name!r:.80}"
                    )
        if self._inputs_n > NEAR:
            given = <Tensor*>calloc(self._inputs_n, sizeof(Tensor))
            views = <Py_buffer*>calloc(self._inputs_n, sizeof(Py_buffer))
        try:
            if given is NULL or views is NULL:
                raise MemoryError("no memory for a call")
            if len(inputs) != self._inputs_n:
                self._names(inputs)
            for i in range(self._inputs_n):
                if self._input_names[i] not in inputs:
                    self._names(inputs)
                shape, data = inputs[self._input_names[i]]
                PyObject_GetBuffer(data, &views[i], PyBUF_SIMPLE)
                viewed += 1
                self._take_raw(i, shape, &views[i], &given[i])
                total += given[i].size
            return self._run(given, total, True, None, outputs, tap)
        finally:
            for i in range(viewed):
                PyBuffer_Release(&views[i])
            if self._inputs_n > NEAR:
                free(given)
                free(views)

    def time_ns(self, inputs, Py_ssize_t repeats):
        """Run the model ``repeats`` times on the same arrays; return each run's nanoseconds.

        Nothing is copied or counted between runs, and the GIL is not held: what is timed is the
        engine.
        """
        cdef Tensor[NEAR] near
        cdef Tensor* given = near
        cdef Reason reason
        cdef Lane* lane
        cdef Py_ssize_t r
        cdef int64_t start
        cdef int code = 0
        cdef Engine engine = self._engine
        cdef int64_t[::1] found
        if self._closed:
            raise self._shut(f"model {self.name} is closed")
        if self._inputs_n > NEAR:
            given = <Tensor*>calloc(self._inputs_n, sizeof(Tensor))
            if given is NULL:
                raise MemoryError("no memory for a call")
        try:
            held = self._check(inputs, given)
            lane = self._lane_for(given)
            times = array("q", bytes(8 * repeats))
            found = times
            with nogil:
                code = self._fill(lane, given, &reason)
                for r in range(repeats):
                    if code:
                        break
                    start = now_ns()
                    code = engine.run(lane.binding, &reason)
                    found[r] = now_ns() - start
            self._give_back(lane)
            if code:
                self._raise(&reason)
            return times.tolist()
        finally:
            if self._inputs_n > NEAR:
                free(given)

    def counters(self):
        """Return (calls, errors, list of LATENCY_BINS counts) since the model was loaded."""
        cdef int i
        return self._calls, self._errors, [self._latency[i] for i in range(LATENCY_BINS)]

    @property
    def closed(self):
        """Whether ``close`` was called."""
        return self._closed

    def close(self):
        """Refuse further calls; memory is free when the last call that runs ends."""
        self._closed = True
        self._free_lanes()
        self._engine = None

    # ---- inside --------------------------------------------------------------------------------

    cdef object _arrays(self, inputs, into, Tap tap):
        cdef Tensor[NEAR] near
        cdef Tensor* given = near
        cdef Py_ssize_t i
        cdef int64_t total = 0
        if self._closed:
            raise self._shut(f"model {self.name} is closed")
        if into is not None:
            self._check_into(into)
        if self._inputs_n > NEAR:
            given = <Tensor*>calloc(self._inputs_n, sizeof(Tensor))
            if given is NULL:
                raise MemoryError("no memory for a call")
        try:
            held = self._check(inputs, given)
            for i in range(self._inputs_n):
                total += given[i].size
            return self._run(given, total, False, into, inputs, tap)
        finally:
            if self._inputs_n > NEAR:
                free(given)

    cdef object _check(self, inputs, Tensor* given):
        """Fill `given` from arrays; return what must be kept until the call is over."""
        cdef Py_ssize_t i
        cdef int32_t d
        cdef PyObject* item
        cdef PyArrayObject* ndarray
        cdef const Port* port
        cdef Tensor* tensor
        cdef dict plain
        need_numpy()
        if PyDict_CheckExact(inputs):
            plain = inputs
        else:
            try:
                plain = dict(inputs)
            except (TypeError, ValueError):
                raise self._refused(
                    f"model {self.name} takes a mapping of names to arrays, "
                    f"not {type(inputs).__name__}"
                ) from None
        if PyDict_Size(plain) != self._inputs_n:
            self._names(plain)
        held = plain.copy() if self._inputs_n > 1 else None
        for i in range(self._inputs_n):
            item = PyDict_GetItemWithError(plain, self._input_names[i])
            if item is NULL:
                self._names(plain)
            value = <object>item
            if self._inputs_n == 1:
                held = value
            port, tensor = &self._inputs[i], &given[i]
            if not PyArray_Check(value):
                raise self._refused(
                    f"input {self._input_names[i]} of {self.name} must be a numpy array, "
                    f"not {type(value).__name__}"
                )
            ndarray = <PyArrayObject*>item
            if port.type == STRING:
                held = self._take_strings(i, value, tensor, held)
                continue
            if PyArray_TYPE(ndarray) != port.typenum and not PyArray_EquivTypenums(
                PyArray_TYPE(ndarray), port.typenum
            ):
                self._wrong_dtype("input", self._input_names[i], port, value)
            if PyArray_NDIM(ndarray) != port.ndim:
                self._wrong_shape("input", self._input_names[i], port, value.shape)
            for d in range(port.ndim):
                tensor.dims[d] = PyArray_DIMS(ndarray)[d]
                if port.dims[d] >= 0 and tensor.dims[d] != port.dims[d]:
                    self._wrong_shape("input", self._input_names[i], port, value.shape)
            if not PyArray_ISCARRAY_RO(ndarray):
                self._wrong_layout("input", self._input_names[i], port, value)
            tensor.data = PyArray_DATA(ndarray)
            tensor.size = PyArray_NBYTES(ndarray)
            tensor.type, tensor.ndim, tensor.owner = port.face, port.ndim, NULL
            if port.type == INT4 or port.type == UINT4:
                tensor.type = INT8      # one value each: not packed yet
        return held

    cdef object _take_strings(self, Py_ssize_t i, value, Tensor* tensor, held):
        cdef const Port* port = &self._inputs[i]
        cdef int32_t d
        if value.dtype.kind not in "OUS":
            self._wrong_dtype("input", self._input_names[i], port, value)
        if value.ndim != port.ndim or any(
            port.dims[d] >= 0 and value.shape[d] != port.dims[d] for d in range(port.ndim)
        ):
            self._wrong_shape("input", self._input_names[i], port, value.shape)
        parts = []
        for element in value.reshape(-1).tolist():
            if isinstance(element, str):
                element = element.encode()
            elif not isinstance(element, bytes):
                raise self._refused(
                    f"input {self._input_names[i]} of {self.name} holds {type(element).__name__}; "
                    "a text input takes str or bytes"
                )
            parts.append(len(element).to_bytes(4, "little"))
            parts.append(element)
        text = b"".join(parts)
        tensor.data = PyBytes_AS_STRING(text)
        tensor.size = len(text)
        tensor.type, tensor.ndim, tensor.owner = STRING, port.ndim, NULL
        for d in range(port.ndim):
            tensor.dims[d] = value.shape[d]
        return held, text

    cdef int _take_raw(
        self, Py_ssize_t i, shape, const Py_buffer* view, Tensor* tensor
    ) except -1:
        cdef const Port* port = &self._inputs[i]
        cdef int32_t d
        cdef int64_t want
        if len(shape) != port.ndim:
            self._wrong_shape("input", self._input_names[i], port, shape)
        for d in range(port.ndim):
            if type(shape[d]) is not int or not 0 <= shape[d] <= DIM_MAX:
                self._wrong_shape("input", self._input_names[i], port, shape)
            tensor.dims[d] = shape[d]
            if tensor.dims[d] < 0 or port.dims[d] >= 0 and tensor.dims[d] != port.dims[d]:
                self._wrong_shape("input", self._input_names[i], port, shape)
        tensor.data, tensor.size = view.buf, view.len
        tensor.type, tensor.ndim, tensor.owner = port.face, port.ndim, NULL
        if port.type != STRING:
            want = tensor_count(tensor)
            want = tensor_size(port.face, want) if want >= 0 else -1
            if want != view.len:
                raise self._refused(
                    f"input {self._input_names[i]} of {self.name} with shape {tuple(shape)} takes "
                    f"{want} bytes, not {view.len}"
                )
        return 0

    cdef object _raw_watched(self, inputs, outputs):
        """Go through arrays, because a monitor wants to see them."""
        from . import call
        arrays = {}
        self._names(inputs)
        for i, name in enumerate(self._input_names):
            arrays[name] = call.from_raw(self._inputs[i].face, *inputs[name])
        found = self.infer(arrays)
        return {
            name: call.to_raw(self._outputs[self._output_names.index(name)].type, found[name])
            for name in (self._output_names if outputs is None else outputs)
        }

    cdef int _check_into(self, into) except -1:
        cdef Py_ssize_t i
        cdef int32_t d
        cdef const Port* port
        need_numpy()
        for name, value in into.items():
            if name not in self._output_names:
                raise self._refused(
                    f"model {self.name} has the outputs {sorted(self._output_names)}, "
                    f"not {name!r:.80}"
                )
            i = self._output_names.index(name)
            port = &self._outputs[i]
            if not PyArray_Check(value) or port.type == STRING:
                raise self._refused(f"output {name} of {self.name} must be a numpy array of numbers")
            if not PyArray_EquivTypenums(PyArray_TYPE(<PyArrayObject*>value), port.typenum):
                self._wrong_dtype("output", name, port, value)
            if value.ndim != port.ndim or any(
                [port.dims[d] >= 0 and value.shape[d] != port.dims[d] for d in range(port.ndim)]
            ):
                self._wrong_shape("output", name, port, value.shape)
            if not PyArray_ISCARRAY(<PyArrayObject*>value):
                self._wrong_layout("output", name, port, value)
        return 0

    cdef Tap _sliced(self, tag):
        if self._tap is None:
            raise ValueError(f"model {self.name} has no monitor that keeps slices")
        return self._tap.sliced(tag)

    cdef object _run(self, Tensor* given, int64_t total, bint raw, into, wanted, Tap tap):
        """Run on checked tensors; `wanted` are output names if raw, else the inputs as given."""
        cdef Reason reason
        cdef Engine engine = self._engine
        cdef Lane* lane = NULL
        cdef Binding* binding
        cdef Tensor[NEAR] near
        cdef Tensor* made = near
        cdef Tensor viewed
        cdef Py_ssize_t i
        cdef int64_t took = 0, start
        cdef int code
        cdef list fresh = None
        if engine is None:
            raise self._shut(f"model {self.name} is closed")
        for i in range(self._outputs_n):
            total += self._outputs[i].size if self._outputs[i].size > 0 else 0
        if self._special or (total <= LANE_BYTES and not self._strings):
            lane = self._lane_for(given)
            binding = lane.binding
        else:
            if self._outputs_n > NEAR:
                made = <Tensor*>calloc(self._outputs_n, sizeof(Tensor))
                if made is NULL:
                    raise MemoryError("no memory for a call")
            try:
                fresh = self._outputs_for(made, raw, into)
                binding = engine.bind(given, made, &reason)
            finally:
                if self._outputs_n > NEAR:
                    free(made)
            if binding is NULL:
                self._raise(&reason)
        try:
            start = now_ns()
            if tap is not None and start >= tap.deadline:
                tap.tick()
                start = now_ns()
            with nogil:
                code = self._fill(lane, given, &reason) if lane is not NULL else 0
                if code == 0 and lane is NULL and self._nan_refused:
                    code = self._refuse_nan(binding, &reason)
                if code == 0:
                    code = engine.run(binding, &reason)
                if code == 0:
                    took = now_ns() - start
                    if tap is not None:
                        tap.take(binding, took)
            if code:
                self._raise(&reason)
            self._calls += 1
            self._latency[latency_bin(took)] += 1
            if raw:
                return self._raw_results(binding, fresh, wanted)
            results = self._results(binding, fresh, into)
        finally:
            if lane is not NULL:
                self._give_back(lane)
            else:
                engine.unbind(binding)
            if tap is not None and tap.due:
                tap.ready()
        if self._monitor is not None:
            self._monitor.observe(wanted, results, took)
        return results

    cdef int _refuse_nan(self, const Binding* binding, Reason* reason) noexcept nogil:
        cdef int64_t i
        for i in range(binding.inputs_n):
            if not all_finite(&binding.inputs[i]):
                reason_set(
                    reason, b"an input holds NaN or an infinity, which this model refuses", True
                )
                return -1
        return 0

    cdef int _fill(self, Lane* lane, const Tensor* given, Reason* reason) noexcept nogil:
        """Copy or convert the inputs into the lane."""
        cdef Py_ssize_t i
        cdef const Port* port
        for i in range(self._inputs_n):
            port = &self._inputs[i]
            if port.scale is not NULL:
                convert(port, &given[i], <float*>lane.binding.inputs[i].data)
            elif given[i].type != port.type:
                if not pack(&given[i], port.type == INT4, <uint8_t*>lane.binding.inputs[i].data):
                    reason_set(reason, b"a 4-bit input holds values beyond its range", True)
                    return -1
            else:
                memcpy(lane.binding.inputs[i].data, given[i].data, given[i].size)
        return self._refuse_nan(lane.binding, reason) if self._nan_refused else 0

    cdef Lane* _lane_for(self, const Tensor* given) except NULL:
        """Return a lane for inputs of these shapes; `_give_back` takes it again."""
        cdef Lane* lane = self._lanes
        cdef Py_ssize_t i
        cdef bint same = True
        if lane is not NULL:
            self._lanes = lane.next
            self._lanes_n -= 1
            for i in range(self._inputs_n):
                if self._inputs[i].size < 0 and memcmp(
                    lane.binding.inputs[i].dims, given[i].dims, given[i].ndim * sizeof(int64_t)
                ):
                    same = False
            if same:
                return lane
            self._drop(lane)
        return self._new_lane(given)

    cdef Lane* _new_lane(self, const Tensor* given) except NULL:
        cdef Lane* lane = <Lane*>calloc(1, sizeof(Lane))
        cdef Tensor* tensors = <Tensor*>calloc(
            self._inputs_n + self._outputs_n + 1, sizeof(Tensor)
        )
        cdef Reason reason
        cdef Engine engine = self._engine
        cdef Py_ssize_t i
        cdef int64_t total = ALIGN
        cdef void* memory = NULL
        cdef char* at
        cdef Binding* binding = NULL
        if lane is NULL or tensors is NULL:
            free(lane)
            free(tensors)
            raise MemoryError("no memory for a call")
        for i in range(self._inputs_n):
            tensors[i] = given[i]
            tensors[i].type = self._inputs[i].type
            tensors[i].size = tensor_size(self._inputs[i].type, tensor_count(&given[i]))
            total += padded(tensors[i].size)
        for i in range(self._outputs_n):
            self._output_tensor(&tensors[self._inputs_n + i], i)
            if self._outputs[i].size >= 0:
                total += padded(self._outputs[i].size)
        if posix_memalign(&memory, ALIGN, total):
            free(lane)
            free(tensors)
            raise MemoryError("no memory for a call")
        memset(memory, 0, total)
        at = <char*>memory
        for i in range(self._inputs_n + self._outputs_n):
            if i < self._inputs_n or self._outputs[i - self._inputs_n].size >= 0:
                tensors[i].data = at
                at += padded(tensors[i].size)
        if engine is not None:
            binding = engine.bind(tensors, tensors + self._inputs_n, &reason)
        free(tensors)
        if binding is NULL:
            free(memory)
            free(lane)
            if engine is None:
                raise self._shut(f"model {self.name} is closed")
            self._raise(&reason)
        lane.binding, lane.memory = binding, <char*>memory
        Py_INCREF(engine)
        lane.engine = <PyObject*>engine
        return lane

    cdef void _output_tensor(self, Tensor* tensor, Py_ssize_t i) noexcept:
        cdef const Port* port = &self._outputs[i]
        tensor.data = tensor.owner = NULL
        tensor.type, tensor.ndim = port.type, port.ndim
        tensor.size = port.size if port.size >= 0 else 0
        memcpy(tensor.dims, port.dims, sizeof(port.dims))

    cdef void _give_back(self, Lane* lane) noexcept:
        cdef Py_ssize_t i
        cdef bint large = False     # what the engine placed stays until the next run: not gigabytes
        for i in range(self._outputs_n):
            if lane.binding.outputs[i].owner is not NULL:
                large = large or lane.binding.outputs[i].size > LANE_BYTES
        if self._closed or large or self._lanes_n >= LANES_MAX:
            self._drop(lane)
            return
        lane.next = self._lanes
        self._lanes = lane
        self._lanes_n += 1

    cdef void _drop(self, Lane* lane) noexcept:
        cdef Engine engine = <Engine>lane.engine
        engine.unbind(lane.binding)
        Py_DECREF(engine)
        free(lane.memory)
        free(lane)

    cdef void _free_lanes(self) noexcept:
        cdef Lane* lane
        while self._lanes is not NULL:
            lane = self._lanes
            self._lanes = lane.next
            self._drop(lane)
        self._lanes_n = 0

    cdef list _outputs_for(self, Tensor* made, bint raw, into):
        """Prepare outputs of a call without a lane; return the arrays or bytes they are in."""
        cdef Py_ssize_t i
        cdef const Port* port
        cdef list fresh = []
        for i in range(self._outputs_n):
            port = &self._outputs[i]
            self._output_tensor(&made[i], i)
            value = None
            if port.size >= 0:
                if raw:
                    value = PyBytes_FromStringAndSize(NULL, port.size)
                    made[i].data = PyBytes_AS_STRING(value)
                elif into is None or self._output_names[i] not in into:
                    value = PyArray_SimpleNew(port.ndim, <Py_ssize_t*>port.dims, port.typenum)
                    made[i].data = PyArray_DATA(<PyArrayObject*>value)
                else:
                    value = into[self._output_names[i]]
                    made[i].data = PyArray_DATA(<PyArrayObject*>value)
            fresh.append(value)
        return fresh

    cdef dict _results(self, const Binding* binding, list fresh, into):
        """Return the outputs as arrays: those already made, else copies."""
        cdef Py_ssize_t i
        cdef const Tensor* tensor
        cdef dict results = {}
        for i in range(self._outputs_n):
            name = self._output_names[i]
            if fresh is not None and fresh[i] is not None:
                results[name] = fresh[i]
                continue
            tensor = &binding.outputs[i]
            if into is None:
                results[name] = self._array(i, tensor)
            elif name in into:
                self._write_into(i, tensor, into[name])
                results[name] = into[name]
        return results

    cdef object _array(self, Py_ssize_t i, const Tensor* tensor):
        cdef const Port* port = &self._outputs[i]
        cdef PyArrayObject* array
        if port.type == STRING:
            from . import call
            shape = tuple([tensor.dims[d] for d in range(tensor.ndim)])
            return call.decode_strings(
                PyBytes_FromStringAndSize(<const char*>tensor.data, tensor.size), shape
            )
        value = PyArray_SimpleNew(tensor.ndim, <Py_ssize_t*>tensor.dims, port.typenum)
        array = <PyArrayObject*>value
        if port.type == INT4 or port.type == UINT4:
            unpack(
                <const uint8_t*>tensor.data, tensor_count(tensor), port.type == INT4,
                <int8_t*>PyArray_DATA(array),
            )
        elif tensor.size:
            memcpy(PyArray_DATA(array), tensor.data, tensor.size)
        return value

    cdef int _write_into(self, Py_ssize_t i, const Tensor* tensor, value) except -1:
        cdef const Port* port = &self._outputs[i]
        cdef PyArrayObject* array = <PyArrayObject*>value
        cdef int32_t d
        shape = tuple([tensor.dims[d] for d in range(tensor.ndim)])
        if value.shape != shape:
            raise self._refused(
                f"output {self._output_names[i]} of {self.name} came with shape {shape}, "
                f"not {value.shape}"
            )
        if port.type == INT4 or port.type == UINT4:
            unpack(
                <const uint8_t*>tensor.data, tensor_count(tensor), port.type == INT4,
                <int8_t*>PyArray_DATA(array),
            )
        elif tensor.size:
            memcpy(PyArray_DATA(array), tensor.data, tensor.size)
        return 0

    cdef dict _raw_results(self, const Binding* binding, list fresh, wanted):
        cdef Py_ssize_t i
        cdef int32_t d
        cdef const Tensor* tensor
        cdef dict results = {}
        for name in (self._output_names if wanted is None else wanted):
            i = self._output_names.index(name)
            tensor = &binding.outputs[i]
            shape = tuple([tensor.dims[d] for d in range(tensor.ndim)])
            if fresh is not None and fresh[i] is not None:
                results[name] = shape, fresh[i]
            else:
                results[name] = shape, PyBytes_FromStringAndSize(
                    <const char*>tensor.data, tensor.size
                )
        return results

    cdef int _raise(self, const Reason* reason) except -1:
        text = reason.text.decode("utf-8", "replace")
        if reason.refused:
            raise self._refused(f"model {self.name} refuses its inputs: {text:.500}")
        self._errors += 1
        raise self._failed(f"model {self.name} failed: {text:.500}")

    cdef int _names(self, inputs) except -1:
        given = sorted(str(name) for name in inputs)
        if given != sorted(self._input_names):
            raise self._refused(
                f"model {self.name} takes the inputs {sorted(self._input_names)}, not {given!s:.500}"
            )
        return 0

    cdef int _wrong_dtype(self, str what, name, const Port* port, value) except -1:
        from . import call
        raise self._refused(
            f"{what} {name} of {self.name} must be {call.dtype_name(port.face)}, not {value.dtype}",
            **hint(self._refused, "convert it where its meaning is known; shoal never casts"),
        )

    cdef int _wrong_shape(self, str what, name, const Port* port, shape) except -1:
        cdef int32_t d
        want = tuple([port.dims[d] for d in range(port.ndim)])
        raise self._refused(
            f"{what} {name} of {self.name} must have shape {want}, not {tuple(shape)}"
        )

    cdef int _wrong_layout(self, str what, name, const Port* port, value) except -1:
        from . import call
        if not value.dtype.isnative:
            self._wrong_dtype(what, name, port, value)
        if what == "output" and not value.flags.writeable:
            raise self._refused(f"output {name} of {self.name} is read-only")
        raise self._refused(
            f"{what} {name} of {self.name} is not C-contiguous or not aligned",
            **hint(self._refused, "pass numpy.ascontiguousarray(x)"),
        )


cdef dict hint(kind, str text):
    return {"hint": text} if hasattr(kind, "hint") or hasattr(kind, "code") else {}


cdef int need_numpy() except -1:
    global numpy_ready
    if not numpy_ready:
        _import_array()
        numpy_ready = True
    return 0


def bin_of_ns(int64_t latency_ns):
    """Return the histogram bin of a latency; the same as the records' ``proto.latency``."""
    return latency_bin(latency_ns)
