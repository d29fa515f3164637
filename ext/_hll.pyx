# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Count distinct keys by HyperLogLog, in the bytes of Apache DataSketches.

    key --hash--> coupon (slot, value) --few: table of coupons--many: largest value per slot-->

While they are few, coupons are kept whole, in a hash table that lies in the memory of the
registers to come. A coupon's home is the word that holds its slot's register, and words are
probed upwards. So the table turns into registers in place: read upwards from an empty word, no
coupon's register lies in a word that is still to be read.

Names, checks and what is promised stand in ``hll.py``.

Sources: Flajolet, Fusy, Gandouet, Meunier, "HyperLogLog", AofA 2007; Ertl, "New cardinality
estimation algorithms for HyperLogLog sketches", 2017, algorithm 6 (the estimator); Appleby,
MurmurHash3 x64-128 (the hash).
"""

from operator import index

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pythread cimport (
    NOWAIT_LOCK, WAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_release_lock,
)
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.math cimport INFINITY, log, sqrt
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memcpy, memset

cdef extern from *:
    int __builtin_clzll(unsigned long long) noexcept nogil

cdef enum:
    ADDRESS_BITS = 26       # of a coupon; the six above are the value
    VALUE_MAX = 63
    SEED = 9001
    PROBES_MAX = 512        # honest coupons need 60; crafted ones may not cost n^2
    BLOCK = 512             # keys made at once: 4 KiB of stack

    LIST = 0
    SET = 1
    ARRAY = 2
    LIST_HEAD = 8           # bytes before the first coupon
    SET_HEAD = 12
    ARRAY_HEAD = 40
    LIST_MAX = 7            # coupons of a list; the eighth makes it a set
    EMPTY_FLAG = 4
    COMPACT_FLAG = 8
    OUT_OF_ORDER_FLAG = 16
    FLAGS = 62              # read-only and full-size may be set too; big-endian may not
    NIBBLE_EXCEPTION = 15
    PENDING = 255           # a register whose exception has not been read yet

cdef double ESTIMATE_MAX = 2.0 ** 88    # coupons tell no more keys apart

LG_K_MIN, LG_K_MAX = HLL_LG_K_MIN, HLL_LG_K_MAX

# ---- hash --------------------------------------------------------------------------------------

cdef inline uint64_t turn(uint64_t x, int bits) noexcept nogil:
    return (x << bits) | (x >> (64 - bits))


cdef inline uint64_t mix_low(uint64_t x) noexcept nogil:
    return turn(x * <uint64_t>0x87c37b91114253d5, 31) * <uint64_t>0x4cf5ad432745937f


cdef inline uint64_t mix_high(uint64_t x) noexcept nogil:
    return turn(x * <uint64_t>0x4cf5ad432745937f, 33) * <uint64_t>0x87c37b91114253d5


cdef inline uint64_t avalanche(uint64_t x) noexcept nogil:
    x = (x ^ (x >> 33)) * <uint64_t>0xff51afd7ed558ccd
    x = (x ^ (x >> 33)) * <uint64_t>0xc4ceb9fe1a85ec53
    return x ^ (x >> 33)


cdef inline void finish(uint64_t* low, uint64_t* high, uint64_t size) noexcept nogil:
    """The hash's last step, in place."""
    cdef uint64_t a = low[0] ^ size, b = high[0] ^ size
    a += b
    b += a
    a, b = avalanche(a), avalanche(b)
    low[0] = a + b
    high[0] = b + low[0]


cdef inline uint32_t coupon_of(uint64_t low, uint64_t high) noexcept nogil:
    # not above 62 zeros, and __builtin_clzll(0) has no answer
    cdef uint32_t value = <uint32_t>__builtin_clzll(high | 2) + 1
    return value << ADDRESS_BITS | <uint32_t>(low & ((1 << ADDRESS_BITS) - 1))


cdef inline void hash_key(uint64_t key, uint64_t* low, uint64_t* high) noexcept nogil:
    """What hll_coupon_bytes does, for 8 bytes."""
    low[0], high[0] = SEED ^ mix_low(key), SEED
    finish(low, high, 8)


cdef uint32_t hll_coupon(uint64_t key) noexcept nogil:
    cdef uint64_t low, high
    hash_key(key, &low, &high)
    return coupon_of(low, high)


