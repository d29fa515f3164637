/* Vector loops of the KLL kernel: are items in order? which are picked from a sorted tile?
 *
 * Items of a sketch stand in foreign bytes, at any alignment: they are loaded by memcpy. The loops
 * stand once, at the end, and this file includes itself to compile it for float and double as
 * "generic" and, on x86-64, as "avx2".
 */
#ifndef KLL_VARIANT /* ---- the variants and their table ---------------------------------------- */
#ifndef SHOAL_KLL_SIMD_H
#define SHOAL_KLL_SIMD_H

#include <stdint.h>
#include <string.h>

#define KLL_VALUES_MAX (INT64_C(1) << 53) /* float64 counts no further exactly */

typedef struct {
  const char* name;
  int64_t (*breaks_float)(const unsigned char* items, int64_t n);
  int64_t (*breaks_double)(const unsigned char* items, int64_t n);
  void (*take_float)(float* out, const unsigned char* items, int64_t step, int64_t n);
  void (*take_double)(double* out, const unsigned char* items, int64_t step, int64_t n);
  void (*pick_float)(float* tile, int64_t rows, int lanes, int s, const int32_t* offsets);
  void (*pick_double)(double* tile, int64_t rows, int lanes, int s, const int32_t* offsets);
} KllSimd;

#define KLL_JOIN_(a, b, c) a##_##b##_##c
#define KLL_JOIN(a, b, c) KLL_JOIN_(a, b, c)
#define KLL_ROW(variant)                                                                    \
  {#variant, breaks_float_##variant, breaks_double_##variant, take_float_##variant, \
   take_double_##variant, pick_float_##variant, pick_double_##variant}

#define KLL_VARIANT generic
#define KLL_BYTES 16
#define KLL_TARGET
#define KLL_T float
#define KLL_BITS int32_t
#include "_kll_simd.h"
#undef KLL_T
#undef KLL_BITS
#define KLL_T double
#define KLL_BITS int64_t
#include "_kll_simd.h"
#undef KLL_T
#undef KLL_BITS
#undef KLL_VARIANT
#undef KLL_BYTES
#undef KLL_TARGET

#if defined(__x86_64__)
#define KLL_VARIANT avx2
#define KLL_BYTES 32
#define KLL_TARGET __attribute__((target("avx2")))
#define KLL_T float
#define KLL_BITS int32_t
#include "_kll_simd.h"
#undef KLL_T
#undef KLL_BITS
#define KLL_T double
#define KLL_BITS int64_t
#include "_kll_simd.h"
#undef KLL_T
#undef KLL_BITS
#undef KLL_VARIANT
#undef KLL_BYTES
#undef KLL_TARGET
static const KllSimd KLL_SIMD[] = {KLL_ROW(generic), KLL_ROW(avx2)};
/* Index of the last variant that this machine can run. */
static inline int kll_simd_best(void) { return __builtin_cpu_supports("avx2") ? 1 : 0; }
#else
static const KllSimd KLL_SIMD[] = {KLL_ROW(generic)};
static inline int kll_simd_best(void) { return 0; }
#endif

/* Ask for the first 1 KiB of a blob while ones before it are read: they lie anywhere. */
static inline void kll_prefetch(const unsigned char* bytes) {
  for (int at = 0; at < 1024; at += 64) __builtin_prefetch(bytes + at);
}

#endif /* SHOAL_KLL_SIMD_H */
#else  /* ---- the loops, once for each variant and type ---------------------------------------- */

/* How many items are not <= their next one. A NaN breaks the order on both its sides. */
static KLL_TARGET int64_t KLL_JOIN(breaks, KLL_T, KLL_VARIANT)(const unsigned char* items,
                                                                int64_t n) {
  KLL_BITS found = 0; /* as wide as an item, so that it vectorises; n is below 2^20 */
  for (int64_t i = 0; i + 1 < n; i++) {
    KLL_T a, b;
    memcpy(&a, items + i * (int64_t)sizeof a, sizeof a);
    memcpy(&b, items + (i + 1) * (int64_t)sizeof b, sizeof b);
    found += !(a <= b);
  }
  return found;
}

/* Copy n items that stand `step` items apart; pairs, which are most of all, in vectors. */
static KLL_TARGET void KLL_JOIN(take, KLL_T, KLL_VARIANT)(KLL_T* restrict out,
                                                          const unsigned char* restrict items,
                                                          int64_t step, int64_t n) {
  typedef KLL_T Loose __attribute__((aligned(1), may_alias));
  const Loose* from = (const Loose*)items;
  if (step == 2) {
    for (int64_t i = 0; i < n; i++) out[i] = from[2 * i];
  } else {
    for (int64_t i = 0; i < n; i++) out[i] = from[step * i];
  }
}

/* Of every 2^s rows keep one, in each lane the one at its offset; the rows kept close up in place.
 * Every row is loaded once and masked, so that no lane needs a load of its own. `lanes` is a
 * multiple of the items in 16 bytes. */
static KLL_TARGET void KLL_JOIN(pick, KLL_T, KLL_VARIANT)(KLL_T* tile, int64_t rows, int lanes,
                                                          int s, const int32_t* offsets) {
  enum { PART = (int)(KLL_BYTES / sizeof(KLL_T)) };
  typedef KLL_BITS Bits __attribute__((vector_size(KLL_BYTES)));
  for (int first = 0; first < lanes; first += PART) {
    Bits offset;
    for (int l = 0; l < PART; l++) offset[l] = offsets[first + l];
    for (int64_t i = 0; i < rows >> s; i++) {
      Bits kept = {0};
      for (int j = 0; j < 1 << s; j++) {
        Bits row;
        memcpy(&row, tile + ((i << s) + j) * lanes + first, sizeof row);
        kept |= row & (Bits)(offset == (Bits){0} + j);
      }
      memcpy(tile + i * lanes + first, &kept, sizeof kept);
    }
  }
}

#endif
