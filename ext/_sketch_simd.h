/* Vector loops of the sketch kernel: sum and search tiles, take blocks, count edges, sum powers.
 *
 * A tile is 512 rows of as many floats as a vector has lanes, each lane a column of one feature;
 * see _sort_simd.h. Doubles become two tiles, of the floats near and below them. Where that is not
 * all (features that keep doubles or items, many edges) they go column by column through blocks.
 *
 * A block is two arrays of the same values, padded with NaN to a multiple of SIMD_LANES:
 *   wide  the values as double, exact; the moments are made from them
 *   low   the values rounded towards -inf to float. For every float e: value >= e is the same
 *         as low >= e, so bins of doubles are exact in float arithmetic.
 * NaN compares false with everything: nulls and padding count nowhere.
 *
 * The loops stand once, in the second half, and this file includes itself to compile them as
 * "generic" (16-byte vectors: SSE2, NEON) and, on x86-64, as "avx2" and "avx512";
 * sketch_simd_best() chooses at run time. Eight sums of a block in one order, one sum of a lane in
 * the order of its rows, and no FMA: all variants give the same bits.
 */
#ifndef SIMD_VARIANT /* ---- types, the variants, their table ---------------------------------- */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "_bins_avx512.h"
#include "_sort_simd.h"

/* Values and nulls per feature: counts stay exact as float64; at 1 ns a value it takes 104 days. */
#define SKETCH_VALUES_MAX (INT64_C(1) << 53)

#define SIMD_LANES 8  /* values a block is padded to */
#define SIMD_SCAN 64 /* edge slots that are compared one and all rather than searched */
#define SIMD_AHEAD 64 /* rows that are fetched ahead: a matrix larger than the caches waits */
#define SIMD_TILE 16 /* most lanes of a tile */
#define SIMD_EDGES 4  /* edges counted in one pass over a block: 4 accumulators hide the latency */

typedef struct {
  double sum;     /* of value - shift */
  double square;  /* of (value - shift)^2 */
  double minimum; /* +inf if no value */
  double maximum; /* -inf if no value */
  int64_t count;  /* values that are not NaN */
} BlockPowers;

typedef struct { /* of each lane of a tile */
  double sum[SIMD_TILE];    /* of value - shift */
  double square[SIMD_TILE]; /* of (value - shift)^2 */
  double lowest[SIMD_TILE];  /* of tile_take: +inf if no value */
  double highest[SIMD_TILE]; /* of tile_take: -inf if no value */
  int32_t count[SIMD_TILE];  /* values that are not NaN */
} TileSums;

/* Largest float <= value; NaN stays NaN. */
static inline float simd_float_floor(double value) {
  float near = (float)value;
  uint32_t bits;
  memcpy(&bits, &near, sizeof bits);
  /* Rounded up? One step down: bits grow with the magnitude. A negative value that rounds to zero
   * gives -0, and the step from -0 leads to the smallest negative float. */
  uint32_t step = (bits >> 31) ? 1u : ~0u;
  bits += ((double)near > value) ? step : 0u;
  memcpy(&near, &bits, sizeof near);
  return near;
}

/* Number of edges <= low. `edges` ascend, then NaN up to `slots`: a power of 2 >= SIMD_LANES, or 0.
 * Few edges are all compared, in vectors: the steps of a search wait for each other (a row of 20
 * features of 31 edges: 0.38 against 0.50 us). Neither branches on the data. */
static inline int64_t simd_rank(const float* edges, int64_t slots, float low) {
  if (slots <= SIMD_SCAN) {
    int32_t count = 0;
    for (int64_t e = 0; e < (slots & -SIMD_LANES); e++) count += low >= edges[e];
    return count;
  }
  int64_t found = 0;
  for (int64_t half = slots / 2; half; half /= 2) {
    found += half & -(int64_t)(low >= edges[found + half - 1]);
  }
  return found;
}

