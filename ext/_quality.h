/* Count values out of range and runs of equal values: what a broken sensor shows.

   A value equal to the one before it continues a run (-0.0 equals 0.0; NaN equals nothing). A run
   counts from its `least`-th value on: then with all its values so far, later with each. Thus the
   counts of windows add up to the values in long runs, also of runs that cross windows.

   Runs are followed value by value only where a block has enough equal pairs for one to count.
   The loops before that are plain, so that compilers make vectors of them. */

#ifndef SHOAL_QUALITY_H
#define SHOAL_QUALITY_H

#include <stdint.h>

#define QUALITY_RUN_MAX (1 << 30)  /* a longer run is this long: `least` is below */
#define QUALITY_BLOCK 256          /* values of a channel that are looked at together */

typedef struct {
    float last;     /* value before; NaN at first */
    int32_t run;    /* values of the run that it ends; 0 at first */
    int64_t below, above, stuck;
} Quality;

/* Follow the runs of a channel's block: n > 0 values, `step` apart, with `same` equal pairs. */
static void quality_runs(const float* x, int32_t n, int64_t step, int32_t same, int32_t least,
                         Quality* q) {
    const int32_t before = q->run > 0 ? q->run : 1;
    int32_t run = 1, i = n - 1;
    if (before + same < least) {
        while (i > 0 && x[i * step] == x[(i - 1) * step]) i--, run++;
        if (i == 0 && x[0] == q->last) run += q->run;
    } else {
        float last = q->last;
        run = q->run;
        for (i = 0; i < n; i++) {
            run = x[i * step] == last ? run + 1 : 1;
            q->stuck += (run == least ? least : 0) + (run > least);
            last = x[i * step];
        }
    }
    q->run = run < QUALITY_RUN_MAX ? run : QUALITY_RUN_MAX;
    q->last = x[(n - 1) * step];
}

/* Consecutive values of one channel. */
static void quality_series(const float* x, int64_t n, float low, float high, int32_t least,
                           Quality* q) {
    while (n > 0) {
        const int32_t size = n < QUALITY_BLOCK ? (int32_t)n : QUALITY_BLOCK;
        int32_t below = x[0] < low, above = x[0] > high, same = x[0] == q->last;
        for (int32_t i = 1; i < size; i++) {
            below += x[i] < low;
            above += x[i] > high;
            same += x[i] == x[i - 1];
        }
        q->below += below;
        q->above += above;
        quality_runs(x, size, 1, same, least, q);
        x += size;
        n -= size;
    }
}

/* The same for 1 to QUALITY_BLOCK rows of one value of each channel; `scratch` holds 3 * channels
   counts, `last` the row before. */
static void quality_rows(const float* restrict x, int32_t rows, int64_t channels,
                         const float* restrict low, const float* restrict high, int32_t least,
                         int32_t* restrict scratch, const float* restrict last,
                         Quality* restrict q) {
    int32_t* restrict below = scratch;
    int32_t* restrict above = scratch + channels;
    int32_t* restrict same = scratch + 2 * channels;
    for (int64_t c = 0; c < channels; c++) {
        below[c] = x[c] < low[c];
        above[c] = x[c] > high[c];
        same[c] = x[c] == last[c];
    }
    for (int32_t r = 1; r < rows; r++) {
        const float* now = x + r * channels;
        const float* before = now - channels;
        for (int64_t c = 0; c < channels; c++) {
            below[c] += now[c] < low[c];
            above[c] += now[c] > high[c];
            same[c] += now[c] == before[c];
        }
    }
    for (int64_t c = 0; c < channels; c++) {
        q[c].below += below[c];
        q[c].above += above[c];
        quality_runs(x + c, rows, channels, same[c], least, &q[c]);
    }
}

/* Values of a window (channels, samples) out of their channel's range. */
static int64_t quality_outside(const float* x, int64_t channels, int64_t samples,
                               const float* low, const float* high) {
    int64_t found = 0;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t i = 0; i < samples; i++, x++)
            found += (*x < low[c]) | (*x > high[c]);
    return found;
}

#endif
