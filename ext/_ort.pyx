# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Run ONNX models through ONNX Runtime's C interface, without its Python module and the GIL.

    open_library(path) -> once per process: dlopen, version, table, environment
    OrtEngine(model) -> session;  bind -> OrtValues on the caller's memory;  run -> one C call

Checks, names and the search for the library stand in ``ort.py``.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memchr, memcpy, strdup

from ._engine cimport (
    DIMS_MAX, STRING, Binding, Engine, Reason, Tensor, binding_free, binding_new, reason_set,
    tensor_count, tensor_size,
)
from ._ort_api cimport *

cdef extern from "dlfcn.h" nogil:
    void* dlopen(const char* path, int mode)
    void* dlsym(void* library, const char* name)
    char* dlerror()
    int RTLD_NOW, RTLD_LOCAL

cdef enum:
    TENSORS_MAX = 4096      # inputs or outputs of a model
    API_OLDEST = 20
    API_KNOWN = 32          # what the table was last compared with; newer libraries offer it too

cdef void** table = NULL
cdef OrtEnv* env = NULL
cdef OrtMemoryInfo* cpu = NULL
cdef OrtAllocator* allocator = NULL
cdef str library_version = ""
cdef char nothing = 0       # ORT wants an address even where there is no element


class OrtFailure(Exception):
    """ORT's own words for what went wrong; ``ort.py`` makes a typed error of it."""


cdef int check(OrtStatus* status) except -1:
    """Raise what a status says, and release it; NULL is success."""
    if status is not NULL:
        text = (<of_message>table[GetErrorMessage])(status).decode("utf-8", "replace")
        (<of_release>table[ReleaseStatus])(status)
        raise OrtFailure(text)
    return 0


cdef int fail(OrtStatus* status, Reason* reason) noexcept nogil:
    """Put what a status says into the reason, and release it; return -1."""
    reason_set(
        reason, (<of_message>table[GetErrorMessage])(status),
        (<of_code>table[GetErrorCode])(status) == ORT_INVALID_ARGUMENT,
    )
    (<of_release>table[ReleaseStatus])(status)
    return -1


def open_library(bytes path):
    """Load the library, once per process; return its version.

    Raises:
        OrtFailure: It cannot be loaded, is older than 1.20, or is no ONNX Runtime.
    """
    global table, env, cpu, allocator, library_version
    cdef void* library
    cdef void* symbol
    cdef const OrtApiBase* base
    cdef int minor
    if library_version:
        return library_version
    library = dlopen(path, RTLD_NOW | RTLD_LOCAL)
    if library is NULL:
        raise OrtFailure(dlerror().decode("utf-8", "replace"))
    symbol = dlsym(library, b"OrtGetApiBase")
    if symbol is NULL:
        raise OrtFailure("the library does not export OrtGetApiBase")
    base = (<const OrtApiBase* (*)() noexcept nogil>symbol)()
    # The version first: asked for a table that it does not have, the library prints and gives NULL.
    version = base.GetVersionString().decode("ascii", "replace")
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        raise OrtFailure(f"the library's version {version!r} is not understood") from None
    if major != 1 or minor < API_OLDEST:
        raise OrtFailure(f"ONNX Runtime {version} is not supported; 1.{API_OLDEST} is the oldest")
    table = base.GetApi(minor if minor < API_KNOWN else API_KNOWN)
    if table is NULL:
        raise OrtFailure(f"ONNX Runtime {version} gave no table of functions")
    check((<of_env>table[CreateEnv])(ORT_LOGGING_FATAL, b"shoal", &env))
    check((<of_self>table[DisableTelemetryEvents])(env))
    check((<of_memory>table[CreateCpuMemoryInfo])(ORT_DEVICE_ALLOCATOR, 0, &cpu))
    check((<of_make>table[GetAllocatorWithDefaultOptions])(<void**>&allocator))
    library_version = version
    return version


