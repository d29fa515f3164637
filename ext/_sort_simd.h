/* Sort the columns of a tile, each lane of a vector by itself.
 *
 *     row 0   a0 b0 c0 d0 ...      W lanes: independent columns, e.g. features
 *     row 1   a1 b1 c1 d1 ...      rows: a power of two from SORT_ROWS_MIN; SORT_ROWS_MAX to thin
 *     ...                          a tile is row-major, aligned to its vectors, without NaN
 *
 * A sorting network compares the same rows whatever the data is, so W columns sort at once with two
 * instructions per comparison, no branch and no shuffle, and rows of a matrix need no transposing.
 * Runs of 8 rows are sorted by the optimal network of 19 comparators; Batcher's bitonic merges
 * make longer ones. Three layers of a merge are done on 8 rows in registers before they are
 * stored: memory traffic, not arithmetic, would bound a layer at a time.
 *
 * The body stands once, at the end, and this file includes itself to compile it for float and
 * double as "generic" (16-byte vectors: SSE2, NEON, or plain C) and, on x86-64, "avx2" and
 * "avx512".
 *
 * Thinning halves twice what need not be sorted to the end: of each 4 values that follow each other
 * in a run of 16 one is chosen, by coins of its lane, and only those are sorted.
 *
 * Source: Batcher, "Sorting networks and their applications", AFIPS 1968; the network of 8: Knuth,
 * TAOCP 3, 5.3.4.
 */
#ifndef SORT_BODY /* ---- the types of each variant --------------------------------------------- */
#ifndef SHOAL_SORT_SIMD_H
#define SHOAL_SORT_SIMD_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum {
  SORT_ROWS_MIN = 8,
  SORT_ROWS_MAX = 512,
  SORT_LANES_MAX = 16,
  SORT_THIN_RUN = 16, /* rows of a run that is thinned */
  SORT_THIN_BITS = 2, /* 2^2 rows become one */
};

#define SORT_JOIN_(a, b) a##_##b
#define SORT_JOIN(a, b) SORT_JOIN_(a, b)

#define SORT_BODY
#define SORT_TARGET
#if defined(__x86_64__)
#define SORT_VARIANT generic
#define SORT_T float
#define SORT_I int32_t
#define SORT_V __m128
#define SORT_LOAD(p) _mm_load_ps(p)
#define SORT_STORE(p, v) _mm_store_ps(p, v)
#define SORT_PICK(a, b, mask) _mm_or_ps(_mm_and_ps(mask, b), _mm_andnot_ps(mask, a))
#define SORT_MIN _mm_min_ps
#define SORT_MAX _mm_max_ps
#include "_sort_simd.h"
#define SORT_VARIANT generic
#define SORT_T double
#define SORT_I int64_t
#define SORT_V __m128d
#define SORT_LOAD(p) _mm_load_pd(p)
#define SORT_STORE(p, v) _mm_store_pd(p, v)
#define SORT_PICK(a, b, mask) _mm_or_pd(_mm_and_pd(mask, b), _mm_andnot_pd(mask, a))
#define SORT_MIN _mm_min_pd
#define SORT_MAX _mm_max_pd
#include "_sort_simd.h"
#undef SORT_TARGET
#define SORT_TARGET __attribute__((target("avx2")))
#define SORT_VARIANT avx2
#define SORT_T float
#define SORT_I int32_t
#define SORT_V __m256
#define SORT_LOAD(p) _mm256_load_ps(p)
#define SORT_STORE(p, v) _mm256_store_ps(p, v)
#define SORT_PICK(a, b, mask) _mm256_blendv_ps(a, b, mask)
#define SORT_MIN _mm256_min_ps
#define SORT_MAX _mm256_max_ps
#include "_sort_simd.h"
#define SORT_VARIANT avx2
#define SORT_T double
#define SORT_I int64_t
#define SORT_V __m256d
#define SORT_LOAD(p) _mm256_load_pd(p)
#define SORT_STORE(p, v) _mm256_store_pd(p, v)
#define SORT_PICK(a, b, mask) _mm256_blendv_pd(a, b, mask)
#define SORT_MIN _mm256_min_pd
#define SORT_MAX _mm256_max_pd
#include "_sort_simd.h"
#undef SORT_TARGET
#define SORT_TARGET __attribute__((target("avx512f")))
#define SORT_VARIANT avx512
#define SORT_T float
#define SORT_I int32_t
#define SORT_V __m512
#define SORT_LOAD(p) _mm512_load_ps(p)
#define SORT_STORE(p, v) _mm512_store_ps(p, v)
#define SORT_PICK(a, b, mask)                                                               \
  _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(mask), _mm512_castps_si512(b), \
                                                _mm512_castps_si512(a), 0xCA))
