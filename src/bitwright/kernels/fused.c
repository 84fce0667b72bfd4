/* Fused fake quantization on the CPU: one pass forward, one pass backward.

   Plain C, compiled on first use; vectorized by the compiler. The arithmetic is the reference's to the last bit in
   the forward pass: a true division, rounding of ties to even, NaN kept, the same random mask. */
#include "floats.c"
#include <math.h>
#include <stddef.h>
#include <stdlib.h>

#define BLOCK 16384 /* elements per job and partial sum */

/* One call. `rows` rows of `columns` elements lie one after another; row r uses scale[r % channels].
   times: 0, or forward passes write integers, (code - zero) * times + offset, and a NaN to *poison if they meet one: as
   bytes, or as bfloat16 if `wide`. */
typedef struct {
    const float *scale, *zeros, *lo, *hi, *strength, *rate; /* zeros, strength, rate, seed: or NULL */
    const int64_t *seed;
    float *poison;
    double zero, times, offset;
    int64_t rows, channels, columns, count, rule, replaced_only, wide, threads;
} Call;

/* How the gradient of a code becomes that of the value; see `KernelRule`. */
enum { CLIPPED_STE = 0, STE = 1, EWGS = 2, SCALAR = 3, CONSTANT = 4, DSQ = 5 };

/* What one row needs. */
typedef struct {
    float s, zero, lo, hi, rate, steep, pull;
    uint32_t low, high;
    int replaced_only;
} Row;

/* v where `condition` holds, else 0: bits instead of a branch, which would keep the loop scalar. */
INLINE float keep_if(int condition, float v) {
    union { float f; int32_t i; } u;
    u.f = v;
    u.i &= -(int32_t)(condition != 0);
    return u.f;
}

INLINE uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x045d9f3bu;
    x = (x ^ (x >> 16)) * 0x045d9f3bu;
    return x ^ (x >> 16);
}

/* The uniform number of the element at `i`, in [0, 1). */
INLINE float uniform(uint32_t i, const Row *p) {
    return (float)(int32_t)(mix(mix(i + p->low) ^ p->high) >> 8) * 0x1p-24f;
}

/* exp(z) for z <= 0 to about one unit in the last place: 2^n times a polynomial. */
INLINE float exp_negative(float z) {
    z = z < -80.0f ? -80.0f : z;
    const float n = rintf(z * 1.44269504f), f = (z - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1.9875691500e-4f;
    e = e * f + 1.3981999507e-3f;
    e = e * f + 8.3334519073e-3f;
    e = e * f + 4.1665795894e-2f;
    e = e * f + 1.6666665459e-1f;
    e = e * f + 5.0000001201e-1f;
    e = (e * f) * f + f + 1.0f;
    union { int32_t i; float f; } power;
    power.i = ((int32_t)n + 127) << 23;
    return e * power.f;
}

/* Slope of DSQ's staircase at c: steep = ln(2 / alpha - 1), pull = steep / (2 (1 - alpha)), sech^2 by exp. */
INLINE float soft_slope(float c, const Row *p) {
    const float t = exp_negative(-2.0f * p->steep * fabsf(c - floorf(c) - 0.5f));
    return p->pull * 4.0f * t / ((1.0f + t) * (1.0f + t));
}

INLINE float scale_of(const Call *q, int64_t channel) {
    return q->count ? fabsf(q->scale[channel]) + 1e-12f : q->scale[channel];
}

/* `mean`: of |gradient of the codes| over the tensor, for SCALAR. */
static Row make_row(const Call *q, int64_t r, double mean) {
    const int64_t channel = r % q->channels;
    Row p = {.s = scale_of(q, channel), .lo = *q->lo, .hi = *q->hi, .rate = q->rate ? *q->rate : 1.0f};
    p.zero = q->zeros ? q->zeros[channel] : (float)q->zero;
    p.replaced_only = (int)q->replaced_only;
    if (q->seed) {
        p.low = (uint32_t)*q->seed;
        p.high = (uint32_t)(*q->seed >> 32);
    }
    const double strength = q->strength ? *q->strength : 0.0, width = (double)p.hi - p.lo;
    if (q->rule == EWGS) p.pull = (float)(strength / width);
    if (q->rule == SCALAR) p.pull = (float)(strength * mean / width / p.s);
    if (q->rule == CONSTANT) p.pull = (float)(strength / width / width / p.s);
    if (q->rule == DSQ) {
        p.steep = (float)log(2.0 / strength - 1.0);
        p.pull = (float)(0.5 * log(2.0 / strength - 1.0) / (1.0 - strength));
    }
    return p;
}

INLINE float clip(float v, const Row *p) {
    v = v < p->lo ? p->lo : v;
    return v > p->hi ? p->hi : v;
}

/* Below, `masked` and `rule` are constants at every call, so that the compiler drops what they exclude. */
#define FORWARD(T)                                                                                                   \
    INLINE void forward_block_##T(const T *restrict x, T *restrict y, uint32_t at, int64_t n, const Row p,           \
                                  int masked) {                                                                      \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                                        \
            const float c = clip(load_##T(x + i) / p.s + p.zero, &p), r = rintf(c);                                  \
            const float k = !masked || uniform(at + (uint32_t)i, &p) < p.rate ? r : c;                               \
            store_##T(y + i, (k - p.zero) * p.s);                                                                    \
        }                                                                                                            \
    }                                                                                                                \
    INLINE void integers_block_##T(const T *restrict x, void *restrict y, int64_t n, const Row p, const Call *q,     \
                                   int wide) {                                                                       \
        const float times = (float)q->times, offset = (float)q->offset;                                              \
        int bad = 0;                                                                                                 \
        _Pragma("omp simd reduction(| : bad)") for (int64_t i = 0; i < n; i++) {                                     \
            const float k = rintf(clip(load_##T(x + i) / p.s + p.zero, &p)), number = (k - p.zero) * times + offset; \
            bad |= k != k;                                                                                           \
            if (wide) cut_bf16((bf16 *)y + i, number);                                                               \
            else ((uint8_t *)y)[i] = (uint8_t)(int32_t)number;                                                       \
        }                                                                                                            \
        if (bad) *q->poison = NAN;                                                                                   \
    }                                                                                                                \
    /* The `n` elements at `at` of what the call makes. */                                                           \
    INLINE void forward_piece_##T(const Call *q, const T *x, void *y, int64_t at, int64_t n, const Row p,            \
                                  int masked) {                                                                      \
        if (q->times != 0.0 && q->wide) integers_block_##T(x, (bf16 *)y + at, n, p, q, 1);                           \
        else if (q->times != 0.0) integers_block_##T(x, (uint8_t *)y + at, n, p, q, 0);                              \
        else if (masked) forward_block_##T(x, (T *)y + at, (uint32_t)at, n, p, 1);                                   \
        else forward_block_##T(x, (T *)y + at, (uint32_t)at, n, p, 0);                                               \
    }                                                                                                                \
    void forward_##T(const Call *q, const T *x, void *y) {                                                           \
        const int64_t blocks = (q->columns + BLOCK - 1) / BLOCK;                                                     \
        const int masked = q->rate && *q->rate < 1.0f;                                                               \
        _Pragma("omp parallel for num_threads(q->threads) schedule(static) if (q->threads > 1)")                     \
        for (int64_t job = 0; job < q->rows * blocks; job++) {                                                       \
            const int64_t r = job / blocks, from = (job % blocks) * BLOCK, at = r * q->columns + from;               \
            const int64_t n = q->columns - from < BLOCK ? q->columns - from : BLOCK;                                 \
            const Row p = make_row(q, r, 0.0);                                                                       \
            forward_piece_##T(q, x + at, y, at, n, p, masked);                                                       \
        }                                                                                                            \
    }

