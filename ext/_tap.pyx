# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Count what a classifier saw and said, inside the step that has no GIL.

    take(inputs, outputs, latency) -> sketches of channels and confidence, class counts, latency

Small windows are put by and sketched 64 at a time: a block costs a tenth of as many single rows.
"""

from cpython.pythread cimport WAIT_LOCK, PyThread_acquire_lock, PyThread_release_lock
from libc.math cimport isfinite
from libc.stdint cimport int16_t, int32_t, int64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from ._call cimport LATENCY_BINS, Tap, latency_bin
from ._engine cimport FLOAT, Binding
from ._sketch cimport Bank, Block, bank_feed

cdef enum:
    LATER = 64              # windows put by
    LATER_FLOATS = 512      # size of a window up to which that pays
    CLASSES_MAX = 32767


cdef class WindowTap(Tap):
    """Counters of one window of predictions, and the classes of the latest predictions.

    Several threads may feed it; whoever reads a window feeds no prediction meanwhile.

    Attributes:
        predictions: Predictions since it was made.
        seen: Predictions since ``begin``.
    """

    cdef Bank _bank
    cdef Py_ssize_t _input, _output, _channels, _samples, _classes, _ring_n, _later_n
    cdef int64_t _limit
    cdef readonly int64_t predictions
    cdef readonly int64_t seen
    cdef int64_t* _class_counts
    cdef int16_t* _ring         # class of prediction i at i % ring_n; -1: labelled
    cdef float* _later          # windows, then confidences
    cdef int64_t[LATENCY_BINS] _latency
    cdef object _ready

    def __init__(
        self, Bank bank not None, *, Py_ssize_t input, Py_ssize_t output, Py_ssize_t channels,
        Py_ssize_t samples, Py_ssize_t classes, Py_ssize_t pending_max, int64_t limit, ready,
    ):
        """Start to count.

        Args:
            bank: Gets the values of channel c as feature c, the confidence as the last feature.
            input, output: Positions of the tensors among the model's: float32 (1, channels,
                samples) in, float32 (1, classes) out. Calls with other tensors are not counted.
            channels, samples, classes: Sizes; classes up to 32767.
            pending_max: How many of the latest predictions remember their class.
            limit: ``ready`` is called when this many were seen since ``begin``.
            ready: Called with the GIL, without arguments.
        """
        if self._ring is not NULL:
            raise RuntimeError("a tap is made once")
        if bank.features != channels + 1 or not 1 <= classes <= CLASSES_MAX or pending_max < 1:
            raise ValueError("the bank must have a feature for each channel and the confidence")
        self._bank, self._input, self._output = bank, input, output
        self._channels, self._samples, self._classes = channels, samples, classes
        self._ring_n, self._limit, self._ready = pending_max, limit, ready
        self._class_counts = <int64_t*>calloc(classes, sizeof(int64_t))
        self._ring = <int16_t*>malloc(pending_max * sizeof(int16_t))
        if channels * samples <= LATER_FLOATS:
            self._later = <float*>malloc(LATER * (channels * samples + 1) * sizeof(float))
        if self._class_counts is NULL or self._ring is NULL or (
            channels * samples <= LATER_FLOATS and self._later is NULL
        ):
            raise MemoryError("no memory for a monitor")
        memset(self._ring, -1, pending_max * sizeof(int16_t))

    def __dealloc__(self):
        free(self._class_counts)
        free(self._ring)
        free(self._later)

    cdef void take(self, const Binding* binding, int64_t latency_ns) noexcept nogil:
        cdef int64_t size = self._channels * self._samples
        if (
            self._input >= binding.inputs_n or self._output >= binding.outputs_n
            or binding.inputs[self._input].type != FLOAT
            or binding.inputs[self._input].size != size * <int64_t>sizeof(float)
            or binding.outputs[self._output].type != FLOAT
            or binding.outputs[self._output].size != self._classes * <int64_t>sizeof(float)
        ):
            return
        self._count(
            <const float*>binding.inputs[self._input].data,
            <const float*>binding.outputs[self._output].data, latency_ns,
        )

    cdef void _count(
        self, const float* window__ct, const float* scores__k, int64_t latency_ns
    ) noexcept nogil:
        cdef Py_ssize_t k, best = 0
        cdef int64_t size = self._channels * self._samples
        for k in range(self._classes):
            if not isfinite(scores__k[k]):
                return                      # no answer; the owner calls it an error
            if scores__k[k] > scores__k[best]:
                best = k
        PyThread_acquire_lock(self._bank._lock, WAIT_LOCK)
        if self._later is NULL:
            self._feed(window__ct, &scores__k[best], 1)
        else:
            memcpy(self._later + self._later_n * size, window__ct, size * sizeof(float))
            self._later[LATER * size + self._later_n] = scores__k[best]
            self._later_n += 1
            if self._later_n == LATER:
                self._feed_later()
        self._class_counts[best] += 1
        self._latency[latency_bin(latency_ns)] += 1
        self._ring[self.predictions % self._ring_n] = <int16_t>best
        self.predictions += 1
        self.seen += 1
        if self.seen >= self._limit:
            self.due = True
        PyThread_release_lock(self._bank._lock)

    cdef void _feed(
        self, const float* windows__bct, const float* confidence__b, int64_t batches
    ) noexcept nogil:
        cdef Block block
        block.is_double = False
        block.batches = batches
        block.x, block.channels, block.length = windows__bct, self._channels, self._samples
        bank_feed(self._bank, 0, &block)
        block.x, block.channels, block.length = confidence__b, 1, 1
        bank_feed(self._bank, self._channels, &block)

    cdef void _feed_later(self) noexcept nogil:
        if self._later_n:
            self._feed(
                self._later, self._later + LATER * self._channels * self._samples, self._later_n
            )
        self._later_n = 0

    def ready(self):
        """Tell the owner that the window is full."""
        self.due = False
        self._ready()

    def put(self, const float[::1] window__k, const float[::1] scores__k, int64_t latency_ns):
        """Count a prediction from arrays: (channels * samples,) and (classes,), float32."""
        if (
            window__k.shape[0] != self._channels * self._samples
            or scores__k.shape[0] != self._classes
        ):
            raise ValueError(
                f"expected {self._channels * self._samples} values and {self._classes} scores, "
                f"got {window__k.shape[0]} and {scores__k.shape[0]}"
            )
        self._count(&window__k[0], &scores__k[0], latency_ns)
        if self.due:
            self.ready()

    def begin(self):
        """Start a window: forget what was counted since the last, sketches included."""
        PyThread_acquire_lock(self._bank._lock, WAIT_LOCK)
        self._later_n = 0
        self.seen = 0
        memset(self._class_counts, 0, self._classes * sizeof(int64_t))
        memset(self._latency, 0, sizeof(self._latency))
        PyThread_release_lock(self._bank._lock)
        self._bank.reset()

    def read(self):
        """Return (class counts, latency bins) of the window; the bank is then complete too."""
        cdef Py_ssize_t k
        PyThread_acquire_lock(self._bank._lock, WAIT_LOCK)
        self._feed_later()
        PyThread_release_lock(self._bank._lock)
        return (
            [self._class_counts[k] for k in range(self._classes)],
            [self._latency[k] for k in range(LATENCY_BINS)],
        )

    def claim(self, int64_t prediction):
        """Return the class of a prediction and let its label count as come; -1: too old, or has."""
        cdef int64_t best
        if not self.predictions - self._ring_n <= prediction < self.predictions or prediction < 0:
            return -1
        best = self._ring[prediction % self._ring_n]
        self._ring[prediction % self._ring_n] = -1
        return best
