/* The loops of the micro engine, once for each variant; only _micro_kernels.h includes this. */

#define SIMD_LANES (SIMD_BYTES / 4)
#define SIMD_INLINE static inline __attribute__((always_inline)) SIMD_TARGET
#define SIMD_LOAD(vector, from) memcpy(&(vector), (from), sizeof(vector))

typedef float SIMD(Reals) __attribute__((vector_size(SIMD_BYTES)));
typedef int32_t SIMD(Ints) __attribute__((vector_size(SIMD_BYTES)));
typedef int16_t SIMD(Pairs) __attribute__((vector_size(SIMD_BYTES)));
typedef int16_t SIMD(Shorts) __attribute__((vector_size(SIMD_BYTES / 2)));

#ifndef SIMD_DOT /* no instruction for it: pairs are multiplied and added one by one */
SIMD_INLINE SIMD(Ints) SIMD(dot)(SIMD(Ints) acc, SIMD(Pairs) a, SIMD(Pairs) b) {
  for (int l = 0; l < SIMD_LANES; l++) {
    acc[l] += (int32_t)a[2 * l] * b[2 * l] + (int32_t)a[2 * l + 1] * b[2 * l + 1];
  }
  return acc;
}
#define SIMD_DOT(acc, a, b) SIMD(dot)((acc), (SIMD(Pairs))(a), (SIMD(Pairs))(b))
#endif

/* yes where the mask is all ones, no where it is all zeros */
#define SIMD_CHOOSE(mask, yes, no)                                        \
  ((SIMD(Reals))(((SIMD(Ints))(mask) & (SIMD(Ints))(yes)) |               \
                 (~(SIMD(Ints))(mask) & (SIMD(Ints))(no))))

/* Clamp; NaN becomes `low`, as maxps(v, low) makes it. */
SIMD_INLINE SIMD(Reals) SIMD(clamp)(SIMD(Reals) v, float low, float high) {
  const SIMD(Reals) lows = low - (SIMD(Reals)){0}, highs = high - (SIMD(Reals)){0};
  v = SIMD_CHOOSE(v > lows, v, lows);
  return SIMD_CHOOSE(v < highs, v, highs);
}

/* Half to even, |v| < 2^22. */
SIMD_INLINE SIMD(Reals) SIMD(round)(SIMD(Reals) v) { return (v + MICRO_MAGIC) - MICRO_MAGIC; }

/* max(v, 0); NaN stays NaN, as in onnxruntime. */
SIMD_INLINE SIMD(Reals) SIMD(relu)(SIMD(Reals) v) {
  return (SIMD(Reals))((SIMD(Ints))v & ~(SIMD(Ints))(v < (SIMD(Reals)){0}));
}

/* e^v within 2 ulp. v = n ln 2 + r, |r| <= ln 2 / 2; coefficients: Cephes expf. 2^n is made of two
 * factors, so that neither over- nor underflows before the product does. */
SIMD_INLINE SIMD(Reals) SIMD(exp)(SIMD(Reals) v) {
  const SIMD(Reals) top = 89.f - (SIMD(Reals)){0}, bottom = -104.f - (SIMD(Reals)){0};
  v = SIMD_CHOOSE(v > top, top, v);
  v = SIMD_CHOOSE(v < bottom, bottom, v);
  const SIMD(Reals) zero = {0};
  const SIMD(Reals) n = SIMD(round)(v * 1.44269504088896341f);
  SIMD(Reals) r = SIMD_FMA(n, zero - 0.693359375f, v);
  r = SIMD_FMA(n, zero + 2.12194440e-4f, r);
  SIMD(Reals) p = zero + 1.9875691500e-4f;
  p = SIMD_FMA(p, r, zero + 1.3981999507e-3f);
  p = SIMD_FMA(p, r, zero + 8.3334519073e-3f);
  p = SIMD_FMA(p, r, zero + 4.1665795894e-2f);
  p = SIMD_FMA(p, r, zero + 1.6666665459e-1f);
  p = SIMD_FMA(p, r, zero + 5.0000001201e-1f);
  p = SIMD_FMA(p, r * r, r) + 1.f;
  /* NaN has no integer: a number in its place keeps the conversion defined, p is NaN anyway. */
  const SIMD(Ints) whole = __builtin_convertvector(SIMD_CHOOSE(n == n, n, zero), SIMD(Ints));
  const SIMD(Ints) half = whole >> 1;
  const SIMD(Reals) low = (SIMD(Reals))((half + 127) << 23);
  const SIMD(Reals) high = (SIMD(Reals))((whole - half + 127) << 23);
  return p * low * high;
}

SIMD_INLINE SIMD(Reals) SIMD(sigmoid)(SIMD(Reals) v) { return 1.f / (1.f + SIMD(exp)(-v)); }

