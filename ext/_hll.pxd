"""C face of the HLL kernel: what other kernels may cimport to count distinct values."""

from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef enum:
    HLL_LG_K_MIN = 4
    HLL_LG_K_MAX = 21
    HLL_4 = 0                       # four bits a register and a list of exceptions
    HLL_6 = 1                       # read, never written
    HLL_8 = 2                       # a byte a register

cdef struct Hll:                    # plain data; {memory of zeros, lg_k, 0} is an empty sketch
    uint8_t* memory                 # hll_memory(lg_k) bytes, aligned to 4, the caller's
    int32_t lg_k                    # HLL_LG_K_MIN to HLL_LG_K_MAX
    int32_t coupons                 # memory is a table with so many; -1: it is 2^lg_k registers

# Size of `memory` in bytes: 2^lg_k, but 32 for lg_k 4.
cdef Py_ssize_t hll_memory(int lg_k) noexcept nogil
cdef void hll_clear(Hll* hll) noexcept nogil

# The 64 bits that stand for a number: any NaN is one key, and both zeros are.
cdef uint64_t hll_key_double(double value) noexcept nogil
# Keys of the values that are not NaN; returns how many. `keys` has room for n.
cdef int64_t hll_keys_doubles(const double* values, int64_t n, uint64_t* keys) noexcept nogil
cdef int64_t hll_keys_floats(const float* values, int64_t n, uint64_t* keys) noexcept nogil
cdef uint32_t hll_coupon(uint64_t key) noexcept nogil
cdef uint32_t hll_coupon_bytes(const uint8_t* data, Py_ssize_t size) noexcept nogil

# Count one key (an int64 is its own key), many, or a coupon.
cdef void hll_put(Hll* hll, uint64_t key) noexcept nogil
cdef void hll_put_keys(Hll* hll, const uint64_t* keys, int64_t n) noexcept nogil
cdef void hll_put_coupon(Hll* hll, uint32_t coupon) noexcept nogil

# Registers in place of coupons; a smaller lg_k (the memory keeps its size).
cdef void hll_promote(Hll* hll) noexcept nogil
cdef void hll_fold(Hll* hll, int lg_k) noexcept nogil
# `other` has coupons, or lg_k >= that of `into`; fold `into` before if not. Not the same memory.
cdef void hll_merge(Hll* into, const Hll* other) noexcept nogil

cdef double hll_estimate(const Hll* hll) noexcept nogil
cdef int64_t hll_least(const Hll* hll) noexcept nogil       # so many distinct keys came, or more

# Bytes of the library's compact form, kind HLL_4 or HLL_8: their number; write them, return it.
cdef Py_ssize_t hll_size(const Hll* hll, int kind) noexcept nogil
cdef Py_ssize_t hll_write(const Hll* hll, int kind, uint8_t* out) noexcept nogil
# NULL, or why the bytes are refused. hll_check reads the head and sets lg_k; hll_read fills an
# empty sketch of that lg_k, which is to be thrown away if the answer is not NULL.
cdef const char* hll_check(const uint8_t* data, Py_ssize_t size, int* lg_k) noexcept nogil
cdef const char* hll_read(Hll* empty, const uint8_t* data, Py_ssize_t size) noexcept nogil

cdef class Distinct:
    cdef Hll _hll
    cdef PyThread_type_lock _lock

    cdef void _enter(self) noexcept
    cdef void _leave(self) noexcept
    cdef uint8_t* _copy(self, Hll* copy) except NULL
