# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# distutils: extra_compile_args = -ffp-contract=off
"""Count values into exact bins, moments and KLL levels: scalar rules, loops, the bank.

    rows --tile--> 512 rows of each lane --sums------------------> moments   (Chan's rule)
                                         --bins, or sort, below--> bins      (exact)
                                         --sort or thin, absorb--> KLL levels
    doubles to keep, --take--> block of 512 --above, powers, sort--> the same
    items of doubles

Names, records and their checks stand in ``sketch.py``; the vector loops in ``_sketch_simd.h`` and
``_sort_simd.h``, the levels in ``_levels.h``. The update methods check their own arguments here:
one more Python frame would cost as much as a row of 20 values.

Rows that come one by one are put by and sorted together: a row then costs a copy. Whoever reads
the bank counts them first (``_settle``).

A block's sums are taken around one of its own values. That bounds what cancels: the square of
the shift is at most (n - 1) times the sum wanted, so a block loses a factor 512 of float64's
2^-53 and no more, wherever the values lie.

Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979; Welford, Technometrics 4, 1962; Karnin, Lang, Liberty, FOCS 2016 (KLL).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.buffer cimport (
    PyBUF_RECORDS_RO, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.pythread cimport (
    NOWAIT_LOCK, WAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_release_lock,
)
from libc.math cimport INFINITY, NAN, isfinite, isinf
from libc.stdint cimport uint16_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset, strcmp

from ._frequent cimport Frequent, frequent_clear, frequent_merge, frequent_put, frequent_read
from ._frequent cimport frequent_size, frequent_write
from ._hll cimport HLL_8, Hll, hll_clear, hll_fold, hll_key_double, hll_memory, hll_merge, hll_put
from ._hll cimport hll_read, hll_size, hll_write

cdef extern from "Python.h":
    # NULL: a number that fits nowhere becomes the largest or the smallest one, which are no feature
    Py_ssize_t index_clipped "PyNumber_AsSsize_t"(object, void*) except? -1

cdef extern from "_bins_avx512.h" nogil:
    enum:
        BINS_MAX

cdef extern from "_levels.h" nogil:
    void levels_shape(LevelsShape*, int32_t) noexcept
    void levels_clear(Levels*, const LevelsShape*) noexcept
    void levels_free(Levels*) noexcept
    int levels_absorb_float(
        Levels*, const LevelsShape*, const float*, int32_t, int32_t, int, uint64_t*, float*
    ) noexcept
    int levels_absorb_double(
        Levels*, const LevelsShape*, const double*, int32_t, int32_t, int, uint64_t*, double*
    ) noexcept
    int levels_reserve_float(Levels*, const LevelsShape*, int32_t) noexcept
    int levels_reserve_double(Levels*, const LevelsShape*, int32_t) noexcept
    uint64_t levels_coins(uint64_t*) noexcept
    int levels_of_run(const Levels*, const LevelsShape*, int64_t, int) noexcept
    int64_t levels_weight(const Levels*) noexcept
    double levels_square(int) noexcept
    int32_t levels_sample_float(
        const Levels*, int64_t, int, uint64_t, float*, double*
    ) noexcept
    int32_t levels_sample_double(
        const Levels*, int64_t, int, uint64_t, double*, double*
    ) noexcept
    int levels_merge_float(
        Levels*, const LevelsShape*, const Levels*, uint64_t*, float*
    ) noexcept
    int levels_merge_double(
        Levels*, const LevelsShape*, const Levels*, uint64_t*, double*
    ) noexcept

cdef enum:
    BLOCK = 512         # values per block: a tile of 8 lanes is 16 KiB, half of an L1 cache
    TILE_ROWS_MIN = 16  # least rows of a tile: bins_avx512 takes no fewer
    PIECE_ROWS = 64     # of doubles that are arranged at once: 8 KiB
    ROWS_BYTES = 1024   # of rows put by, per feature: 256 floats. 512 would sort 20 % slower
    DISTINCT_LG_K = 8   # 256 bytes, 6.5 % standard error
    FREQUENT_LG = 5     # 512 bytes, 24 items
    EDGES_VECTOR = 256  # up to so many edges are counted by comparison, else values are searched
    NOGIL = 2048        # values of a call that lets the GIL go: fewer (~5 us) are not worth it
    THIN_LEVEL = 4      # least level of a block that is thinned: there that adds little

# of one feature: items, counts, registers
cdef Py_ssize_t ITEMS_BYTES = (2 * sizeof(int64_t) << FREQUENT_LG) + hll_memory(DISTINCT_LG_K)
cdef double ITEM_MAX = 2.0 ** 63 - 1024     # the largest double that an int64 holds

VALUES_MAX = SKETCH_VALUES_MAX

ctypedef fused real:
    float
    double

cdef const SketchSimd* simd_now = &SKETCH_SIMD[sketch_simd_best()]

# ---- scalar functions --------------------------------------------------------------------------

cdef void feature_clear(Feature* feature, const LevelsShape* shape) noexcept nogil:
    levels_clear(&feature.levels, shape)
    if feature.distinct.memory is not NULL:
        feature.distinct.lg_k = DISTINCT_LG_K
        hll_clear(&feature.distinct)
        frequent_clear(&feature.frequent)
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

cdef inline double variance_of(const Levels* levels) noexcept nogil:
    """V; no rank errs by more than all values, so n^2 says nothing less."""
    cdef double n = <double>levels_weight(levels)
    return levels.variance if levels.variance < n * n else n * n


cdef inline bint has_levels(const Feature* feature) noexcept nogil:
    return feature.kind != KIND_CATEGORY


cdef inline void item_add(Feature* feature, double value, int64_t count) noexcept nogil:
    """Count a value of an integer or category that came some times: no NaN."""
    if -ITEM_MAX <= value <= ITEM_MAX and value == <double><int64_t>value:
        hll_put(&feature.distinct, <uint64_t><int64_t>value)
        frequent_put(&feature.frequent, <int64_t>value, count)
    else:                       # no whole number: distinct, but no item
        hll_put(&feature.distinct, hll_key_double(value))

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


cdef inline int64_t take(
    const SketchSimd* simd, const Block* block, int64_t at, int64_t runs, int64_t length,
    double* wide, float* low,
) noexcept nogil:
    """Copy values from index `at` on, a run from each of `runs` batches; return the padded size."""
    cdef int64_t stride = block.channels * block.length
    if block.is_double:
        return simd.take_double(<const double*>block.x + at, runs, length, stride, wide, low)
    return simd.take_float(<const float*>block.x + at, runs, length, stride, wide, low)


cdef void lane_bins(
    Feature* feature, const SketchSimd* simd, const float* column, int64_t rows, int64_t count
) noexcept nogil:
    """Bin a sorted lane of a tile of `rows` rows, the first `count` of them values."""
    cdef int32_t[EDGES_VECTOR + SIMD_LANES] below
    cdef int64_t i, before = 0
    cdef int lanes = simd.sort.lanes_float
    if feature.edges_n <= EDGES_VECTOR and feature.edges_n <= 2 * count:
        if feature.edges_n:
            simd.tile_below(column, rows, feature.edges, feature.edges_n, below)
        for i in range(feature.edges_n):
            feature.bins[i] += below[i] - before
            before = below[i]
        feature.bins[feature.edges_n] += count - before
    else:
        for i in range(count):
            feature.bins[simd_rank(feature.edges, feature.slots, column[i * lanes])] += 1


cdef bint lane_moments(
    Feature* feature, int64_t count, double shift, const TileSums* sums, int l
) noexcept nogil:
    """Add the moments of a lane of `count` values by its sums around `shift`, if they tell them."""
    cdef double mean, square = sums.square[l]
    if not (sums.lowest[l] > -INFINITY and sums.highest[l] < INFINITY and square < INFINITY):
        return False        # rare: so one by one
    mean = sums.sum[l] / <double>count
    square -= sums.sum[l] * mean
    finite_merge(
        feature, count, shift + mean, square if square > 0.0 else 0.0, sums.lowest[l],
        sums.highest[l],
    )
    return True


cdef void lane_items(
    Feature* feature, const float* column, int lanes, int64_t count
) noexcept nogil:
    """Count the items of a sorted lane: equal ones together."""
    cdef int64_t i = 0, begin
    while i < count:
        begin = i
        while i < count and column[i * lanes] == column[begin * lanes]:
            i += 1
        item_add(feature, column[begin * lanes], i - begin)


cdef bint tile_bins(
    Bank bank, Feature** features, int used, const float* tile, const TileSums* sums, int64_t rows
) noexcept nogil:
    """Bin the lanes of a tile before it is sorted; say whether that was possible, and of use.

    With many edges a search in the sorted lanes is cheaper.
    """
    cdef int32_t[SIMD_TILE * BINS_MAX] counts
    cdef (const float*)[SIMD_TILE] edges
    cdef int64_t[SIMD_TILE] edges_n
    cdef int64_t i, above
    cdef bint some = False
    cdef int l
    for l in range(used):
        if features[l].edges_n >= BINS_MAX:
            return False
        some = some or features[l].edges_n
        edges[l], edges_n[l] = features[l].edges, features[l].edges_n
    if not some:
        return False
    bank._simd.tile_bins(tile, rows, used, edges, edges_n, counts)
    for l in range(used):
        above = 0
        if edges_n[l]:          # nulls and padding are +inf here
            counts[l * BINS_MAX + edges_n[l]] -= <int32_t>rows - sums.count[l]
        for i in range(1, edges_n[l] + 1):
            features[l].bins[i] += counts[l * BINS_MAX + i]
            above += counts[l * BINS_MAX + i]
        features[l].bins[0] += sums.count[l] - above
    return True


cdef bint is_thinned(
    Bank bank, Feature** features, int used, const TileSums* sums, int64_t rows, bint binned
) noexcept nogil:
    """Whether a tile needs no full sort: no bins, no infinite sum, and picks 4 values apart."""
    cdef int l
    if rows != BLOCK:
        return False
    for l in range(used):
        if (
            features[l].kind != KIND_FLOAT or (features[l].edges_n and not binned)
            or sums.count[l] != BLOCK or not sums.square[l] < INFINITY
            or levels_of_run(&features[l].levels, &bank._shape, BLOCK, 0) < THIN_LEVEL
        ):
            return False
    return True


cdef int lane_thinned(Bank bank, Feature* feature, const float* column, int lanes) noexcept nogil:
    """Put what is left of a thinned lane into the levels."""
    if levels_absorb_float(
        &feature.levels, &bank._shape, column, BLOCK >> SORT_THIN_BITS, lanes, SORT_THIN_BITS,
        &feature.coins, <float*>bank._scratch,
    ):
        return -1
    # one event for each of the runs
    feature.levels.variance += 0.25 * levels_square(SORT_THIN_BITS) * (BLOCK // SORT_THIN_RUN)
    return 0


cdef int tile_settle(
    Bank bank, Feature** features, const int64_t* sizes, int used, float* tile, const float* low,
    int64_t rows, const double* shift, TileSums* sums, uint32_t* unsummed,
) noexcept nogil:
    """Count a tile whose sums are known; its lanes are sorted, or thinned, on the way.

    `low` is the tile to bin, itself or another, and if it is another `sums` has the ends of the
    lanes too. The bits of `unsummed` become the lanes whose sums say nothing: they hold an
    infinity, or go beyond float64.
    """
    cdef const SketchSimd* simd = bank._simd
    cdef int lanes = simd.sort.lanes_float, l, i
    cdef uint32_t[2 * SIMD_TILE] coins
    cdef float[SIMD_TILE] lowest
    cdef float[SIMD_TILE] highest
    cdef int64_t count
    cdef const float* column
    cdef Feature* feature
    cdef bint has_ends = low is not tile
    cdef bint binned = (
        (has_ends or simd.bins_first) and tile_bins(bank, features, used, low, sums, rows)
    )
    cdef bint thinned = is_thinned(bank, features, used, sums, rows, binned)
    unsummed[0] = 0
    if thinned:
        for l in range(lanes):
            for i in range(2):
                coins[i * SIMD_TILE + l] = (
                    <uint32_t>(levels_coins(&features[l].coins) >> 32) if l < used else 0
                )
        if not has_ends:
            simd.tile_ends(tile, BLOCK, lowest, highest)
        simd.sort.thin_float(tile, coins)
    else:
        simd.sort.sort_float(tile, <int>rows)
    for l in range(used):
        feature, count, column = features[l], sums.count[l], tile + l
        feature.nulls += sizes[l] - count
        if not count:
            continue
        if thinned:
            if lane_thinned(bank, feature, column, lanes):
                return -1
        elif has_levels(feature) and levels_absorb_float(
            &feature.levels, &bank._shape, column, <int32_t>count, lanes, 0, &feature.coins,
            <float*>bank._scratch,
        ):
            return -1
        if feature.distinct.memory is not NULL:
            lane_items(feature, column, lanes, count)
        if not binned:
            lane_bins(feature, simd, column, rows, count)
        if not has_ends:
            sums.lowest[l] = lowest[l] if thinned else column[0]
            sums.highest[l] = highest[l] if thinned else column[(count - 1) * lanes]
        if not lane_moments(feature, count, shift[l], sums, l):
            unsummed[0] |= <uint32_t>1 << l
    return 0


cdef int tile_count(
    Bank bank, Feature** features, const int64_t* sizes, int used, const float* x, int64_t stride,
    float* tile, int64_t rows,
) noexcept nogil:
    """Count rows at x, the tile itself or elsewhere.

    Lane l has `sizes[l]` values or nulls of features[l], then NaN.
    """
    cdef double[SIMD_TILE] shift
    cdef TileSums sums
    cdef uint32_t unsummed
    cdef int64_t r
    cdef int lanes = bank._simd.sort.lanes_float, l
    for l in range(lanes):
        shift[l] = 0.0
        for r in range(rows):   # the first finite value: nearly always in the first row
            if isfinite(x[r * stride + l]):
                shift[l] = x[r * stride + l]
                break
    bank._simd.tile_sums(x, rows, stride, shift, tile, &sums)
    if tile_settle(
        bank, features, sizes, used, tile, tile, rows, shift, &sums, &unsummed
    ):
        return -1
    for l in range(used):
        if unsummed >> l & 1:
            for r in range(sums.count[l]):
                value_add(features[l], tile[r * lanes + l])
    return 0


cdef inline int64_t tile_rows(int64_t n) noexcept nogil:
    """The rows that a tile of n values per lane takes."""
    cdef int64_t rows = TILE_ROWS_MIN
    while rows < n:
        rows *= 2
    return rows


cdef void tile_fill(
    const Block* block, int64_t channel, int64_t row, int64_t n, real* tile, int lanes, int at,
    int width,
) noexcept nogil:
    """Copy rows `row` to `row + n` of `width` channels into lanes from `at` on.

    A row is a moment: of batch row // length, its time row % length.
    """
    cdef int64_t r, b, t, i, run
    cdef int c
    cdef const real* x
    if block.length == 1:
        x = <const real*>block.x + row * block.channels + channel
        for c in range(0, width, 4):    # of constant size, a copy is an instruction
            if width - c >= 4:
                for r in range(n):
                    memcpy(
                        tile + r * lanes + at + c, x + r * block.channels + c, 4 * sizeof(real)
                    )
            else:
                for i in range(c, width):
                    for r in range(n):
                        tile[r * lanes + at + i] = x[r * block.channels + i]
        return
    r = 0
    while r < n:
        b, t = (row + r) // block.length, (row + r) % block.length
        run = block.length - t if block.length - t < n - r else n - r
        for c in range(width):
            x = <const real*>block.x + (b * block.channels + channel + c) * block.length + t
            for i in range(run):
                tile[(r + i) * lanes + at + c] = x[i]
        r += run


cdef int floats_feed(
    Bank bank, Py_ssize_t first, int64_t channel, int64_t width, int64_t row, int64_t rows,
    const Block* block, float* tile,
) noexcept nogil:
    """Count rows `row` to `row + rows` of `width` channels of floats, which fill one tile.

    Fewer channels than lanes: several blocks of rows lie side by side.
    """
    cdef int lanes = bank._simd.sort.lanes_float, l
    cdef (Feature*)[SIMD_TILE] features
    cdef int64_t[SIMD_TILE] sizes
    cdef int64_t c, n, i, high
    cdef int used = 0
    n = rows if rows < BLOCK else BLOCK
    high = tile_rows(n)
    if width == lanes and block.length == 1 and n == high:     # nothing to arrange
        for c in range(width):
            features[c] = &bank._features[first + channel + c]
            sizes[c] = n
        return tile_count(
            bank, features, sizes, lanes,
            <const float*>block.x + row * block.channels + channel, block.channels, tile, high,
        )
    if rows < BLOCK * (lanes // width) or lanes % width:
        for i in range(high * lanes):
            tile[i] = <float>NAN
    while rows > 0 and used + width <= lanes:
        n = rows if rows < BLOCK else BLOCK
        tile_fill(block, channel, row, n, tile, lanes, used, <int>width)
        for c in range(width):
            features[used + c] = &bank._features[first + channel + c]
            sizes[used + c] = n
        used += <int>width
        row += n
        rows -= n
    return tile_count(bank, features, sizes, used, tile, lanes, tile, high)


cdef inline double double_at(const Block* block, int64_t channel, int64_t row) noexcept nogil:
    """The value of a channel at a moment, as in tile_fill."""
    cdef int64_t b = row // block.length, t = row % block.length
    return (<const double*>block.x)[(b * block.channels + channel) * block.length + t]


cdef int doubles_feed(
    Bank bank, Py_ssize_t first, int64_t channel, int64_t width, int64_t row, int64_t rows,
    const Block* block, float* tile,
) noexcept nogil:
    """floats_feed for doubles, of features that keep floats and have few edges."""
    cdef unsigned char[BLOCK * SIMD_TILE * 4 + 64] raw
    cdef float* low = <float*>((<uintptr_t>&raw[63]) & ~<uintptr_t>63)
    cdef double[PIECE_ROWS * SIMD_TILE] piece
    cdef int lanes = bank._simd.sort.lanes_float, l, used = 0
    cdef (Feature*)[SIMD_TILE] features
    cdef int64_t[SIMD_TILE] sizes
    cdef int64_t[SIMD_TILE] starts
    cdef double[SIMD_TILE] shift
    cdef TileSums sums
    cdef uint32_t unsummed
    cdef int64_t c, n, i, r, at, high = tile_rows(rows if rows < BLOCK else BLOCK)
    cdef double value
    while rows > 0 and used + width <= lanes:
        n = rows if rows < BLOCK else BLOCK
        for c in range(width):
            features[used + c] = &bank._features[first + channel + c]
            sizes[used + c] = n
            starts[used + c] = row
        used += <int>width
        row += n
        rows -= n
    for l in range(lanes):
        shift[l] = sums.sum[l] = sums.square[l] = 0.0
        sums.lowest[l], sums.highest[l] = INFINITY, -INFINITY
        sums.count[l] = 0
        if l < used:
            for r in range(sizes[l]):
                value = double_at(block, channel + l % width, starts[l] + r)
                if isfinite(value):
                    shift[l] = value
                    break
    if width == lanes and block.length == 1 and sizes[0] == high:   # nothing to arrange
        bank._simd.tile_take(
            <const double*>block.x + starts[0] * block.channels + channel, high, block.channels,
            shift, tile, low, &sums,
        )
    else:
        at = 0
        while at < high:
            n = high - at if high - at < PIECE_ROWS else PIECE_ROWS
            for i in range(n * lanes):
                piece[i] = NAN
            l = 0
            while l < used:
                r = sizes[l] - at if sizes[l] - at < n else n
                if r > 0:
                    tile_fill(block, channel, starts[l] + at, r, <double*>piece, lanes, l, <int>width)
                l += <int>width
            bank._simd.tile_take(
                piece, n, lanes, shift, tile + at * lanes, low + at * lanes, &sums
            )
            at += n
    if tile_settle(bank, features, sizes, used, tile, low, high, shift, &sums, &unsummed):
        return -1
    for l in range(used):
        if unsummed >> l & 1:
            for r in range(sizes[l]):
                value = double_at(block, channel + l % width, starts[l] + r)
                if value == value:
                    value_add(features[l], value)
    return 0


cdef struct Columns:                # columns put by until they fill a tile, and all of one type
    void* tile
    int used
    bint is_double
    int64_t count_max
    (Feature*)[SIMD_TILE] features
    int64_t[SIMD_TILE] counts


cdef int columns_settle(Bank bank, Columns* columns) noexcept nogil:
    """Put the columns into the levels of their features."""
    cdef const SortSimd* sort = bank._simd.sort
    cdef int64_t rows = tile_rows(columns.count_max), r
    cdef int lanes = sort.lanes_double if columns.is_double else sort.lanes_float, l
    cdef float* floats = <float*>columns.tile
    cdef double* doubles = <double*>columns.tile
    cdef Feature* feature
    for l in range(lanes):
        for r in range(columns.counts[l] if l < columns.used else 0, rows):
            if columns.is_double:
                doubles[r * lanes + l] = INFINITY
            else:
                floats[r * lanes + l] = <float>INFINITY
    if columns.is_double:
        sort.sort_double(doubles, <int>rows)
    else:
        sort.sort_float(floats, <int>rows)
    for l in range(columns.used):
        feature = columns.features[l]
        if columns.counts[l] == 0:
            continue
        if columns.is_double:
            if levels_absorb_double(
                &feature.levels, &bank._shape, doubles + l, <int32_t>columns.counts[l], lanes, 0,
                &feature.coins, <double*>bank._scratch,
            ):
                return -1
        elif levels_absorb_float(
            &feature.levels, &bank._shape, floats + l, <int32_t>columns.counts[l], lanes, 0,
            &feature.coins, <float*>bank._scratch,
        ):
            return -1
    columns.used = 0
    columns.count_max = 0
    return 0


cdef int columns_put(
    Bank bank, Columns* columns, Feature* feature, const double* wide, int64_t n
) noexcept nogil:
    """Put by n values, NaN among them, of one feature."""
    cdef bint is_double = feature.kind == KIND_DOUBLE
    cdef const SortSimd* sort = bank._simd.sort
    cdef int lanes = sort.lanes_double if is_double else sort.lanes_float
    cdef int64_t i, count = 0
    if columns.used and (columns.is_double != is_double or columns.used == lanes):
        if columns_settle(bank, columns):
            return -1
    columns.is_double = is_double
    for i in range(n):
        if wide[i] == wide[i]:          # + 0.0 makes 0.0 of -0.0, which a tiny double becomes too
            if is_double:
                (<double*>columns.tile)[count * lanes + columns.used] = wide[i] + 0.0
            else:
                (<float*>columns.tile)[count * lanes + columns.used] = (
                    <float>wide[i] + <float>0.0
                )
            count += 1
    columns.features[columns.used] = feature
    columns.counts[columns.used] = count
    columns.used += 1
    if count > columns.count_max:
        columns.count_max = count
    return 0


cdef int column_feed(
    Bank bank, Feature* feature, const Block* block, int64_t batch, int64_t channel, int64_t runs,
    int64_t t, int64_t length, Columns* columns,
) noexcept nogil:
    """Count values `t` to `t + length` of `runs` batches of one channel: BLOCK values at most."""
    cdef double[BLOCK] wide
    cdef float[BLOCK] low
    cdef int64_t at = (batch * block.channels + channel) * block.length + t, i
    cdef int64_t padded = take(bank._simd, block, at, runs, length, wide, low)
    if has_levels(feature) and columns_put(bank, columns, feature, wide, runs * length):
        return -1
    if feature.distinct.memory is not NULL:
        for i in range(runs * length):
            if wide[i] == wide[i]:
                item_add(feature, wide[i], 1)
    block_add(feature, bank._simd, wide, low, runs * length, padded)
    return 0


cdef inline bint is_tiled(const Feature* feature, const Block* block) noexcept nogil:
    """Whether a feature's values go through tiles of floats.

    Doubles do if the feature keeps floats and a tile can be binned unsorted: items and bins are
    of the doubles themselves, not of the floats near them.
    """
    if block.is_double:
        return feature.kind == KIND_FLOAT and feature.edges_n < BINS_MAX
    return feature.kind != KIND_DOUBLE


cdef int columns_feed(
    Bank bank, Py_ssize_t first, const Block* block, void* tile
) noexcept nogil:
    """Count column by column the channels that no tile takes."""
    cdef Columns columns
    cdef int64_t runs, length, batch = 0, c, t = 0
    columns.tile = tile
    columns.used = 0
    columns.count_max = 0
    # A block is many short runs (rows of a matrix: runs of one) or a piece of one long run.
    runs = BLOCK // block.length if block.length < BLOCK else 1
    while batch < block.batches:
        if runs > block.batches - batch:
            runs = block.batches - batch
        t = 0
        while t < block.length:
            length = block.length - t if block.length - t < BLOCK else BLOCK
            for c in range(block.channels):
                if is_tiled(&bank._features[first + c], block):
                    continue
                if column_feed(
                    bank, &bank._features[first + c], block, batch, c, runs, t, length, &columns
                ):
                    return -1
            t += length
        batch += runs
    return columns_settle(bank, &columns) if columns.used else 0


cdef int bank_feed(Bank bank, Py_ssize_t first, const Block* block) noexcept nogil:
    cdef unsigned char[BLOCK * SIMD_TILE * 4 + 64] raw
    cdef void* tile = <void*>((<uintptr_t>&raw[63]) & ~<uintptr_t>63)
    cdef int lanes = bank._simd.sort.lanes_float, failed
    cdef int64_t rows = block.batches * block.length, row = 0, step, c, width, done, part
    for c in range(block.channels):
        if not is_tiled(&bank._features[first + c], block):
            if columns_feed(bank, first, block, tile):
                return -1
            break
    # So many rows at once that a lone channel fills a tile, and all channels stay in the cache.
    step = BLOCK * lanes
    while row < rows:
        if step > rows - row:
            step = rows - row
        c = 0
        while c < block.channels:
            width = 0
            while (
                width < lanes and c + width < block.channels
                and is_tiled(&bank._features[first + c + width], block)
            ):
                width += 1
            done = 0
            while width and done < step:
                part = BLOCK * (lanes // width)
                if part > step - done:
                    part = step - done
                if block.is_double:
                    failed = doubles_feed(
                        bank, first, c, width, row + done, part, block, <float*>tile
                    )
                else:
                    failed = floats_feed(
                        bank, first, c, width, row + done, part, block, <float*>tile
                    )
                if failed:
                    return -1
                done += part
            c += width if width else 1
        row += step
    return 0

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

    def __init__(
        self, const int64_t[::1] sizes__d, const float[::1] edges__k,
        const unsigned char[::1] kinds__d, int k, uint64_t seed,
    ):
        """Allocate.

        `sizes__d` are numbers of edges, `edges__k` all edges in a row or None, `kinds__d` Kinds;
        `seed` is not 0.
        """
        cdef Py_ssize_t i, scratch, items_n = 0
        cdef char* memory
        cdef int64_t e, at, bins_n = 0, slots_n = 0, edges_n = 0
        if self._features is not NULL:
            raise RuntimeError("a bank is made once")
        if sizes__d.shape[0] < 1:
            raise ValueError("a bank has at least one feature")
        for i in range(sizes__d.shape[0]):
            bins_n += sizes__d[i] + 1
            slots_n += slots_of(sizes__d[i])
            edges_n += sizes__d[i]
            items_n += kinds__d[i] in (KIND_INTEGER, KIND_CATEGORY)
        if edges__k is not None and edges__k.shape[0] != edges_n:
            raise ValueError(f"sizes want {edges_n} edges, got {edges__k.shape[0]}")
        if kinds__d.shape[0] != sizes__d.shape[0] or not 8 <= k <= 65535 or seed == 0:
            raise ValueError("kinds, k or the seed are not of a bank")
        levels_shape(&self._shape, k)
        self._features = <Feature*>calloc(sizes__d.shape[0], sizeof(Feature))
        self._bins = <int64_t*>calloc(bins_n, sizeof(int64_t))
        # A level can be half of what a sketch holds; a block is taken in one piece.
        scratch = BLOCK + self._shape.totals[LEVELS_MAX]
        self._scratch = malloc(scratch * sizeof(double))
        self._items = calloc(items_n + 1, ITEMS_BYTES)
        memory = <char*>self._items
        if edges__k is not None:
            self._edges = <float*>malloc((slots_n + 1) * sizeof(float))
        if (
            self._features is NULL or self._bins is NULL or self._scratch is NULL
            or self._items is NULL or (edges__k is not None and self._edges is NULL)
        ):
            raise MemoryError(f"no memory for a sketch bank of {sizes__d.shape[0]} features")
        self._bins_n = bins_n
        bins_n = slots_n = edges_n = 0
        for i in range(sizes__d.shape[0]):
            self._features[i].kind = <Kind>kinds__d[i]
            if kinds__d[i] in (KIND_INTEGER, KIND_CATEGORY):
                self._features[i].frequent.items = <int64_t*>memory
                self._features[i].frequent.counts = <int64_t*>memory + (1 << FREQUENT_LG)
                self._features[i].frequent.lg_max = FREQUENT_LG
                self._features[i].distinct.memory = (
                    <unsigned char*>memory + (2 * sizeof(int64_t) << FREQUENT_LG)
                )
                memory += ITEMS_BYTES
            # Its own coins for each feature: its neighbours do not move them.
            self._features[i].coins = levels_coins(&seed) | 1
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
            feature_clear(&self._features[i], &self._shape)
        self.features = sizes__d.shape[0]

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.features):
            levels_free(&self._features[i].levels)
        free(self._features)
        free(self._scratch)
        free(self._items)
        free(self._rows)
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

    cdef Feature* _at(self, object i) except NULL:
        cdef Py_ssize_t at = place(i)
        if not 0 <= at < self.features:
            raise IndexError(f"feature index {i} is not in 0 to {self.features - 1}")
        return &self._features[at]

    cdef int _update(self, object x, int ndim, Py_ssize_t first) except -1:
        cdef Py_buffer view
        cdef Block block
        cdef Py_ssize_t values
        cdef int failed = 0
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
                if ndim < 3:
                    self._put(&block)
                elif values < NOGIL:
                    failed = bank_feed(self, first, &block)
                else:
                    with nogil:
                        failed = bank_feed(self, first, &block)
                if failed:
                    raise MemoryError(NO_MEMORY)
            finally:
                self._leave()
        finally:
            PyBuffer_Release(&view)
        return 0

    cdef int _put(self, const Block* block) except -1:
        """Count a matrix: few rows are put by, many counted at once."""
        cdef int64_t size = sizeof(double) if block.is_double else sizeof(float)
        cdef int64_t most = ROWS_BYTES // size, row = 0, n
        cdef int64_t row_size = block.channels * size
        cdef Block rest
        if self._rows_n and (self._rows_double != block.is_double or block.batches > most):
            self._settle()
        if self._rows is NULL:          # a bank that is only merged and read has no need of it
            self._rows = malloc(self.features * ROWS_BYTES)
            if self._rows is NULL:
                raise MemoryError(f"no memory for rows of {self.features} features; none counted")
        self._rows_double = block.is_double
        rest = block[0]
        if block.batches > most:
            rest.batches = block.batches - block.batches % BLOCK
            if block.batches % BLOCK > most:
                rest.batches = block.batches
            if rest.batches:
                self._feed(&rest)
                row = rest.batches
        while row < block.batches:
            n = most - self._rows_n
            if n > block.batches - row:
                n = block.batches - row
            memcpy(
                <char*>self._rows + self._rows_n * row_size,
                <const char*>block.x + row * row_size, n * row_size,
            )
            self._rows_n += n
            row += n
            if self._rows_n == most:
                self._settle()
        return 0

    cdef int _feed(self, const Block* block) except -1:
        cdef int failed
        with nogil:
            failed = bank_feed(self, 0, block)
        if failed:
            raise MemoryError(NO_MEMORY)
        return 0

    cdef int _settle(self) except -1:
        """Count the rows put by. The caller has the lock."""
        cdef Block block
        if self._rows_n:
            block.x, block.is_double = self._rows, self._rows_double
            block.batches, block.channels, block.length = self._rows_n, self.features, 1
            self._rows_n = 0
            self._feed(&block)
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

    def update_channels(self, x__bct, *, object first=0):
        """Count channel-major windows as they lie: all values of a channel are one feature.

        Args:
            x__bct: Windows, shape (batch, channels, time), each >= 1, dtype and layout as in
                ``update``. Channel c goes to feature ``first + c``; features that the window
                does not have are left alone, so several arrays can feed one bank.
            first: Feature of channel 0, 0 <= first and first + channels <= features.

        Raises:
            TypeError: Not an array, or of another dtype; ``first`` is not an int.
            ValueError: Another shape, an empty axis, channels beyond the last feature, or not
                contiguous. Nothing was counted.
        """
        self._update(x__bct, 3, place(first))

    def nulls(self, object i):
        """Return how many NaN feature `i` got; IndexError if there is no such feature."""
        cdef Feature* feature = self._at(i)
        self._enter()
        try:
            self._settle()
            return feature.nulls
        finally:
            self._leave()

    def reset(self):
        """Forget all values; keep edges, kinds, k, memory and the state of the coins."""
        cdef Py_ssize_t i
        self._enter()
        self._rows_n = 0
        self._bins_only = False
        for i in range(self.features):
            feature_clear(&self._features[i], &self._shape)
        self._leave()

    @property
    def memory_bytes(self):
        """Bytes that the bank holds now, per feature; its scratch is shared and not counted."""
        cdef Py_ssize_t i
        cdef int64_t total = 0
        cdef Feature* feature
        self._enter()
        for i in range(self.features):
            feature = &self._features[i]
            total += sizeof(Feature) + (feature.edges_n + 1) * sizeof(int64_t)
            total += ROWS_BYTES if self._rows is not NULL else 0
            total += feature.slots * sizeof(float)
            total += ITEMS_BYTES if feature.distinct.memory is not NULL else 0
            total += feature.levels.size * (
                sizeof(double) if feature.kind == KIND_DOUBLE else sizeof(float)
            )
        self._leave()
        return total / self.features

    def read_bins(self, object i):
        """Return the counts of feature `i`, a list of edges + 1 ints."""
        cdef Feature* feature = self._at(i)
        cdef int64_t b
        self._enter()
        try:
            self._settle()
            return [feature.bins[b] for b in range(feature.edges_n + 1)]
        finally:
            self._leave()

    def read_moments(self, object i):
        """Return (count, mean, variance, minimum, maximum) of feature `i`."""
        cdef Feature feature
        cdef Feature* here = self._at(i)
        self._enter()
        try:
            self._settle()
            feature = here[0]
        finally:
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
        try:
            self._settle()
            other._settle()
            for i in range(self.features):
                mine, theirs = &self._features[i], &other._features[i]
                if mine.edges_n != theirs.edges_n or mine.kind != theirs.kind:
                    return "sizes"
                if (
                    values_of(mine) + values_of(theirs) > SKETCH_VALUES_MAX
                    or mine.nulls + theirs.nulls > SKETCH_VALUES_MAX
                ):
                    hindrance = "values"
            if not hindrance:
                self._bins_only = self._bins_only or other._bins_only
                for i in range(self.features):
                    if levels_add(self, &self._features[i], &other._features[i]) or items_add(
                        &self._features[i], &other._features[i]
                    ):
                        raise MemoryError(NO_MEMORY)
                    feature_merge(&self._features[i], &other._features[i])
        finally:
            if far is not near:
                far._leave()
            near._leave()
        return hindrance

    cdef tuple _levels_of(self, Feature* feature):
        """What ``read_levels`` returns. The caller has the lock and has settled."""
        cdef Levels* levels = &feature.levels
        cdef int64_t size = sizeof(double) if feature.kind == KIND_DOUBLE else sizeof(float)
        cdef int h
        found = PyBytes_FromStringAndSize(
            <const char*>levels.items + (levels.size - levels.retained) * size,
            levels.retained * size,
        ) if levels.retained else b""
        pops = [levels.pops[h] for h in range(levels.levels)]
        return found, pops, levels.k_min, variance_of(levels), feature.minimum, feature.maximum

    def read_levels(self, object i):
        """Return (items, pops, k_min, variance, minimum, maximum) of feature `i`'s sketch.

        Items are bytes of float32 or float64, native, level by level, ascending in each.
        """
        cdef Feature* feature = self._at(i)
        self._enter()
        try:
            self._settle()
            return self._levels_of(feature)
        finally:
            self._leave()

    def write_kll(self, object i):
        """Return the bytes of feature `i`'s sketch as Apache DataSketches KLL."""
        cdef Feature* feature = self._at(i)
        self._enter()
        try:
            self._settle()
            return self._kll_of(feature)
        finally:
            self._leave()

    cdef bytes _kll_of(self, Feature* feature):
        cdef Levels* levels = &feature.levels
        cdef int64_t size = sizeof(double) if feature.kind == KIND_DOUBLE else sizeof(float)
        cdef int64_t n = 0, at
        cdef int h, top = 1
        cdef uint32_t start
        cdef float low, high
        cdef unsigned char* out
        for h in range(levels.levels):
            n += <int64_t>levels.pops[h] << h
            if levels.pops[h]:
                top = h + 1
        while self._shape.totals[top] < levels.retained:
            top += 1
        at = 8 if n < 2 else 20 + 4 * top + 2 * size
        found = PyBytes_FromStringAndSize(NULL, at + levels.retained * size)
        out = <unsigned char*>PyBytes_AS_STRING(found)
        # preamble ints, version, family, flags (empty, level 0 sorted, single), k, m
        out[0], out[1], out[2] = 5 if n > 1 else 2, 2 if n == 1 else 1, 15
        out[3] = 1 if n == 0 else 4 if n == 1 else 2
        put_u32(out + 4, <uint32_t>self._shape.k | 8 << 16)
        if n > 1:
            put_u32(out + 8, <uint32_t>n)
            put_u32(out + 12, <uint32_t>(n >> 32))
            put_u32(out + 16, <uint32_t>levels.k_min | <uint32_t>top << 16)
            start = self._shape.totals[top] - levels.retained
            for h in range(top):
                put_u32(out + 20 + 4 * h, start)
                start += levels.pops[h] if h < levels.levels else 0
            low, high = <float>feature.minimum + <float>0.0, <float>feature.maximum + <float>0.0
            if feature.kind == KIND_DOUBLE:
                put_double(out + at - 16, feature.minimum + 0.0)
                put_double(out + at - 8, feature.maximum + 0.0)
            else:
                put_float(out + at - 8, low)
                put_float(out + at - 4, high)
        for h in range(levels.retained):
            if feature.kind == KIND_DOUBLE:
                put_double(
                    out + at + 8 * h,
                    (<double*>levels.items)[levels.size - levels.retained + h],
                )
            else:
                put_float(
                    out + at + 4 * h, (<float*>levels.items)[levels.size - levels.retained + h]
                )
        return found

    def load_levels(
        self, object i, const unsigned char[::1] items, list pops, int k_min, double variance
    ):
        """Take what ``read_levels`` gave; the caller has checked the values."""
        cdef Feature* feature = self._at(i)
        cdef Levels* levels = &feature.levels
        cdef int64_t size = sizeof(double) if feature.kind == KIND_DOUBLE else sizeof(float)
        cdef int64_t retained = sum(pops)
        cdef int h
        if retained * size != items.shape[0] or not 1 <= len(pops) <= LEVELS_MAX:
            raise ValueError("items do not have the sizes of their levels")
        self._enter()
        try:
            levels_clear(levels, &self._shape)
            levels.levels = <int32_t>len(pops)
            while self._shape.totals[levels.levels] < retained and levels.levels < LEVELS_MAX:
                levels.levels += 1
            if self._shape.totals[levels.levels] < retained:
                raise ValueError("more items than a sketch holds")
            if (
                levels_reserve_double(levels, &self._shape, retained)
                if feature.kind == KIND_DOUBLE
                else levels_reserve_float(levels, &self._shape, retained)
            ):
                raise MemoryError(NO_MEMORY)
            for h in range(len(pops)):
                levels.pops[h] = pops[h]
            levels.retained = <int32_t>retained
            if retained:
                memcpy(
                    <char*>levels.items + (levels.size - retained) * size, &items[0],
                    retained * size,
                )
            levels.k_min, levels.variance = k_min, variance
        finally:
            self._leave()

    cdef tuple _items_of(self, Feature* feature):
        """What ``read_items`` returns. The caller has the lock and has settled."""
        cdef Py_ssize_t size = hll_size(&feature.distinct, HLL_8)
        distinct = PyBytes_FromStringAndSize(NULL, size)
        hll_write(&feature.distinct, HLL_8, <unsigned char*>PyBytes_AS_STRING(distinct))
        size = frequent_size(&feature.frequent)
        if size < 0:
            raise MemoryError("no memory to write the frequent items")
        frequent = PyBytes_FromStringAndSize(NULL, size)
        if frequent_write(&feature.frequent, <unsigned char*>PyBytes_AS_STRING(frequent)) < 0:
            raise MemoryError("no memory to write the frequent items")
        return distinct, frequent

    def read_items(self, object i):
        """Return the bytes of feature `i`'s distinct values (HLL_8) and frequent items.

        ValueError if its kind has none.
        """
        cdef Feature* feature = self._at(i)
        if feature.distinct.memory is NULL:
            raise ValueError(f"feature {i} is no integer and no category: it has no items")
        self._enter()
        try:
            self._settle()
            return self._items_of(feature)
        finally:
            self._leave()

    def load_items(
        self, object i, const unsigned char[::1] distinct, int lg_k,
        const unsigned char[::1] frequent,
    ):
        """Take what ``read_items`` gave, or smaller ones; the caller has checked the bytes."""
        cdef Feature* feature = self._at(i)
        cdef const char* reason
        if feature.distinct.memory is NULL or not 4 <= lg_k <= DISTINCT_LG_K:
            raise ValueError("the feature has no items, or the sketch is too large")
        self._enter()
        try:
            feature.distinct.lg_k = lg_k
            hll_clear(&feature.distinct)
            frequent_clear(&feature.frequent)
            reason = hll_read(&feature.distinct, &distinct[0], distinct.shape[0])
            if reason is NULL:
                reason = frequent_read(&feature.frequent, &frequent[0], frequent.shape[0])
            if reason is not NULL:
                raise ValueError(reason.decode("ascii"))
        finally:
            self._leave()

    cdef tuple _picks_of(self, Feature* feature, int64_t room_bytes, int64_t picks_min):
        """Return (shift, picks, variance, k_min) of a feature's sketch shrunk to some bytes."""
        cdef int64_t n = values_of(feature) if has_levels(feature) else 0
        cdef int64_t size = sizeof(double) if feature.kind == KIND_DOUBLE else sizeof(float)
        cdef int64_t room = room_bytes // size if room_bytes > size * picks_min else picks_min
        cdef int64_t rest
        cdef int shift = 0, bits = 0, ones
        cdef int32_t count
        cdef double variance = variance_of(&feature.levels)
        if n == 0 or levels_weight(&feature.levels) != n:       # none, or bins alone
            return 0, b"", 0.0, feature.levels.k_min
        while n >> bits:
            bits += 1
        while True:
            rest, ones = n & ((<int64_t>1 << shift) - 1), 0
            # whole picks, one for the rest; restored it stands on a level for each of its bits
            while rest:
                rest, ones = rest & (rest - 1), ones + 1
            if (
                (n >> shift) + (1 if ones else 0) <= room
                and (n >> shift) + ones <= self._shape.totals[bits]
            ):
                break
            shift += 1
        found = PyBytes_FromStringAndSize(NULL, ((n >> shift) + (1 if ones else 0)) * size)
        if feature.kind == KIND_DOUBLE:
            count = levels_sample_double(
                &feature.levels, n, shift, levels_coins(&feature.coins),
                <double*>PyBytes_AS_STRING(found), &variance,
            )
        else:
            count = levels_sample_float(
                &feature.levels, n, shift, levels_coins(&feature.coins),
                <float*>PyBytes_AS_STRING(found), &variance,
            )
        if count < 0:
            raise MemoryError("no memory to shrink a sketch")
        return shift, found, min(variance, <double>n * <double>n), feature.levels.k_min

    def dump(
        self, int64_t[::1] counters__k, double[:, ::1] reals__d4, int64_t bytes_max,
        int64_t picks_min, bint sketches,
    ):
        """Write every counter: nulls, lows, highs, bins…; mean, square, minimum, maximum.

        Returns for each feature (shift, picks, variance, k_min) of its sketch, shrunk to what
        `bytes_max` leaves beside its counters as LEB128, and what ``read_items`` does or None;
        None for the sketches unless they are wanted and there.
        """
        cdef Py_ssize_t i, at = 0, j
        cdef int64_t room, counter
        cdef Feature* feature
        self._match(counters__k.shape[0], reals__d4.shape[0], reals__d4.shape[1])
        self._enter()
        try:
            self._settle()
            picks, items = [], []
            for i in range(self.features):
                feature = &self._features[i]
                counters__k[at] = feature.nulls
                counters__k[at + 1] = feature.lows
                counters__k[at + 2] = feature.highs
                memcpy(
                    &counters__k[at + 3], feature.bins, (feature.edges_n + 1) * sizeof(int64_t)
                )
                room = bytes_max
                for j in range(at, at + feature.edges_n + 4):
                    counter = counters__k[j]
                    room -= 1
                    while counter > 127:
                        counter >>= 7
                        room -= 1
                at += feature.edges_n + 4
                reals__d4[i, 0] = feature.mean
                reals__d4[i, 1] = feature.square
                reals__d4[i, 2] = feature.minimum
                reals__d4[i, 3] = feature.maximum
                if feature.distinct.memory is not NULL:
                    counter = room // 2 if has_levels(feature) else room
                    items.append((self._items_of(feature), counter))
                    room -= counter
                else:
                    items.append(None)
                if sketches and not self._bins_only:
                    picks.append(self._picks_of(feature, room, picks_min))
            return None if self._bins_only or not sketches else picks, items
        finally:
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