/* Near 0 a polynomial (Cephes tanhf), elsewhere 1 - 2 / (e^2|v| + 1). */
SIMD_INLINE SIMD(Reals) SIMD(tanh)(SIMD(Reals) v) {
  const SIMD(Ints) sign = (SIMD(Ints))v & INT32_MIN;
  const SIMD(Reals) size = (SIMD(Reals))((SIMD(Ints))v & INT32_MAX);
  const SIMD(Reals) zero = {0};
  const SIMD(Reals) far = 1.f - 2.f / (SIMD(exp)(size + size) + 1.f);
  const SIMD(Reals) z = size * size;
  SIMD(Reals) p = zero - 5.70498872745e-3f;
  p = SIMD_FMA(p, z, zero + 2.06390887954e-2f);
  p = SIMD_FMA(p, z, zero - 5.37397155531e-2f);
  p = SIMD_FMA(p, z, zero + 1.33314422036e-1f);
  p = SIMD_FMA(p, z, zero - 3.33332819422e-1f);
  const SIMD(Reals) near = SIMD_FMA(p * z, size, size);
  const SIMD(Reals) found = SIMD_CHOOSE(size < zero + 0.625f, near, far);
  return (SIMD(Reals))((SIMD(Ints))found | sign);
}

/* ---- sums of products -------------------------------------------------------------------- */

/* Add the products of one k to P * V sums. The weights are loaded first, then each activation is
 * broadcast once: P * V sums, V weights and one activation are what the registers hold. */
SIMD_INLINE void SIMD(products_f)(const float* x, int64_t a_next, const float* w,
                                  SIMD(Reals) * sum, const int P, const int V) {
  SIMD(Reals) weight[MICRO_PANEL_MAX];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) SIMD_LOAD(weight[v], w + v * SIMD_LANES);
#pragma GCC unroll 8
  for (int p = 0; p < P; p++) {
    const SIMD(Reals) value = x[p * a_next] - (SIMD(Reals)){0};
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[p * V + v] = SIMD_FMA(value, weight[v], sum[p * V + v]);
  }
}

/* The same of one pair of k, for int16. */
SIMD_INLINE void SIMD(products_q)(const int16_t* x, int64_t a_next, const int16_t* w,
                                  SIMD(Ints) * sum, const int P, const int V) {
  SIMD(Ints) weight[MICRO_PANEL_MAX];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) SIMD_LOAD(weight[v], w + v * SIMD_LANES * 2);
#pragma GCC unroll 8
  for (int p = 0; p < P; p++) {
    int32_t pair;
    memcpy(&pair, x + p * a_next, sizeof pair);
    const SIMD(Ints) value = pair - (SIMD(Ints)){0};
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[p * V + v] = SIMD_DOT(sum[p * V + v], value, weight[v]);
  }
}

/* P output positions times V vectors of channels; K sums for each, where one would wait for
 * itself. P, V, K are constants where this is inlined: P * V * K <= 12 sums stay in registers. */
SIMD_INLINE void SIMD(block_f)(const MicroStep* s, const MicroPanel* panel, const float* a,
                               int64_t a_next, const float* w, const float* bias, float* out,
                               int64_t out_next, const int P, const int V, const int K) {
  SIMD(Reals) sum[12];
  for (int i = 0; i < P * V * K; i++) sum[i] = (SIMD(Reals)){0};
  for (int64_t run = 0; run < s->runs_n; run++) {
    const float* x = a + s->runs[run];
    int64_t j = 0;
    for (; j + K <= s->run_length; j += K) {
#pragma GCC unroll 8
      for (int k = 0; k < K; k++, w += V * SIMD_LANES) {
        SIMD(products_f)(x + j + k, a_next, w, sum + k * P * V, P, V);
      }
    }
    for (; j < s->run_length; j++, w += V * SIMD_LANES) {
      SIMD(products_f)(x + j, a_next, w, sum, P, V);
    }
  }
#pragma GCC unroll 8
  for (int k = K / 2; k; k /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < k * P * V; i++) sum[i] += sum[k * P * V + i];
  }
  const int whole = panel->count == V * SIMD_LANES;
#pragma GCC unroll 8
  for (int p = 0; p < P; p++) {
    float part[MICRO_PANEL_MAX * SIMD_LANES];
    float* to = whole ? out + p * out_next : part;
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      SIMD(Reals) shift;
      SIMD_LOAD(shift, bias + v * SIMD_LANES);
      SIMD(Reals) y = sum[p * V + v] + shift;
      if (s->flag) y = SIMD(relu)(y);
      memcpy(to + v * SIMD_LANES, &y, sizeof y);
    }
    if (!whole) memcpy(out + p * out_next, part, panel->count * sizeof(float));
  }
}

