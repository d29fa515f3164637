# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Count what a model saw and said, inside the step that has no GIL.

    take(inputs, outputs, latency) --> WindowTap: sketches, quality, classes, scores, latency
                                         | one for each slice
                                       Journal: ids, what was predicted, CPU budget, a capture

Windows are put by and sketched together, up to 64 at a time: a block costs a tenth of as many
single rows.
One lock, the journal's, guards all of a monitor's taps.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.pythread cimport (
    NOWAIT_LOCK, WAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_release_lock, PyThread_type_lock,
)
from libc.math cimport INFINITY, NAN, isfinite
from libc.stdint cimport int16_t, int32_t, int64_t, uint32_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from ._call cimport LATENCY_BINS, Tap, latency_bin, now_ns
from ._engine cimport FLOAT, Binding
from ._projection cimport Projection, Projector, projection_add_window
from ._sketch cimport Bank, Block, bank_feed

cdef extern from "_quality.h" nogil:
    ctypedef struct Quality:
        float last
        int32_t run
        int64_t below
        int64_t above
        int64_t stuck
    void quality_series(const float*, int64_t, float, float, int32_t, Quality*)
    void quality_rows(
        const float*, int32_t, int64_t, const float*, const float*, int32_t, int32_t*,
        const float*, Quality*
    )
    int64_t quality_outside(const float*, int64_t, int64_t, const float*, const float*)

cdef enum:
    LATER = 64              # windows put by, at most
    LATER_FLOATS = 1 << 15  # … and their values: 128 KiB for each slice
    CLASSES_MAX = 32767
    SCORED_MAX = 64         # classes up to which scores are counted: ten numbers for each
    DECILES = 10
    STRIDE_MAX = 1024       # predictions of which at least one is sketched
    BUDGET_NS = 100000      # a model faster than this has the budget of one that takes this …
    IDLE_PER_MILLE = 5      # … or this share of all time, if that is more: few calls cost nobody
    STUCK_MAX = 1 << 29

cdef enum Reason:           # of a capture
    NOTHING
    RANDOM
    THRESHOLD
    DRIFT

REASONS = ("", "random", "threshold", "drift")

cdef struct Said:           # what was predicted
    uint32_t window         # number of the window it was counted in
    int16_t best            # class; -1: none, or labelled
    int16_t decile          # bin of its confidence


