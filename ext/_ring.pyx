# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The two ends of the shared-memory ring: take and answer requests, post and await them.

    client  IDLE --post--> REQUEST                      RESPONSE --read--> IDLE
    server                 REQUEST --take--> RUNNING --answer--> RESPONSE

Rule 1: only its client writes a slot's state in IDLE and RESPONSE, only the server in RUNNING; out
        of REQUEST both may go, by compare-and-swap.
Rule 2: the server works on a slot only while it holds the slot's busy flag, which is in its own
        memory: whatever clients scribble, no two threads of it touch one slot.
Rule 3: of shared memory, a header is copied or compared as a whole; only the copy is used. Sizes
        and offsets come from the copy, so that bytes that change later change numbers alone.

Files and their names, who is alive, and what a model is: not here, but in ``ring.py`` and
``shoal.agent.local.ring_front``. The layout is in docs/shared-memory-ring.md.
"""

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytearray cimport PyByteArray_FromStringAndSize
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeUTF8
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memchr, memcmp, memcpy, memset, strcmp
from posix.unistd cimport getpid

cdef extern from "sched.h":
    int sched_yield() noexcept nogil

from ._engine cimport tensor_size

from .errors import KernelError

cdef extern from "_ring.h":
    uint64_t RING_MAGIC
    uint32_t RING_VERSION
    uint64_t RING_PAGE_BYTES
    ctypedef struct RingPage:
        uint32_t state, bell, sleepers, spinners
        uint64_t[16] pending
    ctypedef struct RingSlot:
        uint64_t owner
        uint32_t state, waiting, sequence, priority
        uint64_t deadline_ns
        uint32_t answer_sequence, status, tensors_n, text_bytes
    ctypedef struct RingRequest:
        uint32_t kind, inputs_n, outputs_n, reserved
        char[256] model
        char[64] revision
    ctypedef struct RingTensor:
        char[256] name
        uint32_t type, ndim
        int64_t[8] dims
        uint64_t offset, size
    ctypedef struct RingName:
        char[256] name

    uint32_t ring_get(const uint32_t* p) noexcept nogil
    uint64_t ring_get64(const uint64_t* p) noexcept nogil
    void ring_set(uint32_t* p, uint32_t v) noexcept nogil
    uint32_t ring_swap(uint32_t* p, uint32_t v) noexcept nogil
    uint32_t ring_add(uint32_t* p, uint32_t v) noexcept nogil
    bint ring_cas(uint32_t* p, uint32_t old, uint32_t v) noexcept nogil
    bint ring_cas64(uint64_t* p, uint64_t old, uint64_t v) noexcept nogil
    uint64_t ring_or64(uint64_t* p, uint64_t v) noexcept nogil
    uint64_t ring_and64(uint64_t* p, uint64_t v) noexcept nogil
    int ring_lowest(uint64_t word) noexcept nogil
    void ring_pause() noexcept nogil
    int64_t ring_now_ns() noexcept nogil
    void ring_sleep(uint32_t* p, uint32_t seen, int64_t wait_ns) noexcept nogil
    void ring_wake(uint32_t* p, int count) noexcept nogil

cdef enum:
    SLOTS_MAX = 1024            # bits of RingPage.pending
    TENSORS_MAX = 64            # inputs, outputs, and wanted outputs of a request
    AXES_MAX = 8
    ALIGN = 64                  # of tensors: a cache line, and what vector loads like
    IDLE = 0
    REQUEST = 1
    RUNNING = 2
    RESPONSE = 3
    SERVING = 1
    CLOSED = 2
    STRING = 8
    INFER = 1
    METADATA = 3
    OK = 0
    SPINS = 32                  # looks between two looks at the clock
    NOGIL = 1 << 16             # bytes of a copy that lets the lock go: about 5 us

MAGIC = RING_MAGIC
VERSION = RING_VERSION
PAGE_BYTES = RING_PAGE_BYTES
SLOT_BYTES = sizeof(RingSlot)
REQUEST_BYTES_MIN = sizeof(RingRequest)

cdef int64_t BYTES_MAX = <int64_t>1 << 40


class RequestError(KernelError, ValueError):
    """A request in shared memory is malformed; nothing of it was run."""

    code = "ext.ring.request"


class AnswerError(KernelError, ValueError):
    """An answer in shared memory is malformed; the server, or another client, wrote nonsense."""

    code = "ext.ring.answer"


cdef inline uint64_t aligned(uint64_t size) noexcept nogil:
    return (size + ALIGN - 1) & ~<uint64_t>(ALIGN - 1)


cdef object text_of(const char* text, Py_ssize_t room, str what):
    """Return a bounded text; raise RequestError if it has no end or is not UTF-8."""
    cdef const char* end = <const char*>memchr(text, 0, room)
    if end is NULL:
        raise RequestError(f"{what} does not end in 0 within {room} bytes")
    try:
        return PyUnicode_DecodeUTF8(text, end - text, NULL)
    except UnicodeDecodeError:
        raise RequestError(f"{what} is not UTF-8") from None


cdef object checked(const RingTensor* tensor, uint64_t first, uint64_t room):
    """Return (name, shape) of a private copy of an entry whose data lies in [first, room)."""
    cdef int64_t count = 1, size
    cdef uint32_t i
    name = text_of(tensor.name, sizeof(tensor.name), "the name of a tensor")
    if not name:
        raise RequestError("a tensor has no name")
    if tensor.ndim > AXES_MAX:
        raise RequestError(f"{name!r} has {tensor.ndim} axes; {AXES_MAX} are allowed")
    for i in range(tensor.ndim):
        if tensor.dims[i] < 0:
            raise RequestError(f"axis {i} of {name!r} is {tensor.dims[i]}")
        if tensor.dims[i] and count > BYTES_MAX // tensor.dims[i]:
            raise RequestError(f"the shape of {name!r} is beyond {BYTES_MAX} elements")
        count *= tensor.dims[i]
    size = tensor_size(tensor.type, count) if tensor.type < 64 else -1
    if size < 0 and tensor.type != STRING:
        raise RequestError(f"{name!r} is of the unknown type {tensor.type}")
    if size >= 0 and <uint64_t>size != tensor.size:
        raise RequestError(f"{name!r} has {tensor.size} bytes; its type and shape take {size}")
    if tensor.offset % ALIGN or tensor.offset < first:
        raise RequestError(
            f"{name!r} lies at {tensor.offset}; a multiple of {ALIGN} from {first} on is allowed"
        )
    if tensor.offset > room or tensor.size > room - tensor.offset:
        raise RequestError(
            f"{name!r} lies at {tensor.offset} with {tensor.size} bytes; the area has {room}"
        )
    return name, tuple([tensor.dims[i] for i in range(tensor.ndim)])


cdef class Ring:
    """A mapped ring; the face of either end stands on it.

    Args:
        buffer: The writable mapping; it stays exported until ``detach``.
        slots_n: Slots, 1 to 1024.
        slot_first: Offset of slot 0 in bytes.
        slot_stride: From slot to slot, bytes.
        request_bytes: Of the request area of a slot.
        response_bytes: Of the response area of a slot.

    Raises:
        ValueError: The mapping is smaller than that.
    """

    cdef Py_buffer buffer
    cdef bint attached
    cdef char* base
    cdef RingPage* page
    cdef readonly uint32_t slots_n
    cdef uint64_t first, stride
    cdef readonly uint64_t request_bytes, response_bytes

    def __init__(
        self, buffer, uint32_t slots_n, uint64_t slot_first, uint64_t slot_stride,
        uint64_t request_bytes, uint64_t response_bytes,
    ):
        if self.attached:
            raise TypeError("a ring is made once")
        if not (
            1 <= slots_n <= SLOTS_MAX
            and max(slot_first, slot_stride, request_bytes, response_bytes) < <uint64_t>BYTES_MAX
            and not (slot_first | slot_stride | request_bytes | response_bytes) % ALIGN
            and slot_first >= RING_PAGE_BYTES
            and request_bytes >= sizeof(RingRequest) and response_bytes >= sizeof(RingTensor)
            and slot_stride >= sizeof(RingSlot) + request_bytes + response_bytes
            and slot_first + slots_n * slot_stride <= <uint64_t>len(buffer)
        ):
            raise ValueError("the sizes of the ring contradict each other or its file")
        PyObject_GetBuffer(buffer, &self.buffer, PyBUF_WRITABLE)
        self.attached = True
        self.base = <char*>self.buffer.buf
        self.page = <RingPage*>self.base
        self.slots_n, self.first, self.stride = slots_n, slot_first, slot_stride
        self.request_bytes, self.response_bytes = request_bytes, response_bytes

    def __dealloc__(self):
        if self.attached:
            PyBuffer_Release(&self.buffer)

    cpdef detach(self):
        """Let the mapping go; every later call raises ValueError."""
        if self.attached:
            self.attached = False
            self.base, self.page = NULL, NULL
            PyBuffer_Release(&self.buffer)

    cdef RingSlot* slot(self, uint32_t index) noexcept nogil:
        return <RingSlot*>(self.base + self.first + index * self.stride)

    cdef char* request_area(self, uint32_t index) noexcept nogil:
        return <char*>self.slot(index) + sizeof(RingSlot)

    cdef char* response_area(self, uint32_t index) noexcept nogil:
        return self.request_area(index) + self.request_bytes

    cdef void ring_bell(self, uint32_t index) noexcept nogil:
        """Say that a slot has a request; wake a server thread if one sleeps."""
        ring_or64(&self.page.pending[index >> 6], <uint64_t>1 << (index & 63))
        ring_add(&self.page.bell, 1)
        if not ring_get(&self.page.spinners) and ring_get(&self.page.sleepers):
            ring_wake(&self.page.bell, 1)

    cdef ensure_attached(self):
        if not self.attached:
            raise ValueError("the ring is detached")

    cdef ensure_slot(self, uint32_t index):
        if not self.attached:
            raise ValueError("the ring is detached")
        if index >= self.slots_n:
            raise IndexError(f"slot {index} of {self.slots_n}")


# ---- the server's end --------------------------------------------------------------------------

cdef class Request:
    """A request as the server sees it; made anew only when a slot's header changes.

    Attributes:
        kind: 1 infer, 2 list models, 3 metadata of a model.
        model: Its name; empty for kind 2.
        revision: Empty: whichever serves.
        inputs: name -> (shape, bytes). Views of shared memory: the client may change the bytes
            while they are read. Strings are a copy, because their lengths are among the bytes.
        types: name -> onnx.TensorProto.DataType of each input.
        outputs: Names of the wanted ones; None is all.
        priority: As the client gave it; 0 is the default.
        deadline_ns: CLOCK_MONOTONIC; 0 is none.
    """

    cdef readonly uint32_t kind, priority
    cdef readonly uint64_t deadline_ns
    cdef readonly str model, revision
    cdef readonly dict inputs, types
    cdef readonly tuple outputs
    cdef public object prepared
    cdef list strings       # (name, shape, view) of inputs to copy at each call
    cdef bytes header


cdef class Server(Ring):
    """The server's end: any number of threads take requests, each answers what it took."""

    cdef uint32_t* busy     # one flag for each slot, private to this process
    cdef uint32_t stopping
    cdef list requests      # the last request of each slot, to be used again
    cdef object view
    cdef uint32_t* sequences

    def __init__(self, buffer, *sizes):
        super().__init__(buffer, *sizes)
        self.busy = <uint32_t*>calloc(2 * self.slots_n, sizeof(uint32_t))
        if self.busy is NULL:
            raise MemoryError
        self.sequences = self.busy + self.slots_n
        self.requests = [None] * self.slots_n
        self.view = memoryview(buffer).toreadonly()

    def __dealloc__(self):
        free(self.busy)

    cpdef detach(self):
        """Let the mapping go. Views that models or monitors kept hold it until they go too."""
        self.view = None
        self.requests = [None] * self.slots_n
        Ring.detach(self)

    cdef int64_t take_pending(self) noexcept nogil:
        """Return a slot that is now RUNNING and busy, else -1."""
        cdef uint32_t word, index
        cdef uint64_t bits, bit
        for word in range((self.slots_n + 63) >> 6):
            bits = ring_get64(&self.page.pending[word])
            while bits:
                bit = bits & (~bits + 1)
                bits ^= bit
                if not ring_and64(&self.page.pending[word], ~bit) & bit:
                    continue                        # another thread was faster
                index = word * 64 + ring_lowest(bit)
                # A slot that is busy is looked at by its holder when it lets go.
                if index >= self.slots_n or ring_swap(&self.busy[index], 1):
                    continue
                if ring_cas(&self.slot(index).state, REQUEST, RUNNING):
                    self.sequences[index] = self.slot(index).sequence
                    return index
                self.let_go(index)
        return -1

    cdef void let_go(self, uint32_t index) noexcept nogil:
        ring_set(&self.busy[index], 0)
        # A request that came while the flag was up was passed over: ring for it again.
        if ring_get(&self.slot(index).state) == REQUEST:
            self.ring_bell(index)

    def take(self, int64_t spin_ns, int64_t wait_ns) -> int:
        """Wait for a request; return its slot, -1 if none came, -2 once stopped.

        Args:
            spin_ns: How long to look before sleeping, nanoseconds; 0 on a board with one core.
            wait_ns: How long to sleep then at most, nanoseconds.
        """
        cdef int64_t found = -1
        self.ensure_attached()
        with nogil:
            if not ring_get(&self.stopping):
                found = self.take_pending()
                if found < 0 and spin_ns > 0:
                    found = self.take_spinning(spin_ns)
                if found < 0:
                    found = self.take_sleeping(wait_ns)
            if found < 0 and ring_get(&self.stopping):
                found = -2
        return found

    cdef int64_t take_spinning(self, int64_t spin_ns) noexcept nogil:
        cdef int64_t found = -1, until = ring_now_ns() + spin_ns
        cdef uint32_t word
        cdef int i
        # While one thread looks, clients need not wake another.
        ring_add(&self.page.spinners, 1)
        while found < 0 and not ring_get(&self.stopping) and ring_now_ns() < until:
            for i in range(SPINS):
                ring_pause()
                found = self.take_pending()
                if found >= 0:
                    break
            else:
                sched_yield()               # the client may wait for this very core
        ring_add(&self.page.spinners, <uint32_t>-1)
        # What was posted while this thread still counted as looking has woken nobody.
        if found < 0:
            return self.take_pending()
        for word in range((self.slots_n + 63) >> 6):
            if ring_get64(&self.page.pending[word]):
                if ring_get(&self.page.sleepers):
                    ring_wake(&self.page.bell, 1)
                break
        return found

    cdef int64_t take_sleeping(self, int64_t wait_ns) noexcept nogil:
        cdef int64_t found
        cdef uint32_t seen
        ring_add(&self.page.sleepers, 1)
        seen = ring_get(&self.page.bell)
        found = self.take_pending()
        if found < 0 and not ring_get(&self.stopping):
            ring_sleep(&self.page.bell, seen, wait_ns)
        ring_add(&self.page.sleepers, <uint32_t>-1)
        if found < 0:
            found = self.take_pending()
        return found

    def stop(self) -> None:
        """Make every ``take`` return -2 soon, and later ones at once."""
        self.ensure_attached()
        ring_set(&self.stopping, 1)
        ring_add(&self.page.bell, 1)
        ring_wake(&self.page.bell, 0x7fffffff)

    def close(self) -> None:
        """Tell every client that this ring is over, and wake those that wait."""
        cdef uint32_t i
        self.ensure_attached()
        ring_set(&self.page.state, CLOSED)
        for i in range(self.slots_n):
            ring_wake(&self.slot(i).state, 0x7fffffff)

    def request(self, uint32_t index) -> Request:
        """Return the request in a slot that was taken.

        Raises:
            RequestError: It is malformed; the slot still waits for its answer.
        """
        self.ensure_slot(index)
        cdef Request request = self.requests[index]
        cdef RingSlot* slot = self.slot(index)
        cdef const char* area = self.request_area(index)
        if request is None or memcmp(area, <char*>request.header, len(request.header)):
            self.requests[index] = None
            request = self.parse(index)
            self.requests[index] = request
        request.deadline_ns, request.priority = slot.deadline_ns, slot.priority
        if request.strings is not None:
            for name, shape, view in request.strings:
                request.inputs[name] = shape, bytes(view)
        return request

    cdef Request parse(self, uint32_t index):
        cdef const char* area = self.request_area(index)
        cdef RingRequest head
        cdef uint64_t size, at
        cdef const RingTensor* tensor
        cdef const RingName* wanted
        cdef const char* copy
        cdef uint32_t i
        cdef Request request = Request.__new__(Request)
        memcpy(&head, area, sizeof(head))
        if not INFER <= head.kind <= METADATA:
            raise RequestError(f"kind {head.kind} is unknown")
        if head.inputs_n > TENSORS_MAX or head.outputs_n > TENSORS_MAX:
            raise RequestError(
                f"{head.inputs_n} inputs and {head.outputs_n} outputs; {TENSORS_MAX} are allowed"
            )
        size = (
            sizeof(head) + head.inputs_n * sizeof(RingTensor) + head.outputs_n * sizeof(RingName)
        )
        if size > self.request_bytes:
            raise RequestError(f"the header has {size} bytes, the area {self.request_bytes}")
        request.header = PyBytes_FromStringAndSize(area, size)
        copy = request.header
        if memcmp(copy, &head, sizeof(head)):
            raise RequestError("the header changed while it was read")
        request.kind = head.kind
        request.model = text_of(head.model, sizeof(head.model), "the name of the model")
        request.revision = text_of(head.revision, sizeof(head.revision), "the version")
        request.inputs, request.types = {}, {}
        tensor = <const RingTensor*>(copy + sizeof(head))
        for i in range(head.inputs_n):
            name, shape = checked(&tensor[i], size, self.request_bytes)
            if name in request.types:
                raise RequestError(f"the input {name!r} is there twice")
            at = self.first + index * self.stride + sizeof(RingSlot) + tensor[i].offset
            view = self.view[at:at + tensor[i].size]
            request.types[name] = tensor[i].type
            request.inputs[name] = shape, view
            if tensor[i].type == STRING:
                if request.strings is None:
                    request.strings = []
                request.strings.append((name, shape, view))
        if head.outputs_n:
            wanted = <const RingName*>(tensor + head.inputs_n)
            request.outputs = tuple([
                text_of(wanted[i].name, sizeof(wanted[i].name), "the name of an output")
                for i in range(head.outputs_n)
            ])
        return request

    def answer(self, uint32_t index, outputs) -> int:
        """Write tensors as the answer of a slot.

        Args:
            index: The slot, which was taken.
            outputs: (name, onnx.TensorProto.DataType, shape, little-endian bytes in C order) each.

        Returns:
            0, or the bytes that the answer would take in an area that has fewer: then the slot
            still waits for its answer.

        Raises:
            ValueError: More than 64 outputs, 8 axes, or 255 bytes of a name; likewise.
        """
        cdef RingSlot* slot = self.slot(index)
        cdef char* area = self.response_area(index)
        cdef RingTensor tensor
        cdef uint64_t at = aligned(len(outputs) * sizeof(RingTensor))
        cdef uint64_t entry = 0
        cdef Py_ssize_t length
        cdef const char* text
        cdef Py_buffer data
        cdef bint fits = at <= self.response_bytes
        self.ensure_slot(index)
        if len(outputs) > TENSORS_MAX:
            raise ValueError(f"{len(outputs)} outputs; {TENSORS_MAX} are allowed")
        for name, type_, shape, value in outputs:
            memset(&tensor, 0, sizeof(tensor))
            text = PyUnicode_AsUTF8AndSize(name, &length)
            if length >= <Py_ssize_t>sizeof(tensor.name) or len(shape) > AXES_MAX:
                raise ValueError(f"{name!r} of shape {shape} does not fit an entry")
            memcpy(tensor.name, text, length)
            tensor.type = type_
            for axis in shape:
                tensor.dims[tensor.ndim] = axis
                tensor.ndim += 1
            PyObject_GetBuffer(value, &data, PyBUF_SIMPLE)
            tensor.offset, tensor.size = at, data.len
            fits = fits and at <= self.response_bytes
            fits = fits and <uint64_t>data.len <= self.response_bytes - at
            if fits:
                memcpy(area + entry, &tensor, sizeof(tensor))
                if data.len > NOGIL:
                    with nogil:
                        memcpy(area + at, data.buf, data.len)
                else:
                    memcpy(area + at, data.buf, data.len)
            PyBuffer_Release(&data)
            entry += sizeof(tensor)
            at = aligned(at + tensor.size)
        if not fits:
            return at
        slot.tensors_n, slot.text_bytes = <uint32_t>len(outputs), 0
        self.publish(index, OK)
        return 0

    def answer_text(self, uint32_t index, uint32_t status, str text) -> None:
        """Write a status and a text as the answer of a slot; the text is cut to the area."""
        cdef RingSlot* slot = self.slot(index)
        cdef bytes coded = text.encode("utf-8", "replace")
        self.ensure_slot(index)
        slot.text_bytes = <uint32_t>min(<uint64_t>len(coded), self.response_bytes)
        memcpy(self.response_area(index), <char*>coded, slot.text_bytes)
        slot.tensors_n = 0
        self.publish(index, status)

    cdef void publish(self, uint32_t index, uint32_t status) noexcept:
        cdef RingSlot* slot = self.slot(index)
        slot.answer_sequence, slot.status = self.sequences[index], status
        ring_set(&slot.state, RESPONSE)
        if ring_get(&slot.waiting):
            ring_wake(&slot.state, 1)
        self.let_go(index)

    def owners(self) -> list:
        """Return (slot, owner) of each slot that somebody claimed."""
        cdef uint32_t i
        cdef uint64_t owner
        found = []
        self.ensure_attached()
        for i in range(self.slots_n):
            owner = ring_get64(&self.slot(i).owner)
            if owner:
                found.append((i, owner))
        return found

    def reclaim(self, uint32_t index, uint64_t owner) -> bool:
        """Free the slot of a client that is gone; False if it runs, or changed hands meanwhile."""
        cdef RingSlot* slot = self.slot(index)
        cdef bint freed = False
        self.ensure_slot(index)
        if ring_swap(&self.busy[index], 1):
            return False
        if ring_get64(&slot.owner) == owner:
            self.requests[index] = None
            ring_set(&slot.state, IDLE)
            ring_set(&slot.waiting, 0)
            freed = ring_cas64(&slot.owner, owner, 0)
        self.let_go(index)
        return freed

    def sweep(self) -> int:
        """Ring for requests whose client did not, or whose bit another client wiped out."""
        cdef uint32_t i, rung = 0
        self.ensure_attached()
        for i in range(self.slots_n):
            if ring_get(&self.slot(i).state) == REQUEST and not ring_get(&self.busy[i]):
                self.ring_bell(i)
                rung += 1
        return rung