SIMD_INLINE void SIMD(finish_q)(const MicroStep* s, SIMD(Ints) sum, const int32_t* bias,
                                const float* scale, void* to) {
  SIMD(Ints) shift;
  SIMD(Reals) factor;
  SIMD_LOAD(shift, bias);
  SIMD_LOAD(factor, scale);
  SIMD(Reals) y = __builtin_convertvector(sum + shift, SIMD(Reals)) * factor;
  if (s->flag) { /* the output is float */
    memcpy(to, &y, sizeof y);
    return;
  }
  y = SIMD(round)(SIMD(clamp)(y, s->low, s->high));
  const SIMD(Shorts) q =
      __builtin_convertvector(__builtin_convertvector(y, SIMD(Ints)), SIMD(Shorts));
  memcpy(to, &q, sizeof q);
}

SIMD_INLINE void SIMD(block_q)(const MicroStep* s, const MicroPanel* panel, const int16_t* a,
                               int64_t a_next, const int16_t* w, const int32_t* bias,
                               const float* scale, char* out, int64_t out_next, const int P,
                               const int V, const int K) {
  const int64_t size = s->flag ? sizeof(float) : sizeof(int16_t);
  SIMD(Ints) sum[12];
  for (int i = 0; i < P * V * K; i++) sum[i] = (SIMD(Ints)){0};
  for (int64_t run = 0; run < s->runs_n; run++) {
    const int16_t* x = a + s->runs[run];
    int64_t j = 0;
    for (; j + K <= s->run_length; j += K) {
#pragma GCC unroll 8
      for (int k = 0; k < K; k++, w += V * SIMD_LANES * 2) {
        SIMD(products_q)(x + 2 * (j + k), a_next, w, sum + k * P * V, P, V);
      }
    }
    for (; j < s->run_length; j++, w += V * SIMD_LANES * 2) {
      SIMD(products_q)(x + 2 * j, a_next, w, sum, P, V);
    }
  }
#pragma GCC unroll 8
  for (int k = K / 2; k; k /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < k * P * V; i++) sum[i] += sum[k * P * V + i];
  }
  const int whole = panel->count == V * SIMD_LANES;
#pragma GCC unroll 8
  for (int p = 0; p < P; p++) {
    char part[MICRO_PANEL_MAX * SIMD_BYTES];
    char* to = whole ? out + p * out_next * size : part;
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      SIMD(finish_q)(s, sum[p * V + v], bias + v * SIMD_LANES, scale + v * SIMD_LANES,
                     to + v * SIMD_LANES * size);
    }
    if (!whole) memcpy(out + p * out_next * size, part, panel->count * size);
  }
}

/* Which blocks exist: many positions of 1 or 2 vectors, or one position of up to 8. */
#define SIMD_BLOCK(P, V, K)                                                                      \
  if (s->kind == MICRO_GEMM_F) {                                                                 \
    SIMD(block_f)(s, panel, (const float*)a, a_next, (const float*)w, (const float*)bias,        \
                  (float*)out, s->dst.c, P, V, K);                                               \
  } else {                                                                                       \
    SIMD(block_q)(s, panel, (const int16_t*)a, a_next, (const int16_t*)w, (const int32_t*)bias,  \
                  scale, out, s->dst.c, P, V, K);                                                \
  }

static SIMD_TARGET void SIMD(block_6x2)(const MicroStep* s, const MicroPanel* panel, const char* a,
                                        int64_t a_next, const char* w, const char* bias,
                                        const float* scale, char* out) {
  SIMD_BLOCK(6, 2, 1)
}
static SIMD_TARGET void SIMD(block_6x1)(const MicroStep* s, const MicroPanel* panel, const char* a,
                                        int64_t a_next, const char* w, const char* bias,
                                        const float* scale, char* out) {
  SIMD_BLOCK(6, 1, 1)
}
static SIMD_TARGET void SIMD(block_1x8)(const MicroStep* s, const MicroPanel* panel, const char* a,
                                        int64_t a_next, const char* w, const char* bias,
                                        const float* scale, char* out) {
  SIMD_BLOCK(1, 8, 1)
}
static SIMD_TARGET void SIMD(block_1x4)(const MicroStep* s, const MicroPanel* panel, const char* a,
                                        int64_t a_next, const char* w, const char* bias,
                                        const float* scale, char* out) {
  SIMD_BLOCK(1, 4, 2)
}
static SIMD_TARGET void SIMD(block_1x2)(const MicroStep* s, const MicroPanel* panel, const char* a,
                                        int64_t a_next, const char* w, const char* bias,
                                        const float* scale, char* out) {
  SIMD_BLOCK(1, 2, 4)
}
static SIMD_TARGET void SIMD(block_1x1)(const MicroStep* s, const MicroPanel* panel, const char* a,
                                        int64_t a_next, const char* w, const char* bias,
                                        const float* scale, char* out) {
  SIMD_BLOCK(1, 1, 8)
}

