/* Batch norm in training together with what follows it: norm, plus a tensor, relu, quantization; one pass each way.

   Every value is the one of the separate operators to the last bit: v = x * alpha + beta as torch computes it, rounded
   to the element type after each step, quantized by the functions of fused.c. */
#include "fused.c"

#define PIECE 1024 /* elements between two passes: they stay in the first cache; also those of one float sum */

/* `samples` times `channels` rows of `columns` elements; row r belongs to channel r % channels. */
typedef struct {
    const float *weight, *bias;
    float *mean, *invstd, *running_mean, *running_var; /* the last two: or NULL */
    double eps, momentum;
    int64_t samples, channels, columns, relu, threads;
} Norm;

INLINE float gain(const Norm *m, int64_t c) { return m->invstd[c] * m->weight[c]; }

INLINE float shift(const Norm *m, int64_t c) { return m->bias[c] - m->mean[c] * gain(m, c); }

#define FORWARD_NORM(T)                                                                                              \
    /* The sum of x - about, or of its squares; double precision, as torch. */                                       \
    INLINE double deviations_##T(const T *x, int64_t n, float about, int squared) {                                  \
        double total = 0.0;                                                                                          \
        _Pragma("omp simd reduction(+ : total)") for (int64_t i = 0; i < n; i++) {                                   \
            const float d = load_##T(x + i) - about;                                                                 \
            total += squared ? (double)(d * d) : (double)d;                                                          \
        }                                                                                                            \
        return total;                                                                                                \
    }                                                                                                                \
    /* Fills mean and invstd, moves the running statistics. */                                                       \
    void statistics_##T(const Norm *m, const T *x) {                                                                 \
        const double count = (double)(m->samples * m->columns);                                                      \
        _Pragma("omp parallel for num_threads(m->threads) schedule(static) if (m->threads > 1)")                     \
        for (int64_t c = 0; c < m->channels; c++) {                                                                  \
            double sum = 0.0, squares = 0.0;                                                                         \
            for (int64_t r = c; r < m->samples * m->channels; r += m->channels)                                      \
                sum += deviations_##T(x + r * m->columns, m->columns, 0.0f, 0);                                      \
            const float mean = m->mean[c] = (float)(sum / count);                                                    \
            for (int64_t r = c; r < m->samples * m->channels; r += m->channels)                                      \
                squares += deviations_##T(x + r * m->columns, m->columns, mean, 1);                                  \
            m->invstd[c] = (float)(1.0 / sqrt((double)(float)(squares / count) + m->eps));                           \
            if (!m->running_mean) continue;                                                                          \
            m->running_mean[c] = (float)(m->momentum * mean + (1.0 - m->momentum) * m->running_mean[c]);             \
            m->running_var[c] =                                                                                      \
                (float)(m->momentum * (squares / (count - 1.0)) + (1.0 - m->momentum) * m->running_var[c]);          \
        }                                                                                                            \
    }                                                                                                                \
    /* `other`: NULL, or what is added. `floor`: 0 for relu, else -infinity. */                                      \
    INLINE void norm_block_##T(const T *restrict x, const T *restrict other, T *restrict z, int64_t n, float alpha,  \
                               float beta, float floor, int added) {                                                 \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                                        \
            float v = round_##T(load_##T(x + i) * alpha + beta);                                                     \
            if (added) v = round_##T(v + load_##T(other + i));                                                       \
            cut_##T(z + i, v < floor ? floor : v);                                                                   \
        }                                                                                                            \
    }                                                                                                                \
    static void norm_piece_##T(const Norm *m, int64_t c, const T *x, const T *other, T *z, int64_t n) {              \
        const float alpha = gain(m, c), beta = shift(m, c), floor = m->relu ? 0.0f : -INFINITY;                      \
        if (other) norm_block_##T(x, other, z, n, alpha, beta, floor, 1);                                            \
        else norm_block_##T(x, other, z, n, alpha, beta, floor, 0);                                                  \
    }                                                                                                                \
    /* z: NULL, or where the values go; y: NULL, or where their quantized form goes (`q` is NULL without). */        \
    void forward_norm_##T(const Norm *m, const Call *q, const T *x, const T *other, T *z, T *y) {                    \
        const int masked = q && q->rate && *q->rate < 1.0f;                                                          \
        const Row p = q ? make_row(q, 0, 0.0) : (Row){0};                                                            \
        _Pragma("omp parallel for num_threads(m->threads) schedule(static) if (m->threads > 1)")                     \
        for (int64_t r = 0; r < m->samples * m->channels; r++) {                                                     \
            T kept[PIECE];                                                                                           \
            for (int64_t from = 0; from < m->columns; from += PIECE) {                                               \
                const int64_t at = r * m->columns + from, left = m->columns - from, n = left < PIECE ? left : PIECE; \
                T *made = z ? z + at : kept;                                                                         \
                norm_piece_##T(m, r % m->channels, x + at, other ? other + at : NULL, made, n);                      \
                if (q && masked) forward_block_##T(made, y + at, (uint32_t)at, n, p, 1);                             \
                else if (q) forward_block_##T(made, y + at, (uint32_t)at, n, p, 0);                                  \
            }                                                                                                        \
        }                                                                                                            \
    }

