# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Read KLL sketches of Apache DataSketches and merge very many of them.

    bytes --head--> KllRef --items--> checked --thin--> tower of tiles --thin--> ...

Names, texts of refusals and docs stand in ``kll.py``.

The reader trusts nothing: no length, count or start is used before it is checked, and nothing
is allocated for what the bytes say.

The tower holds a tile per level; an item of level h stands for 2^h values. A full tile is sorted,
each lane (column) by itself, and of every 2^s neighbours in a lane one, at an offset that is
random and fair for each lane, goes to level h + s. The rest of the design is about V, the bound
of what such sampling adds to the variance of a rank:

    a group of total weight G, replaced by one member chosen fairly, moves the rank of any value
    by a mean of 0, within a range of G, and not at all if the value is outside of the group: so
    it adds G^2 / 4 to V for each group that a value may fall into, one for each sorted lane.

The mass that flows through a level costs V, and a merger of n values affords per unit of mass

    rate = n / (8 k_wide^2) + (V that came with the sketches) / (4 n)

which in total is V <= (n / (4 k_wide))^2 + V_came / 4 for each level where it is used up: all
levels together add about as much as came. What is affordable is decided by n and V alone, never
by items or coins, so that the groups' errors stay independent of each other given what came before.

Cheap steps are taken while affordable: runs that stand deep below are thinned on their way in, as
they are sorted already; tiles of SORT_ROWS_MAX rows, which fit the L1 cache, are thinned by 4 or
more. Where this is too dear, a tile grows, to k_wide rows at most.