cdef inline void put_u32(unsigned char* out, uint32_t value) noexcept nogil:
    """Write little-endian, on any machine."""
    cdef int i
    for i in range(4):
        out[i] = <unsigned char>(value >> 8 * i)


cdef inline void put_float(unsigned char* out, float value) noexcept nogil:
    cdef uint32_t bits
    memcpy(&bits, &value, 4)
    put_u32(out, bits)


cdef inline void put_double(unsigned char* out, double value) noexcept nogil:
    cdef uint64_t bits
    memcpy(&bits, &value, 8)
    put_u32(out, <uint32_t>bits)
    put_u32(out + 4, <uint32_t>(bits >> 32))


NO_MEMORY = "no memory left for a sketch; the rest of the values of this call was not counted"


cdef int levels_add(Bank bank, Feature* into, const Feature* other) noexcept nogil:
    """Merge the levels of `other`, which may be `into`."""
    cdef Levels copy
    cdef int64_t size = sizeof(double) if into.kind == KIND_DOUBLE else sizeof(float)
    cdef int failed
    if other.levels.retained == 0:
        return 0
    copy = other.levels
    if into == other:
        copy.items = malloc(copy.size * size)
        if copy.items is NULL:
            return -1
        memcpy(copy.items, other.levels.items, copy.size * size)
    if into.kind == KIND_DOUBLE:
        failed = levels_merge_double(
            &into.levels, &bank._shape, &copy, &into.coins, <double*>bank._scratch
        )
    else:
        failed = levels_merge_float(
            &into.levels, &bank._shape, &copy, &into.coins, <float*>bank._scratch
        )
    if into == other:           # the same errors once more: twice as large, not two that may cancel
        into.levels.variance += 2.0 * copy.variance
        free(copy.items)
    return failed


