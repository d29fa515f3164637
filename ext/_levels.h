/* The levels of KLL sketches: insert sorted runs, compact, merge.
 *
 *     items:  [ free | level 0 | level 1 | ... | top ]    each level ascending, 2^level per item
 *
 * Levels lie packed at the end of `items`, so that the lowest, which change most, have room to grow
 * downwards. A run is merged into its level in place; only the few items below it move.
 *
 * Rule 1: sum over levels of pop * 2^level = values taken. Rule 2: retained <= total(k, levels).
 * Rule 3: `variance` grows by G^2 / 4 for every event in which contiguous groups of weight G were
 * each replaced by one member chosen uniformly: for any query one group at most errs, by a mean of
 * zero within a range of G, so P(|rank error| > t) <= 2 exp(-t^2 / 2 variance) (Hoeffding).
 *
 * Apache DataSketches writes such levels as KLL bytes; its readers ask for rules 1 and 2 alone, so
 * a sorted block may go straight to the level where its every 2^s-th value belongs.
 *
 * This file includes itself to compile the functions for float and double.
 *
 * Source: Karnin, Lang, Liberty, "Optimal quantile approximation in streams", FOCS 2016.
 */
#ifndef LEVELS_BODY
#ifndef SHOAL_LEVELS_H
#define SHOAL_LEVELS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
  LEVELS_MAX = 56,    /* 2^53 values at k = 8 take 54 */
  LEVELS_M = 8,       /* the least capacity of a level */
  LEVELS_DEPTH = 60,  /* deepest level of the format */
};

/* What a k means; one for all features of a bank. */
typedef struct {
  int32_t k;
  int32_t caps[LEVELS_DEPTH + 1];   /* capacity of a level by its depth below the top */
  int32_t totals[LEVELS_DEPTH + 2]; /* of a sketch by its number of levels */
} LevelsShape;

typedef struct {
  void* items;        /* float or double; owned by whoever calls levels_free */
  double variance;    /* of the rank error, squared counts */
  int32_t size;       /* items there is room for */
  int32_t retained;
  int32_t levels;     /* at least 1 */
  int32_t k_min;      /* smallest k that took part */
  uint32_t pops[LEVELS_MAX];
} Levels;

/* Nearest integer to k (2/3)^depth, at least LEVELS_M; exact in integers as the format asks. */
static inline int32_t levels_capacity(int32_t k, int depth) {
  uint64_t left = (uint64_t)k;
  while (depth > 0) {
    const int step = depth > 30 ? depth / 2 : depth;
    uint64_t power = 1;
    for (int i = 0; i < step; i++) power *= 3;
    left = (((left << 1) << step) / power + 1) >> 1;
    depth -= step;
  }
  return left > LEVELS_M ? (int32_t)left : LEVELS_M;
}

static inline void levels_shape(LevelsShape* shape, int32_t k) {
  shape->k = k;
  shape->totals[0] = 0;
  for (int depth = 0; depth <= LEVELS_DEPTH; depth++) {
    shape->caps[depth] = levels_capacity(k, depth);
    shape->totals[depth + 1] = shape->totals[depth] + shape->caps[depth];
  }
}

static inline void levels_clear(Levels* f, const LevelsShape* shape) {
  f->variance = 0.0;
  f->retained = 0;
  f->levels = 1;
  f->k_min = shape->k;
  memset(f->pops, 0, sizeof f->pops);
}

static inline void levels_free(Levels* f) {
  free(f->items);
  f->items = NULL;
  f->size = 0;
}

/* xorshift64* of Vigna, ACM TOMS 42 (2016): fast, and its high bits pass every test for coins. */
static inline uint64_t levels_coins(uint64_t* state) {
  uint64_t x = *state;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  *state = x;
  return x * UINT64_C(0x2545F4914F6CDD1D);
}

static inline double levels_square(int level) { /* 4^level */
  return (double)(UINT64_C(1) << level) * (double)(UINT64_C(1) << level);
}

/* The level that of n values of weight 2^base every 2^(level - base)-th one goes to: about what it
 * can hold. */
