# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Count values into exact bins and moments: scalar rules, the loop over a block, the bank.

    values --take--> block of 512 --above--> bins      (exact)
                                  --powers-> moments   (shifted sums, merged by Chan's rule)

Names, records and their checks stand in ``sketch.py``; the vector loops in ``_sketch_simd.h``.
The update methods check their own arguments here: one more Python frame would cost as much as
a row of 20 values.

A block's sums are taken around one of its own values. That bounds what cancels: the square of
the shift is at most (n - 1) times the sum wanted, so a block loses a factor 512 of float64's
2^-53 and no more, wherever the values lie.

Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979; Welford, Technometrics 4, 1962.
"""

from cpython.buffer cimport (
    PyBUF_RECORDS_RO, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.pythread cimport (
    NOWAIT_LOCK, WAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_release_lock,
)
from libc.math cimport INFINITY, NAN, isfinite, isinf
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset, strcmp

cdef enum:
    BLOCK = 512         # values per block: 6 KiB of stack, inside every L1 cache
    SMALL = 8           # up to so many values per feature go one by one: a block costs more
    EDGES_VECTOR = 256  # up to so many edges are counted by comparison, else values are searched
    NOGIL = 2048        # values of a call that lets the GIL go: fewer (~5 us) are not worth it

VALUES_MAX = SKETCH_VALUES_MAX

cdef const SketchSimd* simd_now = &SKETCH_SIMD[sketch_simd_best()]

# ---- scalar functions --------------------------------------------------------------------------

cdef void feature_clear(Feature* feature) noexcept nogil:
    feature.nulls = feature.finite = feature.lows = feature.highs = 0
    feature.mean = feature.square = 0.0
    feature.minimum = INFINITY
    feature.maximum = -INFINITY
    memset(feature.bins, 0, (feature.edges_n + 1) * sizeof(int64_t))


cdef inline void finite_add(Feature* feature, double value) noexcept nogil:
    """Welford's step; a value so far away that float64 overflows still gives the right mean."""
    feature.finite += 1
    cdef double n = <double>feature.finite
    cdef double before = value - feature.mean
    if isfinite(before):
        feature.mean += before / n
        feature.square += before * (value - feature.mean)
    else:
        feature.mean += value / n - feature.mean / n
        feature.square = INFINITY


cdef inline void value_add(Feature* feature, double value) noexcept nogil:
    """Add a value that is not NaN to all but the bins."""
    if isfinite(value):
        finite_add(feature, value)
    elif value > 0:
        feature.highs += 1
    else:
        feature.lows += 1
    if value < feature.minimum:
        feature.minimum = value
    if value > feature.maximum:
        feature.maximum = value


cdef void finite_merge(
    Feature* feature, int64_t count, double mean, double square, double minimum, double maximum
) noexcept nogil:
    """Chan's rule: add the moments of `count` finite values and the extremes of all values."""
    cdef double n_old = <double>feature.finite, n_new = <double>count
    cdef double n = n_old + n_new
    cdef double apart = mean - feature.mean
    if minimum < feature.minimum:
        feature.minimum = minimum
    if maximum > feature.maximum:
        feature.maximum = maximum
    if count == 0:
        return
    if feature.finite == 0:
        feature.mean, feature.square = mean, square
    elif isfinite(apart):
        feature.mean += apart * (n_new / n)
        feature.square += square + apart * apart * (n_old * (n_new / n))
    else:
        feature.mean = feature.mean * (n_old / n) + mean * (n_new / n)
        feature.square = INFINITY
    feature.finite += count
    # Were rounding to carry a mean past an extreme, the record's reader would refuse the record.
    if feature.mean < feature.minimum:
        feature.mean = feature.minimum
    if feature.mean > feature.maximum:
        feature.mean = feature.maximum


cdef void feature_merge(Feature* into, const Feature* other) noexcept nogil:
    """Add what `other` counted over the same edges; `other` may be `into`."""
    cdef int64_t b
    for b in range(into.edges_n + 1):
        into.bins[b] += other.bins[b]
    into.nulls += other.nulls
    into.lows += other.lows
    into.highs += other.highs
    finite_merge(into, other.finite, other.mean, other.square, other.minimum, other.maximum)


cdef inline int64_t values_of(const Feature* feature) noexcept nogil:
    return feature.finite + feature.lows + feature.highs

# ---- loops -------------------------------------------------------------------------------------

cdef void block_bins(
    Feature* feature, const SketchSimd* simd, const float* low, int64_t n, int64_t count
) noexcept nogil:
    """Bin a padded block of `n` entries, `count` of them values."""
    cdef int32_t[EDGES_VECTOR] above
    cdef int64_t i, left = count
    if feature.edges_n <= EDGES_VECTOR and feature.edges_n <= 2 * n:
        simd.above(low, n, feature.edges, feature.edges_n, above)
        for i in range(feature.edges_n):
            feature.bins[i] += left - above[i]
            left = above[i]
        feature.bins[feature.edges_n] += left
    else:
        for i in range(n):
            if low[i] == low[i]:
                feature.bins[simd_rank(feature.edges, feature.slots, low[i])] += 1


cdef void block_add(
    Feature* feature, const SketchSimd* simd, const double* wide, const float* low,
    int64_t n, int64_t padded,
) noexcept nogil:
    """Count a block of `n` values, padded with NaN."""
    cdef BlockPowers powers
    cdef int64_t i, first = 0
    cdef double mean, square
    while first < n and not isfinite(wide[first]):
        first += 1
    # The shift is a value of the block; without a finite one the loop below takes over.
    simd.powers(wide, padded, wide[first] if first < n else 0.0, &powers)
    feature.nulls += n - powers.count
    block_bins(feature, simd, low, padded, powers.count)
    if powers.count == 0:
        return
    if powers.minimum > -INFINITY and powers.maximum < INFINITY and powers.square < INFINITY:
        mean = powers.sum / <double>powers.count
        square = powers.square - powers.sum * mean
        finite_merge(
            feature, powers.count, wide[first] + mean, square if square > 0.0 else 0.0,
            powers.minimum, powers.maximum,
        )
        return
    for i in range(n):      # an infinity, or sums beyond float64: rare, so one by one
        if wide[i] == wide[i]:
            value_add(feature, wide[i])


cdef void single_add(Feature* feature, double value, float low) noexcept nogil:
    if value != value:
        feature.nulls += 1
        return
    value_add(feature, value)
    feature.bins[simd_rank(feature.edges, feature.slots, low)] += 1


cdef inline int64_t take(
    const SketchSimd* simd, const Block* block, int64_t at, int64_t runs, int64_t length,
    double* wide, float* low,
) noexcept nogil:
    """Copy values from index `at` on, a run from each of `runs` batches; return the padded size."""
    cdef int64_t stride = block.channels * block.length
    if block.is_double:
        return simd.take_double(<const double*>block.x + at, runs, length, stride, wide, low)
    return simd.take_float(<const float*>block.x + at, runs, length, stride, wide, low)


cdef void features_feed(
    Feature* features, const SketchSimd* simd, const Block* block
) noexcept nogil:
    """Count every value of the block; channel c goes to features[c]."""
    cdef double[BLOCK] wide
    cdef float[BLOCK] low
    cdef int64_t b, c, t, at, runs, length, padded
    cdef double value
    if block.batches * block.length <= SMALL:
        at = 0
        for b in range(block.batches):
            for c in range(block.channels):
                for t in range(block.length):
                    if block.is_double:
                        value = (<const double*>block.x)[at]
                    else:
                        value = (<const float*>block.x)[at]
                    single_add(&features[c], value, simd_float_floor(value))
                    at += 1
        return
    # A block is many short runs (rows of a matrix: runs of one) or a piece of one long run.
    runs = BLOCK // block.length if block.length < BLOCK else 1
    b = 0
    while b < block.batches:
        if runs > block.batches - b:
            runs = block.batches - b
        for c in range(block.channels):
            t = 0
            while t < block.length:
                length = block.length - t if block.length - t < BLOCK else BLOCK
                at = (b * block.channels + c) * block.length + t
                padded = take(simd, block, at, runs, length, wide, low)
                block_add(&features[c], simd, wide, low, runs * length, padded)
                t += length
        b += runs

# ---- the owner ---------------------------------------------------------------------------------

cdef class Bank:
    """Owner of the counters of some features. Any thread may call any method.

    A lock per bank keeps calls whole: threads that feed the same bank wait for each other and
    lose nothing; banks of their own run side by side, because a call of 2,048 values or more
    lets the GIL go.
    """

    def __cinit__(self, *args, **kwargs):
        self._lock = PyThread_allocate_lock()
        if self._lock is NULL:
            raise MemoryError("no lock left for a sketch bank")
        self._simd = simd_now

    def __init__(self, const int64_t[::1] sizes__d, const float[::1] edges__k):
        """Allocate; `sizes__d` are numbers of edges, `edges__k` all edges in a row or None."""
        cdef Py_ssize_t i
        cdef int64_t e, at, bins_n = 0, slots_n = 0, edges_n = 0
        if self._features is not NULL:
            raise RuntimeError("a bank is made once")
        if sizes__d.shape[0] < 1:
            raise ValueError("a bank has at least one feature")
        for i in range(sizes__d.shape[0]):
            bins_n += sizes__d[i] + 1
            slots_n += slots_of(sizes__d[i])
            edges_n += sizes__d[i]
        if edges__k is not None and edges__k.shape[0] != edges_n:
            raise ValueError(f"sizes want {edges_n} edges, got {edges__k.shape[0]}")
        self._features = <Feature*>calloc(sizes__d.shape[0], sizeof(Feature))
        self._bins = <int64_t*>calloc(bins_n, sizeof(int64_t))
        if edges__k is not None:
            self._edges = <float*>malloc((slots_n + 1) * sizeof(float))
        if self._features is NULL or self._bins is NULL or (
            edges__k is not None and self._edges is NULL
        ):
            raise MemoryError(f"no memory for a sketch bank of {sizes__d.shape[0]} features")
        self._bins_n = bins_n
        bins_n = slots_n = edges_n = 0
        for i in range(sizes__d.shape[0]):
            self._features[i].edges_n = sizes__d[i]
            self._features[i].slots = slots_of(sizes__d[i])
            self._features[i].bins = self._bins + bins_n
            bins_n += sizes__d[i] + 1
            if self._edges is not NULL:
                self._features[i].edges = self._edges + slots_n
                for e in range(slots_of(sizes__d[i])):
                    # + 0.0: an edge of -0.0 becomes 0.0, which bins the same
                    self._edges[slots_n + e] = (
                        edges__k[edges_n + e] + <float>0.0 if e < sizes__d[i] else <float>NAN
                    )
                slots_n += slots_of(sizes__d[i])
                edges_n += sizes__d[i]
            feature_clear(&self._features[i])
        self.features = sizes__d.shape[0]

    def __dealloc__(self):
        free(self._features)
        free(self._bins)
        free(self._edges)
        if self._lock is not NULL:
            PyThread_free_lock(self._lock)

    cdef void _enter(self) noexcept:
        """Take the lock; let the GIL go while another thread has it."""
        if not PyThread_acquire_lock(self._lock, NOWAIT_LOCK):
            with nogil:
                PyThread_acquire_lock(self._lock, WAIT_LOCK)

    cdef void _leave(self) noexcept:
        PyThread_release_lock(self._lock)

    cdef Feature* _at(self, Py_ssize_t i) except NULL:
        if not 0 <= i < self.features:
            raise IndexError(f"feature index {i} is not in 0 to {self.features - 1}")
        return &self._features[i]

    cdef int _update(self, object x, int ndim, Py_ssize_t first) except -1:
        cdef Py_buffer view
        cdef Block block
        cdef Py_ssize_t values
        try:
            PyObject_GetBuffer(x, &view, PyBUF_RECORDS_RO)
        except (TypeError, ValueError, BufferError) as error:
            raise TypeError(
                f"{wanted(ndim, self.features, first, NULL)} {type(x).__name__}"
            ) from error
        try:
            block.is_double = view.format is not NULL and strcmp(view.format, b"d") == 0
            if not block.is_double and (view.format is NULL or strcmp(view.format, b"f") != 0):
                raise TypeError(wanted(ndim, self.features, first, &view))
            if view.ndim != ndim:
                raise ValueError(wanted(ndim, self.features, first, &view))
            block.x = view.buf
            block.batches = view.shape[0] if ndim > 1 else 1
            block.channels = view.shape[1] if ndim > 1 else view.shape[0]
            block.length = view.shape[2] if ndim > 2 else 1
            values = block.batches * block.channels * block.length
            if (
                values == 0 or first < 0 or block.channels > self.features - first
                or (ndim < 3 and block.channels != self.features)
                or not PyBuffer_IsContiguous(&view, b"C")
                or <uintptr_t>view.buf % (sizeof(double) if block.is_double else sizeof(float))
            ):
                raise ValueError(wanted(ndim, self.features, first, &view))
            self._enter()
            try:
                if self._edges is NULL:
                    raise ValueError(
                        "this bank was restored without its edges and can only be merged and read; "
                        "write records with to_bytes(edges=True), or merge into a bank with edges"
                    )
                if values < NOGIL:
                    features_feed(self._features + first, self._simd, &block)
                else:
                    with nogil:
                        features_feed(self._features + first, self._simd, &block)
            finally:
                self._leave()
        finally:
            PyBuffer_Release(&view)
        return 0

    def update(self, x__nd):
        """Count the rows of a matrix.

        Args:
            x__nd: Values, shape (n, features), n >= 1, float32 or float64, C-contiguous, aligned,
                native byte order. NaN is null; an infinity is a value.

        Raises:
            TypeError: Not an array, or of another dtype.
            ValueError: Another shape, no row, or not contiguous. Nothing was counted.
        """
        self._update(x__nd, 2, 0)

    def update_row(self, x__d):
        """Count one row: ``update`` for an array of shape (features,)."""
        self._update(x__d, 1, 0)

    def update_channels(self, x__bct, *, Py_ssize_t first=0):
        """Count channel-major windows as they lie: all values of a channel are one feature.

        Args:
            x__bct: Windows, shape (batch, channels, time), each >= 1, dtype and layout as in
                ``update``. Channel c goes to feature ``first + c``; features that the window
                does not have are left alone, so several arrays can feed one bank.
            first: Feature of channel 0, 0 <= first and first + channels <= features.

        Raises:
            TypeError: Not an array, or of another dtype.
            ValueError: Another shape, an empty axis, channels beyond the last feature, or not
                contiguous. Nothing was counted.
        """
        self._update(x__bct, 3, first)

    def nulls(self, Py_ssize_t i):
        """Return how many NaN feature `i` got; IndexError if there is no such feature."""
        cdef Feature* feature = self._at(i)
        self._enter()
        nulls = feature.nulls
        self._leave()
        return nulls

    def reset(self):
        """Forget all values; keep the edges."""
        cdef Py_ssize_t i
        self._enter()
        for i in range(self.features):
            feature_clear(&self._features[i])
        self._leave()

    def read_bins(self, Py_ssize_t i):
        """Return the counts of feature `i`, a list of edges + 1 ints."""
        cdef Feature* feature = self._at(i)
        cdef int64_t b
        self._enter()
        try:
            return [feature.bins[b] for b in range(feature.edges_n + 1)]
        finally:
            self._leave()

    def read_moments(self, Py_ssize_t i):
        """Return (count, mean, variance, minimum, maximum) of feature `i`."""
        cdef Feature feature
        cdef Feature* here = self._at(i)
        self._enter()
        feature = here[0]
        self._leave()
        if values_of(&feature) == 0:
            return 0, NAN, NAN, NAN, NAN
        mean, variance = feature.mean, NAN
        if feature.lows and feature.highs:
            mean = NAN
        elif feature.lows or feature.highs:
            mean = INFINITY if feature.highs else -INFINITY
        else:
            variance = feature.square / <double>feature.finite
        return values_of(&feature), mean, variance, feature.minimum, feature.maximum

    def add(self, Bank other):
        """Merge a bank, which may be this one. Returns what hinders, "" if nothing did.

        "sizes" (of the edges differ) or "values" (more than VALUES_MAX together): nothing changed.
        """
        cdef Py_ssize_t i
        cdef Bank near = self, far = other
        cdef const Feature* mine
        cdef const Feature* theirs
        hindrance = "" if self.features == other.features else "sizes"
        if hindrance:
            return hindrance
        if <uintptr_t><void*>other < <uintptr_t><void*>self:
            near, far = other, self     # one order for all threads: no deadlock
        near._enter()
        if far is not near:
            far._enter()
        for i in range(self.features):
            mine, theirs = &self._features[i], &other._features[i]
            if mine.edges_n != theirs.edges_n:
                hindrance = "sizes"
            elif (
                values_of(mine) + values_of(theirs) > SKETCH_VALUES_MAX
                or mine.nulls + theirs.nulls > SKETCH_VALUES_MAX
            ):
                hindrance = hindrance or "values"
        if not hindrance:
            for i in range(self.features):
                feature_merge(&self._features[i], &other._features[i])
        if far is not near:
            far._leave()
        near._leave()
        return hindrance

    def dump(self, int64_t[::1] counters__k, double[:, ::1] reals__d4):
        """Write every counter: nulls, lows, highs, bins…; mean, square, minimum, maximum."""
        cdef Py_ssize_t i, at = 0
        cdef Feature* feature
        self._match(counters__k.shape[0], reals__d4.shape[0], reals__d4.shape[1])
        self._enter()
        for i in range(self.features):
            feature = &self._features[i]
            counters__k[at] = feature.nulls
            counters__k[at + 1] = feature.lows
            counters__k[at + 2] = feature.highs
            memcpy(&counters__k[at + 3], feature.bins, (feature.edges_n + 1) * sizeof(int64_t))
            at += feature.edges_n + 4
            reals__d4[i, 0] = feature.mean
            reals__d4[i, 1] = feature.square
            reals__d4[i, 2] = feature.minimum
            reals__d4[i, 3] = feature.maximum
        self._leave()

    def load(self, const int64_t[::1] counters__k, const double[:, ::1] reals__d4):
        """Take what ``dump`` wrote; the caller has checked the values."""
        cdef Py_ssize_t i, at = 0
        cdef int64_t b
        cdef Feature* feature
        self._match(counters__k.shape[0], reals__d4.shape[0], reals__d4.shape[1])
        self._enter()
        for i in range(self.features):
            feature = &self._features[i]
            feature.nulls = counters__k[at]
            feature.lows = counters__k[at + 1]
            feature.highs = counters__k[at + 2]
            feature.finite = -feature.lows - feature.highs
            for b in range(feature.edges_n + 1):
                feature.bins[b] = counters__k[at + 3 + b]
                feature.finite += feature.bins[b]
            at += feature.edges_n + 4
            feature.mean = reals__d4[i, 0]
            feature.square = reals__d4[i, 1]
            feature.minimum = reals__d4[i, 2]
            feature.maximum = reals__d4[i, 3]
        self._leave()

    def _match(self, Py_ssize_t counters, Py_ssize_t rows, Py_ssize_t columns):
        if counters != self._bins_n + 3 * self.features or rows != self.features or columns != 4:
            raise ValueError("arrays do not have the sizes of this bank")


cdef int64_t slots_of(int64_t edges_n) noexcept nogil:
    """Floats that the edges of a feature take, padded for the search and the vector loops."""
    cdef int64_t slots = SIMD_LANES
    if edges_n == 0:
        return 0
    while slots <= edges_n:
        slots *= 2
    return slots


cdef str wanted(int ndim, Py_ssize_t features, Py_ssize_t first, const Py_buffer* view):
    """Say what an update takes, and what it got instead."""
    cdef int axis
    shape = (
        f"({features},)",
        f"(n >= 1, {features})",
        f"(batch >= 1, 1 to {features - first} channels after first={first}, time >= 1)",
    )[ndim - 1]
    text = f"expected C-contiguous, aligned, native float32 or float64 of shape {shape}; got"
    if view is NULL:
        return text
    form = view.format.decode("ascii", "replace") if view.format is not NULL else "B"
    got = tuple([view.shape[axis] for axis in range(view.ndim)])
    steps = tuple([view.strides[axis] for axis in range(view.ndim)])
    kind = {
        "f": "float32", "d": "float64", "=f": "unaligned float32", "=d": "unaligned float64",
    }.get(form, f"items of format {form!r}")
    return f"{text} {kind} of shape {got}, strides {steps} bytes; nothing was counted"


def variants():
    """Return the names of the vector variants this machine can run; the best is last."""
    return tuple([SKETCH_SIMD[i].name.decode("ascii") for i in range(sketch_simd_best() + 1)])


def use_variant(str name):
    """Make banks from now on use a variant, one of ``variants()``; for tests and benchmarks."""
    global simd_now
    simd_now = &SKETCH_SIMD[variants().index(name)]