cdef class OrtEngine(Engine):
    """One ONNX Runtime session on the CPU. Any thread may run it."""

    cdef OrtSession* _session
    cdef const char** _input_names
    cdef const char** _output_names
    cdef int64_t _inputs_n
    cdef int64_t _outputs_n

    def __init__(
        self, const uint8_t[::1] model, *, int threads, bint arena, dict config, unknown=(),
    ):
        """Make the session.

        Args:
            model: A serialized ONNX model with all its weights.
            threads: Threads inside one call.
            arena: Whether the session keeps memory between calls.
            config: Entries of ORT's session configuration.
            unknown: Outputs whose number of axes the model does not say; their shape is (-1,).

        Raises:
            OrtFailure: ORT cannot make a session of it.
        """
        cdef OrtSessionOptions* options = NULL
        cdef OrtStatus* status
        if self._session is not NULL:
            raise RuntimeError("an engine is made once")
        if not library_version:
            raise RuntimeError("open_library comes first")
        check((<of_make>table[CreateSessionOptions])(&options))
        try:
            check((<of_int>table[SetSessionLogSeverityLevel])(options, ORT_LOGGING_FATAL))
            check((<of_int>table[SetSessionGraphOptimizationLevel])(options, ORT_ENABLE_ALL))
            check((<of_int>table[SetIntraOpNumThreads])(options, threads))
            check((<of_int>table[SetInterOpNumThreads])(options, 1))
            check((<of_self>table[EnableCpuMemArena if arena else DisableCpuMemArena])(options))
            for key, value in config.items():
                check((<of_entry>table[AddSessionConfigEntry])(
                    options, key.encode(), value.encode()
                ))
            with nogil:
                status = (<of_session>table[CreateSessionFromArray])(
                    env, &model[0], model.shape[0], options, &self._session
                )
            check(status)
        finally:
            (<of_release>table[ReleaseSessionOptions])(options)
        self.backend = "ort"
        self.version = library_version
        self.inputs = self._ports(
            <of_size>table[SessionGetInputCount], <of_name>table[SessionGetInputName],
            <of_type>table[SessionGetInputTypeInfo], &self._input_names, &self._inputs_n,
        )
        self.outputs = self._ports(
            <of_size>table[SessionGetOutputCount], <of_name>table[SessionGetOutputName],
            <of_type>table[SessionGetOutputTypeInfo], &self._output_names, &self._outputs_n,
        )
        # ORT tells an unknown number of axes as none; such an output is ORT's to place.
        self.outputs = tuple([
            (name, type, (-1,) if name in unknown and shape == () else shape)
            for name, type, shape in self.outputs
        ])

    def __dealloc__(self):
        if self._session is not NULL:
            (<of_release>table[ReleaseSession])(self._session)
        free_names(self._input_names, self._inputs_n)
        free_names(self._output_names, self._outputs_n)

    cdef tuple _ports(
        self, of_size count, of_name name_of, of_type type_of, const char*** names, int64_t* names_n
    ):
        cdef size_t n = 0, i
        cdef char* name = NULL
        check(count(self._session, &n))
        if n > TENSORS_MAX:
            raise OrtFailure(f"{n} inputs or outputs, {TENSORS_MAX} at most")
        names[0] = <const char**>calloc(n + 1, sizeof(char*))
        if names[0] is NULL:
            raise MemoryError("no memory for the names of a model")
        names_n[0] = n
        ports = []
        for i in range(n):
            check(name_of(self._session, i, allocator, &name))
            names[0][i] = strdup(name)
            (<of_free>table[AllocatorFree])(allocator, name)
            if names[0][i] is NULL:
                raise MemoryError("no memory for the names of a model")
            ports.append(self._port(names[0][i].decode("utf-8"), type_of, i))
        return tuple(ports)

    cdef tuple _port(self, str name, of_type type_of, size_t i):
        cdef OrtTypeInfo* info = NULL
        cdef const OrtTensorInfo* tensor = NULL
        cdef int kind = 0, type = 0
        cdef size_t ndim = 0, d
        cdef int64_t[DIMS_MAX] dims
        check(type_of(self._session, i, &info))
        try:
            check((<of_get_int>table[GetOnnxTypeFromTypeInfo])(info, &kind))
            if kind != ONNX_TYPE_TENSOR:
                what = {ONNX_TYPE_SEQUENCE: "a sequence", ONNX_TYPE_MAP: "a map"}.get(
                    kind, "not a dense tensor"
                )
                raise OrtFailure(f"{name} is {what}; only dense tensors are supported")
            check((<of_cast>table[CastTypeInfoToTensorInfo])(info, &tensor))
            check((<of_get_int>table[GetTensorElementType])(tensor, &type))
            check((<of_size>table[GetDimensionsCount])(tensor, &ndim))
            if ndim > DIMS_MAX:
                raise OrtFailure(f"{name} has {ndim} axes, {DIMS_MAX} at most")
            if type != STRING and tensor_size(type, 1) < 0:
                raise OrtFailure(f"{name} has elements of type {type}, which is not supported")
            check((<of_dims>table[GetDimensions])(tensor, dims, ndim))
            return name, type, tuple([dims[d] if dims[d] >= 0 else -1 for d in range(ndim)])
        finally:
            (<of_release>table[ReleaseTypeInfo])(info)

    cdef Binding* bind(
        self, const Tensor* inputs, const Tensor* outputs, Reason* reason
    ) noexcept nogil:
        """Make OrtValues on the tensors' memory; state is one array of them, inputs first."""
        cdef int64_t i
        cdef OrtValue** values
        cdef Binding* binding = binding_new(
            inputs, self._inputs_n, outputs, self._outputs_n, reason
        )
        if binding is NULL:
            return NULL
        values = <OrtValue**>calloc(self._inputs_n + self._outputs_n + 1, sizeof(OrtValue*))
        if values is NULL:
            reason_set(reason, b"no memory for a binding", False)
            binding_free(binding)
            return NULL
        binding.state = values
        for i in range(self._inputs_n):
            if value_wrap(&inputs[i], &values[i], reason) < 0:
                self.unbind(binding)
                return NULL
        for i in range(self._outputs_n):
            if outputs[i].data is not NULL and (
                value_wrap(&outputs[i], &values[self._inputs_n + i], reason) < 0
            ):
                self.unbind(binding)
                return NULL
            if outputs[i].data is NULL:
                binding.outputs[i].size = -1     # marks what the engine places
        return binding

    cdef int run(self, Binding* binding, Reason* reason) noexcept nogil:
        cdef OrtValue** values = <OrtValue**>binding.state
        cdef OrtValue** results = values + self._inputs_n
        cdef OrtStatus* status
        cdef Tensor* output
        cdef int64_t i
        cdef bint placed = False
        for i in range(self._outputs_n):
            output = &binding.outputs[i]
            if output.size < 0 or output.owner is not NULL:
                placed = True
                if results[i] is not NULL:
                    output_drop(output, &results[i])
        status = (<of_run>table[Run])(
            self._session, NULL, self._input_names, <const OrtValue* const*>values, self._inputs_n,
            self._output_names, self._outputs_n, results,
        )
        if status is not NULL:
            return fail(status, reason)
        if placed:
            for i in range(self._outputs_n):
                output = &binding.outputs[i]
                if output.size < 0 and output_read(output, results[i], reason) < 0:
                    return -1
        return 0

    cdef void unbind(self, Binding* binding) noexcept nogil:
        cdef OrtValue** values = <OrtValue**>binding.state
        cdef int64_t i
        for i in range(self._outputs_n):
            if values[self._inputs_n + i] is not NULL:
                output_drop(&binding.outputs[i], &values[self._inputs_n + i])
        for i in range(self._inputs_n):
            if values[i] is not NULL:
                (<of_release>table[ReleaseValue])(values[i])
        free(values)
        binding_free(binding)


