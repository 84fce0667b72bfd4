/* What products on integers need beside the multiplication itself. */
#include "gelu.c"

#define TILE 16 /* elements a side: rows of both orders stay in the first cache */

/* (samples, columns, channels) to (samples, channels, columns). */
#define TURN(T)                                                                                                      \
    void turn_##T(const T *x, T *y, int64_t samples, int64_t channels, int64_t columns, int64_t threads) {           \
        const int64_t tiles = (columns + TILE - 1) / TILE;                                                           \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")                           \
        for (int64_t job = 0; job < samples * tiles; job++) {                                                        \
            const int64_t first = (job % tiles) * TILE, count = least(TILE, columns - first);                        \
            const T *from = x + (job / tiles * columns + first) * channels;                                          \
            T *to = y + job / tiles * channels * columns + first;                                                    \
            for (int64_t k = 0; k < channels; k++)                                                                   \
                for (int64_t i = 0; i < count; i++) to[k * columns + i] = from[i * channels + k];                    \
        }                                                                                                            \
    }

TURN(f32)
TURN(uint8_t)

/* x * step as the sum of two bfloat16 numbers, up to 2^-17 of it; step: one number per column, or one. */
void split_f32(const float *restrict x, const float *restrict step, bf16 *restrict high, bf16 *restrict low,
               int64_t rows, int64_t columns, int64_t steps, int64_t threads) {
    _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")
    for (int64_t r = 0; r < rows; r++) {
        _Pragma("omp simd") for (int64_t i = 0; i < columns; i++) {
            const int64_t at = r * columns + i;
            const float v = x[at] * step[steps > 1 ? i : 0];
            store_bf16(high + at, v);
            store_bf16(low + at, v - load_bf16(high + at));
        }
    }
}

/* y * step + bias in place; bias: or NULL. */
void scale_f32(float *restrict y, const float *restrict step, const float *restrict bias, int64_t rows,
               int64_t columns) {
    for (int64_t r = 0; r < rows; r++) {
        float *row = y + r * columns;
        if (bias) { _Pragma("omp simd") for (int64_t i = 0; i < columns; i++) row[i] = row[i] * step[i] + bias[i]; }
        else { _Pragma("omp simd") for (int64_t i = 0; i < columns; i++) row[i] *= step[i]; }
    }
}
