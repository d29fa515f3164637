/* Random features of a row: cos(weights . (row - mean) / scale + phase), added to sums.
 *
 * Angles are in turns, not radians: a turn less is then a subtraction of a whole number, which is
 * exact, and no constant of pi loses digits however far away the angle is.
 *
 *     angle --minus whole turns--> [-1/2, 1/2] --fold--> s in [-1/4, 1/4], cos = sin(2 pi s)
 *
 * sin(2 pi s) is an odd polynomial of degree 9, within 4e-9 over the interval (fitted by Lawson's
 * iteration to the least largest error); with its rounding the cosine of a float angle is within
 * 2e-7. The loop is over features: a column's weights lie in a row, so nothing is gathered.
 *
 * The loops stand once, in the second half, and this file includes itself to compile them as
 * "generic" (16-byte vectors: SSE2, NEON) and, on x86-64, as "avx2", without FMA: there both
 * variants do the same operations in the same order and give the same bits. A compiler for
 * another architecture may fuse, so machines agree within the stated error, not to the bit.
 */
#ifndef SIMD_VARIANT /* ---- types, the variants, their table ---------------------------------- */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PROJECTION_COLUMNS_MAX 1024 /* a standardised row of them is 4 KiB of stack */
#define PROJECTION_STRIP 32         /* slots are a multiple: 4 vectors of AVX2 hide the latency */

/* A value further away counts as so many scales: it bounds what one broken sensor does to the
 * angle (so the subtraction of turns stays exact), and a value that far is an outlier anyway. */
#define PROJECTION_CLIP 32.0f

typedef struct Projection Projection;

typedef struct {
  const char* name;
  void (*add)(const Projection*, const float*, double*);
} ProjectionSimd;

struct Projection {            /* plain data; whoever made it owns what it points to */
  const float* weights;        /* (columns, slots), turns per scale; 0 beyond the features */
  const float* phases;         /* slots, turns, -1/2 to 1/2 */
  const float* mean;           /* columns */
  const float* inverse;        /* columns, 1 / scale */
  int64_t columns;             /* 1 to PROJECTION_COLUMNS_MAX */
  int64_t features;            /* entries of the sums */
  int64_t slots;               /* features, rounded up to a multiple of PROJECTION_STRIP */
  const ProjectionSimd* simd;
};

/* Add the features of the values row[0], row[step], … to sums[features]; return 1.
 * A row with a value that is not finite changes nothing; return 0. */
static inline int64_t projection_add_strided(const Projection* projection, const float* row,
                                             int64_t step, double* sums) {
  float z[PROJECTION_COLUMNS_MAX];
  for (int64_t d = 0; d < projection->columns; d++) {
    const float value = row[d * step];
    if (!isfinite(value)) return 0;
    const float away = (value - projection->mean[d]) * projection->inverse[d];
    z[d] = away > PROJECTION_CLIP    ? PROJECTION_CLIP
           : away < -PROJECTION_CLIP ? -PROJECTION_CLIP
                                     : away;
  }
  projection->simd->add(projection, z, sums);
  return 1;
}

#define SIMD_JOIN_(name, variant) name##_##variant
#define SIMD_JOIN(name, variant) SIMD_JOIN_(name, variant)
#define SIMD(name) SIMD_JOIN(name, SIMD_VARIANT)

#define SIMD_VARIANT generic
#define SIMD_BYTES 16
#define SIMD_TARGET
#include "_projection_simd.h"
#undef SIMD_VARIANT
#undef SIMD_BYTES
#undef SIMD_TARGET

#if defined(__x86_64__)
#define SIMD_VARIANT avx2
#define SIMD_BYTES 32
#define SIMD_TARGET __attribute__((target("avx2")))
#include "_projection_simd.h"
#undef SIMD_VARIANT
#undef SIMD_BYTES
#undef SIMD_TARGET
static const ProjectionSimd PROJECTION_SIMD[] = {{"generic", add_generic}, {"avx2", add_avx2}};
/* Index of the last variant that this machine can run. */
static inline int projection_simd_best(void) { return __builtin_cpu_supports("avx2") ? 1 : 0; }
#else
static const ProjectionSimd PROJECTION_SIMD[] = {{"generic", add_generic}};
static inline int projection_simd_best(void) { return 0; }
#endif