/* Adds one block's parts of the gradients of scale and zero (codes' units) to sums; single precision within 1024
   elements, double beyond. */
#define BACKWARD_BLOCK(T)                                                                                            \
    INLINE void backward_block_##T(const T *restrict g, const T *restrict x, T *restrict dx, uint32_t at, int64_t n, \
                                   double *sums, const Row p, int rule, int masked) {                                \
        double ds = 0.0, dz = 0.0;                                                                                   \
        for (int64_t start = 0; start < n; start += 1024) {                                                          \
            const int64_t stop = start + 1024 < n ? start + 1024 : n;                                                \
            float scale_part = 0.0f, zero_part = 0.0f;                                                               \
            _Pragma("omp simd reduction(+ : scale_part, zero_part)")                                                 \
            for (int64_t i = start; i < stop; i++) {                                                                 \
                const float gi = load_##T(g + i), v = load_##T(x + i) / p.s + p.zero;                                \
                const float c = clip(v, &p), r = rintf(c);                                                           \
                const float k = !masked || uniform(at + (uint32_t)i, &p) < p.rate ? r : c;                           \
                const float e = c - (masked && p.replaced_only ? k : r);                                             \
                const float gk = rule == EWGS                          ? gi + p.pull * fabsf(gi) * e                 \
                                 : rule == SCALAR || rule == CONSTANT  ? gi + p.pull * e                             \
                                 : rule == DSQ                         ? gi * soft_slope(c, &p)                      \
                                                                       : gi;                                         \
                const float gv = keep_if(c == v, gk);                                                                \
                if (rule == STE || rule == CLIPPED_STE) cut_##T(dx + i, rule == STE ? gi : gv);                      \
                else store_##T(dx + i, gv);                                                                          \
                scale_part += gi * (k - p.zero) - gv * (c - p.zero);                                                 \
                zero_part += gv - gi;                                                                                \
            }                                                                                                        \
            ds += scale_part;                                                                                        \
            dz += zero_part;                                                                                         \
        }                                                                                                            \
        sums[0] = ds;                                                                                                \
        sums[1] = dz;                                                                                                \
    }