Source: Karnin, Lang, Liberty, "Optimal quantile approximation in streams", FOCS 2016; Hoeffding,
JASA 58, 1963 (the bound's tail).
"""

import operator

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pythread cimport (
    NOWAIT_LOCK, WAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_release_lock,
)
from cpython.ref cimport PyObject
from libc.math cimport INFINITY, NAN, isfinite, sqrt
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

from .errors import SketchMismatchError, SketchRecordError

cdef extern from "Python.h" nogil:      # of bytes in a tuple that the caller holds: no GIL needed
    bint bytes_check "PyBytes_CheckExact"(PyObject*)
    const unsigned char* bytes_data "(const unsigned char*)PyBytes_AS_STRING"(PyObject*)
    Py_ssize_t bytes_size "PyBytes_GET_SIZE"(PyObject*)
    PyObject* tuple_item "PyTuple_GET_ITEM"(PyObject*, Py_ssize_t)

ctypedef fused real:
    float
    double

cdef enum:
    LEVELS_MAX = 61     # of the format; a reader of 2^53 values meets KLL_LEVELS
    THIN_MAX = 6        # a tile is thinned by at most 2^6 at once
    AHEAD = 4           # sketches between the one asked for from memory and the one read
    ALIGN = 64          # bytes of the widest vector
    LANES_MAX = 16      # floats in it
    TOTALS_K = 513
    TOTALS_LEVELS = 24  # 2^23 times k values

VALUES_MAX = KLL_VALUES_MAX
REASONS = (     # by KllReason
    "",
    "they are shorter than their preamble says",
    "they are of another sketch family than KLL",
    "they are in Java's updatable form; write them with toByteArray(), the compact form",
    "their preamble, version and flags do not fit each other",
    "their k, min_k, m or a reserved byte is out of range",
    "their number of values does not fit their form or exceeds 2^53",
    "their number of levels does not fit their number of values",
    "their levels do not follow each other",
    "their length is neither that of floats nor that of doubles",
    "the weights of their items do not sum to their number of values",
    "a level is not sorted",
    "an item is NaN or outside of their minimum and maximum",
)
cdef enum:          # refusals of a merger, behind those of the reader
    OTHER_TYPE = 100
    TOO_MANY
    BAD_VARIANCE
    NO_BYTES
    NO_MEMORY

cdef uint32_t[TOTALS_K][TOTALS_LEVELS] TOTALS   # kll_total of the usual k: 9 products cost 15 ns
cdef double[LEVELS_MAX] THIRDS              # (2/3)^depth
cdef double[2 * KLL_LEVELS + 2] SQUARES     # 4^level / 4
cdef const KllSimd* simd_now = &KLL_SIMD[kll_simd_best()]
cdef const SortSimd* sort_now = &SORT_SIMD[sort_simd_best()]

cdef int fill_tables() noexcept:
    cdef int i, k
    for i in range(LEVELS_MAX):
        THIRDS[i] = (2.0 / 3.0) ** i
    for i in range(2 * KLL_LEVELS + 2):
        SQUARES[i] = 0.25 * 4.0 ** i
    for k in range(KLL_K_MIN, TOTALS_K):
        for i in range(1, TOTALS_LEVELS):
            TOTALS[k][i] = TOTALS[k][i - 1] + <uint32_t>kll_capacity(k, i - 1)
    return 0

fill_tables()

# ---- capacities --------------------------------------------------------------------------------

cdef int64_t kll_capacity(int k, int depth) noexcept nogil:
    # The format says floor((floor(2k (2/3)^depth) + 1) / 2). Where it exceeds 8, the product in
    # float64 errs by less than 2^-50 of it, and no fraction of 3^depth is that close under an
    # integer: the nudge makes exact products exact and moves no other over an integer.
    cdef double doubled = 2.0 * k * THIRDS[depth]
    cdef int64_t capacity = (<int64_t>(doubled + doubled * 1e-15) + 1) >> 1
    return capacity if capacity > KLL_M else KLL_M


cdef int64_t kll_total(int k, int levels) noexcept nogil:
    cdef int64_t total = 0
    cdef int depth
    if k < TOTALS_K and levels < TOTALS_LEVELS:
        return TOTALS[k][levels]
    for depth in range(levels):
        total += kll_capacity(k, depth)
    return total

# ---- the reader --------------------------------------------------------------------------------

cdef inline uint32_t read_u16(const unsigned char* p) noexcept nogil:
    return p[0] | <uint32_t>p[1] << 8


cdef inline uint32_t read_u32(const unsigned char* p) noexcept nogil:
    return read_u16(p) | read_u16(p + 2) << 16


cdef inline uint64_t read_u64(const unsigned char* p) noexcept nogil:
    return read_u32(p) | <uint64_t>read_u32(p + 4) << 32


cdef inline double read_real(const unsigned char* p, bint is_double) noexcept nogil:
    cdef double wide
    cdef float low
    if is_double:
        memcpy(&wide, p, sizeof(double))
        return wide
    memcpy(&low, p, sizeof(float))
    return low


cdef int head_full(const unsigned char* data, size_t size, KllRef* ref) noexcept nogil:
    """Read what follows the first 8 bytes of a sketch of 2 or more values."""
    cdef int h
    cdef int64_t total, retained
    cdef uint64_t n, weight = 0, count
    cdef uint32_t start, first, before
    cdef const unsigned char* p = data + 20
    if size < 20:
        return KLL_SHORT
    n = read_u64(data + 8)
    ref.min_k = read_u16(data + 16)
    ref.levels = data[18]
    if data[19] != 0 or not KLL_K_MIN <= ref.min_k <= ref.k:
        return KLL_PARAMETERS
    if n < 2 or n > <uint64_t>KLL_VALUES_MAX:
        return KLL_COUNT
    ref.n = <int64_t>n
    # The reference's merge overruns its heap on a level above log2(n).
    if ref.levels < 1 or ref.levels > KLL_LEVELS or n >> (ref.levels - 1) == 0:
        return KLL_LEVEL_COUNT
    if size < 20 + 4 * <size_t>ref.levels:
        return KLL_SHORT
    total = kll_total(ref.k, ref.levels)
    first = before = read_u32(p)
    for h in range(ref.levels):
        start = <uint32_t>total
        if h + 1 < ref.levels:
            start = read_u32(p + 4 * (h + 1))
        if start < before or start > total:
            return KLL_LEVEL_STARTS
        count = start - before
        if count > n >> h:      # so that no sum below overflows: 54 terms up to 2^53
            return KLL_WEIGHT
        weight += count << h
        ref.starts[h] = before - first
        before = start
    retained = total - first
    ref.starts[ref.levels] = <uint32_t>retained
    p += 4 * ref.levels
    if size == <size_t>(p - data) + 4 * <size_t>(retained + 2):
        ref.is_double = False
    elif size == <size_t>(p - data) + 8 * <size_t>(retained + 2):
        ref.is_double = True
    else:
        return KLL_LENGTH
    if weight != n:
        return KLL_WEIGHT
    count = 8 if ref.is_double else 4
    ref.minimum = read_real(p, ref.is_double)
    ref.maximum = read_real(p + count, ref.is_double)
    ref.items = p + 2 * count
    return KLL_OK if ref.minimum <= ref.maximum else KLL_RANGE


cdef int kll_head(const unsigned char* data, size_t size, KllRef* ref) noexcept nogil:
    """Read and check everything but the items."""
    cdef int flags
    if size < 8:
        return KLL_SHORT
    if data[2] != 15:
        return KLL_FAMILY
    if data[1] == 3:
        return KLL_UPDATABLE
    flags = data[3]
    ref.k = ref.min_k = read_u16(data + 4)
    if data[6] != KLL_M or data[7] != 0 or ref.k < KLL_K_MIN:
        return KLL_PARAMETERS
    ref.sorted_zero = (flags & 2) != 0
    if data[0] == 5 and data[1] == 1 and flags & ~2 == 0:
        return head_full(data, size, ref)
    ref.items = data + 8
    ref.starts[0] = 0
    if data[0] == 2 and data[1] == 1 and flags & ~2 == 1:
        ref.is_double = False
        ref.levels = 0
        ref.n = 0
        ref.minimum, ref.maximum = INFINITY, -INFINITY
        return KLL_OK if size == 8 else KLL_LENGTH
    if data[0] == 2 and data[1] == 2 and flags & ~2 == 4:
        if size != 12 and size != 16:
            return KLL_LENGTH
        ref.is_double = size == 16
        ref.levels = 1
        ref.n = 1
        ref.starts[1] = 1
        ref.minimum = ref.maximum = read_real(ref.items, ref.is_double)
        return KLL_OK if ref.minimum == ref.minimum else KLL_RANGE
    return KLL_PREAMBLE


cdef inline double item_of(const KllRef* ref, int64_t i) noexcept nogil:
    return read_real(ref.items + (8 if ref.is_double else 4) * i, ref.is_double)


cdef int kll_items(const KllRef* ref) noexcept nogil:
    """Check the items: order, range, no NaN.

    One pass over all items counts where the order breaks; it may only break between levels, so
    those breaks are counted by themselves. A NaN inside of a level is a break; one at its end is
    out of range.
    """
    cdef int h
    cdef int64_t begin, end, i, breaks, allowed = 0, zero = 0, skip
    cdef double first, last, before = 0.0
    cdef bint some = False
    if not ref.sorted_zero and ref.levels > 0:
        zero = ref.starts[1]
        for i in range(zero):
            first = item_of(ref, i)
            if not (ref.minimum <= first <= ref.maximum):
                return KLL_RANGE
    for h in range(0 if ref.sorted_zero else 1, ref.levels):
        begin, end = ref.starts[h], ref.starts[h + 1]
        if begin == end:
            continue
        first, last = item_of(ref, begin), item_of(ref, end - 1)
        if not (ref.minimum <= first and last <= ref.maximum):
            return KLL_RANGE
        if some and not (before <= first):
            allowed += 1
        some = True
        before = last
    if ref.levels == 0:
        return KLL_OK
    skip = zero * (8 if ref.is_double else 4)
    if ref.is_double:
        breaks = simd_now.breaks_double(ref.items + skip, ref.starts[ref.levels] - zero)
    else:
        breaks = simd_now.breaks_float(ref.items + skip, ref.starts[ref.levels] - zero)
    return KLL_OK if breaks == allowed else KLL_ORDER


cdef int kll_parse(const unsigned char* data, size_t size, KllRef* ref) noexcept nogil:
    cdef int reason = kll_head(data, size, ref)
    return reason if reason else kll_items(ref)


cdef double kll_variance_bound(const KllRef* ref) noexcept nogil:
    # What stands above level h came through it, in events that moved at least half of a level's
    # capacity: the smallest one, that of the present height and of the smallest k.
    cdef double variance = 0.0, above = 0.0, weight = 1.0
    cdef int h, top = ref.levels - 1
    for h in range(ref.levels):
        above += <double>(ref.starts[h + 1] - ref.starts[h]) * weight
        weight *= 2.0
    weight = 1.0
    for h in range(top):
        above -= <double>(ref.starts[h + 1] - ref.starts[h]) * weight
        # whole events: the cast rounds down
        variance += weight * weight * <double><int64_t>(
            above / (2.0 * weight * <double>(kll_capacity(ref.min_k, top - h) >> 1))
        )
        weight *= 2.0
    return variance

# ---- the tower ---------------------------------------------------------------------------------

cdef inline uint64_t toss(Tower* tower) noexcept nogil:
    """xorshift64*: the high bits are the good ones."""
    cdef uint64_t x = tower.coins
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    tower.coins = x
    return x * <uint64_t>2685821657736338717


cdef inline int64_t toss_below(Tower* tower, int bits) noexcept nogil:
    """A fair number below 2^bits, bits >= 1."""
    return <int64_t>(toss(tower) >> (64 - bits))


cdef inline void* tile_of(const Tower* tower, int level) noexcept nogil:
    return tower.slab + <int64_t>level * tower.rows * tower.lanes * (8 if tower.is_double else 4)


cdef inline double rate_of(Tower* tower) noexcept nogil:
    """V that a unit of mass may cost at each level; made anew for each 3 % of values."""
    cdef double n = <double>tower.n, k = <double>tower.rows
    if tower.n >= tower.rate_until:
        tower.rate = n / (8.0 * k * k) + tower.spread / (4.0 * n)
        tower.rate_until = tower.n + (tower.n >> 5)
    return tower.rate


cdef int affordable(Tower* tower, int level, int64_t rows) noexcept nogil:
    """The largest s so that thinning a tile by 2^s is affordable; 0: not even by 2."""
    # A lane costs SQUARES[level + s] and holds a mass of rows * 2^level.
    cdef double purse = rate_of(tower) * <double>(rows << level)
    cdef int s = 0
    while s < THIN_MAX and SQUARES[level + s + 1] <= purse:
        s += 1
    return s


cdef inline int64_t rows_low(const Tower* tower) noexcept nogil:
    return SORT_ROWS_MAX if tower.rows > SORT_ROWS_MAX else tower.rows


cdef void level_thin(Tower* tower, int level, int s, const real* kind) noexcept nogil:
    """Sort the full tile, send one of every 2^s neighbours in a lane up by s levels."""
    cdef real* tile = <real*>tile_of(tower, level)
    cdef int lanes = tower.lanes, lane
    cdef int64_t rows = tower.limit[level] // lanes
    cdef int32_t[LANES_MAX] offsets
    for lane in range(lanes):
        offsets[lane] = <int32_t>toss_below(tower, s)
    if s == 2 and rows >= 2 * SORT_ROWS_MIN:
        if real is float:
            tower.sort.fours_float(tile, <int>rows, offsets)
        else:
            tower.sort.fours_double(tile, <int>rows, offsets)
    elif real is float:
        tower.sort.sort_float(tile, <int>rows)
        tower.simd.pick_float(tile, rows, lanes, s, offsets)
    else:
        tower.sort.sort_double(tile, <int>rows)
        tower.simd.pick_double(tile, rows, lanes, s, offsets)
    tower.variance += lanes * SQUARES[level + s]
    tower.fill[level] = 0
    tower.limit[level] = rows_low(tower) * lanes
    tower.sampling = True
    level_push(tower, level + s, tile, (rows >> s) * lanes)


cdef void level_push(Tower* tower, int level, const real* run, int64_t count) noexcept nogil:
    """Put items, at any alignment, into a tile; thin it whenever it is full."""
    cdef real* tile = <real*>tile_of(tower, level)
    cdef int64_t room
    cdef int s
    while count > 0:
        room = tower.limit[level] - tower.fill[level]
        if room > count:
            room = count
        memcpy(tile + tower.fill[level], run, room * sizeof(real))
        tower.fill[level] += room
        run += room
        count -= room
        if tower.fill[level] == tower.limit[level]:
            s = affordable(tower, level, tower.limit[level] // tower.lanes)
            if s < 2 and tower.limit[level] < <int64_t>tower.rows * tower.lanes:
                tower.limit[level] *= 2
            else:
                level_thin(tower, level, s if s > 1 else 1, run)


cdef inline void level_put(
    Tower* tower, int level, const real* run, int64_t count
) noexcept nogil:
    """level_push, where there is room as a rule."""
    if tower.fill[level] + count < tower.limit[level]:
        memcpy(
            <real*>tile_of(tower, level) + tower.fill[level], run, count * sizeof(real)
        )
        tower.fill[level] += count
    else:
        level_push(tower, level, run, count)


cdef void run_thin(
    Tower* tower, int level, int target, const real* run, int64_t count
) noexcept nogil:
    """Send one of every 2^s neighbours of a sorted run from `level` to `target`.

    s is at most THIN_MAX, so that tiles hold whole groups. A value may fall into one group of a
    run. Items that are left wait at the end of the tile until the next run completes their group,
    into which a value may fall too; what may lie under them stays. Pairs do not wait: a single
    item left is cheaper to keep.
    """
    cdef real* tile = <real*>tile_of(tower, level)
    cdef real* out
    cdef real picked
    cdef int s = target - level
    cdef int64_t group = <int64_t>1 << s, waiting = 0, groups, i
    if s > 1:
        waiting = tower.fill[level] & (group - 1)
        if waiting > 0 and waiting + count >= group:
            i = toss_below(tower, s)
            if i < waiting:
                picked = tile[tower.fill[level] - waiting + i]
            else:
                memcpy(&picked, run + (i - waiting), sizeof(real))
            tower.fill[level] -= waiting
            run += group - waiting
            count -= group - waiting
            tower.variance += SQUARES[target]
            level_put(tower, target, <const real*>&picked, 1)
    groups = count >> s
    if groups > 0:
        tower.variance += SQUARES[target]
        i = toss_below(tower, s)
        if tower.fill[target] + groups < tower.limit[target]:
            out = <real*>tile_of(tower, target) + tower.fill[target]
            tower.fill[target] += groups
            if real is float:
                tower.simd.take_float(out, <const unsigned char*>(run + i), group, groups)
            else:
                tower.simd.take_double(out, <const unsigned char*>(run + i), group, groups)
        else:
            while groups > 0:
                level_push(tower, target, run + i, 1)
                i += group
                groups -= 1
        run += count & -group
        count &= group - 1
    if count > 0:
        level_put(tower, level, run, count)


cdef inline double base_cost(int base) noexcept nogil:
    """About the V of thinning the runs of levels 0 to base - 1 to level `base`."""
    return base * SQUARES[base]


cdef void sketch_push(
    Tower* tower, const KllRef* ref, double variance, const real* items
) noexcept nogil:
    cdef int h, base = 0
    cdef double purse = 0.0
    cdef const real* run
    cdef int64_t count
    tower.n += ref.n
    tower.spread += variance
    tower.variance += variance
    if ref.minimum < tower.minimum:
        tower.minimum = ref.minimum
    if ref.maximum > tower.maximum:
        tower.maximum = ref.maximum
    if tower.sampling and ref.levels > 1:
        purse = rate_of(tower) * <double>ref.n
        base = tower.base
        while base + 2 < KLL_LEVELS and base_cost(base + 1) <= purse:
            base += 1
        while base > 0 and base_cost(base) > purse:
            base -= 1
        tower.base = base
        purse -= base_cost(base)
    for h in range(ref.levels):
        run = items + ref.starts[h]
        count = ref.starts[h + 1] - ref.starts[h]
        if count == 0:
            continue
        if h < base and (h > 0 or ref.sorted_zero):
            run_thin(tower, h, base if base < h + THIN_MAX else h + THIN_MAX, run, count)
        elif h >= base and h > 0 and SQUARES[h + 1] <= purse:
            purse -= SQUARES[h + 1]
            run_thin(tower, h, h + 1, run, count)
        else:
            level_put(tower, h, run, count)


cdef void tower_push(Tower* tower, const KllRef* ref, double variance) noexcept nogil:
    """Merge a sketch that was checked and admitted; the first one chooses the tower's type."""
    cdef int h
    if ref.n == 0:
        return
    if tower.n == 0:
        tower.is_double = ref.is_double
        tower.lanes = tower.sort.lanes_double if ref.is_double else tower.sort.lanes_float
        for h in range(KLL_LEVELS):
            tower.limit[h] = rows_low(tower) * tower.lanes
    if ref.is_double:
        sketch_push(tower, ref, variance, <const double*>ref.items)
    else:
        sketch_push(tower, ref, variance, <const float*>ref.items)

cdef inline double within(const KllRef* ref, double variance) noexcept nogil:
    """A sketch's V; no rank errs by more than n, so n^2 says nothing less."""
    cdef double most = <double>ref.n * <double>ref.n
    return variance if variance < most else most


cdef int admit(int64_t n, bint is_double, const KllRef* ref, double variance) noexcept nogil:
    """Check a sketch against the `n` values so far; 0 or a reason."""
    if not (variance >= 0.0 and isfinite(variance)):
        return BAD_VARIANCE
    if n > 0 and ref.n > 0 and is_double != ref.is_double:
        return OTHER_TYPE
    if ref.n > KLL_VALUES_MAX - n:
        return TOO_MANY
    return 0


cdef int64_t tower_held(const Tower* tower) noexcept nogil:
    cdef int64_t total = 0
    cdef int h
    for h in range(KLL_LEVELS):
        total += tower.fill[h]
    return total


cdef inline int sketches_pass(
    Tower* tower, const KllSpan* spans, Py_ssize_t count, const double* given, Py_ssize_t* bad,
    bint checks, bint merges,
) noexcept nogil:
    """Check sketches, merge checked ones, or both; 0, or why and which is the first refused."""
    cdef KllRef ref
    cdef double variance = 0.0
    cdef int64_t n = tower.n
    cdef bint is_double = tower.is_double
    cdef int reason = 0
    cdef Py_ssize_t i
    for i in range(count):
        if i + AHEAD < count:
            kll_prefetch(spans[i + AHEAD].data)
        if given is not NULL:
            variance = given[i]
        if checks:
            bad[0] = i
            reason = kll_parse(spans[i].data, spans[i].size, &ref)
            if reason == 0:
                reason = admit(
                    n, is_double, &ref,
                    variance if given is not NULL and variance == variance else 0.0,
                )
            if reason:
                return reason
            if ref.n > 0:
                is_double = ref.is_double
                n += ref.n
        else:
            kll_head(spans[i].data, spans[i].size, &ref)
        if merges:
            if given is NULL or variance != variance:
                variance = kll_variance_bound(&ref)
            tower_push(tower, &ref, within(&ref, variance))
    return 0


cdef int merge_all(
    Tower* tower, const KllSpan* spans, Py_ssize_t count, const double* given, Py_ssize_t* bad
) noexcept nogil:
    """Merge all sketches or none; 0, or why none, and which is the first refused.

    Sketches come from far away in memory: they are read once, and what the tower held is put by.
    Where that is more than they are, they are read twice.
    """
    cdef Tower before = tower[0]
    cdef size_t item = 8 if tower.is_double else 4
    cdef size_t held = <size_t>tower_held(tower) * item, size = 0, done = 0
    cdef Py_ssize_t i
    cdef int h, reason
    cdef char* kept = NULL
    for i in range(count):
        size += spans[i].size
        if size > held:
            kept = <char*>malloc(held + 1)
            break
    if kept is NULL:
        reason = sketches_pass(tower, spans, count, given, bad, True, False)
        if reason == 0:
            sketches_pass(tower, spans, count, given, bad, False, True)
        return reason
    for h in range(KLL_LEVELS):
        memcpy(kept + done, tile_of(tower, h), <size_t>before.fill[h] * item)
        done += <size_t>before.fill[h] * item
    reason = sketches_pass(tower, spans, count, given, bad, True, True)
    if reason:
        tower[0] = before
        done = 0
        for h in range(KLL_LEVELS):
            memcpy(tile_of(tower, h), kept + done, <size_t>before.fill[h] * item)
            done += <size_t>before.fill[h] * item
    free(kept)
    return reason

# ---- the curve ---------------------------------------------------------------------------------

cdef void items_take(
    CurveItem* out, const real* tile, int64_t count, int64_t weight
) noexcept nogil:
    cdef int64_t i
    for i in range(count):
        if real is float:
            out[i].key = curve_key_float(tile[i])
        else:
            out[i].key = curve_key_double(tile[i])
        out[i].below = weight


cdef CurveItem* tower_curve(const Tower* tower, CurveItem* room, int64_t held) noexcept nogil:
    """Return the `held` items of a tower in order, summed, within a room for twice as many."""
    cdef CurveItem* found
    cdef int64_t i, done = 0
    cdef int h
    for h in range(KLL_LEVELS):
        if tower.is_double:
            items_take(room + done, <const double*>tile_of(tower, h), tower.fill[h], <int64_t>1 << h)
        else:
            items_take(room + done, <const float*>tile_of(tower, h), tower.fill[h], <int64_t>1 << h)
        done += tower.fill[h]
    found = curve_sort(room, room + held, held, 0 if tower.is_double else 32)
    for i in range(1, held):
        found[i].below += found[i - 1].below
    return found


cdef double curve_quantile(
    const Tower* tower, const CurveItem* curve, int64_t held, double share
) noexcept nogil:
    """The smallest value kept whose rank is at least the share; the extremes at its ends."""
    cdef uint64_t key
    cdef double total
    cdef int64_t found
    if share <= 0.0:
        return tower.minimum
    if share >= 1.0:
        return tower.maximum
    total = <double>curve[held - 1].below
    found = curve_find(curve, held, share * total)
    # The product may have been rounded up, by which the rank of the value before is enough.
    if found > 0 and <double>curve[found - 1].below / total >= share:
        found -= 1
    key = curve[found].key
    return curve_double(key) if tower.is_double else curve_float(key)


cdef void tower_clear(Tower* tower) noexcept nogil:
    """Forget everything but the coins."""
    cdef int h
    tower.n = tower.rate_until = 0
    tower.spread = tower.variance = tower.rate = 0.0
    tower.minimum, tower.maximum = INFINITY, -INFINITY
    tower.sampling = False
    tower.base = 0
    for h in range(KLL_LEVELS):
        tower.fill[h] = 0

# ---- Python faces ------------------------------------------------------------------------------

cdef object refusal(int reason, str what, object variance):
    """The exception for a refused sketch."""
    if reason == OTHER_TYPE:
        return SketchMismatchError(f"{what}: floats and doubles do not merge; nothing was changed")
    if reason == TOO_MANY:
        return SketchMismatchError(f"{what}: more than 2^53 values together; nothing was changed")
    if reason == BAD_VARIANCE:
        return ValueError(
            f"{what}: a variance is finite and at least 0, got {variance}; nothing was changed"
        )
    if reason == NO_BYTES:
        return TypeError(f"{what}: not of type bytes; nothing was changed")
    return SketchRecordError(f"{what}: no KLL sketch of floats or doubles: {REASONS[reason]}")


def read(bytes data not None):
    """Read a sketch: (is_double, k, min_k, n, minimum, maximum, bound of V, starts, items)."""
    cdef KllRef ref
    cdef int h
    cdef Py_ssize_t size
    cdef int reason = kll_parse(bytes_data(<PyObject*>data), len(data), &ref)
    if reason:
        raise refusal(reason, f"{len(data)} bytes", None)
    size = ref.starts[ref.levels] * (8 if ref.is_double else 4)
    return (
        bool(ref.is_double), ref.k, ref.min_k, ref.n, ref.minimum, ref.maximum,
        kll_variance_bound(&ref), [ref.starts[h] for h in range(ref.levels + 1)],
        PyBytes_FromStringAndSize(<const char*>ref.items, size),
    )


def parses(bytes data not None) -> bool:
    """Whether the bytes are a sketch: the reader alone, for the fuzzer."""
    cdef KllRef ref
    return kll_parse(bytes_data(<PyObject*>data), len(data), &ref) == KLL_OK


def capacity(int k, int depth) -> int:
    """Capacity of a level; 8 <= k <= 65535, 0 <= depth <= 60."""
    if not (KLL_K_MIN <= k <= 65535 and 0 <= depth < LEVELS_MAX):
        raise ValueError(f"k is 8 to 65535 and depth 0 to 60, got {k} and {depth}")
    return kll_capacity(k, depth)


def variants() -> tuple[str, ...]:
    """Names of the vector variants that this machine can run, the best one last."""
    return tuple(SORT_SIMD[i].name.decode() for i in range(sort_simd_best() + 1))


def use_variant(str name not None) -> None:
    """Let readers and new mergers use a variant, for tests and benchmarks."""
    global simd_now, sort_now
    if name not in variants():
        raise ValueError(f"{name} is none of {variants()}")
    i = variants().index(name)
    sort_now = &SORT_SIMD[i]
    simd_now = &KLL_SIMD[min(i, kll_simd_best())]


cdef class Blobs:
    """Sketches that stand in memory of others, such as Arrow's buffers. Immutable."""

    def __init__(self, parts, const int64_t[::1] order__s not None):
        """List sketches of parts; they are not copied, and not read before they are merged.

        `parts` are pairs (bytes, int32 offsets): row r of a part is bytes offsets[r] to
        offsets[r + 1] - 1. Rows are numbered through all parts; `order__s` says which are
        listed, and in which order.
        """
        cdef const unsigned char[::1] data
        cdef const int32_t[::1] offsets
        cdef Py_ssize_t part, i, s, rows = 0
        cdef KllSpan* all_rows
        if self._spans is not NULL:
            raise RuntimeError("a list of sketches is made once")
        self._held = []
        for data, offsets in parts:
            if offsets.shape[0] < 1 or offsets[0] < 0:
                raise ValueError("offsets of sketches begin at 0 or later")
            for i in range(offsets.shape[0] - 1):
                if offsets[i + 1] < offsets[i]:
                    raise ValueError("offsets of sketches do not ascend")
            if offsets[offsets.shape[0] - 1] > data.shape[0]:
                raise ValueError("offsets of sketches end behind their bytes")
            self._held.append((data, offsets))
            rows += offsets.shape[0] - 1
        for s in range(order__s.shape[0]):
            if not 0 <= order__s[s] < rows:
                raise IndexError(f"row {order__s[s]} of {rows}")
        self._spans = <KllSpan*>malloc((order__s.shape[0] + 1) * sizeof(KllSpan))
        all_rows = <KllSpan*>malloc((rows + 1) * sizeof(KllSpan))
        if self._spans is NULL or all_rows is NULL:
            free(all_rows)
            raise MemoryError(f"no memory to list {rows} sketches")
        i = 0
        for data, offsets in self._held:
            for part in range(offsets.shape[0] - 1):
                all_rows[i].size = offsets[part + 1] - offsets[part]
                # An empty part has no address.
                all_rows[i].data = &data[0] + offsets[part] if data.shape[0] else NULL
                i += 1
        for s in range(order__s.shape[0]):
            self._spans[s] = all_rows[order__s[s]]
        free(all_rows)
        self.count = order__s.shape[0]

    def __dealloc__(self):
        free(self._spans)

    def __len__(self):
        return self.count

    def __getitem__(self, Py_ssize_t i):
        """A copy of the bytes of a sketch."""
        if not 0 <= i < self.count:
            raise IndexError(f"sketch {i} of {self.count}")
        return PyBytes_FromStringAndSize(<const char*>self._spans[i].data, self._spans[i].size)


cdef class Merger:
    """Owner of a tower. Any thread may call any method; a lock keeps calls whole."""

    def __cinit__(self, *args, **kwargs):
        self._lock = PyThread_allocate_lock()
        if self._lock is NULL:
            raise MemoryError("no lock left for a merger")

    def __init__(self, k_wide, uint64_t coins):
        """Reserve the tiles: `k_wide` rows, a power of 2 from 64 to 65536; `coins` is not 0."""
        cdef Tower* tower = &self._tower
        cdef int64_t size
        k_wide = operator.index(k_wide)
        if self._memory is not NULL:
            raise RuntimeError("a merger is made once")
        if not 64 <= k_wide <= 65536 or k_wide & (k_wide - 1) or coins == 0:
            raise ValueError(f"k_wide is a power of 2 from 64 to 65536, got {k_wide}")
        tower.sort = sort_now
        tower.simd = simd_now
        tower.rows = k_wide
        tower.coins = coins
        tower.minimum, tower.maximum = INFINITY, -INFINITY
        # A row is a vector, of floats or doubles. Pages that are never touched cost no memory.
        size = <int64_t>KLL_LEVELS * tower.rows * tower.sort.lanes_float * sizeof(float)
        self._memory = malloc(size + ALIGN)
        if self._memory is NULL:
            raise MemoryError(f"no memory for a merger of {size} bytes")
        tower.slab = <char*>self._memory + (ALIGN - <uintptr_t>self._memory % ALIGN)
        self.k_wide = k_wide

    def __dealloc__(self):
        free(self._memory)
        if self._lock is not NULL:
            PyThread_free_lock(self._lock)

    cdef void _enter(self) noexcept:
        """Take the lock; let the GIL go while another thread has it."""
        if not PyThread_acquire_lock(self._lock, NOWAIT_LOCK):
            with nogil:
                PyThread_acquire_lock(self._lock, WAIT_LOCK)

    cdef void _leave(self) noexcept:
        PyThread_release_lock(self._lock)

    @property
    def n(self) -> int:
        """Values merged so far, 0 to 2^53."""
        return self._tower.n

    @property
    def variance(self) -> float:
        """V in squared counts: what the sketches brought and what merging added."""
        return self._tower.variance

    def add(self, blob, variance=None) -> None:
        """Merge a sketch.

        Args:
            blob: Bytes of a KLL sketch of floats or doubles, of any k; bytearray and memoryview
                are copied.
            variance: Its V in squared counts, finite and >= 0. Without it V is bounded from the
                bytes, which holds for sketches that the reference libraries made.

        Raises:
            SketchRecordError: The bytes are no such sketch.
            SketchMismatchError: Floats among doubles or doubles among floats, or more than 2^53
                values.
            ValueError: The variance is out of range. All three are ValueErrors, and after each
                the merger is as before.
        """
        cdef KllRef ref
        cdef double v
        cdef int reason
        if not bytes_check(<PyObject*>blob):
            if not isinstance(blob, (bytes, bytearray, memoryview)):
                raise TypeError(f"a sketch is bytes, got {type(blob).__name__}")
            blob = bytes(blob)
        reason = kll_parse(
            bytes_data(<PyObject*>blob), bytes_size(<PyObject*>blob), &ref
        )
        if reason:
            raise refusal(reason, f"{len(blob)} bytes", None)
        v = kll_variance_bound(&ref) if variance is None else variance
        self._enter()
        reason = admit(self._tower.n, self._tower.is_double, &ref, v)
        if reason == 0:
            self.changes += 1
            tower_push(&self._tower, &ref, within(&ref, v))
        self._leave()
        if reason:
            raise refusal(reason, f"{len(blob)} bytes", variance)

    def add_all(self, tuple blobs not None, const double[::1] variances__n=None) -> None:
        """Merge all sketches or none; NaN stands for a variance that is not known."""
        cdef Py_ssize_t count = len(blobs), i
        cdef PyObject* held = <PyObject*>blobs
        cdef KllSpan* spans = <KllSpan*>malloc(max(count, 1) * sizeof(KllSpan))
        if spans is NULL:
            raise MemoryError(f"no memory to list {count} sketches")
        try:
            for i in range(count):
                if not bytes_check(tuple_item(held, i)):
                    raise refusal(NO_BYTES, f"sketch {i} of {count}", None)
                spans[i].data = bytes_data(tuple_item(held, i))
                spans[i].size = bytes_size(tuple_item(held, i))
            self._add(spans, count, variances__n)
        finally:
            free(spans)

    def add_blobs(
        self, Blobs blobs not None, Py_ssize_t begin, Py_ssize_t end,
        const double[::1] variances__n=None,
    ) -> None:
        """Merge sketches `begin` to `end` - 1 of some, or none of them, as add_all does."""
        if not 0 <= begin <= end <= blobs.count:
            raise IndexError(f"sketches {begin} to {end} of {blobs.count}")
        self._add(blobs._spans + begin, end - begin, variances__n)

    cdef int _add(
        self, const KllSpan* spans, Py_ssize_t count, const double[::1] variances__n
    ) except -1:
        cdef Py_ssize_t bad = 0
        cdef const double* given = NULL
        cdef int reason
        if variances__n is not None:
            if variances__n.shape[0] != count:
                raise ValueError(
                    f"{count} sketches have {variances__n.shape[0]} variances; nothing was changed"
                )
            if count > 0:
                given = &variances__n[0]
        self._enter()
        with nogil:
            reason = merge_all(&self._tower, spans, count, given, &bad)
            if reason == 0:
                self.changes += 1
        self._leave()
        if reason:
            raise refusal(
                reason, f"sketch {bad} of {count}, nothing was changed",
                None if variances__n is None else variances__n[bad],
            )
        return 0

    def ask_runs(
        self, Blobs blobs not None, const int64_t[::1] starts__g,
        const double[::1] variances__s, const double[::1] shares__q, double deviations,
        int64_t[::1] n__g, double[::1] variance__g, double[:, :, ::1] found__gbq,
    ) -> None:
        """Merge each run of sketches by itself and write what its quantiles are.

        Run g is the sketches starts__g[g] to starts__g[g + 1] - 1. Of it come n, V and for each
        share the estimate, the lower and the upper bound (axis b): the quantiles of the share and
        of the share less and plus `deviations` * sqrt(V) / n. A run of no value has NaN.
        The merger, which must be empty, is empty again; only its coins have moved on.
        """
        cdef Tower* tower = &self._tower
        cdef CurveItem* room = NULL
        cdef CurveItem* curve
        cdef void* more
        cdef int64_t held, size = 0
        cdef Py_ssize_t g, q, begin, runs = starts__g.shape[0] - 1, bad = 0
        cdef int reason = 0
        cdef double error, share
        if (
            runs < 0 or n__g.shape[0] != runs or variance__g.shape[0] != runs
            or found__gbq.shape[0] != runs or found__gbq.shape[1] != 3
            or found__gbq.shape[2] != shares__q.shape[0] or variances__s.shape[0] != blobs.count
        ):
            raise ValueError("the shapes of runs, variances and answers do not fit")
        if starts__g[0] < 0 or starts__g[runs] > blobs.count:
            raise IndexError(f"sketches {starts__g[0]} to {starts__g[runs]} of {blobs.count}")
        for g in range(runs):
            if starts__g[g + 1] < starts__g[g]:
                raise ValueError("the starts of runs do not ascend")
        self._enter()
        if tower.n:
            self._leave()
            raise ValueError("a merger that holds values cannot be asked for runs")
        try:
            with nogil:
                for g in range(runs):
                    begin = starts__g[g]
                    tower_clear(tower)
                    reason = sketches_pass(
                        tower, blobs._spans + begin, starts__g[g + 1] - begin,
                        &variances__s[0] + begin, &bad, True, True,
                    )
                    if reason:
                        bad += begin
                        break
                    n__g[g] = tower.n
                    variance__g[g] = tower.variance
                    held = tower_held(tower)
                    if held == 0:
                        found__gbq[g] = NAN
                        continue
                    if held > size:
                        size = 2 * held
                        more = realloc(room, 2 * size * sizeof(CurveItem))
                        if more is NULL:
                            reason = NO_MEMORY
                            break
                        room = <CurveItem*>more
                    curve = tower_curve(tower, room, held)
                    for q in range(shares__q.shape[0]):
                        share = shares__q[q]
                        # q = 0 and q = 1 ask for the extremes, which are exact.
                        error = 0.0
                        if 0.0 < share < 1.0:
                            error = deviations * sqrt(tower.variance) / <double>tower.n
                        found__gbq[g, 0, q] = curve_quantile(tower, curve, held, share)
                        found__gbq[g, 1, q] = curve_quantile(tower, curve, held, share - error)
                        found__gbq[g, 2, q] = curve_quantile(tower, curve, held, share + error)
        finally:
            free(room)
            tower_clear(tower)
            self._leave()
        if reason == NO_MEMORY:
            raise MemoryError("no memory for the values of a merger")
        if reason:
            raise refusal(reason, f"sketch {bad} of {blobs.count}", variances__s[bad])

    def curve(self):
        """Read all in order at one moment.

        (changes, is_double, n, variance, minimum, maximum, values as bytes, int64 weights as
        bytes: each of all values up to it)
        """
        cdef Tower* tower = &self._tower
        cdef CurveItem* room = NULL
        cdef CurveItem* found
        cdef int64_t held, i
        cdef bytes values, below
        cdef int64_t* weights
        self._enter()
        try:
            held = tower_held(tower)
            values = PyBytes_FromStringAndSize(NULL, held * (8 if tower.is_double else 4))
            below = PyBytes_FromStringAndSize(NULL, held * sizeof(int64_t))
            room = <CurveItem*>malloc((2 * held + 1) * sizeof(CurveItem))
            if room is NULL:
                raise MemoryError("no memory for the values of a merger")
            weights = <int64_t*>PyBytes_AS_STRING(below)
            with nogil:
                found = tower_curve(tower, room, held)
                for i in range(held):
                    weights[i] = found[i].below
                    if tower.is_double:
                        (<double*>bytes_data(<PyObject*>values))[i] = curve_double(found[i].key)
                    else:
                        (<float*>bytes_data(<PyObject*>values))[i] = curve_float(found[i].key)
            return (
                self.changes, bool(tower.is_double), tower.n, tower.variance,
                tower.minimum, tower.maximum, values, below,
            )
        finally:
            free(room)
            self._leave()

    def dump(self):
        """Read everything at one moment.

        (changes, is_double, n, variance, minimum, maximum, [(level, items as bytes), ...])
        """
        cdef Tower* tower = &self._tower
        cdef int h
        self._enter()
        try:
            return (
                self.changes, bool(tower.is_double), tower.n, tower.variance,
                tower.minimum, tower.maximum,
                [
                    (h, PyBytes_FromStringAndSize(
                        <const char*>tile_of(tower, h),
                        tower.fill[h] * (8 if tower.is_double else 4),
                    ))
                    for h in range(KLL_LEVELS) if tower.fill[h] > 0
                ],
            )
        finally:
            self._leave()

    def merge(self, Merger other not None) -> None:
        """Merge what another merger holds; the other one stays as it is, and may be this one.

        Raises:
            SketchMismatchError: One holds floats, the other doubles, or together they hold more
                than 2^53 values. Neither was changed.
        """
        cdef Tower* tower = &self._tower
        cdef KllRef ref     # all but its levels
        cdef double variance
        cdef int h, reason
        _, ref.is_double, ref.n, variance, ref.minimum, ref.maximum, tiles = other.dump()
        if other is self:       # the same errors once more: twice as large, not two that may cancel
            variance *= 3
        ref.levels = 0
        ref.items = NULL
        self._enter()
        reason = admit(tower.n, tower.is_double, &ref, variance)
        if reason == 0:
            self.changes += 1
            tower_push(tower, &ref, variance)
            for h, items in tiles:
                if ref.is_double:
                    level_push(
                        tower, h, <const double*>bytes_data(<PyObject*>items), len(items) // 8
                    )
                else:
                    level_push(
                        tower, h, <const float*>bytes_data(<PyObject*>items), len(items) // 4
                    )
        self._leave()
        if reason:
            raise refusal(reason, "a merger", variance)
