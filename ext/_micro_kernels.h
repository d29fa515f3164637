/* Kernels of the micro engine: types of a program, and its loops compiled for each variant.
 *
 * A program is a list of steps over tensors in channels-last order, one sample at a time:
 *   float tensors  float32
 *   int8 tensors   int16, the quantized value minus its zero point: exact, no correction terms,
 *                  padding is 0, and pmaddwd / vpdpwssd multiply two pairs without saturation
 * Weights are packed in panels: [panel][k][lane], or [panel][pair of k][lane][2] for int16, so
 * that the inner loop reads them in order and broadcasts the activations.
 *
 * The loops stand in _micro_loops.h and are compiled as "generic" (16-byte vectors: SSE2, NEON)
 * and, on x86-64, as "v3" (AVX2, FMA), "v4" (AVX-512) and "v4vnni". Integer results are the same
 * bits in each; float sums differ in their order.
 *
 * Compile with -ffp-contract=off: what onnxruntime rounds twice must be rounded twice here, or a
 * value near the middle of two quantization steps falls on the other side. Sums of products say
 * SIMD_FMA where they want it.
 */
#ifndef SHOAL_MICRO_KERNELS_H
#define SHOAL_MICRO_KERNELS_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define MICRO_INPUT (-1)    /* MicroView.at: the call's own input, only read */
#define MICRO_OUTPUT (-2)   /* the call's output */
#define MICRO_ROWS 6        /* output positions that one pass of a panel makes */
#define MICRO_PANEL_MAX 8   /* vectors of a panel, at most */
#define MICRO_MAGIC 12582912.f /* 1.5 * 2^23: adding it rounds |v| < 2^22 half to even */

enum MicroKind {
  MICRO_CHANNELS, /* planar (NCHW) -> channels-last */
  MICRO_PLANAR,   /* channels-last -> planar */
  MICRO_GEMM_F,   /* convolution or dense layer, float */
  MICRO_GEMM_Q,   /* of int16, into int16 or float (flag) */
  MICRO_DEPTH_F,  /* depthwise convolution */
  MICRO_DEPTH_Q,
  MICRO_UNARY,    /* element by element; flag: MicroUnary */
  MICRO_BINARY,   /* with constants; flag: MicroBinary */
  MICRO_QUANT,    /* float -> int16 */
  MICRO_DEQUANT,  /* int16 -> float */
  MICRO_MAX_F,    /* pools */
  MICRO_MAX_Q,
  MICRO_MEAN_F,   /* average pool; flag 1: divide by the whole window, padding included */
  MICRO_GLOBAL_F, /* mean over all positions */
  MICRO_GLOBAL_Q,
  MICRO_NORM,     /* instance or group normalisation */
  MICRO_SOFTMAX,  /* over the channels of each position */
  MICRO_SOFTMAX_Q,
  MICRO_TABLE     /* int16 -> int16 by a table of 256, one or one for each channel */
};
enum MicroUnary { MICRO_RELU, MICRO_SIGMOID, MICRO_TANH };
enum MicroBinary { MICRO_ADD, MICRO_SUB, MICRO_RSUB, MICRO_MUL, MICRO_DIV, MICRO_RDIV };

typedef struct {   /* where a tensor is; positions of a row are `c` elements apart */
  int64_t at;      /* byte offset of its first element in the scratch, or one of the above */
  int64_t h, w, c; /* one-dimensional: h is 1; flat: h and w are 1 */
  int64_t row;     /* elements from row to row */
} MicroView;

typedef struct {
  int64_t first;   /* output channel within the group */
  int64_t vectors; /* 1, 2, 4 or 8 */
  int64_t count;   /* channels that are real, the rest is padding */
  int64_t weights; /* element offset from the group's weights */
  int64_t lane;    /* element offset from the group's bias and scale */
} MicroPanel;

typedef struct {
  int64_t kind, flag;
  MicroView src, dst;
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w;
  int64_t groups, src_group, dst_group; /* channels of a group */
  int64_t weights_group, lanes_group;   /* elements of weights and of bias from group to group */
  int64_t panels_n, runs_n, run_length; /* runs of a window that are contiguous in memory */
  const MicroPanel* panels;
  const int64_t* runs;                  /* element offset of each run from the window's start */
  const void* weights;                  /* float or int16, packed */
  const void* bias;                     /* float or int32; constants, tables */
  const float* scale;                   /* per lane: from int32 to the output */
  int64_t constants;                    /* number of constants, in elements */
  int64_t room;                         /* byte offset of a step's own scratch */
  float low, high;                      /* clamp of the output */
  float step;                           /* of quantization; of MICRO_NORM: epsilon */
                                        /* of SOFTMAX_Q: 1 / step */
} MicroStep;

