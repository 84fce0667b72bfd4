/* How a batch norm's tensor is gone through, and the statistics of its channels. */
#include "fused.c"

#define PIECE 1024  /* elements between two passes: they stay in the first cache; also those of one float sum */
#define SPREAD 512  /* the same where numbers per channel take as much room */
#define WIDEST 4096 /* channels, if they lie innermost */

/* `samples` times `channels` times `columns` elements; `last`: in memory channels are innermost. */
typedef struct {
    const float *weight, *bias;
    float *mean, *invstd, *running_mean, *running_var; /* the last two: or NULL */
    double eps, momentum;
    int64_t samples, channels, columns, last, relu, threads;
} Norm;

/* `jobs` jobs of `job` elements (the last may have fewer), done in pieces. Job r is one row, of channel r % channels;
   or, channels last, a number of pieces of whole pixels, whose channels' numbers are spread out as a piece is. */
typedef struct {
    int64_t total, jobs, job, piece, spread; /* spread: how many numbers that makes */
} Plan;

static Plan make_plan(const Norm *m) {
    const int64_t total = m->samples * m->channels * m->columns;
    if (!m->last) return (Plan){total, m->samples * m->channels, m->columns, PIECE, m->channels};
    const int64_t piece = m->channels * (m->channels < SPREAD ? SPREAD / m->channels : 1), job = 64 * piece;
    return (Plan){total, (total + job - 1) / job, job, piece, piece};
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* From a channel's mean, and the sum of squares about it. */
static void set_statistics(const Norm *m, int64_t c, float mean, double squares) {
    const double count = (double)(m->samples * m->columns);
    m->mean[c] = mean;
    m->invstd[c] = (float)(1.0 / sqrt((double)(float)(squares / count) + m->eps));
    if (!m->running_mean) return;
    m->running_mean[c] = (float)(m->momentum * mean + (1.0 - m->momentum) * m->running_mean[c]);
    m->running_var[c] = (float)(m->momentum * (squares / (count - 1.0)) + (1.0 - m->momentum) * m->running_var[c]);
}

#define STATISTICS(T)                                                                                                \
    /* The sum of x - about, or of its squares; double precision, as torch. */                                       \
    INLINE double deviations_##T(const T *x, int64_t n, float about, int squared) {                                  \
        double total = 0.0;                                                                                          \
        _Pragma("omp simd reduction(+ : total)") for (int64_t i = 0; i < n; i++) {                                   \
            const float d = load_##T(x + i) - about;                                                                 \
            total += squared ? (double)(d * d) : (double)d;                                                          \
        }                                                                                                            \
        return total;                                                                                                \
    }                                                                                                                \
    /* Channels last, where a second pass would read all from memory again: sums of x and of its squares. */         \
    static void moments_##T(const T *restrict x, int64_t n, double *restrict sums, double *restrict squares) {       \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                                        \
            const double v = load_##T(x + i);                                                                        \
            sums[i] += v;                                                                                            \
            squares[i] += v * v;                                                                                     \
        }                                                                                                            \
    }                                                                                                                \
    static int statistics_last_##T(const Norm *m, const T *x) {                                                      \
        const Plan plan = make_plan(m);                                                                              \
        const double count = (double)(m->samples * m->columns);                                                      \
        double *parts = calloc((size_t)(2 * plan.spread * plan.jobs), sizeof(double));                               \
        if (!parts) return 1;                                                                                        \
        _Pragma("omp parallel for num_threads(m->threads) schedule(static) if (m->threads > 1)")                     \
        for (int64_t r = 0; r < plan.jobs; r++) {                                                                    \
            double *sums = parts + 2 * plan.spread * r;                                                              \
            for (int64_t at = r * plan.job; at < least((r + 1) * plan.job, plan.total); at += plan.piece)            \
                moments_##T(x + at, least(plan.piece, plan.total - at), sums, sums + plan.spread);                   \
        }                                                                                                            \
        for (int64_t r = 1; r < plan.jobs; r++)                                                                      \
            for (int64_t i = 0; i < 2 * plan.spread; i++) parts[i] += parts[2 * plan.spread * r + i];                \
        for (int64_t c = 0; c < m->channels; c++) {                                                                  \
            double sum = 0.0, squares = 0.0;                                                                         \
            for (int64_t i = c; i < plan.spread; i += m->channels) sum += parts[i], squares += parts[plan.spread + i]; \
            const double mean = sum / count, about = squares - sum * mean;                                           \
            set_statistics(m, c, (float)mean, about < 0.0 ? 0.0 : about);                                            \
        }                                                                                                            \
        free(parts);                                                                                                 \
        return 0;                                                                                                    \
    }                                                                                                                \
    /* Fills mean and invstd, moves the running statistics. 0, or 1 where there is no memory. */                     \
    int statistics_##T(const Norm *m, const T *x) {                                                                  \
        if (m->last) return statistics_last_##T(m, x);                                                               \
        _Pragma("omp parallel for num_threads(m->threads) schedule(static) if (m->threads > 1)")                     \
        for (int64_t c = 0; c < m->channels; c++) {                                                                  \
            double sum = 0.0, squares = 0.0;                                                                         \
            for (int64_t r = c; r < m->samples * m->channels; r += m->channels)                                      \
                sum += deviations_##T(x + r * m->columns, m->columns, 0.0f, 0);                                      \
            const float mean = (float)(sum / (double)(m->samples * m->columns));                                     \
            for (int64_t r = c; r < m->samples * m->channels; r += m->channels)                                      \
                squares += deviations_##T(x + r * m->columns, m->columns, mean, 1);                                  \
            set_statistics(m, c, mean, squares);                                                                     \
        }                                                                                                            \
        return 0;                                                                                                    \
    }

STATISTICS(f32)
STATISTICS(bf16)