# ---- the client's end --------------------------------------------------------------------------

cdef struct Part:               # one input of a plan
    uint64_t offset, size
    int32_t ndim                # -1: whatever has the size; else format and shape are compared
    int64_t[8] dims
    char[8] format


cdef class Plan:
    """The header of a request, made once, and where its inputs go.

    Args:
        kind: 1 infer, 2 list models, 3 metadata.
        model: Name, 255 bytes of UTF-8 at most.
        revision: Version, 63 bytes at most.
        inputs: (name, type, shape, bytes, format) each; the format is that of PEP 3118, with which
            arrays are compared at each call, or "" for any buffer of that size.
        outputs: Names of the wanted outputs; empty is all.
        request_bytes: Of the ring.

    Raises:
        ValueError: Too many, too long, or too large for the ring.
    """

    cdef readonly bytes header
    cdef readonly tuple names
    cdef Part* parts
    cdef Py_ssize_t parts_n
    cdef bytes answer_header    # of the last answer, so that its spec is made once
    cdef list answer_spec       # (name, type, shape, dtype, offset, size)

    def __init__(
        self, uint32_t kind, str model, str revision, inputs, outputs, uint64_t request_bytes
    ):
        cdef RingRequest head
        cdef RingTensor tensor
        cdef RingName wanted
        cdef Part* part
        cdef uint64_t at
        if self.parts is not NULL:
            raise TypeError("a plan is made once")
        if len(inputs) > TENSORS_MAX or len(outputs) > TENSORS_MAX:
            raise ValueError(f"at most {TENSORS_MAX} inputs and outputs")
        memset(&head, 0, sizeof(head))
        head.kind, head.inputs_n, head.outputs_n = kind, len(inputs), len(outputs)
        put_text(head.model, sizeof(head.model), model)
        put_text(head.revision, sizeof(head.revision), revision)
        coded = bytearray((<char*>&head)[:sizeof(head)])
        self.parts_n = len(inputs)
        self.parts = <Part*>calloc(self.parts_n + 1, sizeof(Part))
        if self.parts is NULL:
            raise MemoryError
        at = aligned(
            sizeof(head) + len(inputs) * sizeof(RingTensor) + len(outputs) * sizeof(RingName)
        )
        names = []
        part = self.parts
        for name, type_, shape, size, format_ in inputs:
            memset(&tensor, 0, sizeof(tensor))
            put_text(tensor.name, sizeof(tensor.name), name)
            if len(shape) > AXES_MAX:
                raise ValueError(f"{name!r} has {len(shape)} axes; {AXES_MAX} are allowed")
            tensor.type, tensor.offset, tensor.size = type_, at, size
            for axis in shape:
                tensor.dims[tensor.ndim] = axis
                tensor.ndim += 1
            part.offset, part.size = at, tensor.size
            part.ndim = tensor.ndim if format_ else -1
            memcpy(part.dims, tensor.dims, sizeof(part.dims))
            put_text(part.format, sizeof(part.format), format_)
            at = aligned(at + tensor.size)
            coded += (<char*>&tensor)[:sizeof(tensor)]
            names.append(name)
            part += 1
        for name in outputs:
            memset(&wanted, 0, sizeof(wanted))
            put_text(wanted.name, sizeof(wanted.name), name)
            coded += (<char*>&wanted)[:sizeof(wanted)]
        if at > request_bytes:
            raise ValueError(f"the request takes {at} bytes; the ring has room for {request_bytes}")
        self.header, self.names = bytes(coded), tuple(names)

    def __dealloc__(self):
        free(self.parts)