#define BACKWARD_NORM(T)                                                                                             \
    /* d becomes the gradient of the norm's output: d (if `made`) plus g (if `given`), 0 where relu has z <= 0; it is\
       left alone where that is g. Adds to sums[0] these gradients, to sums[1] their products with x - mean. */      \
    INLINE void merge_block_##T(const T *restrict g, const T *restrict x, const T *restrict z, T *restrict d,        \
                                int64_t n, float mean, double *sums, int made, int given, int relu) {                \
        float total = 0.0f, product = 0.0f;                                                                          \
        _Pragma("omp simd reduction(+ : total, product)") for (int64_t i = 0; i < n; i++) {                          \
            float v = made ? load_##T(d + i) : load_##T(g + i);                                                      \
            if (made && given) v = round_##T(v + load_##T(g + i));                                                   \
            if (relu) v = keep_if(!(load_##T(z + i) <= 0.0f), v);                                                    \
            if (relu || (made && given)) cut_##T(d + i, v);                                                          \
            total += v;                                                                                              \
            product += v * (load_##T(x + i) - mean);                                                                 \
        }                                                                                                            \
        sums[0] += total;                                                                                            \
        sums[1] += product;                                                                                          \
    }                                                                                                                \
    static void merge_piece_##T(const T *g, const T *x, const T *z, T *d, int64_t n, float mean, double *sums,       \
                                int made, int relu) {                                                                \
        if (!made && relu) merge_block_##T(g, x, z, d, n, mean, sums, 0, 1, 1);                                      \
        else if (!made) merge_block_##T(g, x, z, d, n, mean, sums, 0, 1, 0);                                         \
        else if (g && relu) merge_block_##T(g, x, z, d, n, mean, sums, 1, 1, 1);                                     \
        else if (g) merge_block_##T(g, x, z, d, n, mean, sums, 1, 1, 0);                                             \
        else if (relu) merge_block_##T(g, x, z, d, n, mean, sums, 1, 0, 1);                                          \
        else merge_block_##T(g, x, z, d, n, mean, sums, 1, 0, 0);                                                    \
    }                                                                                                                \
    INLINE void norm_gradient_##T(const T *d, const T *x, T *dx, int64_t n, float mean, float slope, float offset,   \
                                  float alpha) {                                                                     \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                          \
            store_##T(dx + i, (load_##T(d + i) - (load_##T(x + i) - mean) * slope - offset) * alpha);                \
    }                                                                                                                \
    /* gy: gradient of the quantized values, or NULL (then `q` is); gz: of the values before that, or NULL (if gy is \
       not). z: these values, or NULL: norm and relu of x. d: where their gradient goes if it is not gz; may be dx.  \
       0, or 1 where there is no memory. */                                                                          \
    int backward_norm_##T(const Norm *m, const Call *q, const T *gy, const T *gz, const T *x, const T *z, T *d,      \
                          T *dx, float *dweight, float *dbias, float *dscale, float *dzeros) {                       \
        const int masked = q && q->rate && *q->rate < 1.0f, rule = q ? (int)q->rule : STE;                           \
        const int64_t rows = m->samples * m->channels;                                                               \
        const double count = (double)(m->samples * m->columns), total = count * (double)m->channels;                 \
        const double pull = rule == SCALAR ? sum_abs_##T(gy, (int64_t)total) * scale_of(q, 0) / total : 0.0;         \
        const Row p = q ? make_row(q, 0, pull) : (Row){0};                                                           \
        double *parts = calloc((size_t)(4 * rows), sizeof(double)), ds = 0.0, dz = 0.0;                              \
        if (!parts) return 1;                                                                                        \
        _Pragma("omp parallel for num_threads(m->threads) schedule(static) if (m->threads > 1)")                     \
        for (int64_t r = 0; r < rows; r++) {                                                                         \
            const int64_t c = r % m->channels;                                                                       \
            double *sums = parts + 4 * r, of_scale[2];                                                               \
            T kept[PIECE];                                                                                           \
            for (int64_t from = 0; from < m->columns; from += PIECE) {                                               \
                const int64_t at = r * m->columns + from, left = m->columns - from, n = left < PIECE ? left : PIECE; \
                const T *value = z ? z + at : kept;                                                                  \
                if ((gy || m->relu) && !z) norm_piece_##T(m, c, x + at, NULL, kept, n);                              \
                if (gy) {                                                                                            \
                    backward_piece_##T(gy + at, value, d + at, (uint32_t)at, n, of_scale, p, rule, masked);          \
                    sums[2] += of_scale[0];                                                                          \
                    sums[3] += of_scale[1];                                                                          \
                }                                                                                                    \
                const T *given = gz ? gz + at : NULL;                                                                \
                merge_piece_##T(given, x + at, value, d + at, n, m->mean[c], sums, gy != NULL, (int)m->relu);        \
            }                                                                                                        \
        }                                                                                                            \
        for (int64_t r = 0; r < rows; r++) {                                                                         \
            double *of = parts + 4 * (r % m->channels);                                                              \
            ds += parts[4 * r + 2];                                                                                  \
            dz += parts[4 * r + 3];                                                                                  \
            if (r >= m->channels) of[0] += parts[4 * r], of[1] += parts[4 * r + 1];                                  \
        }                                                                                                            \
        _Pragma("omp parallel for num_threads(m->threads) schedule(static) if (m->threads > 1)")                     \
        for (int64_t r = 0; r < rows; r++) {                                                                         \
            const int64_t c = r % m->channels, at = r * m->columns;                                                  \
            const double *of = parts + 4 * c;                                                                        \
            const float slope = (float)(of[1] * m->invstd[c] * m->invstd[c] / count);                                \
            const float offset = (float)(of[0] / count), alpha = gain(m, c), mean = m->mean[c];                      \
            const T *source = gy || m->relu ? d : gz;                                                                \
            norm_gradient_##T(source + at, x + at, dx + at, m->columns, mean, slope, offset, alpha);                 \
        }                                                                                                            \
        for (int64_t c = 0; c < m->channels; c++) {                                                                  \
            dweight[c] = (float)(parts[4 * c + 1] * m->invstd[c]);                                                   \
            dbias[c] = (float)parts[4 * c];                                                                          \
        }                                                                                                            \
        free(parts);                                                                                                 \
        if (q) scale_gradients(q, 0, ds, dz, dscale, dzeros);                                                        \
        return 0;                                                                                                    \
    }

FORWARD_NORM(f32)
BACKWARD_NORM(f32)
FORWARD_NORM(bf16)
BACKWARD_NORM(bf16)
