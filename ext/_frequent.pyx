# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Count frequent int64 items by Misra-Gries, in the bytes of Apache DataSketches.

    item, weight --put--> table of at most 3/4 * 2^lg_max counts --full--> purge: the median goes

A purge takes the median of the counts from each, drops those that reach 0 and adds it to
`offset`. So a count never exceeds the item's weight, and lacks at most `offset`. Half of the
counts pay a purge in full, hence  sum of counts + offset <= total.  The reader insists on that.

The table is probed upwards from an item's home; it is never full. A purge may not empty it:
the library writes a sketch without counters as if nothing had come. Then the least of the
largest items stays with a count of 1, which is still not above its weight.

Names, checks and what is promised stand in ``frequent.py``.

Sources: Misra, Gries, "Finding repeated elements", 1982; Anderson, Bevin, Lang, Liberty, Rhodes,
Thaler, "A high-performance algorithm for identifying frequent items in data streams", IMC 2017.
"""

from operator import index

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pythread cimport (
    NOWAIT_LOCK, WAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_release_lock,
)
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcpy, memset

cdef enum:
    SAMPLES_MAX = 1024      # counts that a median is taken of: 8 KiB of stack
    HEAD_EMPTY = 8          # bytes
    HEAD = 32
    EMPTY_FLAGS = 5         # as the library writes; it reads either bit

cdef int64_t FREQUENT_TOTAL_MAX = <int64_t>1 << 62      # sums of two stay within int64

LG_MIN, LG_MAX, TOTAL_MAX = FREQUENT_LG_MIN, FREQUENT_LG_MAX, FREQUENT_TOTAL_MAX

cdef struct Counter:
    int64_t count
    int64_t item

# ---- table -------------------------------------------------------------------------------------

cdef int32_t frequent_capacity(int lg) noexcept nogil:
    return 3 << (lg - 2)


cdef void frequent_clear(Frequent* frequent) noexcept nogil:
    memset(frequent.counts, 0, sizeof(int64_t) << frequent.lg_max)
    frequent.active = 0
    frequent.total = frequent.offset = 0


cdef inline Py_ssize_t place_of(const Frequent* frequent, int64_t item) noexcept nogil:
    """The place that has the item, or the free one where it belongs."""
    cdef Py_ssize_t last = (<Py_ssize_t>1 << frequent.lg_max) - 1, at
    cdef uint64_t mixed = <uint64_t>item ^ (<uint64_t>item >> 32)
    # Fibonacci hashing: neighbours spread, the upper bits are the best.
    at = <Py_ssize_t>(mixed * <uint64_t>0x9e3779b97f4a7c15 >> (64 - frequent.lg_max))
    while frequent.counts[at] and frequent.items[at] != item:
        at = (at + 1) & last
    return at


cdef int64_t median(int64_t* counts, int32_t n) noexcept nogil:
    """Return the element at n // 2 in ascending order, by Hoare's selection; reorders."""
    cdef int32_t low = 0, high = n - 1, wanted = n // 2, i, j
    cdef int64_t pivot
    while low < high:
        pivot = counts[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while counts[i] < pivot:
                i += 1
            while counts[j] > pivot:
                j -= 1
            if i <= j:
                counts[i], counts[j] = counts[j], counts[i]
                i += 1
                j -= 1
        if wanted <= j:
            high = j
        elif wanted >= i:
            low = i
        else:
            break
    return counts[wanted]


cdef void purge(Frequent* frequent) noexcept nogil:
    cdef int64_t[SAMPLES_MAX] samples
    cdef int64_t* counts = frequent.counts
    cdef Py_ssize_t last = (<Py_ssize_t>1 << frequent.lg_max) - 1, at, start, best = -1, to
    cdef int32_t n = 0
    cdef int64_t amount, left
    for at in range(last + 1):
        if counts[at] and n < SAMPLES_MAX:
            samples[n] = counts[at]
            n += 1
        if counts[at] and (
            best < 0 or counts[at] > counts[best]
            or (counts[at] == counts[best] and frequent.items[at] < frequent.items[best])
        ):
            best = at
    amount = median(samples, n)
    if counts[best] <= amount:
        counts[best] = amount + 1           # the one that stays
    start = 0
    while counts[start]:
        start += 1
    frequent.active = 0
    # From a free place upwards: an item's home is never ahead, so all move down or stay.
    for at in range(start + 1, start + 1 + last):
        left = counts[at & last] - amount
        counts[at & last] = 0
        if left > 0:
            to = place_of(frequent, frequent.items[at & last])
            frequent.items[to] = frequent.items[at & last]
            counts[to] = left
            frequent.active += 1
    frequent.offset += amount


cdef inline void count_add(Frequent* frequent, int64_t item, int64_t weight) noexcept nogil:
    cdef Py_ssize_t at = place_of(frequent, item)
    if frequent.counts[at]:
        frequent.counts[at] += weight
    elif weight:
        frequent.items[at] = item
        frequent.counts[at] = weight
        frequent.active += 1
        if frequent.active > frequent_capacity(frequent.lg_max):
            purge(frequent)


cdef void frequent_put(Frequent* frequent, int64_t item, int64_t weight) noexcept nogil:
    frequent.total += weight
    count_add(frequent, item, weight)


cdef void frequent_put_many(
    Frequent* frequent, const int64_t* items, const int64_t* weights, int64_t n
) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        frequent_put(frequent, items[i], 1 if weights is NULL else weights[i])


cdef void frequent_merge(Frequent* into, const Frequent* other) noexcept nogil:
    cdef Py_ssize_t at
    for at in range(<Py_ssize_t>1 << other.lg_max):
        if other.counts[at]:
            count_add(into, other.items[at], other.counts[at])
    into.offset += other.offset
    into.total += other.total


cdef int64_t frequent_count(const Frequent* frequent, int64_t item) noexcept nogil:
    return frequent.counts[place_of(frequent, item)]

# ---- lists and bytes ---------------------------------------------------------------------------

cdef int counter_order(const void* a, const void* b) noexcept nogil:
    cdef const Counter* x = <const Counter*>a
    cdef const Counter* y = <const Counter*>b
    if x.count != y.count:
        return 1 if x.count < y.count else -1
    return (x.item > y.item) - (x.item < y.item)


cdef Counter* counters_sorted(const Frequent* frequent) noexcept nogil:
    """Return the counters, the largest first, in memory that the caller frees; NULL: none left."""
    cdef Counter* counters = <Counter*>malloc((frequent.active + 1) * sizeof(Counter))
    cdef Py_ssize_t at, n = 0
    if counters is NULL:
        return NULL
    for at in range(<Py_ssize_t>1 << frequent.lg_max):
        if frequent.counts[at]:
            counters[n].count, counters[n].item = frequent.counts[at], frequent.items[at]
            n += 1
    qsort(counters, n, sizeof(Counter), counter_order)
    return counters


cdef int frequent_list(const Frequent* frequent, int64_t* items, int64_t* counts) noexcept nogil:
    cdef Counter* counters = counters_sorted(frequent)
    cdef Py_ssize_t i
    if counters is NULL:
        return -1
    for i in range(frequent.active):
        items[i], counts[i] = counters[i].item, counters[i].count
    free(counters)
    return 0


cdef inline uint64_t get_u64(const uint8_t* data, int size) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(size):
        value |= <uint64_t>data[i] << (8 * i)
    return value


cdef inline void put_u64(uint8_t* out, uint64_t value) noexcept nogil:
    cdef int i
    for i in range(8):
        out[i] = (value >> (8 * i)) & 255


cdef Py_ssize_t frequent_size(const Frequent* frequent) noexcept nogil:
    return HEAD + 16 * frequent.active if frequent.total else HEAD_EMPTY


cdef Py_ssize_t frequent_write(const Frequent* frequent, uint8_t* out) noexcept nogil:
    cdef Counter* counters
    cdef Py_ssize_t i, n = frequent.active
    cdef int lg = FREQUENT_LG_MIN
    while frequent_capacity(lg) < n:
        lg += 1
    memset(out, 0, HEAD_EMPTY)
    out[0], out[1], out[2], out[3], out[4] = 1, 1, 10, <uint8_t>frequent.lg_max, <uint8_t>lg
    if frequent.total == 0:
        out[5] = EMPTY_FLAGS
        return HEAD_EMPTY
    counters = counters_sorted(frequent)
    if counters is NULL:
        return -1
    out[0] = 4
    put_u64(out + 8, <uint64_t>n)
    put_u64(out + 16, <uint64_t>frequent.total)
    put_u64(out + 24, <uint64_t>frequent.offset)
    for i in range(n):
        put_u64(out + HEAD + 8 * i, <uint64_t>counters[i].count)
        put_u64(out + HEAD + 8 * (n + i), <uint64_t>counters[i].item)
    free(counters)
    return HEAD + 16 * n


cdef const char* frequent_check(const uint8_t* data, Py_ssize_t size, int* lg_max) noexcept nogil:
    if size < HEAD_EMPTY:
        return b"fewer than 8 bytes"
    if data[2] != 10:
        return b"not a sketch of frequent items"
    if data[1] != 1:
        return b"unknown version"
    if not FREQUENT_LG_MIN <= data[3] <= FREQUENT_LG_MAX:
        return b"lg_max out of range"
    if not FREQUENT_LG_MIN <= data[4] <= data[3]:
        return b"a table larger than its largest"
    if data[5] & ~EMPTY_FLAGS or data[0] != (1 if data[5] else 4):
        return b"a head that is neither empty nor full"
    if data[5] and size != HEAD_EMPTY:
        return b"an empty sketch with more than a head"
    lg_max[0] = data[3]
    if data[5]:
        return NULL
    if size < HEAD:
        return b"cut off"
    if get_u64(data + 8, 4) > <uint64_t>frequent_capacity(data[4]):
        return b"more counters than its table holds"
    return NULL


cdef const char* frequent_read(
    Frequent* empty, const uint8_t* data, Py_ssize_t size
) noexcept nogil:
    cdef uint64_t total, left, count
    cdef int64_t item
    cdef Py_ssize_t i, n, at
    if data[5]:
        return NULL
    n = <Py_ssize_t>get_u64(data + 8, 4)
    total = get_u64(data + 16, 8)
    left = total
    if size != HEAD + 16 * n:
        return b"a length that is not that of its counters"
    if total == 0 or total > <uint64_t>FREQUENT_TOTAL_MAX or get_u64(data + 24, 8) > total:
        return b"a total that cannot be"
    left -= get_u64(data + 24, 8)
    for i in range(n):
        count = get_u64(data + HEAD + 8 * i, 8)
        if count == 0 or count > left:
            return b"counts that are not those of its total"
        left -= count
        item = <int64_t>get_u64(data + HEAD + 8 * (n + i), 8)
        at = place_of(empty, item)
        if empty.counts[at]:
            return b"an item twice"
        empty.items[at], empty.counts[at] = item, <int64_t>count
        empty.active += 1
    empty.total = <int64_t>total
    empty.offset = <int64_t>get_u64(data + 24, 8)
    return NULL

# ---- owner -------------------------------------------------------------------------------------

cdef class Counters:
    """Owner of one sketch's memory; ``frequent.FrequentItems`` has the names and the checks."""

    def __cinit__(self, lg_max=6):
        cdef size_t places
        lg_max = index(lg_max)
        if not FREQUENT_LG_MIN <= lg_max <= FREQUENT_LG_MAX:
            raise ValueError(
                f"lg_max must be {FREQUENT_LG_MIN} to {FREQUENT_LG_MAX}, got {lg_max}"
            )
        self._frequent.lg_max = lg_max
        places = <size_t>1 << self._frequent.lg_max
        self._frequent.items = <int64_t*>calloc(2 * places, sizeof(int64_t))
        self._lock = PyThread_allocate_lock()
        if self._frequent.items is NULL or self._lock is NULL:
            raise MemoryError("no memory for a sketch")
        self._frequent.counts = self._frequent.items + places

    def __dealloc__(self):
        free(self._frequent.items)
        if self._lock is not NULL:
            PyThread_free_lock(self._lock)

    cdef void _enter(self) noexcept:
        """Take the lock; let the GIL go while another thread has it."""
        if not PyThread_acquire_lock(self._lock, NOWAIT_LOCK):
            with nogil:
                PyThread_acquire_lock(self._lock, WAIT_LOCK)

    cdef void _leave(self) noexcept:
        PyThread_release_lock(self._lock)

    cdef int64_t* _copy(self, Frequent* copy) except NULL:
        """Fill `copy`, whose items the caller is to free."""
        cdef size_t size = <size_t>2 << self._frequent.lg_max
        cdef int64_t* memory = <int64_t*>malloc(size * sizeof(int64_t))
        if memory is NULL:
            raise MemoryError("no memory for a copy of a sketch")
        self._enter()
        memcpy(memory, self._frequent.items, size * sizeof(int64_t))
        copy[0] = self._frequent
        self._leave()
        copy.items, copy.counts = memory, memory + size // 2
        return memory

    @property
    def lg_max(self):
        """Base-2 logarithm of the table's places; three quarters of them are used."""
        return self._frequent.lg_max

    def put(self, const int64_t[::1] items__n, const int64_t[::1] weights__n):
        """Count items; weights None: 1 each. Return False, and count nothing, above TOTAL_MAX."""
        cdef int64_t i, n = items__n.shape[0], left
        cdef const int64_t* weights = NULL
        cdef bint fits = True
        if weights__n is not None:
            weights = &weights__n[0]
        self._enter()
        with nogil:
            left = FREQUENT_TOTAL_MAX - self._frequent.total
            if weights is NULL:
                fits = n <= left
            else:
                for i in range(n):
                    if weights[i] > left:
                        fits = False
                        break
                    left -= weights[i]
            if fits:
                frequent_put_many(&self._frequent, &items__n[0], weights, n)
        self._leave()
        return fits

    def read(self, int64_t item):
        """Return (count or 0, offset, total)."""
        self._enter()
        answer = (
            frequent_count(&self._frequent, item), self._frequent.offset, self._frequent.total
        )
        self._leave()
        return answer

    def read_all(self):
        """Return (items, counts, offset, total), the largest count first."""
        cdef Frequent copy
        cdef int64_t* memory = self._copy(&copy)
        cdef int64_t* sorted_items = <int64_t*>malloc((2 * copy.active + 1) * sizeof(int64_t))
        cdef int32_t i, n = copy.active
        try:
            if sorted_items is NULL or frequent_list(&copy, sorted_items, sorted_items + n) < 0:
                raise MemoryError("no memory for a list of items")
            return (
                [sorted_items[i] for i in range(n)], [sorted_items[n + i] for i in range(n)],
                copy.offset, copy.total,
            )
        finally:
            free(sorted_items)
            free(memory)

    def add(self, Counters other not None):
        """Merge another sketch. Return False, and change nothing, above TOTAL_MAX."""
        cdef Frequent copy
        cdef int64_t* memory = other._copy(&copy)
        cdef bint fits
        self._enter()
        fits = copy.total <= FREQUENT_TOTAL_MAX - self._frequent.total
        if fits:
            frequent_merge(&self._frequent, &copy)
        self._leave()
        free(memory)
        return fits

    def reset(self):
        """Forget all items; keep ``lg_max``."""
        self._enter()
        frequent_clear(&self._frequent)
        self._leave()

    def dump(self):
        """Return the bytes."""
        cdef bytes out
        cdef Py_ssize_t size
        self._enter()
        try:
            out = PyBytes_FromStringAndSize(NULL, frequent_size(&self._frequent))
            size = frequent_write(&self._frequent, <uint8_t*>PyBytes_AS_STRING(out))
        finally:
            self._leave()
        if size < 0:
            raise MemoryError("no memory for a sketch's bytes")
        return out

    def load(self, const uint8_t[::1] data):
        """Fill a new sketch; return why not, or "". A sketch that refused is to be dropped."""
        cdef const char* reason
        cdef int lg_max
        self._enter()
        reason = frequent_check(&data[0], data.shape[0], &lg_max)
        if reason is NULL and (lg_max != self._frequent.lg_max or self._frequent.total):
            reason = b"for another sketch"
        if reason is NULL:
            reason = frequent_read(&self._frequent, &data[0], data.shape[0])
        self._leave()
        return "" if reason is NULL else reason.decode()


def peek(const uint8_t[::1] data):
    """Return (lg_max, "") of bytes with a sound head, else (0, why not)."""
    cdef int lg_max = 0
    cdef const char* reason = frequent_check(&data[0], data.shape[0], &lg_max)
    return lg_max, "" if reason is NULL else reason.decode()