typedef void (*MicroRun)(const MicroStep*, int64_t, char*, const char*, char*, int64_t);

static inline char* micro_place(const MicroView* view, char* scratch, const char* input,
                                char* output) {
  if (view->at == MICRO_INPUT) return (char*)(uintptr_t)input;
  return view->at == MICRO_OUTPUT ? output : scratch + view->at;
}

#define SIMD_JOIN_(name, variant) name##_##variant
#define SIMD_JOIN(name, variant) SIMD_JOIN_(name, variant)
#define SIMD(name) SIMD_JOIN(name, SIMD_VARIANT)

#define SIMD_VARIANT generic
#define SIMD_BYTES 16
#define SIMD_TARGET
#if defined(__x86_64__)
#define SIMD_FMA(a, b, c) ((c) + (a) * (b))
#define SIMD_DOT(acc, a, b) ((acc) + (SIMD(Ints))_mm_madd_epi16((__m128i)(a), (__m128i)(b)))
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define SIMD_FMA(a, b, c) ((SIMD(Reals))vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define SIMD_DOT(acc, a, b)                                                       \
  ((acc) + (SIMD(Ints))vpaddq_s32(                                                \
               vmull_s16(vget_low_s16((int16x8_t)(a)), vget_low_s16((int16x8_t)(b))), \
               vmull_high_s16((int16x8_t)(a), (int16x8_t)(b))))
#else
#define SIMD_FMA(a, b, c) ((c) + (a) * (b))
#endif
#include "_micro_loops.h"
#undef SIMD_VARIANT
#undef SIMD_BYTES
#undef SIMD_TARGET
#undef SIMD_FMA
#undef SIMD_DOT

#if defined(__x86_64__)
#define SIMD_VARIANT v3
#define SIMD_BYTES 32
#define SIMD_TARGET __attribute__((target("avx2,fma")))
#define SIMD_FMA(a, b, c) \
  ((SIMD(Reals))_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define SIMD_DOT(acc, a, b) ((acc) + (SIMD(Ints))_mm256_madd_epi16((__m256i)(a), (__m256i)(b)))
#include "_micro_loops.h"
#undef SIMD_VARIANT
#undef SIMD_BYTES
#undef SIMD_TARGET
#undef SIMD_FMA
#undef SIMD_DOT

#define SIMD_VARIANT v4
#define SIMD_BYTES 64
#define SIMD_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#define SIMD_FMA(a, b, c) \
  ((SIMD(Reals))_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define SIMD_DOT(acc, a, b) ((acc) + (SIMD(Ints))_mm512_madd_epi16((__m512i)(a), (__m512i)(b)))
#include "_micro_loops.h"
#undef SIMD_VARIANT
#undef SIMD_TARGET
#undef SIMD_DOT

#define SIMD_VARIANT v4vnni
#define SIMD_TARGET                                                                           \
  __attribute__((                                                                             \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")))
#define SIMD_DOT(acc, a, b) \
  ((SIMD(Ints))_mm512_dpwssd_epi32((__m512i)(acc), (__m512i)(a), (__m512i)(b)))
#include "_micro_loops.h"
#undef SIMD_VARIANT
#undef SIMD_BYTES
#undef SIMD_TARGET
#undef SIMD_FMA
#undef SIMD_DOT
#endif

typedef struct {
  const char* name;
  int64_t lanes; /* floats of a vector */
  MicroRun run;
} MicroVariant;

static const MicroVariant MICRO_VARIANTS[] = {
    {"generic", 4, run_generic},
#if defined(__x86_64__)
    {"v3", 8, run_v3},
    {"v4", 16, run_v4},
    {"v4vnni", 16, run_v4vnni},
#endif
};
enum { MICRO_VARIANTS_N = sizeof MICRO_VARIANTS / sizeof MICRO_VARIANTS[0] };

/* Whether this machine can run a variant. */
static inline int micro_supported(int64_t variant) {
#if defined(__x86_64__)
  const int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (variant == 1) return v3;
  if (variant == 2) return v4;
  if (variant == 3) return v4 && __builtin_cpu_supports("avx512vnni");
#endif
  return variant == 0;
}

#endif
