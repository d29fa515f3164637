/* Bin the lanes of a tile that need not be sorted, by AVX-512 alone.
 *
 *     tile --transpose--> 16 values of a feature --search, 5 comparisons--> 5 bits of each bin
 *          --planes of bits--> AND, popcount --> counts of 32 bins
 *
 * The number of edges <= value is searched for 16 values at once: the edges, NaN behind them, lie
 * in registers, and a permutation fetches each value's next edge. The mask of a comparison is one
 * bit of 16 bins. So the bins of 512 values are five vectors of 512 bits, and a bin's count is a
 * popcount of their conjunction: no value is ever counted by itself.
 *
 * A histogram of 31 edges takes 0.3 ns a value; sorting for its sake took twice that.
 */
#ifndef SHOAL_BINS_AVX512_H
#define SHOAL_BINS_AVX512_H

#include <stdint.h>

enum {
  BINS_LANES = 16,
  BINS_BITS = 5,
  BINS_MAX = 32,      /* 31 edges */
  BINS_PART = 128,    /* rows that are transposed at once: 8 KiB */
};

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#define BINS_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq")))

static inline int bins_supported(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vpopcntdq");
}

/* Write 16 rows of 16 lanes as 16 columns, BINS_PART values apart. */
static inline BINS_TARGET void bins_transpose(const float* tile, float* part) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_load_ps(tile + 16 * i);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) { /* r[i + c]: columns c, 4 + c, 8 + c, 12 + c of four rows */
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int c = 0; c < 4; c++) {
    const __m512 low0 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
    const __m512 high0 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 low1 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 high1 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_store_ps(part + c * BINS_PART, _mm512_shuffle_f32x4(low0, low1, 0x88));
    _mm512_store_ps(part + (8 + c) * BINS_PART, _mm512_shuffle_f32x4(low0, low1, 0xdd));
    _mm512_store_ps(part + (4 + c) * BINS_PART, _mm512_shuffle_f32x4(high0, high1, 0x88));
    _mm512_store_ps(part + (12 + c) * BINS_PART, _mm512_shuffle_f32x4(high0, high1, 0xdd));
  }
}

/* Write the bits of the bins of n values: planes BINS_MAX apart, 16 values to a number, the highest
 * bit first. */
static inline BINS_TARGET void bins_search(const float* values, int64_t n, const float* edges,
                                           int64_t edges_n, uint16_t* bits) {
  const uint32_t some = (uint32_t)((UINT64_C(1) << edges_n) - 1);
  const __m512 none = _mm512_set1_ps(NAN);
  const __m512 e0 = _mm512_mask_loadu_ps(none, (__mmask16)some, edges);
  const __m512 e1 = _mm512_mask_loadu_ps(none, (__mmask16)(some >> 16), edges + 16);
  /* What is compared when i / 16 of the edges are known to be <= value: edges 2 i + 15, 7, 3, 1,
   * 0. */
  const __m512i even =
      _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512 t0 = _mm512_permutex2var_ps(e0, even, e1);
  const __m512 t1 =
      _mm512_permutex2var_ps(e0, _mm512_add_epi32(even, _mm512_set1_epi32(1)), e1);
  const __m512 t3 = _mm512_permutexvar_ps(
      _mm512_set_epi32(15, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1), t1);
  const __m512 first = _mm512_permutexvar_ps(_mm512_set1_epi32(7), t1);
  const __m512 low = _mm512_permutexvar_ps(_mm512_set1_epi32(3), t1);
  const __m512 high = _mm512_permutexvar_ps(_mm512_set1_epi32(11), t1);
  for (int64_t g = 0; g < n / 16; g++) {
    const __m512 v = _mm512_load_ps(values + 16 * g);
    const __mmask16 k0 = _mm512_cmp_ps_mask(v, first, _CMP_GE_OQ);
    const __mmask16 k1 = _mm512_cmp_ps_mask(v, _mm512_mask_blend_ps(k0, low, high), _CMP_GE_OQ);
    __m512i i = _mm512_maskz_mov_epi32(k0, _mm512_set1_epi32(8));
    i = _mm512_mask_add_epi32(i, k1, i, _mm512_set1_epi32(4));
    const __mmask16 k2 = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(i, t3), _CMP_GE_OQ);
    i = _mm512_mask_add_epi32(i, k2, i, _mm512_set1_epi32(2));
    const __mmask16 k3 = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(i, t1), _CMP_GE_OQ);
    i = _mm512_mask_add_epi32(i, k3, i, _mm512_set1_epi32(1));
    const __mmask16 k4 = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(i, t0), _CMP_GE_OQ);
    bits[0 * BINS_MAX + g] = (uint16_t)k0;
    bits[1 * BINS_MAX + g] = (uint16_t)k1;
    bits[2 * BINS_MAX + g] = (uint16_t)k2;
    bits[3 * BINS_MAX + g] = (uint16_t)k3;
    bits[4 * BINS_MAX + g] = (uint16_t)k4;
  }
}

