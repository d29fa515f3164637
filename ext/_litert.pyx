# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Run .tflite models through LiteRT's C API, opened by path: no import of its Python package.

    Session --bind--> Binding --run: lock, resize, copy in, invoke, copy out, unlock--> outputs

Rule 1: an interpreter is not reentrant, so ``run`` holds the session's mutex.
Rule 2: LiteRT never touches a caller's memory: ``run`` copies to and from LiteRT's own buffers.
        XNNPACK reads up to 16 bytes past an input and wants 64-byte alignment; its buffers have
        both, a caller's seldom. Copying 600 KB takes 20 us, 0.3 % of a call of the model that
        takes them.
Rule 3: everything here runs without the GIL, except for what makes Python objects.
Rule 4: the model was checked by ``tflite.read`` and the library's version by ``litert.library``.
"""

cimport cython
from libc.stdint cimport int32_t, int64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, strdup

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer

from ._engine cimport (
    DIMS_MAX,
    Binding,
    Engine,
    Reason,
    Tensor,
    binding_free,
    binding_new,
    reason_set,
    tensor_count,
    tensor_size,
)
from .errors import KernelError

# in the order of Api's fields
cdef tuple SYMBOLS = (
    b"LiteRtCreateEnvironment",
    b"LiteRtCreateModelFromBuffer",
    b"LiteRtDestroyModel",
    b"LiteRtCreateOptions",
    b"LiteRtDestroyOptions",
    b"LiteRtSetOptionsHardwareAccelerators",
    b"LiteRtCreateOpaqueOptions",
    b"LiteRtAddOpaqueOptions",
    b"LiteRtCreateCompiledModel",
    b"LiteRtDestroyCompiledModel",
    b"LiteRtCompiledModelIsFullyAccelerated",
    b"LiteRtGetNumModelSignatures",
    b"LiteRtGetModelSignature",
    b"LiteRtGetSignatureKey",
    b"LiteRtGetNumSignatureInputs",
    b"LiteRtGetNumSignatureOutputs",
    b"LiteRtGetSignatureInputName",
    b"LiteRtGetSignatureOutputName",
    b"LiteRtGetCompiledModelInputBufferRequirements",
    b"LiteRtGetCompiledModelOutputBufferRequirements",
    b"LiteRtCompiledModelResizeInputTensor",
    b"LiteRtGetCompiledModelOutputTensorLayouts",
    b"LiteRtCreateManagedTensorBufferFromRequirements",
    b"LiteRtDestroyTensorBuffer",
    b"LiteRtGetTensorBufferSize",
    b"LiteRtLockTensorBuffer",
    b"LiteRtUnlockTensorBuffer",
    b"LiteRtRunCompiledModel",
    b"LiteRtCompiledModelGetErrorMessages",
    b"LiteRtCompiledModelClearErrors",
)


cdef const char* status_name(int status) noexcept nogil:
    """Return what LiteRtStatus calls it; the library does not export its own table."""
    if status == 1:
        return "kLiteRtStatusErrorInvalidArgument"
    if status == 2:
        return "kLiteRtStatusErrorMemoryAllocationFailure"
    if status == 3:
        return "kLiteRtStatusErrorRuntimeFailure"
    if status == 4:
        return "kLiteRtStatusErrorMissingInputTensor"
    if status == 5:
        return "kLiteRtStatusErrorUnsupported"
    if status == 6:
        return "kLiteRtStatusErrorNotFound"
    if status == 7:
        return "kLiteRtStatusErrorTimeoutExpired"
    if status == 8:
        return "kLiteRtStatusErrorWrongVersion"
    if status == 10:
        return "kLiteRtStatusErrorAlreadyExists"
    if status == 100:
        return "kLiteRtStatusCancelled"
    if status == 500:
        return "kLiteRtStatusErrorFileIO"
    if status == 501:
        return "kLiteRtStatusErrorInvalidFlatbuffer"
    if status == 502:
        return "kLiteRtStatusErrorDynamicLoading"
    if status == 503:
        return "kLiteRtStatusErrorSerialization"
    if status == 504:
        return "kLiteRtStatusErrorCompilation"
    if status == 1000:
        return "kLiteRtStatusErrorIndexOOB"
    if status == 1001:
        return "kLiteRtStatusErrorInvalidIrType"
    if status == 1002:
        return "kLiteRtStatusErrorInvalidGraphInvariant"
    if status == 4000:
        return "kLiteRtStatusErrorUnsupportedRuntimeVersion"
    if status == 5000:
        return "kLiteRtStatusErrorUnsupportedOpShapeInferer"
    if status == 5001:
        return "kLiteRtStatusErrorShapeInferenceFailed"
    return "kLiteRtStatusErrorUnknown"


class LiteRtError(KernelError):
    """LiteRT refused or failed; the engine, if there is one, can be called again."""

    code = "ext.litert"


cdef class Library:
    """LiteRT's shared library, opened; never closed, for its threads may outlive any caller.

    Args:
        path: Of ``libLiteRt.so``.
        accelerators: Bits of what to look for: 1 CPU, 2 GPU, 4 NPU.
        folder: Where accelerators' libraries are; unused for the CPU.

    Raises:
        LiteRtError: The file cannot be opened, lacks a function, or finds no accelerator.
    """

    cdef Api api
    cdef Handle environment
    cdef bytes folder           # LiteRT keeps the pointer

    def __init__(self, bytes path, int accelerators, bytes folder):
        if self.environment is not NULL:
            raise TypeError("a Library is opened once")
        cdef void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL)
        cdef void** fields = <void**>&self.api
        cdef EnvOption[3] options
        cdef int status
        if library is NULL:
            raise LiteRtError(f"LiteRT's library does not open: {dlerror().decode()}")
        for i, name in enumerate(SYMBOLS):
            fields[i] = dlsym(library, name)
            if fields[i] is NULL:
                raise LiteRtError(f"LiteRT's library has no function {name.decode()}")
        self.folder = folder
        options[0] = EnvOption(LOG_TAG, 0, ANY_INT, 0, LOG_NOTHING)
        options[1] = EnvOption(REGISTER_TAG, 0, ANY_INT, 0, accelerators)
        options[2] = EnvOption(LIBRARIES_TAG, 0, ANY_STRING, 0, <int64_t><char*>self.folder)
        status = self.api.environment_new(3 if accelerators != 1 else 2, options, &self.environment)
        if status:
            raise LiteRtError(f"LiteRT makes no environment: {status_name(status).decode()}")


@cython.no_gc_clear     # __dealloc__ needs the library, and LiteRT the model's bytes
cdef class Session(Engine):
    """One signature of one model, compiled; called by any number of threads, one at a time."""

    cdef Library library
    cdef bytes model_bytes      # LiteRT reads weights from here for as long as the model lives
    cdef Handle model
    cdef Handle options
    cdef Handle compiled
    cdef size_t signature
    cdef Port* ports            # inputs, then outputs
    cdef Handle* handles        # their buffers, as LiteRT wants them
    cdef int64_t inputs_n
    cdef int64_t outputs_n
    cdef bint free_axes         # of any port
    cdef bint ready             # buffers fit the dims of now
    cdef pthread_mutex_t lock
    cdef readonly bint accelerated

    def __cinit__(self, *_, **__):
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        cdef int64_t i
        if self.library is not None:
            if self.ports is not NULL:
                for i in range(self.inputs_n + self.outputs_n):
                    self._drop(&self.ports[i])
            if self.compiled is not NULL:
                self.library.api.compiled_free(self.compiled)
            if self.options is not NULL:
                self.library.api.options_free(self.options)
            if self.model is not NULL:
                self.library.api.model_free(self.model)
        free(self.ports)
        free(self.handles)
        pthread_mutex_destroy(&self.lock)

    def __init__(
        self, Library library, str version, bytes model, str key, dict inputs, dict outputs, *,
        int threads, int accelerators, bint stateful,
    ):
        """Compile a signature.

        Args:
            library: The library, opened for these accelerators.
            version: Of the library.
            model: The file's bytes, checked.
            key: Of the signature; "" for the only graph of a model without signatures.
            inputs: For each name its (ONNX type, LiteRT type, shape, -1 for a free axis).
            outputs: Likewise.
            threads: Of the CPU, >= 1.
            accelerators: Bits: 1 CPU, 2 GPU, 4 NPU.
            stateful: Whether a call changes later ones.

        Raises:
            LiteRtError: LiteRT cannot compile the model; the message has its status.
        """
        if self.library is not None:
            raise TypeError("a Session is made once")
        cdef Reason reason
        cdef const char* start = model
        cdef size_t size = len(model)
        cdef int status
        self.library, self.model_bytes = library, model
        self.backend, self.version, self.stateful = "litert", version, stateful
        with nogil:
            status = library.api.model_new(library.environment, start, size, &self.model)
        self._check(status, "takes no such model")
        names_in, names_out = self._find(key)
        if set(names_in) != set(inputs) or set(names_out) != set(outputs):
            raise LiteRtError(
                f"LiteRT names the ports {names_in} -> {names_out}, the file {[*inputs]} -> "
                f"{[*outputs]}"
            )
        self._lay(names_in, inputs, names_out, outputs)
        self._set(threads, accelerators)
        with nogil:
            status = self._open(&reason)
        if status < 0:
            raise LiteRtError(reason.text.decode(errors="replace"))
        cdef Bool whole = 0
        self._check(library.api.accelerated(self.compiled, &whole), "tells no placement")
        self.accelerated = whole

    cdef _check(self, int status, str what):
        if status:
            raise LiteRtError(f"LiteRT {what}: {status_name(status).decode()}")

    cdef tuple _find(self, str key):
        """Return the names of the inputs and outputs; set the index of the signature."""
        cdef size_t count = 0, i
        cdef Handle found = NULL
        cdef const char* text = NULL
        cdef Api* api = &self.library.api
        cdef list ins = [], outs = []
        self._check(api.signatures_n(self.model, &count), "counts no signatures")
        for i in range(count):
            self._check(api.signature_get(self.model, i, &found), "has no such signature")
            self._check(api.signature_key(found, &text), "has no key of a signature")
            if not key or text.decode() == key:
                break
        else:
            raise LiteRtError(f"LiteRT finds no signature {key!r}")
        self.signature = i
        self._check(api.inputs_n(found, &count), "counts no inputs")
        for i in range(count):
            self._check(api.input_name(found, i, &text), "names no input")
            ins.append(text.decode())
        self._check(api.outputs_n(found, &count), "counts no outputs")
        for i in range(count):
            self._check(api.output_name(found, i, &text), "names no output")
            outs.append(text.decode())
        return ins, outs

    cdef _lay(self, list names_in, dict inputs, list names_out, dict outputs):
        """Set the ports and what the engine says of them."""
        cdef Port* port
        cdef int32_t axis
        cdef int64_t i = 0
        self.inputs_n, self.outputs_n = len(names_in), len(names_out)
        if max(self.inputs_n, self.outputs_n) > PORTS_MAX:
            raise LiteRtError(f"a signature may have {PORTS_MAX} inputs and as many outputs")
        self.ports = <Port*>calloc(self.inputs_n + self.outputs_n + 1, sizeof(Port))
        self.handles = <Handle*>calloc(self.inputs_n + self.outputs_n + 1, sizeof(Handle))
        if self.ports is NULL or self.handles is NULL:
            raise MemoryError
        for name, (onnx, element, shape) in [
            *((name, inputs[name]) for name in names_in),
            *((name, outputs[name]) for name in names_out),
        ]:
            port = &self.ports[i]
            port.onnx, port.type.element, port.rank = onnx, element, len(shape)
            port.type.layout.bits = len(shape)
            for axis in range(len(shape)):
                port.fixed[axis] = shape[axis]
                port.type.layout.dims[axis] = 1 if shape[axis] < 0 else shape[axis]
                if shape[axis] < 0:
                    port.free_axes = self.free_axes = True
            i += 1
        self.inputs = tuple((name, inputs[name][0], inputs[name][2]) for name in names_in)
        self.outputs = tuple((name, outputs[name][0], outputs[name][2]) for name in names_out)

    cdef _set(self, int threads, int accelerators):
        """Make the options of the compilation."""
        cdef Api* api = &self.library.api
        cdef Handle opaque = NULL
        self._check(api.options_new(&self.options), "makes no options")
        self._check(api.options_accelerators(self.options, accelerators), "takes no accelerators")
        # what each kind of option is called, and TOML: how LiteRT passes them between libraries
        for name, text in (
            (b"xnnpack", b"num_threads = %d\n" % threads),
            (b"runtime_options_string", b"error_reporter_mode = 2\n"),  # keep, do not print
        ):
            self._check(api.opaque_new(name, strdup(text), free, &opaque), "makes no options")
            self._check(api.opaque_add(self.options, opaque), "takes no options")

    cdef int _open(self, Reason* reason) noexcept nogil:
        """Compile; return -1 and a reason on failure. Any state of the model is new."""
        cdef Api* api = &self.library.api
        cdef Handle made = NULL
        cdef int64_t i
        cdef int32_t axis
        cdef int status = api.compiled_new(
            self.library.environment, self.model, self.options, &made
        )
        if status:
            return self._fail(reason, b"compiles no such model", status)
        if self.compiled is not NULL:
            for i in range(self.inputs_n + self.outputs_n):
                self._drop(&self.ports[i])
            api.compiled_free(self.compiled)
        self.compiled = made
        for i in range(self.inputs_n):      # a new interpreter has the dims of the file
            for axis in range(self.ports[i].rank):
                if self.ports[i].fixed[axis] < 0:
                    self.ports[i].type.layout.dims[axis] = 1
        self.ready = False
        return self._fit(reason)

    cdef void _drop(self, Port* port) noexcept nogil:
        if port.buffer is not NULL:
            self.library.api.buffer_free(port.buffer)
            port.buffer = NULL

    cdef int _fit(self, Reason* reason) noexcept nogil:
        """Make every port's buffer for the dims of now."""
        cdef Api* api = &self.library.api
        cdef Layout[PORTS_MAX] layouts
        cdef Handle needs = NULL
        cdef Port* port
        cdef size_t room = 0
        cdef int64_t i, count
        cdef int32_t axis
        cdef int status = 0
        self.ready = False
        # makes LiteRT allocate now, so that an operator it cannot prepare is known at once
        status = api.layouts(self.compiled, self.signature, self.outputs_n, layouts, 1)
        if status:
            return self._fail(reason, b"cannot prepare the model", status)
        for i in range(self.inputs_n + self.outputs_n):
            port = &self.ports[i]
            self._drop(port)
            if i >= self.inputs_n:
                memcpy(&port.type.layout, &layouts[i - self.inputs_n], sizeof(Layout))
                port.type.layout.bits &= 127    # no strides
                if not self._fits(port):
                    reason_set(reason, b"an output has another shape than the file says", False)
                    return -1
            count = 1
            for axis in range(port.rank):
                count *= port.type.layout.dims[axis]
            port.size = tensor_size(port.onnx, count)
            if i < self.inputs_n:
                status = api.input_needs(self.compiled, self.signature, i, &needs)
            else:
                status = api.output_needs(
                    self.compiled, self.signature, i - self.inputs_n, &needs
                )
            if status:
                return self._fail(reason, b"has no needs of a tensor", status)
            status = api.buffer_new(
                self.library.environment, &port.type, needs, &port.buffer
            )
            if status:
                port.buffer = NULL
                return self._fail(reason, b"makes no buffer", status)
            status = api.buffer_size(port.buffer, &room)
            if status or <int64_t>room < port.size:
                return self._fail(reason, b"makes too small a buffer", status)
            self.handles[i] = port.buffer
        self.ready = True
        return 0

    cdef bint _fits(self, const Port* port) noexcept nogil:
        """Return whether the shape that LiteRT prepared is one that the file allows."""
        cdef int32_t axis
        if <int32_t>port.type.layout.bits != port.rank:
            return False
        for axis in range(port.rank):
            if port.type.layout.dims[axis] < 0:
                return False
            if port.fixed[axis] >= 0 and port.type.layout.dims[axis] != port.fixed[axis]:
                return False
        return True

    cdef int _resize(self, Binding* binding, Reason* reason) noexcept nogil:
        """Give the inputs the binding's dims."""
        cdef Api* api = &self.library.api
        cdef Port* port
        cdef int64_t i
        cdef int32_t axis
        cdef bint same = self.ready
        cdef int[DIMS_MAX] dims
        cdef int status
        for i in range(self.inputs_n):
            port = &self.ports[i]
            for axis in range(binding.inputs[i].ndim):
                same = same and port.type.layout.dims[axis] == binding.inputs[i].dims[axis]
        if same:
            return 0
        self.ready = False
        for i in range(self.inputs_n):
            port = &self.ports[i]
            if not port.free_axes:
                continue
            for axis in range(port.rank):
                dims[axis] = <int>binding.inputs[i].dims[axis]
            status = api.resize(self.compiled, self.signature, i, dims, port.rank)
            if status:
                self._fail(reason, b"takes no such shape", status)
                reason.refused = True
                return -1
            for axis in range(port.rank):
                port.type.layout.dims[axis] = dims[axis]
        return self._fit(reason)

    cdef int _fail(self, Reason* reason, const char* what, int status) noexcept nogil:
        """Fill the reason with LiteRT's status and messages; return -1."""
        cdef Api* api = &self.library.api
        cdef char* said = NULL
        if self.compiled is not NULL and api.messages(self.compiled, &said):
            said = NULL
        if said is not NULL and said[0]:
            snprintf(
                reason.text, sizeof(reason.text), "LiteRT %s: %s: %s", what,
                status_name(status), said,
            )
        else:
            snprintf(
                reason.text, sizeof(reason.text), "LiteRT %s: %s", what, status_name(status)
            )
        reason.refused = False
        free(said)
        if self.compiled is not NULL:
            api.messages_clear(self.compiled)
        return -1

    cdef Binding* bind(
        self, const Tensor* inputs, const Tensor* outputs, Reason* reason
    ) noexcept nogil:
        cdef Binding* binding
        cdef Port* port
        cdef const Tensor* tensor
        cdef int64_t i
        cdef int32_t axis
        cdef int64_t count
        if self.compiled is NULL:
            reason_set(reason, b"this engine has no model", False)
            return NULL
        for i in range(self.inputs_n + self.outputs_n):
            port = &self.ports[i]
            tensor = &inputs[i] if i < self.inputs_n else &outputs[i - self.inputs_n]
            if i >= self.inputs_n and (tensor.data is NULL or port.free_axes):
                continue
            if tensor.type != port.onnx or tensor.ndim != port.rank:
                reason_set(reason, b"a tensor has another type or rank than the model's", True)
                return NULL
            for axis in range(tensor.ndim):
                if tensor.dims[axis] != port.fixed[axis] and port.fixed[axis] >= 0:
                    reason_set(reason, b"a tensor has another shape than the model's", True)
                    return NULL
                if tensor.dims[axis] > 0x7FFFFFFF:
                    reason_set(reason, b"an axis is beyond 2147483647", True)
                    return NULL
            count = tensor_count(tensor)
            if count < 0 or tensor.size != tensor_size(tensor.type, count):
                reason_set(reason, b"a tensor's bytes do not fit its shape", True)
                return NULL
        binding = binding_new(inputs, self.inputs_n, outputs, self.outputs_n, reason)
        if binding is NULL:
            return NULL
        binding.state = calloc(self.outputs_n + 1, sizeof(Room))
        if binding.state is NULL:
            binding_free(binding)
            reason_set(reason, b"no memory for a binding", False)
            return NULL
        return binding

    cdef void unbind(self, Binding* binding) noexcept nogil:
        cdef Room* rooms = <Room*>binding.state
        cdef int64_t i
        for i in range(binding.outputs_n):
            if rooms[i]:
                free(binding.outputs[i].data)
        free(rooms)
        binding_free(binding)

    cdef int run(self, Binding* binding, Reason* reason) noexcept nogil:
        cdef int done
        pthread_mutex_lock(&self.lock)
        done = self._run(binding, reason)
        pthread_mutex_unlock(&self.lock)
        return done

    cdef int _run(self, Binding* binding, Reason* reason) noexcept nogil:
        cdef Api* api = &self.library.api
        cdef int64_t i
        cdef int status
        cdef void* data = NULL
        if self.free_axes and self._resize(binding, reason) < 0:
            return -1
        if not self.ready and self._fit(reason) < 0:
            return -1
        for i in range(self.inputs_n):
            status = api.buffer_lock(self.ports[i].buffer, &data, LOCK_WRITE)
            if status:
                return self._fail(reason, b"locks no input", status)
            memcpy(data, binding.inputs[i].data, self.ports[i].size)
            api.buffer_unlock(self.ports[i].buffer)
        status = api.run(
            self.compiled, self.signature, self.inputs_n, self.handles,
            self.outputs_n, self.handles + self.inputs_n,
        )
        if status:
            return self._fail(reason, b"runs no such inputs", status)
        for i in range(self.outputs_n):
            if self._give(&self.ports[self.inputs_n + i], binding, i, reason) < 0:
                return -1
        return 0

    cdef int _give(
        self, Port* port, Binding* binding, int64_t i, Reason* reason
    ) noexcept nogil:
        """Copy an output to where the binding wants it, with its shape."""
        cdef Api* api = &self.library.api
        cdef Room* room = <Room*>binding.state + i
        cdef Tensor* tensor = &binding.outputs[i]
        cdef void* data = NULL
        cdef int32_t axis
        cdef int status
        if tensor.data is NULL or (room[0] and room[0] < port.size):
            free(tensor.data)
            room[0] = port.size if port.size else 1
            tensor.data = malloc(room[0])
            if tensor.data is NULL:
                room[0] = 0
                reason_set(reason, b"no memory for an output", False)
                return -1
        elif not room[0] and tensor.size != port.size:
            reason_set(reason, b"an output's place has another size than the output", True)
            return -1
        status = api.buffer_lock(port.buffer, &data, LOCK_READ)
        if status:
            return self._fail(reason, b"locks no output", status)
        memcpy(tensor.data, data, port.size)
        api.buffer_unlock(port.buffer)
        tensor.size = port.size
        tensor.type = port.onnx
        tensor.ndim = port.rank
        for axis in range(tensor.ndim):
            tensor.dims[axis] = port.type.layout.dims[axis]
        return 0

    def reset(self):
        """Forget the state that calls built up: compile anew, as after loading.

        Costs as much as compiling. Waits for a call that is running.

        Raises:
            LiteRtError: LiteRT cannot compile it again; the engine keeps its state.
        """
        cdef Reason reason
        cdef int done
        with nogil:
            pthread_mutex_lock(&self.lock)
            done = self._open(&reason)
            pthread_mutex_unlock(&self.lock)
        if done < 0:
            raise LiteRtError(reason.text.decode(errors="replace"))

    def call(self, inputs):
        """Run once, for tools and tests; programs go through the runtime's model.

        Args:
            inputs: For each input its shape and its bytes, little-endian and in C order.

        Returns:
            For each output its shape and its bytes.

        Raises:
            LiteRtError: The inputs do not fit, or LiteRT failed.
        """
        cdef Tensor[PORTS_MAX] given
        cdef Tensor[PORTS_MAX] wanted
        cdef Py_buffer[PORTS_MAX] views
        cdef Binding* binding
        cdef Reason reason
        cdef int64_t i, held = 0
        cdef int done = -1
        if len(inputs) != self.inputs_n:
            raise LiteRtError(f"the model has {self.inputs_n} inputs, not {len(inputs)}")
        try:
            for i in range(self.inputs_n):
                shape, data = inputs[i]
                if len(shape) > DIMS_MAX:
                    raise LiteRtError(f"a tensor has {DIMS_MAX} axes at most")
                PyObject_GetBuffer(data, &views[i], PyBUF_SIMPLE)
                held += 1
                given[i].data, given[i].size = views[i].buf, views[i].len
                given[i].type, given[i].ndim = self.ports[i].onnx, len(shape)
                for axis, dim in enumerate(shape):
                    given[i].dims[axis] = dim
            for i in range(self.outputs_n):
                wanted[i].data, wanted[i].size = NULL, 0
                wanted[i].type, wanted[i].ndim = self.ports[self.inputs_n + i].onnx, 0
            with nogil:
                binding = self.bind(given, wanted, &reason)
                if binding is not NULL:
                    done = self.run(binding, &reason)
            try:
                if done < 0:
                    raise LiteRtError(reason.text.decode(errors="replace"))
                return [
                    (
                        tuple(binding.outputs[i].dims[axis]
                              for axis in range(binding.outputs[i].ndim)),
                        PyBytes_FromStringAndSize(
                            <char*>binding.outputs[i].data, binding.outputs[i].size
                        ),
                    )
                    for i in range(self.outputs_n)
                ]
            finally:
                if binding is not NULL:
                    self.unbind(binding)
        finally:
            for i in range(held):
                PyBuffer_Release(&views[i])