#define SORT_MIN _mm512_min_ps
#define SORT_MAX _mm512_max_ps
#include "_sort_simd.h"
#define SORT_VARIANT avx512
#define SORT_T double
#define SORT_I int64_t
#define SORT_V __m512d
#define SORT_LOAD(p) _mm512_load_pd(p)
#define SORT_STORE(p, v) _mm512_store_pd(p, v)
#define SORT_PICK(a, b, mask)                                                               \
  _mm512_castsi512_pd(_mm512_ternarylogic_epi64(_mm512_castpd_si512(mask), _mm512_castpd_si512(b), \
                                                _mm512_castpd_si512(a), 0xCA))
#define SORT_MIN _mm512_min_pd
#define SORT_MAX _mm512_max_pd
#include "_sort_simd.h"
#else
#if defined(__ARM_NEON)
#define SORT_V float32x4_t
#define SORT_LOAD(p) vld1q_f32(p)
#define SORT_STORE(p, v) vst1q_f32(p, v)
#define SORT_PICK(a, b, mask) vbslq_f32(vreinterpretq_u32_f32(mask), b, a)
#define SORT_MIN vminq_f32
#define SORT_MAX vmaxq_f32
#else
typedef struct {
  float lane[4];
} SortFloats;
static inline SortFloats sort_floats_pick(SortFloats a, SortFloats b, int larger) {
  for (int l = 0; l < 4; l++) a.lane[l] = ((a.lane[l] < b.lane[l]) ^ larger) ? a.lane[l] : b.lane[l];
  return a;
}
static inline SortFloats sort_floats_mask(SortFloats a, SortFloats b, SortFloats mask) {
  for (int l = 0; l < 4; l++) a.lane[l] = mask.lane[l] == 0 ? a.lane[l] : b.lane[l];
  return a;
}
#define SORT_V SortFloats
#define SORT_PICK(a, b, mask) sort_floats_mask(a, b, mask)
#define SORT_LOAD(p) (*(const SortFloats*)(p))
#define SORT_STORE(p, v) (*(SortFloats*)(p) = (v))
#define SORT_MIN(a, b) sort_floats_pick(a, b, 0)
#define SORT_MAX(a, b) sort_floats_pick(a, b, 1)
#endif
#define SORT_VARIANT generic
#define SORT_T float
#define SORT_I int32_t
#include "_sort_simd.h"
#if defined(__aarch64__)
#define SORT_V float64x2_t
#define SORT_LOAD(p) vld1q_f64(p)
#define SORT_STORE(p, v) vst1q_f64(p, v)
#define SORT_PICK(a, b, mask) vbslq_f64(vreinterpretq_u64_f64(mask), b, a)
#define SORT_MIN vminq_f64
#define SORT_MAX vmaxq_f64
#else
typedef struct {
  double lane[2];
} SortDoubles;
static inline SortDoubles sort_doubles_pick(SortDoubles a, SortDoubles b, int larger) {
  for (int l = 0; l < 2; l++) a.lane[l] = ((a.lane[l] < b.lane[l]) ^ larger) ? a.lane[l] : b.lane[l];
  return a;
}
static inline SortDoubles sort_doubles_mask(SortDoubles a, SortDoubles b, SortDoubles mask) {
  for (int l = 0; l < 2; l++) a.lane[l] = mask.lane[l] == 0 ? a.lane[l] : b.lane[l];
  return a;
}
#define SORT_V SortDoubles
#define SORT_PICK(a, b, mask) sort_doubles_mask(a, b, mask)
#define SORT_LOAD(p) (*(const SortDoubles*)(p))
#define SORT_STORE(p, v) (*(SortDoubles*)(p) = (v))
#define SORT_MIN(a, b) sort_doubles_pick(a, b, 0)
#define SORT_MAX(a, b) sort_doubles_pick(a, b, 1)
#endif
#define SORT_VARIANT generic
#define SORT_T double
#define SORT_I int64_t
#include "_sort_simd.h"
#endif
#undef SORT_TARGET
#undef SORT_BODY