cdef put_text(char* place, Py_ssize_t room, str text):
    cdef Py_ssize_t length
    cdef const char* coded = PyUnicode_AsUTF8AndSize(text, &length)
    if length >= room or memchr(coded, 0, length):
        raise ValueError(f"{text!r} takes more than {room - 1} bytes or has a zero in it")
    memcpy(place, coded, length)


cdef class Port(Ring):
    """The client's end: one slot, one request at a time; the caller sees to that.

    Attributes:
        index: The slot; -1 before ``claim``.
        in_flight: Whether the server still has a request whose caller gave up.
    """

    cdef readonly int64_t index
    cdef readonly bint in_flight
    cdef uint32_t sequence
    cdef uint64_t owner
    cdef int pid
    cdef Plan posted            # whose header lies in the request area

    def __cinit__(self, *args):
        self.index = -1

    def claim(self, uint64_t owner) -> bool:
        """Take a free slot; False if there is none.

        Args:
            owner: start << 32 | pid of this process, never 0.
        """
        cdef uint32_t i
        self.ensure_attached()
        for i in range(self.slots_n):
            if ring_get64(&self.slot(i).owner) == 0 and ring_cas64(&self.slot(i).owner, 0, owner):
                self.index, self.owner, self.pid, self.posted = i, owner, getpid(), None
                ring_set(&self.slot(i).state, IDLE)
                ring_set(&self.slot(i).waiting, 0)
                return True
        return False

    def release(self) -> bool:
        """Give the slot back; False, and it stays claimed, while a request is in flight."""
        self.ensure_attached()
        if self.mine:
            if not self.settle():
                return False
            ring_set(&self.slot(self.index).state, IDLE)
            ring_cas64(&self.slot(self.index).owner, self.owner, 0)
        self.index = -1
        return True

    @property
    def mine(self) -> bool:
        """Whether the slot is this process's: not a parent's, and not reclaimed by the server."""
        self.ensure_attached()
        return (
            self.index >= 0 and self.pid == getpid()
            and ring_get64(&self.slot(self.index).owner) == self.owner
        )

    @property
    def closed(self) -> bool:
        """Whether the server said that this ring is over."""
        self.ensure_attached()
        return ring_get(&self.page.state) == CLOSED

    cdef bint settle(self) noexcept nogil:
        """Return whether no request is in flight; one that is not yet taken is withdrawn."""
        cdef RingSlot* slot = self.slot(self.index)
        cdef uint32_t state
        if not self.in_flight:
            return True
        if ring_cas(&slot.state, REQUEST, IDLE):
            self.in_flight = False
            return True
        state = ring_get(&slot.state)
        if state == RESPONSE or state == IDLE:
            self.in_flight = False
        return not self.in_flight

    def withdraw(self) -> bool:
        """Give up on a request; True if the slot can be used at once."""
        self.ensure_slot(<uint32_t>self.index)
        return self.settle()

    def post(self, Plan plan, inputs, uint64_t deadline_ns, uint32_t priority) -> int:
        """Write a request and ring; the slot must be settled.

        Args:
            plan: What is asked.
            inputs: name -> buffer of each input of the plan.
            deadline_ns: CLOCK_MONOTONIC; 0 none.
            priority: For the server's queue.

        Returns:
            -1, or the index of the first input that does not fit the plan (then nothing was
            posted): another dtype, shape or size.

        Raises:
            KeyError: An input is missing.
            BufferError: An input is not C-contiguous.
            TypeError: An input is no buffer.
        """
        cdef RingSlot* slot
        cdef char* area
        cdef Py_ssize_t i
        cdef Py_buffer data
        cdef Part* part
        cdef bint fits
        self.ensure_attached()
        if self.index < 0 or self.in_flight or len(inputs) != plan.parts_n:
            raise ValueError("no slot, one in flight, or inputs that are not the plan's")
        slot, area = self.slot(self.index), self.request_area(self.index)
        if self.posted is not plan:
            self.posted = None
            memcpy(area, <char*>plan.header, len(plan.header))
            self.posted = plan
        for i in range(plan.parts_n):
            part = &plan.parts[i]
            PyObject_GetBuffer(inputs[plan.names[i]], &data, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
            fits = <uint64_t>data.len == part.size
            if part.ndim >= 0:
                fits = (
                    fits and data.ndim == part.ndim
                    and (part.ndim == 0 or not memcmp(data.shape, part.dims, 8 * part.ndim))
                    and data.format is not NULL and not strcmp(data.format, part.format)
                )
            if fits:
                if data.len > NOGIL:
                    with nogil:
                        memcpy(area + part.offset, data.buf, data.len)
                else:
                    memcpy(area + part.offset, data.buf, data.len)
            PyBuffer_Release(&data)
            if not fits:
                return i
        self.sequence += 1
        slot.sequence, slot.priority, slot.deadline_ns = self.sequence, priority, deadline_ns
        self.in_flight = True
        ring_set(&slot.state, REQUEST)
        self.ring_bell(self.index)
        return -1

    def wait(self, int64_t spin_ns, int64_t wait_ns) -> bool:
        """Wait for the answer; False if it did not come in time, or woke up without one."""
        cdef RingSlot* slot
        cdef uint32_t state
        cdef int64_t until
        cdef int i
        self.ensure_slot(<uint32_t>self.index)
        slot = self.slot(self.index)
        with nogil:
            state = ring_get(&slot.state)
            if spin_ns > 0:
                until = ring_now_ns() + spin_ns
                while state != RESPONSE and ring_now_ns() < until:
                    for i in range(SPINS):
                        ring_pause()
                        state = ring_get(&slot.state)
                        if state == RESPONSE:
                            break
                    else:
                        sched_yield()       # the server may wait for this very core
            if state != RESPONSE and wait_ns > 0:
                ring_set(&slot.waiting, 1)
                state = ring_get(&slot.state)
                if state != RESPONSE and ring_get(&self.page.state) == SERVING:
                    ring_sleep(&slot.state, state, wait_ns)
                    state = ring_get(&slot.state)
                ring_set(&slot.waiting, 0)
        return state == RESPONSE

    def read(self, Plan plan, ndarray, dtype_of):
        """Return (status, what was answered) and make the slot idle.

        Args:
            plan: What was posted.
            ndarray: numpy.ndarray, to have arrays; None for (type, shape, bytearray) each.
            dtype_of: From a type number to a dtype; None for types that stay raw.

        Returns:
            For tensors a dict by name; else the text.

        Raises:
            AnswerError: The answer is malformed, or of another request.
        """
        cdef RingSlot* slot
        cdef const char* area
        cdef uint32_t status, tensors_n, text_bytes
        cdef uint64_t offset, size, header
        cdef dict found
        self.ensure_slot(<uint32_t>self.index)
        slot, area = self.slot(self.index), self.response_area(self.index)
        if ring_get(&slot.state) != RESPONSE:
            raise ValueError("there is no answer to read")
        self.in_flight = False
        try:
            status, tensors_n, text_bytes = slot.status, slot.tensors_n, slot.text_bytes
            if slot.answer_sequence != self.sequence:
                raise AnswerError("the answer is of another request")
            if tensors_n > TENSORS_MAX or text_bytes > self.response_bytes:
                raise AnswerError("the sizes of the answer are beyond its area")
            if status != OK:
                self.posted = None      # should somebody have scribbled on the header, mend it
            if status != OK or ((<const RingRequest*><char*>plan.header).kind != INFER):
                return status, PyUnicode_DecodeUTF8(area, text_bytes, "replace")
            header = tensors_n * sizeof(RingTensor)
            if header > self.response_bytes:
                raise AnswerError("the sizes of the answer are beyond its area")
            if (
                plan.answer_header is None or <uint64_t>len(plan.answer_header) != header
                or memcmp(area, <char*>plan.answer_header, header)
            ):
                plan.answer_header = None
                self.read_header(plan, PyBytes_FromStringAndSize(area, header), dtype_of)
            found = {}
            for name, type_, shape, dtype, at, length in plan.answer_spec:
                offset, size = at, length
                data = PyByteArray_FromStringAndSize(area + offset, size)
                if ndarray is None or dtype is None:
                    found[name] = type_, shape, data
                else:
                    found[name] = ndarray(shape, dtype, data)
            return status, found
        finally:
            ring_set(&slot.state, IDLE)

    cdef read_header(self, Plan plan, bytes header, dtype_of):
        cdef const RingTensor* tensor = <const RingTensor*><char*>header
        cdef Py_ssize_t i
        spec = []
        for i in range(len(header) // <Py_ssize_t>sizeof(RingTensor)):
            try:
                name, shape = checked(&tensor[i], len(header), self.response_bytes)
            except RequestError as exc:
                raise AnswerError(str(exc)) from None
            dtype = dtype_of(tensor[i].type)
            spec.append((name, tensor[i].type, shape, dtype, tensor[i].offset, tensor[i].size))
        plan.answer_spec, plan.answer_header = spec, header


def process_id() -> int:
    """Return the id of this process, as the kernel has it now."""
    return getpid()