cdef void free_names(const char** names, int64_t n) noexcept:
    cdef int64_t i
    if names is not NULL:
        for i in range(n):
            free(<void*>names[i])
        free(names)


cdef int value_wrap(const Tensor* tensor, OrtValue** value, Reason* reason) noexcept nogil:
    """Make an OrtValue on the memory of a tensor; strings are copied, ORT keeps its own."""
    cdef OrtStatus* status
    if tensor.type == STRING:
        return strings_wrap(tensor, value, reason)
    status = (<of_wrap>table[CreateTensorWithDataAsOrtValue])(
        cpu, tensor.data if tensor.data is not NULL else &nothing, tensor.size, tensor.dims,
        tensor.ndim, tensor.type, value,
    )
    return fail(status, reason) if status is not NULL else 0


cdef int strings_wrap(const Tensor* tensor, OrtValue** value, Reason* reason) noexcept nogil:
    """Make a string OrtValue of lengths and bytes; refuse what does not fit in `size`."""
    cdef int64_t count = tensor_count(tensor), i, at = 0, length
    cdef const uint8_t* data = <const uint8_t*>tensor.data
    cdef char* copy = NULL
    cdef const char** starts = NULL
    cdef OrtStatus* status = NULL
    if count < 0 or count > tensor.size // 4:
        reason_set(reason, b"a string tensor ends early", True)
        return -1
    # Each string moves 4 bytes to the left and gets a 0 behind it: the copy is never longer.
    copy = <char*>malloc(tensor.size + 1)
    starts = <const char**>malloc((count + 1) * sizeof(char*))
    if copy is NULL or starts is NULL:
        reason_set(reason, b"no memory for strings", False)
        free(copy)
        free(starts)
        return -1
    for i in range(count):
        length = -1
        if tensor.size - at >= 4:
            length = (
                data[at] | (<int64_t>data[at + 1] << 8) | (<int64_t>data[at + 2] << 16)
                | (<int64_t>data[at + 3] << 24)
            )
        if length < 0 or length > tensor.size - at - 4 or memchr(data + at + 4, 0, length):
            reason_set(
                reason, b"a string tensor ends early" if length < 0
                or length > tensor.size - at - 4 else b"a string holds a NUL character", True,
            )
            free(copy)
            free(starts)
            return -1
        memcpy(copy + at, data + at + 4, length)
        copy[at + length] = 0
        starts[i] = copy + at
        at += 4 + length
    if at != tensor.size:
        reason_set(reason, b"a string tensor is longer than its strings", True)
    else:
        status = (<of_tensor>table[CreateTensorAsOrtValue])(
            allocator, tensor.dims, tensor.ndim, STRING, value
        )
        if status is NULL:
            status = (<of_fill>table[FillStringTensor])(value[0], starts, count)
    free(copy)
    free(starts)
    if at != tensor.size:
        return -1
    return fail(status, reason) if status is not NULL else 0