/* One variant: how many lanes its vectors have, and its sorts. */
typedef struct {
  const char* name;
  int lanes_float;
  int lanes_double;
  void (*sort_float)(float* tile, int rows);    /* rows x lanes_float */
  void (*sort_double)(double* tile, int rows);  /* rows x lanes_double */
  void (*fours_float)(float* tile, int rows, const int32_t* offsets); /* rows to rows / 4 */
  void (*fours_double)(double* tile, int rows, const int32_t* offsets);
  void (*thin_float)(float* tile, const uint32_t* coins); /* 512 to 128 rows */
} SortSimd;

#if defined(__x86_64__)
static const SortSimd SORT_SIMD[] = {
    {"generic", 4, 2, sort_float_generic, sort_double_generic, fours_float_generic, fours_double_generic, thin_float_generic},
    {"avx2", 8, 4, sort_float_avx2, sort_double_avx2, fours_float_avx2, fours_double_avx2, thin_float_avx2},
    {"avx512", 16, 8, sort_float_avx512, sort_double_avx512, fours_float_avx512, fours_double_avx512, thin_float_avx512},
};
/* Index of the last variant that this machine can run. */
static inline int sort_simd_best(void) {
  if (!__builtin_cpu_supports("avx2")) return 0;
  return __builtin_cpu_supports("avx512f") ? 2 : 1;
}
#else
static const SortSimd SORT_SIMD[] = {{"generic", 4, 2, sort_float_generic, sort_double_generic, fours_float_generic, fours_double_generic, thin_float_generic}};
static inline int sort_simd_best(void) { return 0; }
#endif

#endif /* SHOAL_SORT_SIMD_H */
#else  /* ---- the body, once for each variant and type ----------------------------------------- */

#define SORT_NAME(name) SORT_JOIN(SORT_JOIN(name, SORT_T), SORT_VARIANT)
#define SORT_LANES ((int)(sizeof(SORT_V) / sizeof(SORT_T)))
#define SORT_ROW(i) (tile + (i)*SORT_LANES)
#define SORT_PAIR(a, b)                \
  do {                                 \
    const SORT_V low = SORT_MIN(a, b); \
    b = SORT_MAX(a, b);                \
    a = low;                           \
  } while (0)

/* Sort 8 rows that follow each other. */
static inline SORT_TARGET void SORT_NAME(run8)(SORT_T* tile) {
  SORT_V a = SORT_LOAD(SORT_ROW(0)), b = SORT_LOAD(SORT_ROW(1));
  SORT_V c = SORT_LOAD(SORT_ROW(2)), d = SORT_LOAD(SORT_ROW(3));
  SORT_V e = SORT_LOAD(SORT_ROW(4)), f = SORT_LOAD(SORT_ROW(5));
  SORT_V g = SORT_LOAD(SORT_ROW(6)), h = SORT_LOAD(SORT_ROW(7));
  SORT_PAIR(a, c); SORT_PAIR(b, d); SORT_PAIR(e, g); SORT_PAIR(f, h);
  SORT_PAIR(a, e); SORT_PAIR(b, f); SORT_PAIR(c, g); SORT_PAIR(d, h);
  SORT_PAIR(a, b); SORT_PAIR(c, d); SORT_PAIR(e, f); SORT_PAIR(g, h);
  SORT_PAIR(c, e); SORT_PAIR(d, f);
  SORT_PAIR(b, e); SORT_PAIR(d, g);
  SORT_PAIR(b, c); SORT_PAIR(d, e); SORT_PAIR(f, g);
  SORT_STORE(SORT_ROW(0), a); SORT_STORE(SORT_ROW(1), b);
  SORT_STORE(SORT_ROW(2), c); SORT_STORE(SORT_ROW(3), d);
  SORT_STORE(SORT_ROW(4), e); SORT_STORE(SORT_ROW(5), f);
  SORT_STORE(SORT_ROW(6), g); SORT_STORE(SORT_ROW(7), h);
}