static inline int levels_of_run(const Levels* f, const LevelsShape* shape, int64_t n, int base) {
  int up = 0;
  while (base + up < f->levels - 1 &&
         (n >> up) * 4 > (int64_t)shape->caps[f->levels - 1 - base - up] * 5) {
    up++;
  }
  return base + up;
}

/* Number of values that all items stand for. */
static inline int64_t levels_weight(const Levels* f) {
  int64_t weight = 0;
  for (int h = 0; h < f->levels; h++) weight += (int64_t)f->pops[h] << h;
  return weight;
}

/* Number of the lowest level that is full, or f->levels. */
static inline int levels_full(const Levels* f, const LevelsShape* shape) {
  int h = 0;
  while (h < f->levels && (int32_t)f->pops[h] < shape->caps[f->levels - 1 - h]) h++;
  return h;
}

#define LEVELS_JOIN_(a, b) a##_##b
#define LEVELS_JOIN(a, b) LEVELS_JOIN_(a, b)
#define LEVELS_BODY
#define LEVELS_T float
#include "_levels.h"
#undef LEVELS_T
#define LEVELS_T double
#include "_levels.h"
#undef LEVELS_T
#undef LEVELS_BODY

#endif /* SHOAL_LEVELS_H */
#else  /* ---- the functions, once for each type ------------------------------------------------ */

#define LEVELS(name) LEVELS_JOIN(levels_##name, LEVELS_T)

/* Make room for q items more; -1 if there is no memory. Room doubles up to what a sketch with four
 * levels more would hold, which is when its values have come 16 times as many. */
static inline int LEVELS(reserve)(Levels* f, const LevelsShape* shape, int32_t q) {
  const int32_t want = f->retained + q;
  if (want <= f->size) return 0;
  const int most = f->levels + 4 < LEVELS_DEPTH ? f->levels + 4 : LEVELS_DEPTH;
  int32_t size = f->size < shape->totals[most] / 2 ? 2 * f->size : shape->totals[most];
  if (size < want) size = want;
  LEVELS_T* items = (LEVELS_T*)malloc((size_t)size * sizeof(LEVELS_T));
  if (!items) return -1;
  if (f->items) {
    memcpy(items + size - f->retained, (LEVELS_T*)f->items + f->size - f->retained,
           (size_t)f->retained * sizeof(LEVELS_T));
  }
  free(f->items);
  f->items = items;
  f->size = size;
  return 0;
}

/* Index of the first item of a level. */
static inline int32_t LEVELS(start)(const Levels* f, int level) {
  int32_t start = f->size;
  for (int g = level; g < f->levels; g++) start -= (int32_t)f->pops[g];
  return start;
}

/* Move n items, mostly few, to a lower place or one apart. */
static inline void LEVELS(move)(LEVELS_T* into, const LEVELS_T* from, int32_t n) {
  if (n > 32) {
    memmove(into, from, (size_t)n * sizeof(LEVELS_T));
  } else {
    for (int32_t i = 0; i < n; i++) into[i] = from[i];
  }
}

/* Merge ascending `a` with ascending `b` into `into`, all apart. From both ends at once: each end
 * waits for its own last comparison, so two go in the time of one. */
static inline void LEVELS(merge_runs)(const LEVELS_T* restrict a, int32_t na,
                                      const LEVELS_T* restrict b, int32_t nb,
                                      LEVELS_T* restrict into) {
  const int32_t all = na + nb, both = na < nb ? na : nb;
  int32_t i = 0, j = 0, m = na - 1, n = nb - 1;
  for (int32_t t = 0; t < both; t++) { /* takes at most `both` of either from each end */
    const LEVELS_T x = a[i], y = b[j], u = a[m], v = b[n];
    const int first = x <= y, last = u > v;
    into[t] = first ? x : y;
    into[all - 1 - t] = last ? u : v;
    i += first;
    j += !first;
    m -= last;
    n -= !last;
  }
  for (int32_t t = both; t < all - both; t++) { /* the middle */
    const int first = j > n || (i <= m && a[i] <= b[j]);
    into[t] = first ? a[i++] : b[j++];
  }
}

