/* GELU and quantization as one pass each way. Values err by up to 4e-7 (torch: 1e-6). */
#include "norm.c"

/* exp(-x^2 / 2). */
INLINE float bell(float x) { return exp_negative(-0.5f * x * x); }

/* The normal distribution function at x, given bell(x). Below zero it is the bell times a polynomial in
   1 / (1 + |x| / 4), fitted by least squares reweighted to an even error of 2e-8. */
INLINE float normal(float x, float e) {
    const float t = 1.0f / (1.0f + 0.25f * fabsf(x));
    float q = -0.0959992543f;
    q = q * t + 0.3616610115f;
    q = q * t - 0.3045272161f;
    q = q * t + 0.3180198030f;
    q = q * t + 0.0048280904f;
    q = q * t + 0.1178494719f;
    q = q * t + 0.0981680769f;
    q = q * t * e;
    return x < 0.0f ? q : 1.0f - q;
}

#define GELU(T)                                                                                                      \
    INLINE void gelu_block_##T(const T *restrict x, T *restrict z, float *restrict slope, int64_t n) {               \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                                        \
            const float v = load_##T(x + i), e = bell(v), share = normal(v, e);                                      \
            store_##T(z + i, v * share);                                                                             \
            if (slope) slope[i] = share + v * e * 0.3989422804f;                                                     \
        }                                                                                                            \
    }                                                                                                                \
    INLINE void times_block_##T(T *restrict d, const float *restrict slope, int64_t n) {                             \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) store_##T(d + i, load_##T(d + i) * slope[i]);            \
    }                                                                                                                \
    /* `q` has one row. */                                                                                           \
    void forward_gelu_##T(const Call *q, const T *x, void *y) {                                                      \
        const int masked = q->rate && *q->rate < 1.0f;                                                               \
        const Row p = make_row(q, 0, 0.0);                                                                           \
        _Pragma("omp parallel for num_threads(q->threads) schedule(static) if (q->threads > 1)")                     \
        for (int64_t at = 0; at < q->columns; at += PIECE) {                                                         \
            T kept[PIECE];                                                                                           \
            const int64_t n = least(PIECE, q->columns - at);                                                         \
            gelu_block_##T(x + at, kept, NULL, n);                                                                   \
            forward_piece_##T(q, kept, y, at, n, p, masked);                                                         \
        }                                                                                                            \
    }                                                                                                                \
    /* 0, or 1 where there is no memory. */                                                                          \
    int backward_gelu_##T(const Call *q, const T *g, const T *x, T *dx, float *dscale, float *dzeros) {              \
        const int masked = q->rate && *q->rate < 1.0f, rule = (int)q->rule;                                          \
        const int64_t jobs = (q->columns + PIECE - 1) / PIECE;                                                       \
        double *parts = malloc(sizeof(double) * 2 * (size_t)jobs), ds = 0.0, dz = 0.0;                               \
        if (!parts) return 1;                                                                                        \
        const double mean = rule == SCALAR ? sum_abs_##T(g, q->columns) * scale_of(q, 0) / (double)q->columns : 0.0; \
        const Row p = make_row(q, 0, mean);                                                                          \
        _Pragma("omp parallel for num_threads(q->threads) schedule(static) if (q->threads > 1)")                     \
        for (int64_t job = 0; job < jobs; job++) {                                                                   \
            T kept[PIECE];                                                                                           \
            float slope[PIECE];                                                                                      \
            const int64_t at = job * PIECE, n = least(PIECE, q->columns - at);                                       \
            gelu_block_##T(x + at, kept, slope, n);                                                                  \
            backward_piece_##T(g + at, kept, dx + at, (uint32_t)at, n, parts + 2 * job, p, rule, masked);            \
            times_block_##T(dx + at, slope, n);                                                                      \
        }                                                                                                            \
        for (int64_t job = 0; job < jobs; job++) ds += parts[2 * job], dz += parts[2 * job + 1];                     \
        free(parts);                                                                                                 \
        scale_gradients(q, 0, ds, dz, dscale, dzeros);                                                               \
        return 0;                                                                                                    \
    }

GELU(f32)
GELU(bf16)
