"""C face of a call: what a tap must offer to see each call inside the step that has no GIL."""

from libc.stdint cimport int64_t

from ._engine cimport Binding

cdef enum:
    LATENCY_BINS = 64

cdef int latency_bin(int64_t latency_ns) noexcept nogil

# CLOCK_MONOTONIC
cdef int64_t now_ns() noexcept nogil

cdef class Tap:
    cdef bint due               # set by `take` when `ready` shall be called, with the GIL
    cdef int64_t deadline       # a call that starts at or after it calls `tick` first; now_ns()

    cdef void take(self, const Binding* binding, int64_t latency_ns) noexcept nogil
