/* Layout and atomics of the shared-memory ring; the contract is docs/shared-memory-ring.md.
 *
 * All numbers are little-endian. Whoever maps the file may write any byte of it at any time, so
 * what is read here is copied first, then checked, and only the copy is used.
 */
#ifndef SHOAL_RING_H
#define SHOAL_RING_H

#include <errno.h>
#include <linux/futex.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the ring is little-endian"
#endif

#define RING_MAGIC 0x474e524c414f4853ull   /* "SHOALRNG" in the file */
#define RING_VERSION 1
#define RING_PAGE_BYTES 4096

typedef struct {                      /* page 0 of the file; written by the server alone, */
    uint64_t magic;                   /* but for bell and pending */
    uint32_t version, slots_n;
    uint64_t slot_first, slot_stride, request_bytes, response_bytes;
    uint64_t generation;
    uint32_t server_pid, server_start;
    uint8_t pad0[64];
    uint32_t state;                   /* 128: RING_SERVING or RING_CLOSED */
    uint8_t pad1[60];
    uint32_t bell;                    /* 192: futex of the server; clients add 1 */
    uint8_t pad2[60];
    uint32_t sleepers;                /* 256: server threads that are in futex wait, or about to */
    uint32_t spinners;                /* 260: server threads that look at pending all the time */
    uint8_t pad3[56];
    uint64_t pending[16];             /* 320: bit n%64 of word n/64: slot n has a request */
} RingPage;

typedef struct {                      /* 256 bytes, then the request area, the response area */
    uint64_t owner;                   /* 0 free; else start << 32 | pid of the client */
    uint8_t pad0[56];
    uint32_t state;                   /* 64: futex of the client */
    uint32_t waiting;                 /* 68: the client is in futex wait, or about to */
    uint8_t pad1[56];
    uint32_t sequence, priority;      /* 128: of the request */
    uint64_t deadline_ns;             /* 136: CLOCK_MONOTONIC; 0 none */
    uint8_t pad2[48];
    uint32_t answer_sequence, status; /* 192: of the response */
    uint32_t tensors_n, text_bytes;
    uint8_t pad3[48];
} RingSlot;

typedef struct {                      /* at 0 of the request area; then inputs, then outputs */
    uint32_t kind, inputs_n, outputs_n, reserved;
    char model[256];                  /* UTF-8, ends in 0 */
    char revision[64];                /* UTF-8, ends in 0; empty: whichever serves */
    uint8_t pad[48];
} RingRequest;

typedef struct {                      /* an input, or an output of a response */
    char name[256];                   /* UTF-8, ends in 0 */
    uint32_t type, ndim;              /* type: onnx.TensorProto.DataType */
    int64_t dims[8];
    uint64_t offset, size;            /* bytes, from the start of the area; offset % 64 == 0 */
    uint8_t pad[8];
} RingTensor;

typedef struct { char name[256]; } RingName;   /* a wanted output */

_Static_assert(offsetof(RingPage, generation) == 48, "page");
_Static_assert(offsetof(RingPage, state) == 128, "page");
_Static_assert(offsetof(RingPage, bell) == 192, "page");
_Static_assert(offsetof(RingPage, sleepers) == 256, "page");
_Static_assert(offsetof(RingPage, pending) == 320, "page");
_Static_assert(offsetof(RingSlot, state) == 64, "slot");
_Static_assert(offsetof(RingSlot, sequence) == 128, "slot");
_Static_assert(offsetof(RingSlot, deadline_ns) == 136, "slot");
_Static_assert(offsetof(RingSlot, answer_sequence) == 192, "slot");
_Static_assert(sizeof(RingSlot) == 256, "slot");
_Static_assert(sizeof(RingRequest) == 384, "request");
_Static_assert(sizeof(RingTensor) == 352, "tensor");

/* Sequentially consistent throughout: a request is a handshake of two words (pending and
 * sleepers, state and waiting), each side writes one and reads the other. */
static inline uint32_t ring_get(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline uint64_t ring_get64(const uint64_t* p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void ring_set(uint32_t* p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static inline uint32_t ring_swap(uint32_t* p, uint32_t v) {
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);
}
static inline uint32_t ring_add(uint32_t* p, uint32_t v) {
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
static inline int ring_cas(uint32_t* p, uint32_t old, uint32_t v) {
    return __atomic_compare_exchange_n(p, &old, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
static inline int ring_cas64(uint64_t* p, uint64_t old, uint64_t v) {
    return __atomic_compare_exchange_n(p, &old, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
static inline uint64_t ring_or64(uint64_t* p, uint64_t v) {
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);
}
static inline uint64_t ring_and64(uint64_t* p, uint64_t v) {
    return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);
}
static inline int ring_lowest(uint64_t word) { return __builtin_ctzll(word); }

/* Tell the core that this is a spin; what was read is read again. */
static inline void ring_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ __volatile__("yield" ::: "memory");
#else
    __asm__ __volatile__("" ::: "memory");
#endif
}

static inline int64_t ring_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Sleep while *p == seen, wait_ns at most. Not PRIVATE: the other side is another process. */
static inline void ring_sleep(uint32_t* p, uint32_t seen, int64_t wait_ns) {
    struct timespec t = {wait_ns / 1000000000, wait_ns % 1000000000};
    syscall(SYS_futex, p, FUTEX_WAIT, seen, &t, NULL, 0);
}
static inline void ring_wake(uint32_t* p, int count) {
    syscall(SYS_futex, p, FUTEX_WAKE, count, NULL, NULL, 0);
}

#endif