/* Put an ascending run of q items into a level; there is room. `scratch` holds the level. */
static inline void LEVELS(insert)(Levels* f, int level, const LEVELS_T* run, int32_t q,
                                  LEVELS_T* restrict scratch) {
  if (q == 0) return;
  LEVELS_T* items = (LEVELS_T*)f->items;
  const int32_t start = LEVELS(start)(f, level), first = f->size - f->retained;
  const int32_t pop = (int32_t)f->pops[level];
  LEVELS(move)(items + first - q, items + first, start - first);
  LEVELS(move)(scratch, items + start, pop);
  LEVELS(merge_runs)(run, q, scratch, pop, items + start - q);
  f->pops[level] += (uint32_t)q;
  f->retained += q;
}

/* Halve a level of two items or more into the one above, by one coin. `scratch` holds both. */
static inline void LEVELS(compact)(Levels* f, int level, uint64_t* coins, LEVELS_T* scratch) {
  LEVELS_T* items = (LEVELS_T*)f->items;
  const int32_t pop = (int32_t)f->pops[level], odd = pop & 1, half = pop >> 1;
  const int32_t start = LEVELS(start)(f, level), first = f->size - f->retained;
  const LEVELS_T left = items[start]; /* the odd one stays behind */
  const LEVELS_T* pick = items + start + odd + (levels_coins(coins) >> 63);
  for (int32_t i = 0; i < half; i++) scratch[i] = pick[2 * i];
  if (level == f->levels - 1) f->pops[f->levels++] = 0;
  LEVELS_T* into = items + start + pop - half;
  const int32_t above = (int32_t)f->pops[level + 1];
  LEVELS(move)(scratch + half, items + start + pop, above);
  LEVELS(merge_runs)(scratch, half, scratch + half, above, into);
  if (odd) into[-1] = left;
  for (int32_t i = start - 1; i >= first; i--) items[i + half] = items[i]; /* few, upwards */
  f->pops[level] = (uint32_t)odd;
  f->pops[level + 1] += (uint32_t)half;
  f->retained -= half;
  f->variance += levels_square(level);
}

/* Make room: compact a full level, or grow, but to no more levels than `weight` values to come can
 * reach: readers refuse a sketch that is higher than log2 of its values. -1 if nothing is left. */
static inline int LEVELS(relieve)(Levels* f, const LevelsShape* shape, int64_t weight,
                                  uint64_t* coins, LEVELS_T* scratch) {
  int level = levels_full(f, shape);
  if (level == f->levels) {
    weight += levels_weight(f);
    if (weight >> f->levels != 0 && f->levels + 1 < LEVELS_MAX) {
      f->pops[f->levels++] = 0;
      return 0;
    }
    level = 0;
    while (level < f->levels && f->pops[level] < 2) level++;
  }
  if (level == f->levels || (level == f->levels - 1 && f->levels + 1 >= LEVELS_MAX)) return -1;
  LEVELS(compact)(f, level, coins, scratch);
  return 0;
}

/* Take n ascending values of weight 2^base that lie `stride` apart; -1 if there is no memory and
 * none was taken. `scratch` holds 512 items and a sketch. */
static inline int LEVELS(absorb)(Levels* f, const LevelsShape* shape, const LEVELS_T* sorted,
                                 int32_t n, int32_t stride, int base, uint64_t* coins,
                                 LEVELS_T* scratch) {
  int up; /* levels above base */
  for (;;) {
    up = levels_of_run(f, shape, n, base) - base;
    if (f->retained + (n >> up) + up <= shape->totals[f->levels]) break;
    if (LEVELS(relieve)(f, shape, (int64_t)n << base, coins, scratch)) return -1;
  }
  if (LEVELS(reserve)(f, shape, (n >> up) + up)) return -1;
  const uint64_t coin = levels_coins(coins);
  const int32_t q = n >> up;
  int32_t at = q << up;
  const LEVELS_T* pick = sorted + (int64_t)stride * (int64_t)((coin >> 32) & ((1u << up) - 1u));
  const int64_t step = (int64_t)stride << up;
  for (int32_t i = 0; i < q; i++) scratch[i] = pick[i * step];
  LEVELS(insert)(f, base + up, scratch, q, scratch + q);
  /* What is left over goes down in powers of two, one value for each: groups of the same event. */
  for (int b = up - 1; at < n; b--) {
    if (((n - at) >> b) & 1) {
      const LEVELS_T* one = sorted + stride * (int64_t)(at + (int32_t)(coin & ((1u << b) - 1u)));
      LEVELS(insert)(f, base + b, one, 1, scratch);
      at += 1 << b;
    }
  }
  if (up) f->variance += 0.25 * levels_square(base + up);
  return 0;
}