static SIMD_TARGET void SIMD(gemm)(const MicroStep* s, const char* src, char* dst) {
  const int64_t a_size = s->kind == MICRO_GEMM_F ? 4 : 2;
  const int64_t out_size = s->kind == MICRO_GEMM_F || s->flag ? 4 : 2;
  const int64_t a_next = s->stride_w * s->src.c, w = s->dst.w;
  for (int64_t y = 0; y < s->dst.h; y++) {
    const char* row =
        src + ((y * s->stride_h - s->pad_h) * s->src.row - s->pad_w * s->src.c) * a_size;
    for (int64_t g = 0; g < s->groups; g++) {
      const char* a = row + g * s->src_group * a_size;
      char* out = dst + (y * s->dst.row + g * s->dst_group) * out_size;
      const char* group = (const char*)s->weights + g * s->weights_group * a_size;
      for (int64_t i = 0; i < s->panels_n; i++) {
        const MicroPanel* panel = &s->panels[i];
        const char* weights = group + panel->weights * a_size;
        const char* bias = (const char*)s->bias + (g * s->lanes_group + panel->lane) * 4;
        const float* scale = s->scale ? s->scale + g * s->lanes_group + panel->lane : NULL;
        char* to = out + panel->first * out_size;
        if (w >= MICRO_ROWS && panel->vectors <= 2) {
          for (int64_t x = 0; x < w; x += MICRO_ROWS) {
            if (x > w - MICRO_ROWS) x = w - MICRO_ROWS; /* the last ones again: same results */
            const char* from = a + x * a_next * a_size;
            char* at = to + x * s->dst.c * out_size;
            if (panel->vectors == 2) {
              SIMD(block_6x2)(s, panel, from, a_next, weights, bias, scale, at);
            } else {
              SIMD(block_6x1)(s, panel, from, a_next, weights, bias, scale, at);
            }
          }
          continue;
        }
        for (int64_t x = 0; x < w; x++) {
          const char* from = a + x * a_next * a_size;
          char* at = to + x * s->dst.c * out_size;
          switch (panel->vectors) {
            case 8: SIMD(block_1x8)(s, panel, from, a_next, weights, bias, scale, at); break;
            case 4: SIMD(block_1x4)(s, panel, from, a_next, weights, bias, scale, at); break;
            case 2: SIMD(block_1x2)(s, panel, from, a_next, weights, bias, scale, at); break;
            default: SIMD(block_1x1)(s, panel, from, a_next, weights, bias, scale, at);
          }
        }
      }
    }
  }
}

/* Depthwise: each output channel has one input channel; weights are [tap][lane]. */
static SIMD_TARGET void SIMD(depth)(const MicroStep* s, const char* src, char* dst) {
  const int real = s->kind == MICRO_DEPTH_F;
  const int64_t out_size = real || s->flag ? 4 : 2;
  for (int64_t y = 0; y < s->dst.h; y++) {
    for (int64_t x = 0; x < s->dst.w; x++) {
      const int64_t at = (y * s->stride_h - s->pad_h) * s->src.row +
                         (x * s->stride_w - s->pad_w) * s->src.c;
      char* out = dst + (y * s->dst.row + x * s->dst.c) * out_size;
      for (int64_t c = 0; c < s->dst.c; c += SIMD_LANES) {
        char part[SIMD_BYTES];
        if (real) {
          SIMD(Reals) sum = {0}, weight, value, shift;
          for (int64_t run = 0; run < s->runs_n; run++) {
            SIMD_LOAD(weight, (const float*)s->weights + run * s->lanes_group + c);
            SIMD_LOAD(value, (const float*)src + at + s->runs[run] + c);
            sum = SIMD_FMA(value, weight, sum);
          }
          SIMD_LOAD(shift, (const float*)s->bias + c);
          sum += shift;
          if (s->flag) sum = SIMD(relu)(sum);
          memcpy(part, &sum, sizeof sum);
        } else {
          SIMD(Ints) sum = {0};
          SIMD(Shorts) weight, value;
          for (int64_t run = 0; run < s->runs_n; run++) {
            SIMD_LOAD(weight, (const int16_t*)s->weights + run * s->lanes_group + c);
            SIMD_LOAD(value, (const int16_t*)src + at + s->runs[run] + c);
            sum += __builtin_convertvector(value, SIMD(Ints)) *
                   __builtin_convertvector(weight, SIMD(Ints));
          }
          SIMD(finish_q)(s, sum, (const int32_t*)s->bias + c, s->scale + c, part);
        }
        const int64_t left = s->dst.c - c < SIMD_LANES ? s->dst.c - c : SIMD_LANES;
        memcpy(out + c * out_size, part, left * out_size);
      }
    }
  }
}