cdef class Journal:
    """What the taps of one monitor share: the latest predictions, the CPU budget, a capture.

    The budget: what a sketched prediction costs and what a prediction may cost are followed as
    moving means; of ``stride`` predictions one is sketched, the least number that keeps to the
    share. A model of less than 100 us may cost what one of 100 us may, or 0.5 % of the time that
    passes: where predictions are few nothing is left out to save microseconds. Costs are those of
    sketches, quality counters and random features; counts of classes and latencies, some 0.1 us,
    always go on.

    Attributes:
        predictions: Predictions since it was made.
        stride: Of how many predictions one is sketched now, 1 to 1024.
        captures_missed: Captures that were wanted while another waited.
    """

    cdef PyThread_type_lock _lock
    cdef Said* _ring            # of prediction i at i % ring_n
    cdef Py_ssize_t _ring_n
    cdef readonly int64_t predictions
    cdef readonly int64_t stride
    cdef readonly int64_t captures_missed
    cdef double _share          # of the inference time
    cdef double _allowed_ns     # for a prediction, mean
    cdef double _latency_ns     # of a prediction, mean
    cdef int64_t _charged_ns    # when costs were charged last; 0: never
    cdef int64_t _charged_at    # predictions then
    cdef double _cost_ns        # of a prediction that is sketched, mean; 0: not known
    cdef float* _held           # NULL: nothing is captured
    cdef int64_t _held_n        # values
    cdef Reason _held_reason    # NOTHING: the place is free
    cdef int64_t _held_prediction
    cdef uint32_t _held_window
    cdef int64_t _random_in     # predictions until one is captured; 0 due, -1 never
    cdef float _margin_below
    cdef float _outside_above

    def __cinit__(self, *args, **kwargs):
        self._lock = PyThread_allocate_lock()
        if self._lock is NULL:
            raise MemoryError("no memory for a monitor's lock")
        self.stride = 1

    def __init__(self, Py_ssize_t pending_max, *, double cpu_share_max):
        """Start to count.

        Args:
            pending_max: How many of the latest predictions remember what they said.
            cpu_share_max: Bound of the cost as a share of the inference time; 1 and more: none.
        """
        if self._ring is not NULL:
            raise RuntimeError("a journal is made once")
        if pending_max < 1 or not cpu_share_max > 0:
            raise ValueError("pending_max must be at least 1, cpu_share_max above 0")
        self._ring_n, self._share = pending_max, cpu_share_max
        self._allowed_ns = cpu_share_max * BUDGET_NS
        self._ring = <Said*>malloc(pending_max * sizeof(Said))
        if self._ring is NULL:
            raise MemoryError("no memory for a monitor")
        memset(self._ring, -1, pending_max * sizeof(Said))

    def __dealloc__(self):
        if self._lock is not NULL:
            PyThread_free_lock(self._lock)
        free(self._ring)
        free(self._held)

    cdef void _add(self, Said said, int64_t latency_ns) noexcept nogil:
        cdef double allowed = self._share * (latency_ns if latency_ns > BUDGET_NS else BUDGET_NS)
        self._allowed_ns += (allowed - self._allowed_ns) / LATER
        self._latency_ns += (latency_ns - self._latency_ns) / LATER
        self._ring[self.predictions % self._ring_n] = said
        self.predictions += 1

    cdef void _charge(self, int64_t cost_ns, int64_t batches) noexcept nogil:
        cdef double cost = <double>cost_ns / batches, allowed = self._allowed_ns, idle
        cdef int64_t now = now_ns()
        if self._share >= 1:
            return
        if self._latency_ns < BUDGET_NS:
            if self._charged_ns == 0:   # how often it is asked is not known yet
                self._charged_ns, self._charged_at = now, self.predictions
                return
            idle = (now - self._charged_ns) * IDLE_PER_MILLE / 1000.0
            idle /= self.predictions - self._charged_at + 1
            if idle > allowed:
                allowed = idle
        self._charged_ns, self._charged_at = now, self.predictions
        if self._cost_ns == 0:
            self._cost_ns = cost
        else:
            if cost > 4 * self._cost_ns:
                cost = 4 * self._cost_ns    # the thread was interrupted
            self._cost_ns += (cost - self._cost_ns) / 8
        self.stride = 1
        if self._cost_ns > allowed:
            self.stride = <int64_t>(self._cost_ns / allowed) + 1
            if self.stride > STRIDE_MAX:
                self.stride = STRIDE_MAX

    cdef void _hold(self) noexcept:
        """Take the lock; let the GIL go while another thread has it."""
        if not PyThread_acquire_lock(self._lock, NOWAIT_LOCK):
            with nogil:
                PyThread_acquire_lock(self._lock, WAIT_LOCK)

    def __enter__(self):
        """Keep predictions from being counted; who reads and begins windows does it within."""
        self._hold()
        return self

    def __exit__(self, kind, value, tb):
        PyThread_release_lock(self._lock)

    def claim(self, int64_t prediction):
        """Return (class, confidence bin, window) of a prediction and let its label count as come.

        None: it is too old, unknown, of no class, or has its label.
        """
        cdef Said* said
        self._hold()
        try:
            if not 0 <= self.predictions - 1 - prediction < self._ring_n or prediction < 0:
                return None
            said = &self._ring[prediction % self._ring_n]
            if said.best < 0:
                return None
            found = said.best, said.decile, said.window
            said.best = -1
            return found
        finally:
            PyThread_release_lock(self._lock)

    def watch(
        self, *, int64_t values, int64_t random_in, float margin_below, float outside_above
    ):
        """Hold the inputs of predictions that are worth it, one at a time, until ``captured``.

        Args:
            values: Values of an input.
            random_in: The so-many-th prediction from now is worth it; -1: none.
            margin_below: So is one whose best two classes are less apart; 0: none is.
            outside_above: So is one with a greater share of values out of range; 1: none is.
        """
        cdef float* held = <float*>malloc(values * sizeof(float))
        if held is NULL:
            raise MemoryError("no memory for a capture")
        self._hold()
        free(self._held)
        self._held, self._held_n, self._held_reason = held, values, NOTHING
        self._random_in = random_in
        self._margin_below, self._outside_above = margin_below, outside_above
        PyThread_release_lock(self._lock)

    def captured(self, int64_t random_in):
        """Return (prediction, reason, window, float32 bytes) of what is held, or None; free it.

        Args:
            random_in: As in ``watch``, if that prediction has come.
        """
        self._hold()
        try:
            if self._random_in == 0:
                self._random_in = random_in
            if self._held_reason == NOTHING:
                return None
            found = (
                self._held_prediction, REASONS[<int>self._held_reason], self._held_window,
                PyBytes_FromStringAndSize(<char*>self._held, self._held_n * sizeof(float)),
            )
            self._held_reason = NOTHING
            return found
        finally:
            PyThread_release_lock(self._lock)


