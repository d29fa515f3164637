"""C face of the projection kernel: what other kernels may cimport to project in a fused step.

    cdef const Projection* p = (<Projector>features).projection()   # valid while it lives
    rows += projection_add_window(p, window, samples, stride, sums)
"""

from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport int64_t

cdef extern from "_projection_simd.h" nogil:
    enum:
        PROJECTION_COLUMNS_MAX
        PROJECTION_STRIP            # slots are a multiple of it

    ctypedef struct ProjectionSimd: # the loop in one variant
        const char* name

    ctypedef struct Projection:     # plain data; whoever made it owns what it points to
        const float* weights        # (columns, slots), turns per scale
        const float* phases         # slots, turns, -1/2 to 1/2
        const float* mean           # columns
        const float* inverse        # columns, 1 / scale
        int64_t columns
        int64_t features            # entries of the sums
        int64_t slots
        const ProjectionSimd* simd

    const ProjectionSimd[] PROJECTION_SIMD
    int projection_simd_best() noexcept
    int64_t projection_add_strided(
        const Projection* projection, const float* row, int64_t step, double* sums
    ) noexcept

# Add the features of row[columns] to sums[features]: 1, or 0 (a value is not finite: unchanged).
cdef int64_t projection_add(
    const Projection* projection, const float* row, double* sums
) noexcept nogil

# Add the rows at every stride-th sample of a window (columns, samples), C-contiguous; returns how
# many were added, of the ceil(samples / stride) there are. Both must be at least 1.
cdef int64_t projection_add_window(
    const Projection* projection, const float* window, int64_t samples, int64_t stride,
    double* sums,
) noexcept nogil

cdef class Projector:
    cdef Projection _projection
    cdef float* _slab               # weights, phases, mean, inverse
    cdef double* _sums              # features
    cdef int64_t _rows
    cdef int64_t _skipped
    cdef PyThread_type_lock _lock

    cdef const Projection* projection(self) noexcept
    cdef void _enter(self) noexcept
    cdef void _leave(self) noexcept