/* ---- element by element ------------------------------------------------------------------ */

#define SIMD_EACH(n, from, to, expression)           \
  do {                                               \
    int64_t i_ = 0;                                  \
    SIMD(Reals) v;                                   \
    for (; i_ + SIMD_LANES <= (n); i_ += SIMD_LANES) { \
      SIMD_LOAD(v, (from) + i_);                     \
      v = (expression);                              \
      memcpy((to) + i_, &v, sizeof v);               \
    }                                                \
    if (i_ < (n)) {                                  \
      v = (SIMD(Reals)){0};                          \
      memcpy(&v, (from) + i_, ((n)-i_) * sizeof(float)); \
      v = (expression);                              \
      memcpy((to) + i_, &v, ((n)-i_) * sizeof(float)); \
    }                                                \
  } while (0)

static SIMD_TARGET void SIMD(unary)(const MicroStep* s, const float* src, float* dst) {
  const int64_t n = s->src.w * s->src.c;
  for (int64_t y = 0; y < s->src.h; y++) {
    const float* from = src + y * s->src.row;
    float* to = dst + y * s->dst.row;
    if (s->flag == MICRO_RELU) {
      SIMD_EACH(n, from, to, SIMD(relu)(v));
    } else if (s->flag == MICRO_SIGMOID) {
      SIMD_EACH(n, from, to, SIMD(sigmoid)(v));
    } else {
      SIMD_EACH(n, from, to, SIMD(tanh)(v));
    }
  }
}

#define SIMD_WITH(expression)                                        \
  if (s->constants == 1) {                                           \
    const float c = constants[0];                                    \
    for (int64_t i = 0; i < n; i++) {                                \
      const float a = from[i];                                       \
      to[i] = (expression);                                          \
    }                                                                \
  } else {                                                           \
    for (int64_t x = 0; x < n; x += period) {                        \
      for (int64_t i = 0; i < period; i++) {                         \
        const float a = from[x + i], c = constants[i];               \
        to[x + i] = (expression);                                    \
      }                                                              \
    }                                                                \
  }

static SIMD_TARGET void SIMD(binary)(const MicroStep* s, const float* from, float* to) {
  const int64_t n = s->src.w * s->src.c;
  const int64_t period = s->constants == s->src.c ? s->src.c : n;
  const float* constants = (const float*)s->bias;
  for (int64_t y = 0; y < s->src.h; y++) {
    switch (s->flag) {
      case MICRO_ADD: SIMD_WITH(a + c) break;
      case MICRO_SUB: SIMD_WITH(a - c) break;
      case MICRO_RSUB: SIMD_WITH(c - a) break;
      case MICRO_MUL: SIMD_WITH(a * c) break;
      case MICRO_DIV: SIMD_WITH(a / c) break;
      default: SIMD_WITH(c / a)
    }
    from += s->src.row;
    to += s->dst.row;
    if (s->constants > s->src.c) constants += n;
  }
}

static SIMD_TARGET void SIMD(quant)(const MicroStep* s, const float* src, int16_t* dst) {
  const int64_t n = s->src.w * s->src.c;
  for (int64_t y = 0; y < s->src.h; y++) {
    const float* from = src + y * s->src.row;
    int16_t* to = dst + y * s->dst.row;
    for (int64_t i = 0; i < n; i += SIMD_LANES) {
      const int64_t left = n - i < SIMD_LANES ? n - i : SIMD_LANES;
      SIMD(Reals) v = {0};
      if (left == SIMD_LANES) {
        SIMD_LOAD(v, from + i);
      } else {
        memcpy(&v, from + i, left * sizeof(float));
      }
      v = SIMD(round)(SIMD(clamp)(v / s->step, s->low, s->high));
      const SIMD(Shorts) q =
          __builtin_convertvector(__builtin_convertvector(v, SIMD(Ints)), SIMD(Shorts));
      if (left == SIMD_LANES) {
        memcpy(to + i, &q, sizeof q);
      } else {
        memcpy(to + i, &q, left * sizeof(int16_t));
      }
    }
  }
}

static SIMD_TARGET void SIMD(dequant)(const MicroStep* s, const int16_t* src, float* dst) {
  for (int64_t y = 0; y < s->src.h; y++) {
    const int16_t* restrict from = src + y * s->src.row;
    float* restrict to = dst + y * s->dst.row;
    for (int64_t i = 0; i < s->src.w * s->src.c; i++) to[i] = (float)from[i] * s->step;
  }
}

/* ---- layouts ----------------------------------------------------------------------------- */