/* Add the levels of another sketch of the same type and of any k; -1 if there is no memory: some of
 * its levels may be in. */
static inline int LEVELS(merge)(Levels* f, const LevelsShape* shape, const Levels* other,
                                uint64_t* coins, LEVELS_T* scratch) {
  const LEVELS_T* items = (const LEVELS_T*)other->items;
  int32_t at = other->size - other->retained;
  for (int h = 0; h < other->levels; h++) {
    const int32_t pop = (int32_t)other->pops[h];
    if (pop == 0) continue;
    while (f->levels <= h) f->pops[f->levels++] = 0;
    if (LEVELS(absorb)(f, shape, items + at, pop, 1, h, coins, scratch)) return -1;
    at += pop;
  }
  f->variance += other->variance;
  if (other->k_min < f->k_min) f->k_min = other->k_min;
  return 0;
}

/* Cut the n values of a sketch, in their order, into groups of 2^shift, the last of what is left
 * over, and choose one of each by one coin for all; return how many, -1 if there is no memory. The
 * variance of that is added to *variance: of the largest group whose values are not all
 * the same. */
static inline int32_t LEVELS(sample)(const Levels* f, int64_t n, int shift, uint64_t coin,
                                     LEVELS_T* restrict out, double* variance) {
  const int32_t all = f->retained;
  LEVELS_T* values = (LEVELS_T*)malloc((size_t)all * 2 * (sizeof(LEVELS_T) + 1) + 1);
  if (!values) return -1;
  uint8_t* level = (uint8_t*)(values + 2 * all);
  /* Merge the levels one by one, from one half of the memory to the other. */
  const LEVELS_T* items = (const LEVELS_T*)f->items + f->size - all;
  LEVELS_T *from = values, *into = values + all;
  uint8_t *from_level = level, *into_level = level + all;
  int32_t held = 0;
  for (int h = 0; h < f->levels; h++) {
    const int32_t pop = (int32_t)f->pops[h];
    if (pop == 0) continue;
    int32_t i = 0, j = 0;
    while (i < held || j < pop) {
      const int first = j >= pop || (i < held && from[i] <= items[j]);
      into[i + j] = first ? from[i] : items[j];
      into_level[i + j] = first ? from_level[i] : (uint8_t)h;
      i += first;
      j += !first;
    }
    items += pop;
    held += pop;
    LEVELS_T* swap = from;
    uint8_t* swap_level = from_level;
    from = into, into = swap;
    from_level = into_level, into_level = swap_level;
  }
  const int64_t group = INT64_C(1) << shift;
  int64_t begin = 0, seen = 0, unlike = 0; /* seen: values up to and with item i - 1 */
  int32_t count = 0, i = 0;
  while (begin < n) {
    const int64_t size = n - begin < group ? n - begin : group;
    /* The coin's modulus favours a place of a group of 2^53 by 2^-10, of 2^30 by 2^-33. */
    const int64_t chosen = begin + (int64_t)((coin >> 1) % (uint64_t)size);
    LEVELS_T low = 0, pick = 0;
    int some = 0;
    for (;;) { /* items that reach into the group */
      const int64_t end = seen + (INT64_C(1) << from_level[i]);
      if (!some) low = from[i];
      some = 1;
      if (seen <= chosen && chosen < end) pick = from[i];
      if (end >= begin + size) break;
      seen = end;
      i++;
    }
    if (low != from[i] && size > unlike) unlike = size;
    out[count++] = pick;
    begin += size;
    if (seen + (INT64_C(1) << from_level[i]) == begin) seen += INT64_C(1) << from_level[i++];
  }
  *variance += 0.25 * (double)unlike * (double)unlike;
  free(values);
  return count;
}

#undef LEVELS
#endif