cdef void output_drop(Tensor* output, OrtValue** value) noexcept nogil:
    """Release a result; one that the engine placed is marked as to be placed again."""
    (<of_release>table[ReleaseValue])(value[0])
    value[0] = NULL
    if output.owner is not NULL:
        if output.type == STRING:
            free(output.owner)
        output.owner = output.data = NULL
        output.size = -1


cdef int output_read(Tensor* output, OrtValue* value, Reason* reason) noexcept nogil:
    """Say where ORT put a result and what shape it has."""
    cdef OrtTensorInfo* info = NULL
    cdef size_t ndim = 0
    cdef int type = 0
    cdef OrtStatus* status = (<of_shape>table[GetTensorTypeAndShape])(value, &info)
    if status is not NULL:
        return fail(status, reason)
    status = (<of_get_int>table[GetTensorElementType])(info, &type)
    if status is NULL:
        status = (<of_size>table[GetDimensionsCount])(info, &ndim)
    if status is NULL and ndim <= DIMS_MAX:
        output.ndim = <int32_t>ndim
        status = (<of_dims>table[GetDimensions])(info, output.dims, ndim)
    (<of_release>table[ReleaseTensorTypeAndShapeInfo])(info)
    if status is not NULL:
        return fail(status, reason)
    if ndim > DIMS_MAX or type != output.type:
        reason_set(reason, b"a result has too many axes, or another type than declared", False)
        return -1
    if type == STRING:
        return strings_read(output, value, reason)
    status = (<of_data>table[GetTensorMutableData])(value, &output.data)
    if status is not NULL:
        return fail(status, reason)
    output.size = tensor_size(type, tensor_count(output))
    output.owner = value
    return 0


cdef int strings_read(Tensor* output, OrtValue* value, Reason* reason) noexcept nogil:
    """Bring a string result into the form of lengths and bytes, in memory of its own."""
    cdef int64_t count = tensor_count(output), i, at = 0, length
    cdef size_t total = 0
    cdef char* text = NULL
    cdef size_t* offsets = NULL
    cdef uint8_t* data
    cdef OrtStatus* status = (<of_size>table[GetStringTensorDataLength])(value, &total)
    if status is not NULL:
        return fail(status, reason)
    data = <uint8_t*>malloc(total + 4 * count + 1)
    text = <char*>malloc(total + 1)
    offsets = <size_t*>malloc((count + 1) * sizeof(size_t))
    if data is NULL or text is NULL or offsets is NULL:
        reason_set(reason, b"no memory for strings", False)
        free(data)
    else:
        status = (<of_content>table[GetStringTensorContent])(value, text, total, offsets, count)
        if status is not NULL:
            free(data)
            fail(status, reason)
        else:
            offsets[count] = total
            for i in range(count):
                length = <int64_t>(offsets[i + 1] - offsets[i])
                data[at] = length & 0xFF
                data[at + 1] = (length >> 8) & 0xFF
                data[at + 2] = (length >> 16) & 0xFF
                data[at + 3] = (length >> 24) & 0xFF
                memcpy(data + at + 4, text + offsets[i], length)
                at += 4 + length
            output.data = output.owner = data
            output.size = at
    free(text)
    free(offsets)
    return 0 if output.owner is not NULL else -1