#define SIMD_TURN(type)                                                                        \
  for (int64_t y = 0; y < s->src.h; y++) {                                                     \
    for (int64_t c = 0; c < s->src.c; c++) {                                                   \
      const int64_t plane = (c * s->src.h + y) * s->src.w;                                     \
      if (s->kind == MICRO_CHANNELS) {                                                         \
        const type* restrict from = (const type*)src + plane;                                  \
        type* restrict to = (type*)dst + y * s->dst.row + c;                                   \
        for (int64_t x = 0; x < s->src.w; x++) to[x * s->src.c] = from[x];                     \
      } else {                                                                                 \
        const type* restrict from = (const type*)src + y * s->src.row + c;                     \
        type* restrict to = (type*)dst + plane;                                                \
        for (int64_t x = 0; x < s->src.w; x++) to[x] = from[x * s->src.c];                     \
      }                                                                                        \
    }                                                                                          \
  }

/* flag: the tensor is int16. Both views have the tensor's own h, w, c. */
static SIMD_TARGET void SIMD(turn)(const MicroStep* s, const char* src, char* dst) {
  if (s->flag) {
    SIMD_TURN(int16_t)
  } else {
    SIMD_TURN(float)
  }
}

/* ---- pools, normalisation, softmax ------------------------------------------------------- */

#define SIMD_POOL(type, first, join, last)                                                     \
  for (int64_t y = 0; y < s->dst.h; y++) {                                                     \
    for (int64_t x = 0; x < s->dst.w; x++) {                                                   \
      type* restrict to = (type*)dst + y * s->dst.row + x * channels;                          \
      int64_t n = 0;                                                                           \
      for (int64_t i = 0; i < s->kernel_h; i++) {                                              \
        const int64_t sy = y * s->stride_h - s->pad_h + i * s->dilation_h;                     \
        if (sy < 0 || sy >= s->src.h) continue;                                                \
        for (int64_t j = 0; j < s->kernel_w; j++) {                                            \
          const int64_t sx = x * s->stride_w - s->pad_w + j * s->dilation_w;                   \
          if (sx < 0 || sx >= s->src.w) continue;                                              \
          const type* restrict from = (const type*)src + sy * s->src.row + sx * channels;      \
          if (!n++) {                                                                          \
            for (int64_t c = 0; c < channels; c++) to[c] = first(from[c]);                     \
          } else {                                                                             \
            for (int64_t c = 0; c < channels; c++) to[c] = join(to[c], from[c]);               \
          }                                                                                    \
        }                                                                                      \
      }                                                                                        \
      last                                                                                     \
    }                                                                                          \
  }
#define SIMD_SAME(a) (a)
#define SIMD_LARGER(a, b) ((b) > (a) ? (b) : (a))
#define SIMD_SUM(a, b) ((a) + (b))

static SIMD_TARGET void SIMD(pool)(const MicroStep* s, const char* src, char* dst) {
  const int64_t channels = s->src.c;
  if (s->kind == MICRO_MAX_F) {
    SIMD_POOL(float, SIMD_SAME, SIMD_LARGER, )
  } else if (s->kind == MICRO_MAX_Q) {
    SIMD_POOL(int16_t, SIMD_SAME, SIMD_LARGER, )
  } else {
    const int64_t window = s->flag ? s->kernel_h * s->kernel_w : 0;
    SIMD_POOL(float, SIMD_SAME, SIMD_SUM, {
      const float by = (float)(window ? window : n);
      for (int64_t c = 0; c < channels; c++) to[c] /= by;
    })
  }
}

/* Mean of each channel. Four sums by index mod 4 over the plane, then (0 + 2) + (1 + 3), then the
 * rest: the order of onnxruntime's own loop, so that both round alike. */
static SIMD_TARGET void SIMD(global_f)(const MicroStep* s, const float* src, float* dst,
                                       float* restrict room) {
  const int64_t channels = s->src.c, count = s->src.h * s->src.w, whole = count & -4;
  float* restrict to = dst;
  memset(room, 0, 4 * channels * sizeof(float));
  int64_t n = 0;
  for (int64_t y = 0; y < s->src.h; y++) {
    const float* restrict from = src + y * s->src.row;
    for (int64_t x = 0; x < s->src.w; x++, n++, from += channels) {
      if (n == whole) {
        for (int64_t c = 0; c < channels; c++) {
          to[c] = (room[c] + room[2 * channels + c]) + (room[channels + c] + room[3 * channels + c]);
        }
      }
      float* restrict sum = n < whole ? room + (n & 3) * channels : to;
      for (int64_t c = 0; c < channels; c++) sum[c] += from[c];
    }
  }
  if (n == whole) {
    for (int64_t c = 0; c < channels; c++) {
      to[c] = (room[c] + room[2 * channels + c]) + (room[channels + c] + room[3 * channels + c]);
    }
  }
  for (int64_t c = 0; c < channels; c++) to[c] /= (float)count;
}