#undef SIMD_JOIN_
#undef SIMD_JOIN
#undef SIMD

#else /* ---- the loops, once for each variant --------------------------------------------- */

#define SIMD_REALS (SIMD_BYTES / 4)
#define SIMD_STRIP (4 * SIMD_REALS)

typedef float SIMD(Floats) __attribute__((vector_size(SIMD_BYTES)));
typedef int32_t SIMD(Signs) __attribute__((vector_size(SIMD_BYTES)));

/* cos(2 pi angle) for |angle| < 2^22. */
static inline SIMD_TARGET SIMD(Floats) SIMD(cosine)(SIMD(Floats) angle) {
  const float whole = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to an integer */
  const SIMD(Floats) part = angle - ((angle + whole) - whole);
  const SIMD(Floats) s = 0.25f - (SIMD(Floats))((SIMD(Signs))part & INT32_MAX); /* 1/4 - |part| */
  const SIMD(Floats) u = s * s;
  SIMD(Floats) sum = 39.53670121f * u - 76.54978180f;
  sum = sum * u + 81.60100556f;
  sum = sum * u - 41.34165573f;
  sum = sum * u + 6.28318501f;
  return sum * s;
}

static SIMD_TARGET void SIMD(add)(const Projection* restrict projection, const float* restrict z,
                                  double* restrict sums) {
  const int64_t slots = projection->slots, features = projection->features;
  const int64_t columns = projection->columns;
  for (int64_t f = 0; f < slots; f += SIMD_STRIP) {
    /* Four named vectors each: the compiler keeps an array in memory. */
    SIMD(Floats) a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, w0, w1, w2, w3;
    const float* at = projection->weights + f;
    for (int64_t d = 0; d < columns; d++, at += slots) {
      memcpy(&w0, at, SIMD_BYTES);
      memcpy(&w1, at + SIMD_REALS, SIMD_BYTES);
      memcpy(&w2, at + 2 * SIMD_REALS, SIMD_BYTES);
      memcpy(&w3, at + 3 * SIMD_REALS, SIMD_BYTES);
      a0 += w0 * z[d];
      a1 += w1 * z[d];
      a2 += w2 * z[d];
      a3 += w3 * z[d];
    }
    /* The phases come last: while the sum is small it is rounded to small steps. */
    at = projection->phases + f;
    memcpy(&w0, at, SIMD_BYTES);
    memcpy(&w1, at + SIMD_REALS, SIMD_BYTES);
    memcpy(&w2, at + 2 * SIMD_REALS, SIMD_BYTES);
    memcpy(&w3, at + 3 * SIMD_REALS, SIMD_BYTES);
    a0 = SIMD(cosine)(a0 + w0);
    a1 = SIMD(cosine)(a1 + w1);
    a2 = SIMD(cosine)(a2 + w2);
    a3 = SIMD(cosine)(a3 + w3);
    float found[SIMD_STRIP];
    memcpy(found, &a0, SIMD_BYTES);
    memcpy(found + SIMD_REALS, &a1, SIMD_BYTES);
    memcpy(found + 2 * SIMD_REALS, &a2, SIMD_BYTES);
    memcpy(found + 3 * SIMD_REALS, &a3, SIMD_BYTES);
    if (features - f >= SIMD_STRIP) {
      for (int i = 0; i < SIMD_STRIP; i++) sums[f + i] += found[i];
    } else { /* the caller's array ends with the last feature */
      for (int64_t i = 0; i < features - f; i++) sums[f + i] += found[i];
    }
  }
}

#undef SIMD_REALS
#undef SIMD_STRIP
#endif
