"""C face of the KLL kernel: what other kernels may cimport to read sketches."""

from cpython.pythread cimport PyThread_type_lock
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef extern from "_kll_simd.h" nogil:
    ctypedef struct KllSimd:        # the vector loops in one variant
        const char* name
        int64_t (*breaks_float)(const unsigned char*, int64_t) noexcept nogil
        int64_t (*breaks_double)(const unsigned char*, int64_t) noexcept nogil
        void (*take_float)(float*, const unsigned char*, int64_t, int64_t) noexcept nogil
        void (*take_double)(double*, const unsigned char*, int64_t, int64_t) noexcept nogil
        void (*pick_float)(float*, int64_t, int, int, const int32_t*) noexcept nogil
        void (*pick_double)(double*, int64_t, int, int, const int32_t*) noexcept nogil

    const int64_t KLL_VALUES_MAX    # values of a sketch, and of sketches merged
    const KllSimd[] KLL_SIMD
    int kll_simd_best() noexcept
    void kll_prefetch(const unsigned char* bytes) noexcept

cdef extern from "_kll_curve.h" nogil:
    ctypedef struct CurveItem:
        uint64_t key                # orders as the value does
        int64_t below               # weight of the item; once summed, of all items up to it

    uint64_t curve_key_float(float value) noexcept
    uint64_t curve_key_double(double value) noexcept
    float curve_float(uint64_t key) noexcept
    double curve_double(uint64_t key) noexcept
    CurveItem* curve_sort(
        CurveItem* items, CurveItem* other, int64_t n, int first_bit
    ) noexcept
    int64_t curve_find(const CurveItem* items, int64_t n, double wanted) noexcept

cdef extern from "_sort_simd.h" nogil:
    enum:
        SORT_ROWS_MIN
        SORT_ROWS_MAX               # rows of a tile that stays in the L1 cache

    ctypedef struct SortSimd:
        const char* name
        int lanes_float
        int lanes_double
        void (*sort_float)(float* tile, int rows) noexcept nogil
        void (*sort_double)(double* tile, int rows) noexcept nogil
        void (*fours_float)(float* tile, int rows, const int32_t* offsets) noexcept nogil
        void (*fours_double)(double* tile, int rows, const int32_t* offsets) noexcept nogil

    const SortSimd[] SORT_SIMD
    int sort_simd_best() noexcept

cdef enum:
    KLL_LEVELS = 54                 # levels of a sketch: the heaviest item weighs 2^53
    KLL_K_MIN = 8
    KLL_M = 8                       # smallest capacity of a level, fixed by the format

cdef enum KllReason:                # why bytes are no sketch; texts stand in kll.py, in this order
    KLL_OK
    KLL_SHORT                       # shorter than the preamble says
    KLL_FAMILY
    KLL_UPDATABLE                   # Java's format with free space
    KLL_PREAMBLE                    # preamble, version and flags do not fit each other
    KLL_PARAMETERS                  # k, m, min_k or bytes that must be 0
    KLL_COUNT                       # n too small for its form, or beyond KLL_VALUES_MAX
    KLL_LEVEL_COUNT                 # no level, or more than n values can fill
    KLL_LEVEL_STARTS                # a level ends before it starts, or behind the array
    KLL_LENGTH                      # not the exact length of floats or doubles
    KLL_WEIGHT                      # weights do not sum to n
    KLL_ORDER                       # a level that must be sorted is not
    KLL_RANGE                       # NaN, or an item outside [minimum, maximum]

cdef struct KllRef:                 # a sketch in bytes that somebody else owns
    bint is_double                  # items are float64, else float32; an empty one says float32
    bint sorted_zero                # level 0 is sorted
    int k                           # 8 to 65535
    int min_k                       # smallest k that was merged into it, 8 to k
    int levels                      # 0 if empty, 1 to KLL_LEVELS
    int64_t n                       # values seen, 0 to KLL_VALUES_MAX
    double minimum                  # of all values; +inf if empty
    double maximum                  # of all values; -inf if empty
    uint32_t[KLL_LEVELS + 1] starts # level h is items starts[h] to starts[h + 1] - 1
    const unsigned char* items      # not aligned; level 0 first

# Capacity of a level that stands `depth` levels under the top; and of `levels` levels together.
cdef int64_t kll_capacity(int k, int depth) noexcept nogil
cdef int64_t kll_total(int k, int levels) noexcept nogil
# Read and check everything; 0 or a KllReason, and then `ref` is undefined.
cdef int kll_parse(const unsigned char* data, size_t size, KllRef* ref) noexcept nogil
# Bound of V for a sketch that the reference's update and merge made, from its levels alone.
cdef double kll_variance_bound(const KllRef* ref) noexcept nogil

cdef struct Tower:                  # the levels of a merger; it owns nothing
    bint is_double
    bint sampling                   # some tile was full: from now on groups are sampled
    int lanes                       # items in a row of a tile
    int rows                        # rows of a full tile: k_wide
    int base                        # runs below this level are thinned on their way in
    int64_t n                       # values merged
    double spread                   # V that the merged sketches brought
    double variance                 # V of everything, spread included
    double rate                     # V that a unit of mass may cost at each level
    int64_t rate_until              # n from which on the rate is made anew
    double minimum                  # +inf if empty
    double maximum                  # -inf if empty
    uint64_t coins                  # state of the random generator, not 0
    const SortSimd* sort
    const KllSimd* simd
    char* slab                      # KLL_LEVELS tiles
    int64_t[KLL_LEVELS] fill        # items in each tile
    int64_t[KLL_LEVELS] limit       # items at which it is thinned; whole rows

cdef struct KllSpan:                # bytes that may be a sketch
    const unsigned char* data
    size_t size

cdef class Blobs:
    cdef KllSpan* _spans            # within the memory of what is held
    cdef list _held
    cdef readonly Py_ssize_t count

cdef class Merger:
    cdef Tower _tower
    cdef void* _memory
    cdef PyThread_type_lock _lock
    cdef readonly int k_wide
    cdef readonly int64_t changes

    cdef void _enter(self) noexcept
    cdef void _leave(self) noexcept
    cdef int _add(
        self, const KllSpan* spans, Py_ssize_t count, const double[::1] variances__n
    ) except -1