static SIMD_TARGET void SIMD(global_q)(const MicroStep* s, const int16_t* src, int16_t* dst) {
  for (int64_t c = 0; c < s->src.c; c++) {
    int32_t sum = 0;
    for (int64_t y = 0; y < s->src.h; y++) {
      const int16_t* from = src + y * s->src.row + c;
      for (int64_t x = 0; x < s->src.w; x++) sum += from[x * s->src.c];
    }
    float v = (float)sum * s->step;
    v = v > s->low ? v : s->low;
    v = v < s->high ? v : s->high;
    dst[c] = (int16_t)((v + MICRO_MAGIC) - MICRO_MAGIC);
  }
}

/* Sum of x (of its squares about `mean`, if about) in the order of Eigen's reduction with vectors
 * of 4, which onnxruntime is compiled with: `lead` numbers up to an aligned address, two vectors,
 * their sum, one vector more if any is left, then what leads, then the rest. */
typedef float SIMD(Four) __attribute__((vector_size(16)));
SIMD_INLINE float SIMD(total)(const float* x, int64_t n, int64_t lead, float mean, const int about) {
#define SIMD_TAKE(v) (about ? ((v)-mean) * ((v)-mean) : (v))
  float found = 0;
  if (n < lead) lead = n;
  const int64_t end = lead + (n - lead) / 4 * 4, end2 = lead + (n - lead) / 8 * 8;
  if (end > lead) {
    SIMD(Four) v, sum, more;
    SIMD_LOAD(v, x + lead);
    sum = SIMD_TAKE(v);
    if (end > lead + 4) {
      SIMD_LOAD(v, x + lead + 4);
      more = SIMD_TAKE(v);
      for (int64_t i = lead + 8; i < end2; i += 8) {
        SIMD_LOAD(v, x + i);
        sum += SIMD_TAKE(v);
        SIMD_LOAD(v, x + i + 4);
        more += SIMD_TAKE(v);
      }
      sum += more;
      if (end > end2) {
        SIMD_LOAD(v, x + end2);
        sum += SIMD_TAKE(v);
      }
    }
    found = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    for (int64_t i = 0; i < lead; i++) found += SIMD_TAKE(x[i]);
    for (int64_t i = end; i < n; i++) found += SIMD_TAKE(x[i]);
  } else if (n) {
    found = SIMD_TAKE(x[0]);
    for (int64_t i = 1; i < n; i++) found += SIMD_TAKE(x[i]);
  }
  return found;
#undef SIMD_TAKE
}

static SIMD_TARGET void SIMD(norm)(const MicroStep* s, const float* src, float* dst,
                                   float* restrict room, int64_t sample) {
  const int64_t channels = s->src.c, width = channels / s->groups, plane = s->src.h * s->src.w;
  float* restrict scale = room;
  float* restrict shift = room + channels;
  float* restrict line = room + 2 * channels;
  const float* gain = s->scale;
  const float* bias = (const float*)s->bias;
  for (int64_t g = 0; g < s->groups; g++) {
    for (int64_t y = 0; y < s->src.h; y++) {
      for (int64_t c = 0; c < width; c++) {
        const float* restrict from = src + y * s->src.row + g * width + c;
        float* restrict to = line + (c * s->src.h + y) * s->src.w;
        for (int64_t x = 0; x < s->src.w; x++) to[x] = from[x * channels];
      }
    }
    const int64_t n = width * plane, lead = -((sample * s->groups + g) * n) & 3;
    const float mean = SIMD(total)(line, n, lead, 0, 0) / (float)n;
    const float square = SIMD(total)(line, n, 0, mean, 1);
    const float inverse = 1.f / sqrtf(square / (float)n + s->step);
    for (int64_t c = g * width; c < (g + 1) * width; c++) {
      scale[c] = inverse * gain[g];
      shift[c] = bias[g] - mean * scale[c];
    }
  }
  for (int64_t y = 0; y < s->src.h; y++) {
    for (int64_t x = 0; x < s->src.w; x++) {
      const float* from = src + y * s->src.row + x * channels;
      float* to = dst + y * s->dst.row + x * channels;
      for (int64_t c = 0; c < channels; c++) to[c] = from[c] * scale[c] + shift[c];
    }
  }
}

static SIMD_TARGET void SIMD(softmax)(const MicroStep* s, const float* src, float* dst) {
  const int64_t channels = s->src.c;
  for (int64_t y = 0; y < s->src.h; y++) {
    for (int64_t x = 0; x < s->src.w; x++) {
      const float* from = src + y * s->src.row + x * channels;
      float* to = dst + y * s->dst.row + x * channels;
      float most = from[0], sum = 0;
      for (int64_t c = 1; c < channels; c++) most = from[c] > most ? from[c] : most;
      SIMD_EACH(channels, from, to, SIMD(exp)(v - most));
      for (int64_t c = 0; c < channels; c++) sum += to[c];
      const float factor = 1.f / sum;
      for (int64_t c = 0; c < channels; c++) to[c] *= factor;
    }
  }
}