typedef struct {
  const char* name;
  const SortSimd* sort;
  int bins_first; /* tile_bins is cheaper than sorting and tile_below */
  void (*tile_sums)(const float*, int64_t, int64_t, const double*, float*, TileSums*);
  void (*tile_ends)(const float*, int64_t, float*, float*);
  void (*tile_below)(const float*, int64_t, const float*, int64_t, int32_t*);
  void (*tile_bins)(const float*, int64_t, int, const float* const*, const int64_t*, int32_t*);
  void (*tile_take)(const double*, int64_t, int64_t, const double*, float*, float*, TileSums*);
  int64_t (*take_float)(const float*, int64_t, int64_t, int64_t, double*, float*);
  int64_t (*take_double)(const double*, int64_t, int64_t, int64_t, double*, float*);
  void (*above)(const float*, int64_t, const float*, int64_t, int32_t*);
  void (*powers)(const double*, int64_t, double, BlockPowers*);
} SketchSimd;

#define SIMD_JOIN_(name, variant) name##_##variant
#define SIMD_JOIN(name, variant) SIMD_JOIN_(name, variant)
#define SIMD(name) SIMD_JOIN(name, SIMD_VARIANT)
#define SIMD_ROW(variant, index, bins_first, bins)                                          \
  {#variant,             &SORT_SIMD[index],    bins_first, tile_sums_##variant,           \
   tile_ends_##variant,  tile_below_##variant, bins,       tile_take_##variant,           \
   take_float_##variant, take_double_##variant, above_##variant, powers_##variant}

#define SIMD_VARIANT generic
#define SIMD_BYTES 16
#define SIMD_TARGET
#if defined(__x86_64__)
#define SIMD_MIN _mm_min_pd
#define SIMD_MAX _mm_max_pd
#else /* a choice by comparison */
#define SIMD_MIN(a, b) SIMD_CHOOSE((SIMD(Masks))((a) < (b)), a, b)
#define SIMD_MAX(a, b) SIMD_CHOOSE((SIMD(Masks))((a) > (b)), a, b)
#endif
#include "_sketch_simd.h"
#undef SIMD_VARIANT
#undef SIMD_BYTES
#undef SIMD_TARGET
#undef SIMD_MIN
#undef SIMD_MAX

#if defined(__x86_64__)
#define SIMD_VARIANT avx2
#define SIMD_BYTES 32
#define SIMD_TARGET __attribute__((target("avx2")))
#define SIMD_MIN _mm256_min_pd
#define SIMD_MAX _mm256_max_pd
#include "_sketch_simd.h"
#undef SIMD_VARIANT
#undef SIMD_BYTES
#undef SIMD_TARGET
#undef SIMD_MIN
#undef SIMD_MAX
#define SIMD_VARIANT avx512
#define SIMD_BYTES 64
#define SIMD_TARGET __attribute__((target("avx512f,avx512dq")))
#define SIMD_MIN _mm512_min_pd
#define SIMD_MAX _mm512_max_pd
#include "_sketch_simd.h"
#undef SIMD_VARIANT
#undef SIMD_BYTES
#undef SIMD_TARGET
#undef SIMD_MIN
#undef SIMD_MAX
static const SketchSimd SKETCH_SIMD[] = {
    SIMD_ROW(generic, 0, 0, tile_bins_generic), SIMD_ROW(avx2, 1, 0, tile_bins_avx2),
    SIMD_ROW(avx512, 2, 1, bins_avx512)};
/* Index of the last variant that this machine can run. */
static inline int sketch_simd_best(void) {
  if (!__builtin_cpu_supports("avx2")) return 0;
  return bins_supported() ? 2 : 1;
}
#else
static const SketchSimd SKETCH_SIMD[] = {SIMD_ROW(generic, 0, 0, tile_bins_generic)};
static inline int sketch_simd_best(void) { return 0; }
#endif

#else /* ---- the loops, once for each variant --------------------------------------------- */

typedef double SIMD(Reals) __attribute__((vector_size(SIMD_BYTES)));
typedef int64_t SIMD(Masks) __attribute__((vector_size(SIMD_BYTES)));
typedef float SIMD(Floats) __attribute__((vector_size(SIMD_BYTES)));
typedef int32_t SIMD(Ints) __attribute__((vector_size(SIMD_BYTES)));
typedef float SIMD(Halves) __attribute__((vector_size(SIMD_BYTES / 2)));
typedef int32_t SIMD(HalfInts) __attribute__((vector_size(SIMD_BYTES / 2)));

#define SIMD_CHOOSE(mask, yes, no) \
  ((SIMD(Reals))(((mask) & (SIMD(Masks))(yes)) | (~(mask) & (SIMD(Masks))(no))))

/* The largest floats that are not above doubles whose nearest floats are known. */
#if SIMD_BYTES == 64
#define SIMD_FLOOR(wide, nearest)                                                              \
  ((SIMD(Halves))_mm512_cvt_roundpd_ps((__m512d)(wide), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC))
#else
static inline SIMD_TARGET SIMD(Halves) SIMD(floor)(SIMD(Reals) wide, SIMD(Halves) nearest) {
  const SIMD(Masks) above = (SIMD(Masks))(__builtin_convertvector(nearest, SIMD(Reals)) > wide);
  /* One step down, as in simd_float_floor: the sign, -1 or 0, makes it +1 or -1. */
  const SIMD(HalfInts) bits = (SIMD(HalfInts))nearest;
  const SIMD(HalfInts) down = -((bits >> 31) | 1) & __builtin_convertvector(above, SIMD(HalfInts));
  return (SIMD(Halves))(bits + down);
}
#define SIMD_FLOOR(wide, nearest) SIMD(floor)(wide, nearest)
#endif

/* Copy `rows` rows, `stride` floats apart, to a tile and sum each lane around its shift. `careful`:
 * NaN counts nowhere and becomes +inf, as the sort wants it. */
static inline __attribute__((always_inline)) SIMD_TARGET void SIMD(tile_sums_of)(
    const float* x, int64_t rows, int64_t stride, const double* restrict shift, float* tile,
    TileSums* restrict out, const int careful) {
  enum { LANES = SIMD_BYTES / 4, REALS = SIMD_BYTES / 8 };
  const SIMD(Ints) inf = (SIMD(Ints))((float)INFINITY - (SIMD(Floats)){0});
  SIMD(Reals) sum0 = {0}, sum1 = {0}, square0 = {0}, square1 = {0}, shift0, shift1;
  SIMD(Ints) count = {0};
  memcpy(&shift0, shift, sizeof shift0);
  memcpy(&shift1, shift + REALS, sizeof shift1);
  for (int64_t r = 0; r < rows; r++) {
    const float* row = x + r * stride;
    SIMD(Floats) v;
    __builtin_prefetch(row + SIMD_AHEAD * stride);
    SIMD(Halves) low, high;
    memcpy(&v, row, sizeof v);
    memcpy(&low, row, sizeof low);
    memcpy(&high, row + REALS, sizeof high);
    SIMD(Ints) clean = (SIMD(Ints))(v + 0.0f); /* +0 of -0 */
    SIMD(Reals) from0 = __builtin_convertvector(low, SIMD(Reals)) - shift0;
    SIMD(Reals) from1 = __builtin_convertvector(high, SIMD(Reals)) - shift1;
    if (careful) {
      const SIMD(Ints) some = (SIMD(Ints))(v == v);
      clean = (clean & some) | (inf & ~some);
      count -= some;
      /* inf - inf is NaN and stays: the sums then say that they are none */
      const SIMD(Reals) wide0 = __builtin_convertvector(low, SIMD(Reals));
      const SIMD(Reals) wide1 = __builtin_convertvector(high, SIMD(Reals));
      from0 = (SIMD(Reals))((SIMD(Masks))from0 & (SIMD(Masks))(wide0 == wide0));
      from1 = (SIMD(Reals))((SIMD(Masks))from1 & (SIMD(Masks))(wide1 == wide1));
    }
    memcpy(tile + r * LANES, &clean, sizeof clean);
    sum0 += from0;
    sum1 += from1;
    square0 += from0 * from0;
    square1 += from1 * from1;
  }
  if (!careful) count += (int32_t)rows;
  memcpy(out->sum, &sum0, sizeof sum0);
  memcpy(out->sum + REALS, &sum1, sizeof sum1);
  memcpy(out->square, &square0, sizeof square0);
  memcpy(out->square + REALS, &square1, sizeof square1);
  memcpy(out->count, &count, sizeof count);
}

/* The same; the rows may be the tile itself. A NaN makes its lane's sum NaN, so whether there was
 * one is known at the end, and rarely. */
static SIMD_TARGET void SIMD(tile_sums)(const float* x, int64_t rows, int64_t stride,
                                        const double* restrict shift, float* tile,
                                        TileSums* restrict out) {
  enum { LANES = SIMD_BYTES / 4 };
  int nan = 0;
  for (int l = 0; l < LANES; l++) nan |= x[l] != x[l]; /* an unused lane: all of it is NaN */
  if (!nan) {
    SIMD(tile_sums_of)(x, rows, stride, shift, tile, out, 0);
    for (int l = 0; l < LANES; l++) nan |= out->sum[l] != out->sum[l];
  }
  if (nan) SIMD(tile_sums_of)(x, rows, stride, shift, tile, out, 1);
}

/* Take `rows` rows of doubles, `stride` apart, into two tiles: `near` has them as the nearest
 * floats, `low` as the largest floats that are not above them, by which bins are exact; NaN becomes
 * +inf and -0 +0. What the doubles sum to and reach to is added to `out`: a tile may come in
 * pieces. */
static inline __attribute__((always_inline)) SIMD_TARGET void SIMD(tile_take_of)(
    const double* x, int64_t rows, int64_t stride, const double* restrict shift,
    float* restrict near, float* restrict low, TileSums* restrict out, const int careful) {
  enum { LANES = SIMD_BYTES / 4, REALS = SIMD_BYTES / 8 };
  for (int part = 0; part < LANES; part += REALS) {
    SIMD(Reals) sum, square, lowest, highest, from;
    SIMD(Masks) count = {0};
    memcpy(&sum, out->sum + part, sizeof sum);
    memcpy(&square, out->square + part, sizeof square);
    memcpy(&lowest, out->lowest + part, sizeof lowest);
    memcpy(&highest, out->highest + part, sizeof highest);
    memcpy(&from, shift + part, sizeof from);
    for (int64_t r = 0; r < rows; r++) {
      const double* row = x + r * stride + part;
      SIMD(Reals) v;
      __builtin_prefetch(row + SIMD_AHEAD * stride);
      memcpy(&v, row, sizeof v);
      SIMD(Reals) clean = v + 0.0, apart = v - from;
      if (careful) {
        const SIMD(Masks) some = (SIMD(Masks))(v == v);
        clean = SIMD_CHOOSE(some, clean, (double)INFINITY - (SIMD(Reals)){0});
        apart = (SIMD(Reals))((SIMD(Masks))apart & some);
        count -= some;
      }
      const SIMD(Halves) nearest = __builtin_convertvector(clean, SIMD(Halves));
      const SIMD(Halves) stored = nearest + 0.0f, floored = SIMD_FLOOR(clean, nearest);
      memcpy(near + r * LANES + part, &stored, sizeof stored);
      memcpy(low + r * LANES + part, &floored, sizeof floored);
      sum += apart;
      square += apart * apart;
      lowest = SIMD_MIN(v, lowest); /* the second one if v is NaN */
      highest = SIMD_MAX(v, highest);
    }
    if (!careful) count += rows;
    memcpy(out->sum + part, &sum, sizeof sum);
    memcpy(out->square + part, &square, sizeof square);
    memcpy(out->lowest + part, &lowest, sizeof lowest);
    memcpy(out->highest + part, &highest, sizeof highest);
    for (int l = 0; l < REALS; l++) out->count[part + l] += (int32_t)count[l];
  }
}

/* Likewise: careful if a sum says that there was a NaN, and as long as it says so. */
static SIMD_TARGET void SIMD(tile_take)(const double* x, int64_t rows, int64_t stride,
                                        const double* restrict shift, float* restrict near,
                                        float* restrict low, TileSums* restrict out) {
  enum { LANES = SIMD_BYTES / 4 };
  const TileSums before = *out;
  int nan = 0;
  for (int l = 0; l < LANES; l++) nan |= x[l] != x[l];
  if (!nan) {
    SIMD(tile_take_of)(x, rows, stride, shift, near, low, out, 0);
    for (int l = 0; l < LANES; l++) nan |= out->sum[l] != out->sum[l];
    if (nan) *out = before;
  }
  if (nan) SIMD(tile_take_of)(x, rows, stride, shift, near, low, out, 1);
}

#if SIMD_BYTES < 64 /* wider vectors have _bins_avx512.h */
/* counts[BINS_MAX l + b] = values of lane l with b edges <= value, b >= 1, for the first `used`
 * lanes of a tile without NaN; at most BINS_MAX - 1 edges a lane. Every lane's e-th edge is
 * compared at once. */
static SIMD_TARGET void SIMD(tile_bins)(const float* tile, int64_t rows, int used,
                                        const float* const* edges, const int64_t* edges_n,
                                        int32_t* counts) {
  enum { LANES = SIMD_BYTES / 4 };
  int64_t most = 0;
  for (int l = 0; l < used; l++) most = edges_n[l] > most ? edges_n[l] : most;
  for (int64_t e = 0; e < most; e += SIMD_EDGES) {
    SIMD(Floats) edge[SIMD_EDGES];
    SIMD(Ints) n0 = {0}, n1 = {0}, n2 = {0}, n3 = {0};
    for (int i = 0; i < SIMD_EDGES; i++) {
      for (int l = 0; l < LANES; l++) {
        edge[i][l] = l < used && e + i < edges_n[l] ? edges[l][e + i] : NAN;
      }
    }
    const SIMD(Floats) e0 = edge[0], e1 = edge[1], e2 = edge[2], e3 = edge[3];
    for (int64_t r = 0; r < rows; r++) {
      SIMD(Floats) v;
      memcpy(&v, tile + r * LANES, sizeof v);
      n0 -= (SIMD(Ints))(v >= e0);
      n1 -= (SIMD(Ints))(v >= e1);
      n2 -= (SIMD(Ints))(v >= e2);
      n3 -= (SIMD(Ints))(v >= e3);
    }
    const SIMD(Ints) above[SIMD_EDGES] = {n0, n1, n2, n3};
    for (int i = 0; i < SIMD_EDGES; i++) {
      for (int l = 0; l < used; l++) { /* of those that reach the edge, the next edge takes some */
        if (e + i < edges_n[l]) counts[BINS_MAX * l + e + i + 1] = above[i][l];
        if (e + i > 0 && e + i < edges_n[l]) counts[BINS_MAX * l + e + i] -= above[i][l];
      }
    }
  }
}
#endif

/* The least and the greatest value of each lane, without NaN. */
static SIMD_TARGET void SIMD(tile_ends)(const float* restrict tile, int64_t rows,
                                        float* restrict lowest, float* restrict highest) {
  enum { LANES = SIMD_BYTES / 4 };
  for (int l = 0; l < LANES; l++) lowest[l] = highest[l] = tile[l];
  for (int64_t r = 0; r < rows; r += 4) { /* the compiler makes vectors of this */
    for (int l = 0; l < LANES; l++) {
      const float* v = tile + r * LANES + l;
      const float a = v[0] < v[LANES] ? v[0] : v[LANES];
      const float b = v[2 * LANES] < v[3 * LANES] ? v[2 * LANES] : v[3 * LANES];
      const float c = v[0] > v[LANES] ? v[0] : v[LANES];
      const float d = v[2 * LANES] > v[3 * LANES] ? v[2 * LANES] : v[3 * LANES];
      const float low = a < b ? a : b, high = c > d ? c : d;
      lowest[l] = low < lowest[l] ? low : lowest[l];
      highest[l] = high > highest[l] ? high : highest[l];
    }
  }
}

/* below[e] = values < edges[e] in a sorted lane, whose first value is at `column`; `rows` is a
 * power of 2, padded with +inf; edges are padded to a multiple of SIMD_LANES, and so is `below`.
 * The searches of 8 edges go side by side: each alone would wait for its last step. */
static SIMD_TARGET void SIMD(tile_below)(const float* restrict column, int64_t rows,
                                         const float* restrict edges, int64_t edges_n,
                                         int32_t* restrict below) {
  enum { LANES = SIMD_BYTES / 4 };
  for (int64_t e = 0; e < edges_n; e += SIMD_LANES) {
    const float *p0 = column, *p1 = column, *p2 = column, *p3 = column;
    const float *p4 = column, *p5 = column, *p6 = column, *p7 = column;
    const float e0 = edges[e], e1 = edges[e + 1], e2 = edges[e + 2], e3 = edges[e + 3];
    const float e4 = edges[e + 4], e5 = edges[e + 5], e6 = edges[e + 6], e7 = edges[e + 7];
    for (int64_t half = rows / 2 * LANES; half >= LANES; half /= 2) {
#define SIMD_STEP(p, e) p += half & -(int64_t)(p[half - LANES] < e)
      SIMD_STEP(p0, e0); SIMD_STEP(p1, e1); SIMD_STEP(p2, e2); SIMD_STEP(p3, e3);
      SIMD_STEP(p4, e4); SIMD_STEP(p5, e5); SIMD_STEP(p6, e6); SIMD_STEP(p7, e7);
    }
#define SIMD_FOUND(i, p, e) below[i] = (int32_t)((p - column) / LANES) + (*p < e)
    SIMD_FOUND(e, p0, e0); SIMD_FOUND(e + 1, p1, e1);
    SIMD_FOUND(e + 2, p2, e2); SIMD_FOUND(e + 3, p3, e3);
    SIMD_FOUND(e + 4, p4, e4); SIMD_FOUND(e + 5, p5, e5);
    SIMD_FOUND(e + 6, p6, e6); SIMD_FOUND(e + 7, p7, e7);
#undef SIMD_STEP
#undef SIMD_FOUND
  }
}

/* Pad both arrays with NaN behind n values; return the padded length. */
static inline SIMD_TARGET int64_t SIMD(pad)(double* wide, float* low, int64_t n) {
  for (; n % SIMD_LANES; n++) {
    wide[n] = NAN;
    low[n] = NAN;
  }
  return n;
}

/* Take `runs` runs of `length` values, `stride` values apart; return the padded length. */
static SIMD_TARGET int64_t SIMD(take_float)(const float* restrict x, int64_t runs, int64_t length,
                                            int64_t stride, double* restrict wide,
                                            float* restrict low) {
  int64_t n = 0;
  if (length == 1) { /* a column of a matrix of rows */
    for (; n < runs; n++) {
      low[n] = x[n * stride];
      wide[n] = low[n];
    }
    return SIMD(pad)(wide, low, n);
  }
  for (int64_t r = 0; r < runs; r++, n += length) {
    for (int64_t t = 0; t < length; t++) {
      low[n + t] = x[r * stride + t];
      wide[n + t] = low[n + t];
    }
  }
  return SIMD(pad)(wide, low, n);
}

static SIMD_TARGET int64_t SIMD(take_double)(const double* restrict x, int64_t runs,
                                             int64_t length, int64_t stride,
                                             double* restrict wide, float* restrict low) {
  int64_t n = 0;
  if (length == 1) {
    for (; n < runs; n++) {
      wide[n] = x[n * stride];
      low[n] = simd_float_floor(wide[n]);
    }
    return SIMD(pad)(wide, low, n);
  }
  for (int64_t r = 0; r < runs; r++, n += length) {
    for (int64_t t = 0; t < length; t++) {
      wide[n + t] = x[r * stride + t];
      low[n + t] = simd_float_floor(wide[n + t]);
    }
  }
  return SIMD(pad)(wide, low, n);
}

/* above[e] = number of values >= edges[e], for n padded values and a padded number of edges. */
static SIMD_TARGET void SIMD(above)(const float* restrict low, int64_t n,
                                    const float* restrict edges, int64_t edges_n,
                                    int32_t* restrict above) {
  for (int64_t e = 0; e < edges_n; e += SIMD_EDGES) {
    const float e0 = edges[e], e1 = edges[e + 1], e2 = edges[e + 2], e3 = edges[e + 3];
    int32_t n0 = 0, n1 = 0, n2 = 0, n3 = 0;
    for (int64_t i = 0; i < (n & -SIMD_LANES); i++) { /* the compiler makes vectors of this */
      n0 += low[i] >= e0;
      n1 += low[i] >= e1;
      n2 += low[i] >= e2;
      n3 += low[i] >= e3;
    }
    above[e] = n0;
    above[e + 1] = n1;
    above[e + 2] = n2;
    above[e + 3] = n3;
  }
}

#define SIMD_REALS (SIMD_BYTES / 8)
#define SIMD_PARTS (SIMD_LANES / SIMD_REALS)

/* Powers of value - shift over n padded values; its vectors are explicit, because the order of a
 * sum of doubles is not the compiler's to change. */
static SIMD_TARGET void SIMD(powers)(const double* restrict wide, int64_t n, double shift,
                                     BlockPowers* restrict out) {
  SIMD(Reals) sum[SIMD_PARTS], square[SIMD_PARTS], minimum[SIMD_PARTS], maximum[SIMD_PARTS];
  SIMD(Masks) count[SIMD_PARTS];
  for (int p = 0; p < SIMD_PARTS; p++) {
    sum[p] = square[p] = (SIMD(Reals)){0};
    minimum[p] = (double)INFINITY - (SIMD(Reals)){0};
    maximum[p] = -minimum[p];
    count[p] = (SIMD(Masks)){0};
  }
  for (int64_t i = 0; i < n; i += SIMD_LANES) {
    for (int p = 0; p < SIMD_PARTS; p++) {
      SIMD(Reals) v;
      memcpy(&v, wide + i + p * SIMD_REALS, sizeof v);
      const SIMD(Masks) some = (SIMD(Masks))(v == v); /* true is -1 */
      const SIMD(Reals) from = (SIMD(Reals))((SIMD(Masks))(v - shift) & some);
      count[p] -= some;
      sum[p] += from;
      square[p] += from * from;
      minimum[p] = SIMD_CHOOSE((SIMD(Masks))(v < minimum[p]), v, minimum[p]);
      maximum[p] = SIMD_CHOOSE((SIMD(Masks))(v > maximum[p]), v, maximum[p]);
    }
  }
  *out = (BlockPowers){.minimum = INFINITY, .maximum = -INFINITY};
  for (int lane = 0; lane < SIMD_LANES; lane++) {
    const int p = lane / SIMD_REALS, l = lane % SIMD_REALS;
    out->sum += sum[p][l];
    out->square += square[p][l];
    out->count += count[p][l];
    if (minimum[p][l] < out->minimum) out->minimum = minimum[p][l];
    if (maximum[p][l] > out->maximum) out->maximum = maximum[p][l];
  }
}

#undef SIMD_REALS
#undef SIMD_PARTS
#undef SIMD_CHOOSE
#undef SIMD_FLOOR
#endif
