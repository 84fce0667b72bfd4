/* Batch norm in training together with what follows it: norm, plus a tensor, relu, quantization; one pass each way.

   Every value is the one of the separate operators to the last bit: v = x * alpha + beta as torch computes it, rounded
   to the element type after each step, quantized by the functions of fused.c. */
#include "statistics.c"

INLINE float gain(const Norm *m, int64_t c) { return m->invstd[c] * m->weight[c]; }

INLINE float shift(const Norm *m, int64_t c) { return m->bias[c] - m->mean[c] * gain(m, c); }

/* Spreads gain and shift. */
static void spread_norm(const Norm *m, int64_t spread, float *alpha, float *beta) {
    for (int64_t i = 0; i < spread; i++) alpha[i] = gain(m, i % m->channels), beta[i] = shift(m, i % m->channels);
}

/* Below, `last` is a constant at every call, as `added` is: per channel numbers are then one an element, else one. */
#define FORWARD_NORM(T)                                                                                              \
    /* `other`: NULL, or what is added. `floor`: 0 for relu, else -infinity. */                                      \
    INLINE void norm_block_##T(const T *restrict x, const T *restrict other, T *restrict z, int64_t n,               \
                               const float *restrict alpha, const float *restrict beta, float floor, int added,      \
                               int last) {                                                                           \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                                        \
            float v = round_##T(load_##T(x + i) * alpha[last ? i : 0] + beta[last ? i : 0]);                         \
            if (added) v = round_##T(v + load_##T(other + i));                                                       \
            cut_##T(z + i, v < floor ? floor : v);                                                                   \
        }                                                                                                            \
    }                                                                                                                \
    static void norm_piece_##T(const Norm *m, const T *x, const T *other, T *z, int64_t n, const float *alpha,       \
                               const float *beta) {                                                                  \
        const float floor = m->relu ? 0.0f : -INFINITY;                                                              \
        if (m->last && other) norm_block_##T(x, other, z, n, alpha, beta, floor, 1, 1);                              \
        else if (m->last) norm_block_##T(x, other, z, n, alpha, beta, floor, 0, 1);                                  \
        else if (other) norm_block_##T(x, other, z, n, alpha, beta, floor, 1, 0);                                    \
        else norm_block_##T(x, other, z, n, alpha, beta, floor, 0, 0);                                               \
    }                                                                                                                \
    /* z: NULL, or where the values go; y: NULL, or where their quantized form goes (`q` is NULL without). 0, or 1   \
       where there is no memory. */                                                                                  \
    int forward_norm_##T(const Norm *m, const Call *q, const T *x, const T *other, T *z, void *y) {                  \
        const int masked = q && q->rate && *q->rate < 1.0f;                                                          \
        const Row p = q ? make_row(q, 0, 0.0) : (Row){0};                                                            \
        const Plan plan = make_plan(m);                                                                              \
        float *alpha = malloc(sizeof(float) * 2 * (size_t)plan.spread), *beta = alpha + plan.spread;                 \
        if (!alpha) return 1;                                                                                        \
        spread_norm(m, plan.spread, alpha, beta);                                                                    \
        _Pragma("omp parallel for num_threads(m->threads) schedule(static) if (m->threads > 1)")                     \
        for (int64_t r = 0; r < plan.jobs; r++) {                                                                    \
            T kept[WIDEST];                                                                                          \
            const int64_t c = m->last ? 0 : r % m->channels, stop = least((r + 1) * plan.job, plan.total);           \
            for (int64_t at = r * plan.job; at < stop; at += plan.piece) {                                           \
                const int64_t n = least(plan.piece, stop - at);                                                      \
                T *made = z ? z + at : kept;                                                                         \
                norm_piece_##T(m, x + at, other ? other + at : NULL, made, n, alpha + c, beta + c);                  \
                if (q) forward_piece_##T(q, made, y, at, n, p, masked);                                              \
            }                                                                                                        \
        }                                                                                                            \
        free(alpha);                                                                                                 \
        return 0;                                                                                                    \
    }