/* For a rule that is known at run time only. */
#define BACKWARD_PIECE(T)                                                                                            \
    static void backward_piece_##T(const T *g, const T *x, T *dx, uint32_t at, int64_t n, double *sums, const Row p, \
                                   int rule, int masked) {                                                           \
        if (rule == CLIPPED_STE) backward_block_##T(g, x, dx, at, n, sums, p, CLIPPED_STE, 0);                       \
        else if (rule == STE) backward_block_##T(g, x, dx, at, n, sums, p, STE, 0);                                  \
        else if (rule == DSQ) backward_block_##T(g, x, dx, at, n, sums, p, DSQ, 0);                                  \
        else if (rule == EWGS && masked) backward_block_##T(g, x, dx, at, n, sums, p, EWGS, 1);                      \
        else if (rule == EWGS) backward_block_##T(g, x, dx, at, n, sums, p, EWGS, 0);                                \
        else if (masked) backward_block_##T(g, x, dx, at, n, sums, p, SCALAR, 1);                                    \
        else backward_block_##T(g, x, dx, at, n, sums, p, SCALAR, 0);                                                \
    }

/* Gradients of a channel's scale (of LSQ's parameter, if it is one) and zero from the sums of `backward_block`. */
static void scale_gradients(const Call *q, int64_t c, double of_scale, double of_zero, float *dscale, float *dzeros) {
    const double raw = q->scale[c], sign = raw > 0 ? 1.0 : raw < 0 ? -1.0 : 0.0;
    dscale[c] = (float)(q->count ? of_scale * sign / sqrt((double)q->count * *q->hi) : of_scale);
    if (dzeros) dzeros[c] = (float)(of_zero * scale_of(q, c));
}

/* Parts are added in a fixed order, whatever the number of threads. 0, or 1 where there is no memory. */
#define BACKWARD(T)                                                                                                  \
    INLINE double sum_abs_##T(const T *g, int64_t n) {                                                               \
        double total = 0.0;                                                                                          \
        for (int64_t start = 0; start < n; start += 1024) {                                                          \
            const int64_t stop = start + 1024 < n ? start + 1024 : n;                                                \
            float part = 0.0f;                                                                                       \
            _Pragma("omp simd reduction(+ : part)") for (int64_t i = start; i < stop; i++)                           \
                part += fabsf(load_##T(g + i));                                                                      \
            total += part;                                                                                           \
        }                                                                                                            \
        return total;                                                                                                \
    }                                                                                                                \
    int backward_##T(const Call *q, const T *g, const T *x, T *dx, float *dscale, float *dzeros) {                   \
        const int64_t blocks = (q->columns + BLOCK - 1) / BLOCK, jobs = q->rows * blocks;                            \
        const int masked = q->rate && *q->rate < 1.0f, rule = (int)q->rule;                                          \
        double *sums = malloc(sizeof(double) * 2 * (size_t)(jobs + q->channels)), mean = 0.0;                        \
        if (!sums) return 1;                                                                                         \
        double *totals = sums + 2 * jobs;                                                                            \
        for (int pass = rule == SCALAR ? 0 : 1; pass < 2; pass++) {                                                  \
            _Pragma("omp parallel for num_threads(q->threads) schedule(static) if (q->threads > 1)")                 \
            for (int64_t job = 0; job < jobs; job++) {                                                               \
                const int64_t row = job / blocks, from = (job % blocks) * BLOCK, at = row * q->columns + from;       \
                const int64_t n = q->columns - from < BLOCK ? q->columns - from : BLOCK;                             \
                if (pass == 0) {                                                                                     \
                    sums[2 * job] = sum_abs_##T(g + at, n) * scale_of(q, row % q->channels);                         \
                    continue;                                                                                        \
                }                                                                                                    \
                const Row p = make_row(q, row, mean);                                                                \
                double *out = sums + 2 * job;                                                                        \
                backward_piece_##T(g + at, x + at, dx + at, (uint32_t)at, n, out, p, rule, masked);                  \
            }                                                                                                        \
            if (pass == 0) {                                                                                         \
                for (int64_t job = 0; job < jobs; job++) mean += sums[2 * job];                                      \
                mean /= (double)(q->rows * q->columns);                                                              \
            }                                                                                                        \
        }                                                                                                            \
        for (int64_t c = 0; c < 2 * q->channels; c++) totals[c] = 0.0;                                               \
        for (int64_t job = 0; job < jobs; job++) {                                                                   \
            totals[2 * ((job / blocks) % q->channels)] += sums[2 * job];                                             \
            totals[2 * ((job / blocks) % q->channels) + 1] += sums[2 * job + 1];                                     \
        }                                                                                                            \
        for (int64_t c = 0; c < q->channels; c++)                                                                    \
            scale_gradients(q, c, totals[2 * c], totals[2 * c + 1], dscale, dzeros);                                 \
        free(sums);                                                                                                  \
        return 0;                                                                                                    \
    }

FORWARD(f32)
FORWARD(bf16)
BACKWARD_BLOCK(f32)
BACKWARD_BLOCK(bf16)
BACKWARD_PIECE(f32)
BACKWARD_PIECE(bf16)
BACKWARD(f32)
BACKWARD(bf16)
