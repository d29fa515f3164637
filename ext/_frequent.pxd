"""C face of the frequent-items kernel: what other kernels may cimport to count frequent items."""

from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport int32_t, int64_t, uint8_t

cdef enum:
    FREQUENT_LG_MIN = 3
    FREQUENT_LG_MAX = 16

cdef struct Frequent:               # plain data; zeros beside the pointers and lg_max are empty
    int64_t* items                  # 2^lg_max places, the caller's
    int64_t* counts                 # as many; 0: the place is free
    int32_t lg_max                  # FREQUENT_LG_MIN to FREQUENT_LG_MAX
    int32_t active                  # places in use, at most 3/4 of all
    int64_t total                   # weight of all that came
    int64_t offset                  # the most that a count may be too low

cdef int32_t frequent_capacity(int lg) noexcept nogil
cdef void frequent_clear(Frequent* frequent) noexcept nogil

# Add weight >= 0 to an item; the caller keeps total within FREQUENT_TOTAL_MAX.
cdef int64_t FREQUENT_TOTAL_MAX
cdef void frequent_put(Frequent* frequent, int64_t item, int64_t weight) noexcept nogil
cdef void frequent_put_many(
    Frequent* frequent, const int64_t* items, const int64_t* weights, int64_t n
) noexcept nogil                    # weights NULL: 1 each
# Add what `other`, not the same memory, counted.
cdef void frequent_merge(Frequent* into, const Frequent* other) noexcept nogil
# Its count: a lower bound of its weight, which is at most the count + offset. 0: not kept.
cdef int64_t frequent_count(const Frequent* frequent, int64_t item) noexcept nogil
# Copy the counters, the largest first, equal ones by item, to arrays of `active`; -1: no memory.
cdef int frequent_list(const Frequent* frequent, int64_t* items, int64_t* counts) noexcept nogil

# Bytes of the library: their number; write them and return it, or -1: no memory.
cdef Py_ssize_t frequent_size(const Frequent* frequent) noexcept nogil
cdef Py_ssize_t frequent_write(const Frequent* frequent, uint8_t* out) noexcept nogil
# NULL, or why the bytes are refused. frequent_check reads head and length and sets lg_max;
# frequent_read fills an empty sketch of that lg_max, to be thrown away if the answer is not NULL.
cdef const char* frequent_check(const uint8_t* data, Py_ssize_t size, int* lg_max) noexcept nogil
cdef const char* frequent_read(
    Frequent* empty, const uint8_t* data, Py_ssize_t size
) noexcept nogil

cdef class Counters:
    cdef Frequent _frequent
    cdef PyThread_type_lock _lock

    cdef void _enter(self) noexcept
    cdef void _leave(self) noexcept
    cdef int64_t* _copy(self, Frequent* copy) except NULL