cdef class WindowTap(Tap):
    """Counters of one window of one slice's predictions.

    Several threads may feed it. ``read``, ``begin`` and ``error`` are called within ``with
    journal``.

    Attributes:
        seen: Predictions since ``begin``.
        misfits: Calls since ``begin`` whose tensors did not fit.
        limit: ``ready`` is called when this many were seen; 0: never.
    """

    cdef Bank _bank
    cdef Journal _journal
    cdef Projector _projector
    cdef const Projection* _projection
    cdef double* _sums              # of random features
    cdef int64_t _projected         # rows in them
    cdef Py_ssize_t _input, _output, _channels, _samples, _classes, _values, _later_n, _later_max
    cdef int64_t _shed, _turn, _row_stride
    cdef int32_t _stuck_min
    cdef uint32_t _window
    cdef readonly int64_t seen
    cdef readonly int64_t misfits
    cdef public int64_t limit
    cdef int64_t* _class_counts
    cdef int64_t* _scores           # classes x 10; NULL: too many classes
    cdef float* _later              # windows, then what else is a feature; NULL: not put by
    cdef float* _low                # channels
    cdef float* _high
    cdef Quality* _quality          # channels
    cdef int32_t* _scratch
    cdef float* _last               # row before, of windows of one sample
    cdef float[DECILES - 1] _deciles
    cdef int64_t[LATENCY_BINS] _latency
    cdef object _ready, _tick, _sliced

    def __init__(
        self, Bank bank not None, Journal journal not None, *, Py_ssize_t input, Py_ssize_t output,
        Py_ssize_t samples, Py_ssize_t classes, Py_ssize_t values, const float[::1] low__c,
        const float[::1] high__c, const float[::1] deciles__9, int32_t stuck_min, int64_t limit,
        Projector projector, int64_t row_stride, ready, tick, sliced,
    ):
        """Start to count.

        Args:
            bank: Gets the values of channel c as feature c, and as the last features the
                confidence, or the values of the output if there are no classes.
            journal: Of the monitor.
            input, output: Positions of the tensors among the model's: float32 (1, channels,
                samples) in, float32 (1, classes) or ``values`` out. Other calls are misfits.
            samples, classes, values: Sizes; classes up to 32767, 0: not a classifier.
            low__c, high__c: A channel's value below or above is out of range.
            deciles__9: Edges of the confidence bins, ascending.
            stuck_min: Length of a run of equal values that counts, 2 to 2**29.
            limit: See above.
            projector: Random features of a row of channels, or None.
            row_stride: A row is taken at every so-many-th sample.
            ready: Called with the GIL when a window is full or a capture waits.
            tick: … when ``deadline_ns`` of CLOCK_MONOTONIC is over, before the call that comes.
            sliced: Returns the tap of a slice tag.
        """
        cdef Py_ssize_t channels = low__c.shape[0], c
        if self._quality is not NULL:
            raise RuntimeError("a tap is made once")
        if classes:
            values = 1
        if bank.features != channels + values or not 0 <= classes <= CLASSES_MAX or values < 1:
            raise ValueError("the bank must have a feature for each channel and what is said")
        if high__c.shape[0] != channels or deciles__9.shape[0] != DECILES - 1 or channels < 1:
            raise ValueError("low__c and high__c have an entry for each channel, deciles__9 nine")
        if not 2 <= stuck_min <= STUCK_MAX or samples < 1 or row_stride < 1:
            raise ValueError("stuck_min must be 2 to 2**29, samples and row_stride at least 1")
        if projector is not None and projector.projection().columns != channels:
            raise ValueError("the projection is of another number of channels")
        self._bank, self._journal = bank, journal
        self._input, self._output, self._samples = input, output, samples
        self._channels, self._classes, self._values = channels, classes, values
        self.limit, self._stuck_min, self._row_stride = limit, stuck_min, row_stride
        self._ready, self._tick, self._sliced = ready, tick, sliced
        self._class_counts = <int64_t*>calloc(classes + 1, sizeof(int64_t))
        self._quality = <Quality*>calloc(channels, sizeof(Quality))
        self._scratch = <int32_t*>calloc(3 * channels, sizeof(int32_t))
        self._last = <float*>calloc(3 * channels, sizeof(float))
        self._low, self._high = self._last + channels, self._last + 2 * channels
        if (
            self._class_counts is NULL or self._quality is NULL or self._scratch is NULL
            or self._last is NULL
        ):
            raise MemoryError("no memory for a monitor")
        if 0 < classes <= SCORED_MAX:
            self._scores = <int64_t*>calloc(classes * DECILES, sizeof(int64_t))
            if self._scores is NULL:
                raise MemoryError("no memory for a monitor")
        self._later_max = min(LATER, LATER_FLOATS // (channels * samples + values))
        if self._later_max > 1:
            self._later = <float*>malloc(
                self._later_max * (channels * samples + values) * sizeof(float)
            )
            if self._later is NULL:
                raise MemoryError("no memory for a monitor")
        if projector is not None:
            self._projector, self._projection = projector, projector.projection()
            self._sums = <double*>calloc(self._projection.features, sizeof(double))
            if self._sums is NULL:
                raise MemoryError("no memory for a monitor")
        for c in range(channels):
            self._low[c], self._high[c] = low__c[c], high__c[c]
            self._last[c] = self._quality[c].last = NAN
        for c in range(DECILES - 1):
            self._deciles[c] = deciles__9[c]

    def __dealloc__(self):
        free(self._class_counts)
        free(self._scores)
        free(self._later)
        free(self._quality)
        free(self._scratch)
        free(self._last)
        free(self._sums)

    cdef void take(self, const Binding* binding, int64_t latency_ns) noexcept nogil:
        cdef int64_t size = self._channels * self._samples
        cdef int64_t said = self._classes if self._classes else self._values
        if (
            self._input >= binding.inputs_n or self._output >= binding.outputs_n
            or binding.inputs[self._input].type != FLOAT
            or binding.inputs[self._input].size != size * <int64_t>sizeof(float)
            or binding.outputs[self._output].type != FLOAT
            or binding.outputs[self._output].size != said * <int64_t>sizeof(float)
        ):
            PyThread_acquire_lock(self._journal._lock, WAIT_LOCK)
            self.misfits += 1
            PyThread_release_lock(self._journal._lock)
            return
        self._count(
            <const float*>binding.inputs[self._input].data,
            <const float*>binding.outputs[self._output].data, latency_ns,
        )

    cdef void _count(
        self, const float* window__ct, const float* said__k, int64_t latency_ns
    ) noexcept nogil:
        cdef Py_ssize_t k
        cdef float best = -INFINITY, second = -INFINITY
        cdef const float* feature = said__k
        cdef Said said
        said.best, said.decile = -1, 0
        for k in range(self._classes if self._classes else self._values):
            if not isfinite(said__k[k]):
                return                      # no answer; the owner calls it an error
            if said__k[k] > best:
                second, best = best, said__k[k]
                feature = &said__k[k]
            elif said__k[k] > second:
                second = said__k[k]
        PyThread_acquire_lock(self._journal._lock, WAIT_LOCK)
        said.window = self._window
        if self._classes:
            said.best = <int16_t>(feature - said__k)
            for k in range(DECILES - 1):
                said.decile += best >= self._deciles[k]
            self._class_counts[said.best] += 1
            if self._scores is not NULL:
                self._scores[said.best * DECILES + said.decile] += 1
        else:
            feature = said__k
        if self._journal._held is not NULL:
            self._hold_if_wanted(window__ct, best - second if self._classes else INFINITY)
        self._turn += 1
        if self._turn >= self._journal.stride:
            self._turn = 0
            self._put_by(window__ct, feature)
        else:
            self._shed += 1
        self._latency[latency_bin(latency_ns)] += 1
        self._journal._add(said, latency_ns)
        self.seen += 1
        if self.seen == self.limit:
            self.due = True
        PyThread_release_lock(self._journal._lock)

    cdef void _hold_if_wanted(self, const float* window__ct, float margin) noexcept nogil:
        cdef Reason reason = NOTHING
        cdef int64_t size = self._channels * self._samples
        if self._journal._random_in > 0:
            self._journal._random_in -= 1
        if self._journal._random_in == 0:
            reason = RANDOM
        if margin < self._journal._margin_below:
            reason = THRESHOLD
        if self._journal._outside_above < 1 and quality_outside(
            window__ct, self._channels, self._samples, self._low, self._high
        ) > self._journal._outside_above * size:
            reason = DRIFT
        if reason == NOTHING or size != self._journal._held_n:
            return
        if self._journal._held_reason != NOTHING:
            self._journal.captures_missed += 1
            return
        memcpy(self._journal._held, window__ct, size * sizeof(float))
        self._journal._held_reason = reason
        self._journal._held_prediction = self._journal.predictions
        self._journal._held_window = self._window
        self.due = True

    cdef void _put_by(self, const float* window__ct, const float* feature__v) noexcept nogil:
        cdef int64_t size = self._channels * self._samples
        if self._later is NULL:
            self._feed(window__ct, feature__v, 1)
            return
        memcpy(self._later + self._later_n * size, window__ct, size * sizeof(float))
        memcpy(
            self._later + self._later_max * size + self._later_n * self._values, feature__v,
            self._values * sizeof(float),
        )
        self._later_n += 1
        if self._later_n == self._later_max:
            self._feed_later()

    cdef void _feed(
        self, const float* windows__bct, const float* features__bv, int64_t batches
    ) noexcept nogil:
        cdef int64_t start = now_ns()
        if self._sketch(windows__bct, features__bv, batches):
            self._shed += batches           # no memory for their sketches
        self._examine(windows__bct, batches)
        self._journal._charge(now_ns() - start, batches)

    cdef int _sketch(
        self, const float* windows__bct, const float* features__bv, int64_t batches
    ) noexcept nogil:
        cdef Block block
        block.is_double = False
        block.batches = batches
        block.x, block.channels, block.length = windows__bct, self._channels, self._samples
        if bank_feed(self._bank, 0, &block):
            return -1
        block.x, block.channels, block.length = features__bv, self._values, 1
        return bank_feed(self._bank, self._channels, &block)

    cdef void _examine(self, const float* windows__bct, int64_t batches) noexcept nogil:
        """Count what is out of range or stuck, and project."""
        cdef Py_ssize_t b, c
        cdef const float* window = windows__bct
        cdef int64_t size = self._channels * self._samples
        if self._samples == 1:              # batches are at most LATER
            quality_rows(
                window, <int32_t>batches, self._channels, self._low, self._high, self._stuck_min,
                self._scratch, self._last, self._quality,
            )
            memcpy(
                self._last, window + (batches - 1) * self._channels,
                self._channels * sizeof(float),
            )
        else:
            for b in range(batches):
                for c in range(self._channels):
                    quality_series(
                        window + b * size + c * self._samples, self._samples, self._low[c],
                        self._high[c], self._stuck_min, &self._quality[c],
                    )
        if self._projection is not NULL:
            for b in range(batches):
                self._projected += projection_add_window(
                    self._projection, window + b * size, self._samples, self._row_stride,
                    self._sums,
                )

    cdef void _feed_later(self) noexcept nogil:
        if self._later_n:
            self._feed(
                self._later, self._later + self._later_max * self._channels * self._samples,
                self._later_n,
            )
        self._later_n = 0

    def ready(self):
        """Tell the owner that the window is full, or a capture waits."""
        self.due = False
        self._ready()

    def tick(self):
        """Let the owner look at the clock."""
        self._tick()

    def sliced(self, tag):
        """Return the tap of a slice."""
        return self._sliced(tag)

    def put(self, const float[::1] window__k, const float[::1] said__k, int64_t latency_ns):
        """Count a prediction from arrays: (channels * samples,) and (classes or values,)."""
        cdef Py_ssize_t said = self._classes if self._classes else self._values
        if window__k.shape[0] != self._channels * self._samples or said__k.shape[0] != said:
            raise ValueError(
                f"expected {self._channels * self._samples} values and {said} outputs, "
                f"got {window__k.shape[0]} and {said__k.shape[0]}"
            )
        with nogil:                 # whoever has the lock may need the GIL
            self._count(&window__k[0], &said__k[0], latency_ns)
        if self.due:
            self.ready()

    def misfit(self):
        """Count a call whose tensors do not fit."""
        self._journal._hold()
        self.misfits += 1
        PyThread_release_lock(self._journal._lock)

    def begin(self, uint32_t window):
        """Start a window: forget what was counted since the last, sketches included.

        Args:
            window: What ``Journal.claim`` shall say of its predictions.
        """
        cdef Py_ssize_t c
        self._later_n = 0
        self._window = window
        self.seen = self._shed = self.misfits = self._projected = 0
        memset(self._class_counts, 0, self._classes * sizeof(int64_t))
        if self._scores is not NULL:
            memset(self._scores, 0, self._classes * DECILES * sizeof(int64_t))
        memset(self._latency, 0, sizeof(self._latency))
        for c in range(self._channels):     # a run goes on
            self._quality[c].below = self._quality[c].above = self._quality[c].stuck = 0
        if self._sums is not NULL:
            memset(self._sums, 0, self._projection.features * sizeof(double))
        self._bank.reset()

    def read(self):
        """Return the window's counters by name; the bank is then complete too."""
        cdef Py_ssize_t k
        self._feed_later()
        return {
            "predictions": self.seen,
            "shed": self._shed,
            "schema": self.misfits,
            "classes": [self._class_counts[k] for k in range(self._classes)],
            "scores": None if self._scores is NULL else [
                self._scores[k] for k in range(self._classes * DECILES)
            ],
            "latency_us": [self._latency[k] for k in range(LATENCY_BINS)],
            "below": [self._quality[k].below for k in range(self._channels)],
            "above": [self._quality[k].above for k in range(self._channels)],
            "stuck": [self._quality[k].stuck for k in range(self._channels)],
            "projection": None if self._sums is NULL else [
                self._sums[k] for k in range(self._projection.features)
            ],
            "projected": self._projected,
        }
