/* The curve of a merger: its items in ascending order, each with the weight of all up to it.
 *
 * Items are sorted by radix, 11 bits at a time, on keys of 64 bits that order as the floats do;
 * digits that all items share are skipped, so floats take three passes. -0.0 comes before 0.0.
 */
#ifndef SHOAL_KLL_CURVE_H
#define SHOAL_KLL_CURVE_H

#include <stdint.h>
#include <string.h>

enum { CURVE_BITS = 11, CURVE_DIGITS = 1 << CURVE_BITS };

typedef struct {
  uint64_t key;  /* orders as the value does */
  int64_t below; /* weight of the item; once summed, of all items up to it */
} CurveItem;

/* A float stands in the upper half of its key, a double fills it. */
static inline uint64_t curve_key_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint64_t)(bits ^ ((uint32_t)((int32_t)bits >> 31) | UINT32_C(0x80000000))) << 32;
}

static inline uint64_t curve_key_double(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits ^ ((uint64_t)((int64_t)bits >> 63) | UINT64_C(0x8000000000000000));
}

static inline float curve_float(uint64_t key) {
  uint32_t bits = (uint32_t)(key >> 32);
  float value;
  bits ^= (bits & UINT32_C(0x80000000)) ? UINT32_C(0x80000000) : UINT32_C(0xffffffff);
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline double curve_double(uint64_t key) {
  double value;
  key ^= (key >> 63) ? UINT64_C(0x8000000000000000) : UINT64_C(0xffffffffffffffff);
  memcpy(&value, &key, sizeof value);
  return value;
}

/* Sort n items at `items`, with as much room at `other`; return where they are: at one of both. */
static CurveItem* curve_sort(CurveItem* items, CurveItem* other, int64_t n, int first_bit) {
  for (int bit = first_bit; bit < 64; bit += CURVE_BITS) {
    int64_t ends[CURVE_DIGITS] = {0};
    for (int64_t i = 0; i < n; i++) ends[items[i].key >> bit & (CURVE_DIGITS - 1)]++;
    if (n == 0 || ends[items[0].key >> bit & (CURVE_DIGITS - 1)] == n) continue;
    int64_t sum = 0;
    for (int d = 0; d < CURVE_DIGITS; d++) {
      const int64_t count = ends[d];
      ends[d] = sum;
      sum += count;
    }
    for (int64_t i = 0; i < n; i++) {
      other[ends[items[i].key >> bit & (CURVE_DIGITS - 1)]++] = items[i];
    }
    CurveItem* sorted = other;
    other = items;
    items = sorted;
  }
  return items;
}

/* Index of the first of n >= 1 items up to which the weight is at least `wanted`; else the last. */
static inline int64_t curve_find(const CurveItem* items, int64_t n, double wanted) {
  int64_t low = 0, high = n - 1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if ((double)items[middle].below >= wanted) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

#endif /* SHOAL_KLL_CURVE_H */