#define BACKWARD_NORM(T)                                                                                             \
    /* d becomes the gradient of the norm's output: d (if `made`) plus g (if `given`), 0 where relu has z <= 0; it is\
       left alone where that is g. Adds these gradients to totals, to products those with x - mean. */               \
    INLINE void merge_block_##T(const T *restrict g, const T *restrict x, const T *restrict z, T *restrict d,        \
                                int64_t n, const float *restrict mean, float *restrict totals,                       \
                                float *restrict products, int made, int given, int relu, int last) {                 \
        float total = 0.0f, product = 0.0f;                                                                          \
        _Pragma("omp simd reduction(+ : total, product)") for (int64_t i = 0; i < n; i++) {                          \
            float v = made ? load_##T(d + i) : load_##T(g + i);                                                      \
            if (made && given) v = round_##T(v + load_##T(g + i));                                                   \
            if (relu) v = keep_if(!(load_##T(z + i) <= 0.0f), v);                                                    \
            if (relu || (made && given)) cut_##T(d + i, v);                                                          \
            const float with = v * (load_##T(x + i) - mean[last ? i : 0]);                                           \
            if (last) totals[i] += v, products[i] += with;                                                           \
            else total += v, product += with;                                                                        \
        }                                                                                                            \
        if (!last) totals[0] += total, products[0] += product;                                                       \
    }                                                                                                                \
    INLINE void merge_case_##T(const T *g, const T *x, const T *z, T *d, int64_t n, const float *mean,               \
                               float *totals, float *products, int made, int relu, int last) {                       \
        if (!made && relu) merge_block_##T(g, x, z, d, n, mean, totals, products, 0, 1, 1, last);                    \
        else if (!made) merge_block_##T(g, x, z, d, n, mean, totals, products, 0, 1, 0, last);                       \
        else if (g && relu) merge_block_##T(g, x, z, d, n, mean, totals, products, 1, 1, 1, last);                   \
        else if (g) merge_block_##T(g, x, z, d, n, mean, totals, products, 1, 1, 0, last);                           \
        else if (relu) merge_block_##T(g, x, z, d, n, mean, totals, products, 1, 0, 1, last);                        \
        else merge_block_##T(g, x, z, d, n, mean, totals, products, 1, 0, 0, last);                                  \
    }                                                                                                                \
    static void merge_piece_##T(const Norm *m, const T *g, const T *x, const T *z, T *d, int64_t n,                  \
                                const float *mean, float *totals, float *products, int made) {                       \
        if (m->last) merge_case_##T(g, x, z, d, n, mean, totals, products, made, (int)m->relu, 1);                   \
        else merge_case_##T(g, x, z, d, n, mean, totals, products, made, (int)m->relu, 0);                           \
    }                                                                                                                \
    INLINE void gradient_block_##T(const T *d, const T *x, T *dx, int64_t n, const float *mean, const float *slope,  \
                                   const float *offset, const float *alpha, int last) {                              \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                                        \
            const int64_t c = last ? i : 0;                                                                          \
            store_##T(dx + i, (load_##T(d + i) - (load_##T(x + i) - mean[c]) * slope[c] - offset[c]) * alpha[c]);    \
        }                                                                                                            \
    }                                                                                                                \
    static void gradient_piece_##T(const Norm *m, const T *d, const T *x, T *dx, int64_t n, const float *mean,       \
                                   const float *slope, const float *offset, const float *alpha) {                    \
        if (m->last) gradient_block_##T(d, x, dx, n, mean, slope, offset, alpha, 1);                                 \
        else gradient_block_##T(d, x, dx, n, mean, slope, offset, alpha, 0);                                         \
    }                                                                                                                \
    /* gy: gradient of the quantized values, or NULL (then `q` is); gz: of the values before that, or NULL (if gy is \
       not). z: these values, or NULL: norm and relu of x. d: where their gradient goes if it is not gz; may be dx.  \
       0, or 1 where there is no memory. */                                                                          \
    int backward_norm_##T(const Norm *m, const Call *q, const T *gy, const T *gz, const T *x, const T *z, T *d,      \
                          T *dx, float *dweight, float *dbias, float *dscale, float *dzeros) {                       \
        const int masked = q && q->rate && *q->rate < 1.0f, rule = q ? (int)q->rule : STE;                           \
        const Plan plan = make_plan(m);                                                                              \
        const int64_t channels = m->channels, own = m->last ? channels : 1, part = 2 + 2 * own;                      \
        const double count = (double)(m->samples * m->columns), total = (double)plan.total;                          \
        const double pull = rule == SCALAR ? sum_abs_##T(gy, plan.total) * scale_of(q, 0) / total : 0.0;             \
        const Row p = q ? make_row(q, 0, pull) : (Row){0};                                                           \
        double *sums = calloc((size_t)(2 + 2 * channels + part * plan.jobs), sizeof(double));                        \
        float *alpha = malloc(sizeof(float) * 5 * (size_t)plan.spread), *beta = alpha + plan.spread;                 \
        float *mean = beta + plan.spread, *slope = mean + plan.spread, *offset = slope + plan.spread;                \
        double *totals = sums + 2, *products = totals + channels, *parts = products + channels;                      \
        if (!sums || !alpha) return free(sums), free(alpha), 1;                                                      \
        spread_norm(m, plan.spread, alpha, beta);                                                                    \
        for (int64_t i = 0; i < plan.spread; i++) mean[i] = m->mean[i % channels];                                   \
        _Pragma("omp parallel for num_threads(m->threads) schedule(static) if (m->threads > 1)")                     \
        for (int64_t r = 0; r < plan.jobs; r++) {                                                                    \
            T kept[WIDEST];                                                                                          \
            float gathered[2 * WIDEST];                                                                              \
            double *of_job = parts + part * r, of_scale[2];                                                          \
            const int64_t c = m->last ? 0 : r % channels, stop = least((r + 1) * plan.job, plan.total);              \
            const int64_t kinds = m->last ? plan.piece : 1;                                                          \
            for (int64_t i = 0; i < 2 * kinds; i++) gathered[i] = 0.0f;                                              \
            for (int64_t at = r * plan.job; at < stop; at += plan.piece) {                                           \
                const int64_t n = least(plan.piece, stop - at);                                                      \
                const T *value = z ? z + at : kept, *given = gz ? gz + at : NULL;                                    \
                if ((gy || m->relu) && !z) norm_piece_##T(m, x + at, NULL, kept, n, alpha + c, beta + c);            \
                if (gy) {                                                                                            \
                    backward_piece_##T(gy + at, value, d + at, (uint32_t)at, n, of_scale, p, rule, masked);          \
                    of_job[0] += of_scale[0];                                                                        \
                    of_job[1] += of_scale[1];                                                                        \
                }                                                                                                    \
                merge_piece_##T(m, given, x + at, value, d + at, n, mean + c, gathered, gathered + kinds, gy != NULL); \
                if (m->last && at + n < stop) continue;                                                              \
                for (int64_t i = 0; i < kinds; i += own)                                                             \
                    for (int64_t k = 0; k < own; k++) {                                                              \
                        of_job[2 + k] += gathered[i + k];                                                            \
                        of_job[2 + own + k] += gathered[kinds + i + k];                                              \
                    }                                                                                                \
                gathered[0] = gathered[1] = 0.0f;                                                                    \
            }                                                                                                        \
        }                                                                                                            \
        for (int64_t r = 0; r < plan.jobs; r++) {                                                                    \
            const double *of_job = parts + part * r;                                                                 \
            sums[0] += of_job[0];                                                                                    \
            sums[1] += of_job[1];                                                                                    \
            for (int64_t i = 0; i < own; i++) {                                                                      \
                totals[m->last ? i : r % channels] += of_job[2 + i];                                                 \
                products[m->last ? i : r % channels] += of_job[2 + own + i];                                         \
            }                                                                                                        \
        }                                                                                                            \
        for (int64_t i = 0; i < plan.spread; i++) {                                                                  \
            const int64_t c = i % channels;                                                                          \
            slope[i] = (float)(products[c] * m->invstd[c] * m->invstd[c] / count);                                   \
            offset[i] = (float)(totals[c] / count);                                                                  \
        }                                                                                                            \
        const T *source = gy || m->relu ? d : gz;                                                                    \
        _Pragma("omp parallel for num_threads(m->threads) schedule(static) if (m->threads > 1)")                     \
        for (int64_t r = 0; r < plan.jobs; r++) {                                                                    \
            const int64_t c = m->last ? 0 : r % channels, stop = least((r + 1) * plan.job, plan.total);              \
            for (int64_t at = r * plan.job; at < stop; at += plan.piece)                                             \
                gradient_piece_##T(m, source + at, x + at, dx + at, least(plan.piece, stop - at), mean + c,          \
                                   slope + c, offset + c, alpha + c);                                                \
        }                                                                                                            \
        for (int64_t c = 0; c < channels; c++) {                                                                     \
            dweight[c] = (float)(products[c] * m->invstd[c]);                                                        \
            dbias[c] = (float)totals[c];                                                                             \
        }                                                                                                            \
        if (q) scale_gradients(q, 0, sums[0], sums[1], dscale, dzeros);                                              \
        free(sums);                                                                                                  \
        free(alpha);                                                                                                 \
        return 0;                                                                                                    \
    }

FORWARD_NORM(f32)
BACKWARD_NORM(f32)
FORWARD_NORM(bf16)
BACKWARD_NORM(bf16)