/* The first three layers of a merge of two ascending runs of 4 * step rows: row i against its
 * mirror image, then half-cleaners 2 * step and step apart. */
static inline SORT_TARGET void SORT_NAME(merge_first)(SORT_T* tile, int step) {
  for (int i = 0; i < step; i++) {
    SORT_T* low = SORT_ROW(i);
    SORT_T* high = SORT_ROW(8 * step - 1 - i);
    const int s = step * SORT_LANES;
    SORT_V a = SORT_LOAD(low), b = SORT_LOAD(low + s);
    SORT_V c = SORT_LOAD(low + 2 * s), d = SORT_LOAD(low + 3 * s);
    SORT_V h = SORT_LOAD(high), g = SORT_LOAD(high - s);
    SORT_V f = SORT_LOAD(high - 2 * s), e = SORT_LOAD(high - 3 * s);
    SORT_PAIR(a, h); SORT_PAIR(b, g); SORT_PAIR(c, f); SORT_PAIR(d, e);
    SORT_PAIR(a, c); SORT_PAIR(b, d); SORT_PAIR(e, g); SORT_PAIR(f, h);
    SORT_PAIR(a, b); SORT_PAIR(c, d); SORT_PAIR(e, f); SORT_PAIR(g, h);
    SORT_STORE(low, a); SORT_STORE(low + s, b);
    SORT_STORE(low + 2 * s, c); SORT_STORE(low + 3 * s, d);
    SORT_STORE(high, h); SORT_STORE(high - s, g);
    SORT_STORE(high - 2 * s, f); SORT_STORE(high - 3 * s, e);
  }
}

/* Half-cleaners 4 * step, 2 * step and step apart on 8 * step rows. */
static inline SORT_TARGET void SORT_NAME(merge_three)(SORT_T* tile, int step) {
  for (int i = 0; i < step; i++) {
    SORT_T* row = SORT_ROW(i);
    const int s = step * SORT_LANES;
    SORT_V a = SORT_LOAD(row), b = SORT_LOAD(row + s);
    SORT_V c = SORT_LOAD(row + 2 * s), d = SORT_LOAD(row + 3 * s);
    SORT_V e = SORT_LOAD(row + 4 * s), f = SORT_LOAD(row + 5 * s);
    SORT_V g = SORT_LOAD(row + 6 * s), h = SORT_LOAD(row + 7 * s);
    SORT_PAIR(a, e); SORT_PAIR(b, f); SORT_PAIR(c, g); SORT_PAIR(d, h);
    SORT_PAIR(a, c); SORT_PAIR(b, d); SORT_PAIR(e, g); SORT_PAIR(f, h);
    SORT_PAIR(a, b); SORT_PAIR(c, d); SORT_PAIR(e, f); SORT_PAIR(g, h);
    SORT_STORE(row, a); SORT_STORE(row + s, b);
    SORT_STORE(row + 2 * s, c); SORT_STORE(row + 3 * s, d);
    SORT_STORE(row + 4 * s, e); SORT_STORE(row + 5 * s, f);
    SORT_STORE(row + 6 * s, g); SORT_STORE(row + 7 * s, h);
  }
}