cdef int items_add(Feature* into, const Feature* other) noexcept nogil:
    """Merge the distinct values and frequent items of `other`, which may be `into`."""
    cdef Frequent copy
    cdef int64_t places = <int64_t>1 << FREQUENT_LG
    if into.distinct.memory is NULL:
        return 0
    if into == other:           # its distinct values are there already
        copy = into.frequent
        copy.items = <int64_t*>malloc(2 * places * sizeof(int64_t))
        if copy.items is NULL:
            return -1
        copy.counts = copy.items + places
        memcpy(copy.items, into.frequent.items, places * sizeof(int64_t))
        memcpy(copy.counts, into.frequent.counts, places * sizeof(int64_t))
        frequent_merge(&into.frequent, &copy)
        free(copy.items)
        return 0
    if other.distinct.coupons < 0 and other.distinct.lg_k < into.distinct.lg_k:
        hll_fold(&into.distinct, other.distinct.lg_k)
    hll_merge(&into.distinct, &other.distinct)
    frequent_merge(&into.frequent, &other.frequent)
    return 0


cdef int64_t slots_of(int64_t edges_n) noexcept nogil:
    """Floats that the edges of a feature take, padded for the search and the vector loops."""
    cdef int64_t slots = SIMD_LANES
    if edges_n == 0:
        return 0
    while slots <= edges_n:
        slots *= 2
    return slots


cdef Py_ssize_t place(object i) except? -1:
    """Return the index that an int of any size says; one beyond all features is beyond here too."""
    if isinstance(i, bool):
        raise TypeError("'bool' object is not taken for an integer")
    return index_clipped(i, NULL)


cdef str wanted(int ndim, object features, object first, const Py_buffer* view):
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


def capacity(int k, int levels):
    """Return how many items a KLL sketch of size `k` holds on `levels` levels, 1 to 61."""
    cdef LevelsShape shape
    if not 8 <= k <= 65535 or not 1 <= levels <= 61:
        raise ValueError(f"k {k} or {levels} levels are not of a sketch")
    levels_shape(&shape, k)
    return shape.totals[levels]


def variants():
    """Return the names of the vector variants this machine can run; the best is last."""
    return tuple([SKETCH_SIMD[i].name.decode("ascii") for i in range(sketch_simd_best() + 1)])


def use_variant(str name):
    """Make banks from now on use a variant, one of ``variants()``; for tests and benchmarks."""
    global simd_now
    simd_now = &SKETCH_SIMD[variants().index(name)]
