"""C face of the sketch kernel: what other kernels may cimport to feed a bank in a fused step."""

from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t

from ._frequent cimport Frequent
from ._hll cimport Hll

cdef extern from "_levels.h" nogil:
    enum:
        LEVELS_MAX
    ctypedef struct LevelsShape:    # what a k means
        int32_t k
        int32_t[61] caps
        int32_t[62] totals
    ctypedef struct Levels:         # of one feature's KLL sketch
        void* items                 # float or double, ascending within a level, at the end
        double variance             # of the rank error, squared counts
        int32_t size
        int32_t retained
        int32_t levels
        int32_t k_min
        uint32_t[56] pops

cdef extern from "_sketch_simd.h" nogil:
    enum:
        SIMD_LANES                  # values a block is padded to
        SIMD_TILE                   # most lanes of a tile
        SORT_THIN_RUN               # rows of a run that is thinned
        SORT_THIN_BITS              # 2^bits of its rows become one

    ctypedef struct BlockPowers:
        double sum                  # of value - shift
        double square               # of (value - shift)^2
        double minimum              # +inf if no value
        double maximum              # -inf if no value
        int64_t count               # values that are not NaN

    ctypedef struct TileSums:       # of each lane of a tile
        double[16] sum
        double[16] square
        double[16] lowest           # of tile_take
        double[16] highest
        int32_t[16] count

    ctypedef struct SortSimd:
        int lanes_float
        int lanes_double
        void (*sort_float)(float*, int) noexcept nogil
        void (*sort_double)(double*, int) noexcept nogil
        void (*thin_float)(float*, const uint32_t*) noexcept nogil

    ctypedef struct SketchSimd:     # the vector loops in one variant
        const char* name
        const SortSimd* sort
        int bins_first
        void (*tile_sums)(
            const float*, int64_t, int64_t, const double*, float*, TileSums*
        ) noexcept nogil
        void (*tile_ends)(const float*, int64_t, float*, float*) noexcept nogil
        void (*tile_below)(const float*, int64_t, const float*, int64_t, int32_t*) noexcept nogil
        void (*tile_bins)(
            const float*, int64_t, int, const float* const*, const int64_t*, int32_t*
        ) noexcept nogil
        void (*tile_take)(
            const double*, int64_t, int64_t, const double*, float*, float*, TileSums*
        ) noexcept nogil
        int64_t (*take_float)(
            const float*, int64_t, int64_t, int64_t, double*, float*
        ) noexcept nogil
        int64_t (*take_double)(
            const double*, int64_t, int64_t, int64_t, double*, float*
        ) noexcept nogil
        void (*above)(const float*, int64_t, const float*, int64_t, int32_t*) noexcept nogil
        void (*powers)(const double*, int64_t, double, BlockPowers*) noexcept nogil

    const SketchSimd[] SKETCH_SIMD
    const int64_t SKETCH_VALUES_MAX # values and nulls per feature
    int sketch_simd_best() noexcept
    float simd_float_floor(double value) noexcept
    int64_t simd_rank(const float* edges, int64_t slots, float low) noexcept

cdef enum Kind:                     # what a feature's values are
    KIND_FLOAT = 0                  # KLL floats
    KIND_DOUBLE = 1                 # KLL doubles
    KIND_INTEGER = 2                # KLL floats, distinct values and frequent items
    KIND_CATEGORY = 3               # distinct values and frequent items

cdef struct Feature:                # plain data; the bank owns what it points to
    int64_t nulls                   # NaN seen
    int64_t finite                  # finite values seen
    int64_t lows                    # -inf seen
    int64_t highs                   # +inf seen
    double mean                     # of the finite values; 0 if none
    double square                   # sum of (value - mean)^2 of them; inf if it overflowed
    double minimum                  # over all values; +inf if none
    double maximum                  # over all values; -inf if none
    int64_t* bins                   # edges_n + 1 counts
    const float* edges              # ascending, then NaN up to `slots`; NULL: digest only
    int64_t edges_n
    int64_t slots                   # a power of 2 > edges_n, at least SIMD_LANES; 0 if no edges
    Levels levels                   # of the values
    uint64_t coins                  # state of their generator
    Hll distinct                    # of integers and categories
    Frequent frequent               # of their values that are whole numbers
    Kind kind

cdef struct Block:                  # values (batches, channels, length), C-contiguous, not owned
    const void* x
    bint is_double                  # else float
    int64_t batches
    int64_t channels
    int64_t length

cdef class Bank:
    cdef Feature* _features
    cdef int64_t* _bins             # slab of all bins
    cdef float* _edges              # slab of all padded edges; NULL: digest only
    cdef int64_t _bins_n
    cdef PyThread_type_lock _lock
    cdef const SketchSimd* _simd
    cdef LevelsShape _shape
    cdef void* _scratch             # of the levels
    cdef void* _items               # memory of distinct values and frequent items
    cdef void* _rows                # matrix rows put by until they are worth a block
    cdef int64_t _rows_n
    cdef bint _rows_double
    cdef readonly Py_ssize_t features
    cdef public bint _bins_only     # counters alone came, at least in part

    cdef void _enter(self) noexcept
    cdef void _leave(self) noexcept
    cdef int _update(self, object x, int ndim, Py_ssize_t first) except -1
    cdef int _put(self, const Block* block) except -1
    cdef int _feed(self, const Block* block) except -1
    cdef int _settle(self) except -1
    cdef tuple _levels_of(self, Feature* feature)
    cdef bytes _kll_of(self, Feature* feature)
    cdef tuple _items_of(self, Feature* feature)
    cdef tuple _picks_of(self, Feature* feature, int64_t room_bytes, int64_t picks_min)
    cdef Feature* _at(self, object i) except NULL

# Count every value of a block; channel c goes to feature first + c. The caller has the lock. -1: no
# memory left for the levels; the rest of the block was not counted.
cdef int bank_feed(Bank bank, Py_ssize_t first, const Block* block) noexcept nogil
