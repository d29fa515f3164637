# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Sum random features over rows: scalar rule, loops over rows and windows, the owner.

The arithmetic stands in ``_projection_simd.h``; names, docs and the checks of what a projection is
made of in ``projection.py``. The add methods check their own arguments here: one more Python frame
would cost as much as a row.
"""

from cpython.pythread cimport (
    NOWAIT_LOCK, WAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_release_lock,
)
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

COLUMNS_MAX = PROJECTION_COLUMNS_MAX

cdef const ProjectionSimd* simd_now = &PROJECTION_SIMD[projection_simd_best()]

# ---- scalar functions --------------------------------------------------------------------------

cdef int64_t projection_add(
    const Projection* projection, const float* row, double* sums
) noexcept nogil:
    return projection_add_strided(projection, row, 1, sums)

# ---- loops -------------------------------------------------------------------------------------

cdef int64_t projection_add_window(
    const Projection* projection, const float* window, int64_t samples, int64_t stride,
    double* sums,
) noexcept nogil:
    cdef int64_t t = 0, added = 0
    while t < samples:
        added += projection_add_strided(projection, window + t, samples, sums)
        if stride >= samples - t:   # t + stride must not overflow
            break
        t += stride
    return added

# ---- the owner ---------------------------------------------------------------------------------

cdef class Projector:
    """Owner of a projection and of the sums of its features. Any thread may call any method.

    A lock keeps calls whole, and each lets the GIL go while it adds. ``projection()`` may be read
    by other kernels without the lock: it never changes.
    """

    def __cinit__(self, *args, **kwargs):
        self._lock = PyThread_allocate_lock()
        if self._lock is NULL:
            raise MemoryError("no lock left for a projection")

    def __init__(
        self, const float[:, ::1] weights__df, const float[::1] phases__f,
        const float[::1] mean__d, const float[::1] inverse__d,
    ):
        """Copy; weights and phases are in turns, ``inverse__d`` is 1 / scale."""
        cdef int64_t columns = weights__df.shape[0], features = weights__df.shape[1], d
        cdef int64_t slots = (
            (features + PROJECTION_STRIP - 1) // PROJECTION_STRIP * PROJECTION_STRIP
        )
        if self._slab is not NULL:
            raise RuntimeError("a projection is made once")
        if not 1 <= columns <= PROJECTION_COLUMNS_MAX or features < 1:
            raise ValueError(f"weights of {columns} columns and {features} features")
        if (
            phases__f.shape[0] != features or mean__d.shape[0] != columns
            or inverse__d.shape[0] != columns
        ):
            raise ValueError("phases, mean or scale do not fit the weights")
        self._slab = <float*>calloc((columns + 1) * slots + 2 * columns, sizeof(float))
        self._sums = <double*>calloc(features, sizeof(double))
        if self._slab is NULL or self._sums is NULL:
            raise MemoryError(f"no memory for a projection of {columns} x {features}")
        cdef float* phases = self._slab + columns * slots
        cdef float* mean = phases + slots
        for d in range(columns):
            memcpy(self._slab + d * slots, &weights__df[d, 0], features * sizeof(float))
        memcpy(phases, &phases__f[0], features * sizeof(float))
        memcpy(mean, &mean__d[0], columns * sizeof(float))
        memcpy(mean + columns, &inverse__d[0], columns * sizeof(float))
        self._projection.weights = self._slab
        self._projection.phases = phases
        self._projection.mean = mean
        self._projection.inverse = mean + columns
        self._projection.columns = columns
        self._projection.features = features
        self._projection.slots = slots
        self._projection.simd = simd_now

    def __dealloc__(self):
        free(self._slab)
        free(self._sums)
        if self._lock is not NULL:
            PyThread_free_lock(self._lock)

    cdef const Projection* projection(self) noexcept:
        """Return what other kernels add with; valid while this object lives."""
        return &self._projection

    cdef void _enter(self) noexcept:
        """Take the lock; let the GIL go while another thread has it."""
        if not PyThread_acquire_lock(self._lock, NOWAIT_LOCK):
            with nogil:
                PyThread_acquire_lock(self._lock, WAIT_LOCK)

    cdef void _leave(self) noexcept:
        PyThread_release_lock(self._lock)

    @property
    def features(self):
        """Number of random features, F."""
        return self._projection.features

    @property
    def columns(self):
        """Number of columns of a row, D."""
        return self._projection.columns

    @property
    def skipped(self):
        """Rows that were not added since the last reset: a value in them was not finite."""
        return self._skipped

    def add(self, const float[:, ::1] x__nd not None):
        """Add the features of each row.

        Args:
            x__nd: Rows, shape (N, D), N >= 0, float32, C-contiguous. A row with a NaN or an
                infinity is skipped and counted.

        Raises:
            TypeError: Not an array.
            ValueError: Another shape, dtype or layout. Nothing was added.
        """
        cdef const Projection* projection = &self._projection
        cdef int64_t n = x__nd.shape[0], i, added = 0
        if x__nd.shape[1] != projection.columns or self._slab is NULL:
            raise ValueError(f"rows of {x__nd.shape[1]} columns, need {projection.columns}")
        self._enter()
        with nogil:
            for i in range(n):
                added += projection_add(projection, &x__nd[i, 0], self._sums)
            self._rows += added
            self._skipped += n - added
        self._leave()

    def add_channels(self, const float[:, :, ::1] x__bct not None, *, Py_ssize_t stride=1):
        """Add the rows of channel-major windows as they lie: a row is a sample of all channels.

        Args:
            x__bct: Windows, shape (batch, D, time), time >= 1, float32, C-contiguous.
            stride: The samples 0, stride, 2 stride, … of each window are rows; at least 1.

        Raises:
            TypeError: Not an array.
            ValueError: Another shape, dtype, layout, or stride. Nothing was added.
        """
        cdef const Projection* projection = &self._projection
        cdef int64_t batch = x__bct.shape[0], samples = x__bct.shape[2], b, added = 0
        if (
            x__bct.shape[1] != projection.columns or self._slab is NULL or samples < 1
            or stride < 1
        ):
            raise ValueError(
                f"windows of {x__bct.shape[1]} channels, {samples} samples at stride {stride}; "
                f"need {projection.columns} channels, and a sample and a stride of at least 1"
            )
        self._enter()
        with nogil:
            for b in range(batch):
                added += projection_add_window(
                    projection, &x__bct[b, 0, 0], samples, stride, self._sums
                )
            self._rows += added
            self._skipped += batch * ((samples - 1) // stride + 1) - added
        self._leave()

    def read_into(self, double[::1] sums__f not None):
        """Write the sums; return the rows in them."""
        if sums__f.shape[0] != self._projection.features:
            raise ValueError(f"{sums__f.shape[0]} sums, need {self._projection.features}")
        self._enter()
        if self._sums is not NULL:
            memcpy(&sums__f[0], self._sums, self._projection.features * sizeof(double))
        rows = self._rows
        self._leave()
        return rows

    def reset(self):
        """Forget all rows; keep the projection."""
        self._enter()
        if self._sums is not NULL:
            memset(self._sums, 0, self._projection.features * sizeof(double))
        self._rows = self._skipped = 0
        self._leave()


def variants():
    """Return the names of the variants that this machine can run."""
    return tuple(PROJECTION_SIMD[i].name.decode() for i in range(projection_simd_best() + 1))


def use_variant(str name):
    """Choose the variant of projections made from now on; for tests and measurements."""
    global simd_now
    names = variants()
    if name not in names:
        raise ValueError(f"no variant {name!r}; there are {', '.join(names)}")
    simd_now = &PROJECTION_SIMD[<int>names.index(name)]