/* Half-cleaners 2 and 1 rows apart on 4 rows. */
static inline SORT_TARGET void SORT_NAME(merge_two)(SORT_T* tile) {
  SORT_V a = SORT_LOAD(SORT_ROW(0)), b = SORT_LOAD(SORT_ROW(1));
  SORT_V c = SORT_LOAD(SORT_ROW(2)), d = SORT_LOAD(SORT_ROW(3));
  SORT_PAIR(a, c); SORT_PAIR(b, d);
  SORT_PAIR(a, b); SORT_PAIR(c, d);
  SORT_STORE(SORT_ROW(0), a); SORT_STORE(SORT_ROW(1), b);
  SORT_STORE(SORT_ROW(2), c); SORT_STORE(SORT_ROW(3), d);
}

/* Half-cleaner of neighbours. */
static inline SORT_TARGET void SORT_NAME(merge_one)(SORT_T* tile) {
  SORT_V a = SORT_LOAD(SORT_ROW(0)), b = SORT_LOAD(SORT_ROW(1));
  SORT_PAIR(a, b);
  SORT_STORE(SORT_ROW(0), a); SORT_STORE(SORT_ROW(1), b);
}

/* Merge neighbouring ascending runs of `run` rows (4 to 256) until all `rows` are one. */
static SORT_TARGET void SORT_NAME(merge)(SORT_T* tile, int rows, int run) {
  for (; run < rows; run *= 2) {
    for (int r = 0; r < rows; r += 2 * run) SORT_NAME(merge_first)(SORT_ROW(r), run / 4);
    int step = run / 8; /* of the next half-cleaner */
    for (; step >= 4; step /= 8) {
      for (int r = 0; r < rows; r += 2 * step) SORT_NAME(merge_three)(SORT_ROW(r), step / 4);
    }
    if (step == 2) {
      for (int r = 0; r < rows; r += 4) SORT_NAME(merge_two)(SORT_ROW(r));
    } else if (step == 1) {
      for (int r = 0; r < rows; r += 2) SORT_NAME(merge_one)(SORT_ROW(r));
    }
  }
}

/* Sort each of the tile's columns ascending. */
static SORT_TARGET void SORT_NAME(sort)(SORT_T* tile, int rows) {
  for (int r = 0; r < rows; r += 8) SORT_NAME(run8)(SORT_ROW(r));
  SORT_NAME(merge)(tile, rows, 8);
}