cdef inline uint64_t word(const uint8_t* data, Py_ssize_t size) noexcept nogil:
    """Return up to 8 bytes as a little-endian number."""
    cdef uint64_t value = 0
    cdef Py_ssize_t i
    for i in range(size):
        value |= <uint64_t>data[i] << (8 * i)
    return value


cdef uint32_t hll_coupon_bytes(const uint8_t* data, Py_ssize_t size) noexcept nogil:
    cdef uint64_t low = SEED, high = SEED
    cdef Py_ssize_t at = 0
    while size - at >= 16:
        low = (turn(low ^ mix_low(word(data + at, 8)), 27) + high) * 5 + 0x52dce729
        high = (turn(high ^ mix_high(word(data + at + 8, 8)), 31) + low) * 5 + 0x38495ab5
        at += 16
    if size - at > 8:
        high ^= mix_high(word(data + at + 8, size - at - 8))
    low ^= mix_low(word(data + at, min(size - at, 8)))      # no bytes: 0, which mixes to 0
    finish(&low, &high, <uint64_t>size)
    return coupon_of(low, high)


cdef inline uint64_t key_of(double value) noexcept nogil:
    cdef uint64_t key
    value += 0.0                            # -0.0 becomes 0.0
    memcpy(&key, &value, 8)
    return key


cdef uint64_t hll_key_double(double value) noexcept nogil:
    return key_of(value) if value == value else <uint64_t>0x7ff8000000000000


cdef int64_t hll_keys_doubles(const double* values, int64_t n, uint64_t* keys) noexcept nogil:
    cdef int64_t i, count = 0
    for i in range(n):
        keys[count] = key_of(values[i])
        count += values[i] == values[i]     # a null's key is overwritten
    return count


cdef int64_t hll_keys_floats(const float* values, int64_t n, uint64_t* keys) noexcept nogil:
    cdef int64_t i, count = 0
    for i in range(n):
        keys[count] = key_of(values[i])
        count += values[i] == values[i]
    return count

# ---- coupons and registers ---------------------------------------------------------------------

cdef inline int coupons_max(int lg_k) noexcept nogil:
    """So many coupons are kept: the library's rule, three quarters of a set of 2^(lg_k - 3)."""
    return LIST_MAX if lg_k < 8 else 3 << (lg_k - 5)


cdef Py_ssize_t hll_memory(int lg_k) noexcept nogil:
    return max(<Py_ssize_t>1 << lg_k, 4 * (LIST_MAX + 1))


cdef void hll_clear(Hll* hll) noexcept nogil:
    memset(hll.memory, 0, hll_memory(hll.lg_k))
    hll.coupons = 0


cdef inline void register_raise(uint8_t* registers, uint32_t mask, uint32_t coupon) noexcept nogil:
    cdef uint8_t value = <uint8_t>(coupon >> ADDRESS_BITS)
    if registers[coupon & mask] < value:
        registers[coupon & mask] = value