/* Four counts of 16 bits in each 8 bytes: of the bins whose highest bits are those of `three`. */
static inline BINS_TARGET __m512i bins_four(__m512i three, __m512i b3, __m512i b4) {
#define BINS_OF(low) _mm512_popcnt_epi64(_mm512_ternarylogic_epi64(three, b3, b4, 16 << (low)))
  return _mm512_or_si512(
      _mm512_or_si512(BINS_OF(0), _mm512_slli_epi64(BINS_OF(1), 16)),
      _mm512_or_si512(_mm512_slli_epi64(BINS_OF(2), 32), _mm512_slli_epi64(BINS_OF(3), 48)));
#undef BINS_OF
}

/* Count the bins of `rows` values, whose bits are given. Without a bit: bin 0, which is not
 * counted. */
static inline BINS_TARGET void bins_popcount(const uint16_t* bits, int64_t rows, int32_t* counts) {
  const __mmask32 some = (__mmask32)((UINT64_C(1) << rows / 16) - 1);
  __m512i b[BINS_BITS], c[8], half[4];
  for (int i = 0; i < BINS_BITS; i++) b[i] = _mm512_maskz_loadu_epi16(some, bits + i * BINS_MAX);
#define BINS_THREE(high) \
  c[high] = bins_four(_mm512_ternarylogic_epi64(b[0], b[1], b[2], 1 << (high)), b[3], b[4])
  BINS_THREE(0); BINS_THREE(1); BINS_THREE(2); BINS_THREE(3);
  BINS_THREE(4); BINS_THREE(5); BINS_THREE(6); BINS_THREE(7);
#undef BINS_THREE
  for (int i = 0; i < 4; i++) { /* add the 8 parts of each, all at once */
    half[i] = _mm512_add_epi64(_mm512_unpacklo_epi64(c[2 * i], c[2 * i + 1]),
                               _mm512_unpackhi_epi64(c[2 * i], c[2 * i + 1]));
  }
  for (int i = 0; i < 2; i++) {
    half[i] = _mm512_add_epi64(_mm512_shuffle_i64x2(half[2 * i], half[2 * i + 1], 0x88),
                               _mm512_shuffle_i64x2(half[2 * i], half[2 * i + 1], 0xdd));
  }
  const __m512i all = _mm512_add_epi64(_mm512_shuffle_i64x2(half[0], half[1], 0x88),
                                       _mm512_shuffle_i64x2(half[0], half[1], 0xdd));
  _mm512_storeu_si512(counts, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(all)));
  _mm512_storeu_si512(counts + 16, _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(all, 1)));
}

/* counts[32 l + b] = values of lane l with b edges <= value, b >= 1, for the first `used` lanes of
 * a tile without NaN; `rows` is a power of 2 from 16; at most 31 edges a lane. */
static BINS_TARGET void bins_avx512(const float* tile, int64_t rows, int used,
                                    const float* const* edges, const int64_t* edges_n,
                                    int32_t* counts) {
  uint16_t bits[BINS_LANES][BINS_BITS * BINS_MAX];
  float part[BINS_LANES][BINS_PART] __attribute__((aligned(64)));
  for (int64_t row = 0; row < rows; row += BINS_PART) {
    const int64_t n = rows - row < BINS_PART ? rows - row : BINS_PART;
    for (int64_t r = 0; r < n; r += 16) {
      bins_transpose(tile + (row + r) * BINS_LANES, &part[0][r]);
    }
    for (int l = 0; l < used; l++) {
      bins_search(part[l], n, edges[l], edges_n[l], &bits[l][row / 16]);
    }
  }
  for (int l = 0; l < used; l++) bins_popcount(bits[l], rows, counts + BINS_MAX * l);
}

#endif /* __x86_64__ */
#endif /* SHOAL_BINS_AVX512_H */