/* Vectors of which each lane is all ones or zeros, by one bit of what each lane's coin says. */
#define SORT_MASK(name, coin_of_l, bit)                                              \
  SORT_I name##_ints[SORT_LANES] __attribute__((aligned(64)));                       \
  for (int l = 0; l < SORT_LANES; l++) name##_ints[l] = -(SORT_I)((coin_of_l) >> (bit)&1); \
  const SORT_V name = SORT_LOAD((const SORT_T*)name##_ints)
#define SORT_PICK_4(a, b, c, d) SORT_PICK(SORT_PICK(a, b, m0), SORT_PICK(c, d, m0), m1)

/* Sort each of the tile's columns into fours that ascend, and keep of each four the value that
 * offsets[lane], 0 to 3, says: rows / 4 ascending rows. `rows` is a power of two from 16.
 *
 * Where a fair coin chooses, the order within a four does not matter: the last layers are
 * left out. */
static SORT_TARGET void SORT_NAME(fours)(SORT_T* tile, int rows, const int32_t* offsets) {
  const int run = rows / 2;
  SORT_NAME(sort)(tile, run);
  SORT_NAME(sort)(SORT_ROW(run), run);
  SORT_NAME(merge_first)(tile, run / 4);
  int step = run / 8; /* of the next half-cleaner */
  for (; step >= 8; step /= 8) {
    for (int r = 0; r < rows; r += 2 * step) SORT_NAME(merge_three)(SORT_ROW(r), step / 4);
  }
  SORT_MASK(m0, offsets[l], 0);
  SORT_MASK(m1, offsets[l], 1);
  for (int r = 0; r < rows; r += 8) {
    SORT_V v[8];
    for (int i = 0; i < 8; i++) v[i] = SORT_LOAD(SORT_ROW(r + i));
    if (step == 4) {
      for (int i = 0; i < 4; i++) SORT_PAIR(v[i], v[i + 4]);
    }
    SORT_STORE(SORT_ROW(r / 4), SORT_PICK_4(v[0], v[1], v[2], v[3]));
    SORT_STORE(SORT_ROW(r / 4 + 1), SORT_PICK_4(v[4], v[5], v[6], v[7]));
  }
}

#define SORT_TWICE(i, j, k, l) \
  do {                         \
    SORT_PAIR(v[i], v[j]);     \
    SORT_PAIR(v[k], v[l]);     \
  } while (0)

/* Replace each 4 values that follow each other in a run of SORT_THIN_RUN rows by one of them, in a
 * tile of SORT_ROWS_MAX, and sort what is left: 128 rows. Which of the 4 it is, is the same within
 * a run and lane, and said by 2 of the 64 bits of coins[lane] and coins[SORT_LANES_MAX + lane].
 *
 * Who is chosen by a coin needs no order among the four: both halves of a run are sorted, and two
 * layers of their merge part the run into fours. */
static inline SORT_TARGET void SORT_NAME(thin)(SORT_T* tile, const uint32_t* coins) {
  enum { HALF = SORT_THIN_RUN / 2 };
  for (int r = 0; r < SORT_ROWS_MAX / SORT_THIN_RUN; r++) {
    SORT_V v[SORT_THIN_RUN];
    const uint32_t* words = coins + r * SORT_THIN_BITS / 32 * SORT_LANES_MAX;
    SORT_MASK(m0, words[l], r * SORT_THIN_BITS % 32);
    SORT_MASK(m1, words[l], r * SORT_THIN_BITS % 32 + 1);
    for (int i = 0; i < SORT_THIN_RUN; i++) v[i] = SORT_LOAD(SORT_ROW(r * SORT_THIN_RUN + i));
    for (int h = 0; h < SORT_THIN_RUN; h += HALF) { /* as in run8 */
      SORT_TWICE(h, h + 2, h + 1, h + 3); SORT_TWICE(h + 4, h + 6, h + 5, h + 7);
      SORT_TWICE(h, h + 4, h + 1, h + 5); SORT_TWICE(h + 2, h + 6, h + 3, h + 7);
      SORT_TWICE(h, h + 1, h + 2, h + 3); SORT_TWICE(h + 4, h + 5, h + 6, h + 7);
      SORT_TWICE(h + 2, h + 4, h + 3, h + 5);
      SORT_TWICE(h + 1, h + 4, h + 3, h + 6);
      SORT_TWICE(h + 1, h + 2, h + 3, h + 4);
      SORT_PAIR(v[h + 5], v[h + 6]);
    }
    for (int i = 0; i < HALF; i++) SORT_PAIR(v[i], v[SORT_THIN_RUN - 1 - i]);
    for (int h = 0; h < SORT_THIN_RUN; h += HALF) {
      for (int i = h; i < h + HALF / 2; i++) SORT_PAIR(v[i], v[i + HALF / 2]);
    }
    for (int g = 0; g < SORT_THIN_RUN / 4; g++) {
      SORT_STORE(SORT_ROW(r * SORT_THIN_RUN / 4 + g),
                 SORT_PICK_4(v[4 * g], v[4 * g + 1], v[4 * g + 2], v[4 * g + 3]));
    }
  }
  SORT_NAME(merge)(tile, SORT_ROWS_MAX / 4, SORT_THIN_RUN / 4);
}

#undef SORT_TWICE
#undef SORT_MASK
#undef SORT_PICK_4
#undef SORT_NAME
#undef SORT_LANES
#undef SORT_ROW
#undef SORT_PAIR
#undef SORT_VARIANT
#undef SORT_T
#undef SORT_I
#undef SORT_V
#undef SORT_LOAD
#undef SORT_STORE
#undef SORT_MIN
#undef SORT_MAX
#undef SORT_PICK
#endif