/* In integers as onnxruntime does: the table holds e^(-i step) for the distance i from the largest
 * value, last entry first, scaled so that the sum fits 32 bits. */
static SIMD_TARGET void SIMD(softmax_q)(const MicroStep* s, const int16_t* src, int16_t* dst) {
  const int64_t channels = s->src.c;
  for (int64_t y = 0; y < s->src.h; y++) {
    for (int64_t x = 0; x < s->src.w; x++) {
      const int16_t* from = src + y * s->src.row + x * channels;
      int16_t* to = dst + y * s->dst.row + x * channels;
      int16_t most = from[0];
      for (int64_t c = 1; c < channels; c++) most = from[c] > most ? from[c] : most;
      const uint32_t* table = (const uint32_t*)s->bias + 255 - most;
      uint32_t sum = 0;
      for (int64_t c = 0; c < channels; c++) sum += table[from[c]];
      for (int64_t c = 0; c < channels; c++) {
        const uint32_t q = (table[from[c]] * (uint32_t)s->step + (sum >> 1)) / sum;
        to[c] = (int16_t)(q > (uint32_t)s->high ? (uint32_t)s->high : q);
      }
    }
  }
}

static SIMD_TARGET void SIMD(table)(const MicroStep* s, const int16_t* src, int16_t* dst) {
  const int16_t* table = (const int16_t*)s->bias - (int64_t)s->low;
  const int64_t next = s->constants > 256 ? 256 : 0, channels = s->src.c;
  for (int64_t y = 0; y < s->src.h; y++) {
    for (int64_t x = 0; x < s->src.w; x++) {
      const int16_t* from = src + y * s->src.row + x * channels;
      int16_t* to = dst + y * s->dst.row + x * channels;
      for (int64_t c = 0; c < channels; c++) to[c] = table[c * next + from[c]];
    }
  }
}

/* ---- the program ------------------------------------------------------------------------- */

static SIMD_TARGET void SIMD(run)(const MicroStep* steps, int64_t steps_n, char* scratch,
                                  const char* input, char* output, int64_t sample) {
  for (const MicroStep* s = steps; s < steps + steps_n; s++) {
    const char* src = micro_place(&s->src, scratch, input, output);
    char* dst = micro_place(&s->dst, scratch, input, output);
    float* room = (float*)(scratch + s->room);
    switch (s->kind) {
      case MICRO_CHANNELS:
      case MICRO_PLANAR: SIMD(turn)(s, src, dst); break;
      case MICRO_GEMM_F:
      case MICRO_GEMM_Q: SIMD(gemm)(s, src, dst); break;
      case MICRO_DEPTH_F:
      case MICRO_DEPTH_Q: SIMD(depth)(s, src, dst); break;
      case MICRO_UNARY: SIMD(unary)(s, (const float*)src, (float*)dst); break;
      case MICRO_BINARY: SIMD(binary)(s, (const float*)src, (float*)dst); break;
      case MICRO_QUANT: SIMD(quant)(s, (const float*)src, (int16_t*)dst); break;
      case MICRO_DEQUANT: SIMD(dequant)(s, (const int16_t*)src, (float*)dst); break;
      case MICRO_MAX_F:
      case MICRO_MAX_Q:
      case MICRO_MEAN_F: SIMD(pool)(s, src, dst); break;
      case MICRO_GLOBAL_F: SIMD(global_f)(s, (const float*)src, (float*)dst, room); break;
      case MICRO_GLOBAL_Q: SIMD(global_q)(s, (const int16_t*)src, (int16_t*)dst); break;
      case MICRO_NORM: SIMD(norm)(s, (const float*)src, (float*)dst, room, sample); break;
      case MICRO_SOFTMAX_Q: SIMD(softmax_q)(s, (const int16_t*)src, (int16_t*)dst); break;
      case MICRO_TABLE: SIMD(table)(s, (const int16_t*)src, (int16_t*)dst); break;
      default: SIMD(softmax)(s, (const float*)src, (float*)dst);
    }
  }
}

#undef SIMD_LANES
#undef SIMD_INLINE
#undef SIMD_LOAD
#undef SIMD_CHOOSE
#undef SIMD_BLOCK
#undef SIMD_EACH
#undef SIMD_WITH
#undef SIMD_TURN
#undef SIMD_POOL
#undef SIMD_SAME
#undef SIMD_LARGER
#undef SIMD_SUM