cdef void hll_promote(Hll* hll) noexcept nogil:
    cdef uint32_t* words = <uint32_t*>hll.memory
    cdef uint32_t last = <uint32_t>(hll_memory(hll.lg_k) // 4 - 1), start = 0, at, coupon
    if hll.coupons < 0:
        return
    while words[start]:                     # there is an empty word: the table is never full
        start += 1
    for at in range(start + 1, start + 1 + last):
        coupon = words[at & last]
        words[at & last] = 0
        if coupon:
            register_raise(hll.memory, (<uint32_t>1 << hll.lg_k) - 1, coupon)
    hll.coupons = -1


cdef void hll_put_coupon(Hll* hll, uint32_t coupon) noexcept nogil:
    cdef uint32_t* words = <uint32_t*>hll.memory
    cdef uint32_t mask = (<uint32_t>1 << hll.lg_k) - 1
    cdef uint32_t last = <uint32_t>(hll_memory(hll.lg_k) // 4 - 1), at
    cdef int probes = 0
    if hll.coupons >= 0:
        at = (coupon & mask) >> 2
        while words[at] and words[at] != coupon and probes < PROBES_MAX:
            at = (at + 1) & last
            probes += 1
        if words[at] == coupon:
            return
        if probes < PROBES_MAX and hll.coupons < coupons_max(hll.lg_k):
            words[at] = coupon
            hll.coupons += 1
            return
        hll_promote(hll)
    register_raise(hll.memory, mask, coupon)


cdef void hll_put(Hll* hll, uint64_t key) noexcept nogil:
    hll_put_coupon(hll, hll_coupon(key))


cdef void hll_put_keys(Hll* hll, const uint64_t* keys, int64_t n) noexcept nogil:
    cdef uint64_t low, high, mask = (<uint64_t>1 << hll.lg_k) - 1
    cdef uint8_t* registers = hll.memory
    cdef int64_t i = 0, j
    while i < n and hll.coupons >= 0:
        hll_put(hll, keys[i])
        i += 1
    for j in range(i, n):
        hash_key(keys[j], &low, &high)
        # Fewer leading zeros than the register says: nearly always, and cheaper than to count.
        if high >> 1 >> (VALUE_MAX - registers[low & mask]) == 0:
            register_raise(registers, <uint32_t>mask, coupon_of(low, high))


cdef void hll_fold(Hll* hll, int lg_k) noexcept nogil:
    cdef Py_ssize_t i, size = <Py_ssize_t>1 << lg_k
    hll_promote(hll)
    for i in range(size, <Py_ssize_t>1 << hll.lg_k):
        hll.memory[i & (size - 1)] = max(hll.memory[i & (size - 1)], hll.memory[i])
    hll.lg_k = lg_k


cdef void hll_merge(Hll* into, const Hll* other) noexcept nogil:
    cdef const uint32_t* words = <const uint32_t*>other.memory
    cdef Py_ssize_t i, mask = (<Py_ssize_t>1 << into.lg_k) - 1
    if other.coupons >= 0:
        for i in range(hll_memory(other.lg_k) // 4):
            if words[i]:
                hll_put_coupon(into, words[i])
        return
    hll_promote(into)
    for i in range(<Py_ssize_t>1 << other.lg_k):
        into.memory[i & mask] = max(into.memory[i & mask], other.memory[i])

# ---- estimate ----------------------------------------------------------------------------------

cdef double sigma(double x) noexcept nogil:
    """x + the sum of x^(2^k) 2^(k-1), k from 1 on: what the empty registers add."""
    cdef double y = 1.0, z = x, before = -1.0
    if x == 1.0:
        return INFINITY
    while z != before:
        x *= x
        before = z
        z += x * y
        y += y
    return z


cdef double tau(double x) noexcept nogil:
    """(1 - x - the sum of (1 - x^(2^-k))^2 2^-k, k from 1 on) / 3: the saturated registers."""
    cdef double y = 1.0, z = 1.0 - x, before = -1.0
    if x == 0.0 or x == 1.0:
        return 0.0
    while z != before:
        x = sqrt(x)
        before = z
        y *= 0.5
        z -= (1.0 - x) * (1.0 - x) * y
    return z / 3.0


cdef void registers_count(const Hll* hll, int64_t* counts) noexcept nogil:
    """Set counts[v] to the number of registers that are v, for v from 0 to VALUE_MAX."""
    cdef Py_ssize_t i
    memset(counts, 0, (VALUE_MAX + 1) * sizeof(int64_t))
    for i in range(<Py_ssize_t>1 << hll.lg_k):
        counts[hll.memory[i]] += 1


cdef double hll_estimate(const Hll* hll) noexcept nogil:
    cdef int64_t[VALUE_MAX + 1] counts
    cdef double m = <double>(<int64_t>1 << hll.lg_k), z, c = hll.coupons
    cdef int v
    if hll.coupons >= 0:
        # Two keys share a coupon with probability 2^-26 times the sum of 4^-v, which is 1/3.
        return c + c * (c - 1.0) / (2.0 * 3.0 * (1 << ADDRESS_BITS))
    registers_count(hll, counts)
    z = m * tau(1.0 - counts[VALUE_MAX] / m)
    for v in range(VALUE_MAX - 1, 0, -1):
        z = 0.5 * (z + counts[v])
    z += m * sigma(counts[0] / m)
    return min(m * m / (2.0 * log(2.0) * z), ESTIMATE_MAX) if z > 0.0 else ESTIMATE_MAX


cdef int64_t hll_least(const Hll* hll) noexcept nogil:
    cdef int64_t[VALUE_MAX + 1] counts
    if hll.coupons >= 0:
        return hll.coupons
    registers_count(hll, counts)
    return (<int64_t>1 << hll.lg_k) - counts[0]

# ---- bytes -------------------------------------------------------------------------------------

cdef inline uint32_t get_u32(const uint8_t* data) noexcept nogil:
    return <uint32_t>word(data, 4)


cdef inline void put_u32(uint8_t* out, uint32_t value) noexcept nogil:
    cdef int i
    for i in range(4):
        out[i] = (value >> (8 * i)) & 255


cdef inline void put_double(uint8_t* out, double value) noexcept nogil:
    cdef uint64_t bits
    memcpy(&bits, &value, 8)
    put_u32(out, <uint32_t>bits)
    put_u32(out + 4, <uint32_t>(bits >> 32))


cdef int coupon_order(const void* a, const void* b) noexcept nogil:
    cdef uint32_t x = get_u32(<const uint8_t*>a), y = get_u32(<const uint8_t*>b)
    return (x > y) - (x < y)


cdef inline int table_lg(int lg, int64_t count) noexcept nogil:
    """lg of a hash table that starts at `lg` and grows when more than three quarters full."""
    while 4 * count > <int64_t>3 << lg:
        lg += 1
    return lg


cdef inline int exceptions_lg(int lg_k) noexcept nogil:
    """lg of the table of exceptions that the library starts with."""
    return 2 if lg_k < 7 else 3 if lg_k < 10 else 4 if lg_k < 12 else 5 if lg_k < 14 else lg_k - 8


cdef Py_ssize_t hll_size(const Hll* hll, int kind) noexcept nogil:
    cdef int64_t[VALUE_MAX + 1] counts
    cdef int64_t exceptions = 0
    cdef int v = 0, lowest
    if hll.coupons >= 0:
        return (LIST_HEAD if hll.coupons <= LIST_MAX else SET_HEAD) + 4 * hll.coupons
    if kind == HLL_8:
        return ARRAY_HEAD + (<Py_ssize_t>1 << hll.lg_k)
    registers_count(hll, counts)
    while counts[v] == 0:
        v += 1
    for lowest in range(v + NIBBLE_EXCEPTION, VALUE_MAX + 1):
        exceptions += counts[lowest]
    return ARRAY_HEAD + (<Py_ssize_t>1 << (hll.lg_k - 1)) + 4 * exceptions


cdef Py_ssize_t hll_write(const Hll* hll, int kind, uint8_t* out) noexcept nogil:
    memset(out, 0, hll_size(hll, kind))
    out[1], out[2], out[3], out[5] = 1, 7, <uint8_t>hll.lg_k, COMPACT_FLAG
    if hll.coupons >= 0:
        return write_coupons(hll, kind, out)
    return write_registers(hll, kind, out)


cdef Py_ssize_t write_coupons(const Hll* hll, int kind, uint8_t* out) noexcept nogil:
    cdef const uint32_t* words = <const uint32_t*>hll.memory
    cdef bint few = hll.coupons <= LIST_MAX
    cdef Py_ssize_t i, head = LIST_HEAD if few else SET_HEAD, at = head
    out[0] = 2 if few else 3
    out[4] = 3 if few else <uint8_t>table_lg(5, hll.coupons)
    out[7] = <uint8_t>((LIST if few else SET) | kind << 2)
    if few:
        out[6] = <uint8_t>hll.coupons
        out[5] |= 0 if hll.coupons else EMPTY_FLAG
    else:
        put_u32(out + LIST_HEAD, <uint32_t>hll.coupons)
    for i in range(hll_memory(hll.lg_k) // 4):
        if words[i]:
            put_u32(out + at, words[i])
            at += 4
    qsort(out + head, hll.coupons, 4, coupon_order)     # the bytes tell nothing of the order
    return at


cdef Py_ssize_t write_registers(const Hll* hll, int kind, uint8_t* out) noexcept nogil:
    cdef int64_t[VALUE_MAX + 1] counts
    cdef double low = 0.0, high = 0.0
    cdef uint32_t exceptions = 0
    cdef Py_ssize_t i, k = <Py_ssize_t>1 << hll.lg_k, at = ARRAY_HEAD + k // 2
    cdef int v, lowest = 0, above
    registers_count(hll, counts)
    for v in range(VALUE_MAX, -1, -1):      # exact: both sums have fewer than 53 bits
        if v < 32:
            low += counts[v] / <double>(<uint64_t>1 << v)
        else:
            high += counts[v] / <double>(<uint64_t>1 << v)
    while kind == HLL_4 and counts[lowest] == 0:
        lowest += 1
    out[0] = 10
    out[5] |= OUT_OF_ORDER_FLAG             # readers shall not use the accumulator, which is 0
    out[6] = <uint8_t>lowest
    out[7] = <uint8_t>(ARRAY | kind << 2)
    put_double(out + 16, low)
    put_double(out + 24, high)
    put_u32(out + 32, <uint32_t>counts[lowest])
    if kind == HLL_8:
        memcpy(out + ARRAY_HEAD, hll.memory, k)
        return ARRAY_HEAD + k
    for i in range(k):
        above = hll.memory[i] - lowest
        if above >= NIBBLE_EXCEPTION:
            put_u32(out + at, <uint32_t>hll.memory[i] << ADDRESS_BITS | <uint32_t>i)
            at += 4
            exceptions += 1
            above = NIBBLE_EXCEPTION
        out[ARRAY_HEAD + i // 2] |= <uint8_t>(above << (4 * (i & 1)))
    if exceptions:
        out[4] = <uint8_t>table_lg(exceptions_lg(hll.lg_k), exceptions)
        put_u32(out + 36, exceptions)
    return at


cdef const char* hll_check(const uint8_t* data, Py_ssize_t size, int* lg_k) noexcept nogil:
    cdef int mode
    if size < LIST_HEAD:
        return b"fewer than 8 bytes"
    mode = data[7] & 3
    if data[2] != 7:
        return b"not an HLL sketch"
    if data[1] != 1:
        return b"unknown version"
    if data[5] & ~FLAGS:
        return b"unknown flags"
    if mode > ARRAY or data[7] >> 4 or data[7] >> 2 > HLL_8:
        return b"unknown mode"
    if data[0] != (10 if mode == ARRAY else 2 + mode):
        return b"a head whose length is not that of its mode"
    if not HLL_LG_K_MIN <= data[3] <= HLL_LG_K_MAX:
        return b"lg_k out of range"
    lg_k[0] = data[3]
    return NULL


cdef const char* hll_read(Hll* empty, const uint8_t* data, Py_ssize_t size) noexcept nogil:
    cdef int mode = data[7] & 3
    cdef const char* reason
    if mode == ARRAY:
        reason = read_registers(empty, data, size)
    elif mode == LIST:
        reason = read_coupons(empty, data, size, LIST_HEAD, data[6], LIST_MAX)
    elif size < SET_HEAD:
        return b"cut off"
    else:
        reason = read_coupons(
            empty, data, size, SET_HEAD, get_u32(data + 8), coupons_max(empty.lg_k)
        )
    if reason is NULL and data[5] & EMPTY_FLAG and hll_least(empty):
        return b"entries in an empty sketch"
    return reason


cdef const char* read_coupons(
    Hll* hll, const uint8_t* data, Py_ssize_t size, Py_ssize_t head, uint32_t count, int most
) noexcept nogil:
    cdef uint32_t coupon, seen = 0
    cdef Py_ssize_t at
    cdef int before
    if count > <uint32_t>most:
        return b"more coupons than the mode holds"
    if (size - head) & 3 or (data[5] & COMPACT_FLAG and size - head != 4 * <Py_ssize_t>count):
        return b"a length that is not that of its coupons"
    for at in range(head, size, 4):
        coupon = get_u32(data + at)
        if coupon == 0 and not data[5] & COMPACT_FLAG:
            continue                        # a free place of a table
        if coupon >> ADDRESS_BITS == 0:
            return b"a coupon without a value"
        seen += 1
        before = hll.coupons
        if seen <= count:
            hll_put_coupon(hll, coupon)
        if before >= 0 and hll.coupons == before:
            return b"a coupon twice, or more coupons than said"
    if seen != count:
        return b"fewer coupons than said"
    return NULL


cdef const char* read_registers(Hll* hll, const uint8_t* data, Py_ssize_t size) noexcept nogil:
    """Sums and counts that follow from the registers are not read: some writers are behind."""
    cdef Py_ssize_t i, k = <Py_ssize_t>1 << hll.lg_k, pending = 0, body
    cdef const uint8_t* packed = data + ARRAY_HEAD
    cdef int kind = data[7] >> 2, value
    body = k // 2 if kind == HLL_4 else k if kind == HLL_8 else 3 * k // 4 + 1
    if size < ARRAY_HEAD + body or (kind != HLL_4 and size != ARRAY_HEAD + body):
        return b"a length that is not that of its registers"
    if kind != HLL_4 and get_u32(data + 36):
        return b"exceptions where none can be"
    hll.coupons = -1
    for i in range(k):
        if kind == HLL_8:
            value = packed[i]
        elif kind == HLL_6:
            value = (packed[3 * i // 4] | packed[3 * i // 4 + 1] << 8) >> (6 * i & 7) & 63
        else:
            value = packed[i // 2] >> (4 * (i & 1)) & 15
            if value == NIBBLE_EXCEPTION:
                pending += 1
                hll.memory[i] = PENDING
                continue
            value += data[6]
        if value > VALUE_MAX:
            return b"a register above 63"
        hll.memory[i] = <uint8_t>value
    if kind == HLL_4:
        return read_exceptions(hll, data, size, ARRAY_HEAD + body, pending)
    return NULL


cdef const char* read_exceptions(
    Hll* hll, const uint8_t* data, Py_ssize_t size, Py_ssize_t at, Py_ssize_t pending
) noexcept nogil:
    cdef uint32_t coupon, slot
    cdef bint compact = data[5] & COMPACT_FLAG
    if get_u32(data + 36) != pending:
        return b"exceptions that are not those of its registers"
    if (size - at) & 3 or (compact and size - at != 4 * pending):
        return b"a length that is not that of its exceptions"
    for at in range(at, size, 4):
        coupon = get_u32(data + at)
        if coupon == 0 and not compact:
            continue                        # a free place of a table
        slot = coupon & ((1 << ADDRESS_BITS) - 1)
        if slot >> hll.lg_k or hll.memory[slot] != PENDING:
            return b"an exception of a register that has none"
        if coupon >> ADDRESS_BITS < <uint32_t>data[6] + NIBBLE_EXCEPTION:
            return b"an exception too low to be one"
        hll.memory[slot] = <uint8_t>(coupon >> ADDRESS_BITS)
        pending -= 1
    if pending:
        return b"a register without its exception"
    return NULL

# ---- owner -------------------------------------------------------------------------------------

cdef class Distinct:
    """Owner of one sketch's memory; ``hll.HllSketch`` has the names and the checks."""

    def __cinit__(self, lg_k=12):
        lg_k = index(lg_k)
        if not HLL_LG_K_MIN <= lg_k <= HLL_LG_K_MAX:
            raise ValueError(f"lg_k must be {HLL_LG_K_MIN} to {HLL_LG_K_MAX}, got {lg_k}")
        self._hll.lg_k = lg_k
        self._hll.memory = <uint8_t*>calloc(hll_memory(self._hll.lg_k), 1)
        self._lock = PyThread_allocate_lock()
        if self._hll.memory is NULL or self._lock is NULL:
            raise MemoryError("no memory for a sketch")

    def __dealloc__(self):
        free(self._hll.memory)
        if self._lock is not NULL:
            PyThread_free_lock(self._lock)

    cdef void _enter(self) noexcept:
        """Take the lock; let the GIL go while another thread has it."""
        if not PyThread_acquire_lock(self._lock, NOWAIT_LOCK):
            with nogil:
                PyThread_acquire_lock(self._lock, WAIT_LOCK)

    cdef void _leave(self) noexcept:
        PyThread_release_lock(self._lock)

    cdef uint8_t* _copy(self, Hll* copy) except NULL:
        """Fill `copy`, whose memory the caller is to free."""
        cdef uint8_t* memory
        self._enter()
        memory = <uint8_t*>malloc(hll_memory(self._hll.lg_k))
        if memory is not NULL:
            memcpy(memory, self._hll.memory, hll_memory(self._hll.lg_k))
            copy[0] = self._hll
            copy.memory = memory
        self._leave()
        if memory is NULL:
            raise MemoryError("no memory for a copy of a sketch")
        return memory

    @property
    def lg_k(self):
        """Base-2 logarithm of the number of registers."""
        return self._hll.lg_k

    def put_integers(self, const int64_t[::1] values__n):
        """Count int64 values."""
        self._enter()
        with nogil:
            hll_put_keys(&self._hll, <const uint64_t*>&values__n[0], values__n.shape[0])
        self._leave()

    def put_doubles(self, const double[::1] values__n):
        """Count float64 values."""
        cdef uint64_t[BLOCK] keys
        cdef int64_t at = 0, size, n = values__n.shape[0]
        self._enter()
        with nogil:
            while at < n:
                size = min(<int64_t>BLOCK, n - at)
                hll_put_keys(&self._hll, keys, hll_keys_doubles(&values__n[at], size, keys))
                at += size
        self._leave()

    def put_floats(self, const float[::1] values__n):
        """Count float32 values."""
        cdef uint64_t[BLOCK] keys
        cdef int64_t at = 0, size, n = values__n.shape[0]
        self._enter()
        with nogil:
            while at < n:
                size = min(<int64_t>BLOCK, n - at)
                hll_put_keys(&self._hll, keys, hll_keys_floats(&values__n[at], size, keys))
                at += size
        self._leave()

    def put_texts(self, list texts):
        """Count strings; all are looked at before the first is counted."""
        cdef Py_ssize_t i, size, n = 0
        cdef const char* data
        cdef uint32_t* coupons = <uint32_t*>malloc((len(texts) + 1) * sizeof(uint32_t))
        if coupons is NULL:
            raise MemoryError("no memory for the strings' hashes")
        try:
            for i in range(len(texts)):
                if not isinstance(texts[i], str):
                    raise TypeError(f"a text is a str, got {type(texts[i]).__name__}")
                data = PyUnicode_AsUTF8AndSize(texts[i], &size)
                if size:
                    coupons[n] = hll_coupon_bytes(<const uint8_t*>data, size)
                    n += 1
            self._enter()
            for i in range(n):
                hll_put_coupon(&self._hll, coupons[i])
            self._leave()
        finally:
            free(coupons)

    def reset(self):
        """Forget all values; keep ``lg_k``."""
        self._enter()
        hll_clear(&self._hll)
        self._leave()

    def read(self):
        """Return (estimate, distinct values that certainly came, coupons or -1)."""
        self._enter()
        answer = hll_estimate(&self._hll), hll_least(&self._hll), self._hll.coupons
        self._leave()
        return answer

    def registers(self):
        """Return the 2^lg_k registers, a byte each; those that coupons would make."""
        cdef Hll copy
        cdef uint8_t* memory = self._copy(&copy)
        try:
            hll_promote(&copy)
            return PyBytes_FromStringAndSize(<char*>memory, <Py_ssize_t>1 << copy.lg_k)
        finally:
            free(memory)

    def add(self, Distinct other not None):
        """Merge another sketch; the smaller ``lg_k`` of those that have registers stays."""
        cdef Hll copy
        cdef uint8_t* memory = other._copy(&copy)
        cdef uint8_t* smaller
        self._enter()
        with nogil:
            if copy.coupons < 0 and copy.lg_k < self._hll.lg_k:
                hll_fold(&self._hll, copy.lg_k)
                smaller = <uint8_t*>realloc(self._hll.memory, hll_memory(copy.lg_k))
                if smaller is not NULL:
                    self._hll.memory = smaller
            hll_merge(&self._hll, &copy)
        self._leave()
        free(memory)

    def dump(self, int kind):
        """Return the bytes, kind HLL_4 (0) or HLL_8 (2)."""
        cdef bytes out
        self._enter()
        try:
            out = PyBytes_FromStringAndSize(NULL, hll_size(&self._hll, kind))
            hll_write(&self._hll, kind, <uint8_t*>PyBytes_AS_STRING(out))
        finally:
            self._leave()
        return out

    def load(self, const uint8_t[::1] data):
        """Fill a new sketch; return why not, or "". A sketch that refused is to be dropped."""
        cdef const char* reason
        cdef int lg_k
        self._enter()
        with nogil:
            reason = hll_check(&data[0], data.shape[0], &lg_k)
            if reason is NULL and (lg_k != self._hll.lg_k or self._hll.coupons):
                reason = b"for another sketch"
            if reason is NULL:
                reason = hll_read(&self._hll, &data[0], data.shape[0])
        self._leave()
        return "" if reason is NULL else reason.decode()


def peek(const uint8_t[::1] data):
    """Return (lg_k, "") of bytes with a sound head, else (0, why not)."""
    cdef int lg_k = 0
    cdef const char* reason = hll_check(&data[0], data.shape[0], &lg_k)
    return lg_k, "" if reason is NULL else reason.decode()


def coupon(const uint8_t[::1] data):
    """Return the coupon of bytes: the hash alone, for tests."""
    return hll_coupon_bytes(&data[0], data.shape[0])
