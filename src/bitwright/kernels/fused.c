/* Fused fake quantization on the CPU: one pass forward, one pass backward.

   Plain C, compiled on first use; vectorized by the compiler. The arithmetic is the reference's to the last bit in
   the forward pass: a true division, rounding of ties to even, NaN kept. Layout: `rows` rows of `columns` elements,
   row r uses scale[r % channels]; one scale for all is channels = 1. */
#include <math.h>
#include <stdint.h>
#include <stddef.h>

typedef uint16_t bf16;

static inline float load_f32(const float *p) { return *p; }
static inline void store_f32(float *p, float v) { *p = v; }

static inline float load_bf16(const bf16 *p) {
    union { uint32_t i; float f; } u;
    u.i = (uint32_t)*p << 16;
    return u.f;
}

static inline void store_bf16(bf16 *p, float v) {
    union { float f; uint32_t i; } u;
    u.f = v;
    uint32_t rounded = (u.i + 0x7fffu + ((u.i >> 16) & 1u)) >> 16;
    *p = (bf16)((v != v) ? 0x7fc0u : rounded);
}

/* v where `condition` holds, else 0: bits instead of a branch, which would keep the loop scalar. */
static inline float keep_if(int condition, float v) {
    union { float f; int32_t i; } u;
    u.f = v;
    u.i &= -(int32_t)(condition != 0);
    return u.f;
}

/* Backward rules, in units of codes: c the clipped value, k its code, g the gradient of k. */
enum { CLIPPED_STE = 0, EWGS = 1, STE = 2 };

#define FORWARD(NAME, T, LOAD, STORE)                                                                              \
    void NAME(const T *restrict x, T *restrict y, const float *scale, float zero, float lo, float hi, int64_t rows, int64_t channels, \
              int64_t columns, int threads) {                                                                      \
        const int64_t block = 16384, blocks = (columns + block - 1) / block;                                       \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")                         \
        for (int64_t job = 0; job < rows * blocks; job++) {                                                        \
            const int64_t r = job / blocks, from = (job % blocks) * block;                                         \
            const int64_t n = columns - from < block ? columns - from : block;                                     \
            const float s = scale[r % channels];                                                                   \
            const T *a = x + r * columns + from;                                                                   \
            T *b = y + r * columns + from;                                                                         \
            _Pragma("omp simd")                                                                                    \
            for (int64_t i = 0; i < n; i++) {                                                                      \
                float v = LOAD(a + i) / s + zero;                                                                  \
                v = v < lo ? lo : v;                                                                               \
                v = v > hi ? hi : v;                                                                               \
                STORE(b + i, (rintf(v) - zero) * s);                                                               \
            }                                                                                                      \
        }                                                                                                          \
    }

/* One block of one row; `rule` is a constant at every call, so that the compiler drops the other rules.
   Returns the block's part of dscale; single precision within 1024 elements, double beyond. */
#define BACKWARD_BLOCK(NAME, T, LOAD, STORE)                                                                       \
    static inline __attribute__((always_inline)) double NAME(const T *restrict g, const T *restrict x,             \
                                                             T *restrict dx, int64_t n, float s, float zero,       \
                                                             float lo, float hi, float per_range, int rule) {      \
        double total = 0.0;                                                                                        \
        for (int64_t start = 0; start < n; start += 1024) {                                                        \
            const int64_t stop = start + 1024 < n ? start + 1024 : n;                                              \
            float part = 0.0f;                                                                                     \
            _Pragma("omp simd reduction(+ : part)")                                                                \
            for (int64_t i = start; i < stop; i++) {                                                               \
                const float gi = LOAD(g + i), v = LOAD(x + i) / s + zero;                                          \
                float c = v < lo ? lo : v;                                                                         \
                c = c > hi ? hi : c;                                                                               \
                const float k = rintf(c);                                                                          \
                const float gk = rule == EWGS ? gi + per_range * fabsf(gi) * (c - k) : gi;                         \
                const float gv = keep_if(c == v, gk);                                                              \
                STORE(dx + i, rule == STE ? gi : gv);                                                              \
                part += gi * (k - zero) - gv * (c - zero);                                                         \
            }                                                                                                      \
            total += part;                                                                                         \
        }                                                                                                          \
        return total;                                                                                              \
    }

/* dscale_parts: (rows * blocks) doubles, summed by the caller in a fixed order whatever the number of threads. */
#define BACKWARD(NAME, BLOCK, T)                                                                                   \
    void NAME(const T *g, const T *x, T *dx, double *dscale_parts, const float *scale, float zero, float lo,       \
              float hi, int rule, float strength, int64_t rows, int64_t channels, int64_t columns, int threads) {  \
        const int64_t block = 16384, blocks = (columns + block - 1) / block;                                       \
        const float pr = strength / (hi - lo);                                                                     \
        _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")                         \
        for (int64_t job = 0; job < rows * blocks; job++) {                                                        \
            const int64_t r = job / blocks, from = (job % blocks) * block, at = r * columns + from;                \
            const int64_t n = columns - from < block ? columns - from : block;                                     \
            const float s = scale[r % channels];                                                                   \
            dscale_parts[job] = rule == EWGS  ? BLOCK(g + at, x + at, dx + at, n, s, zero, lo, hi, pr, EWGS)       \
                                : rule == STE ? BLOCK(g + at, x + at, dx + at, n, s, zero, lo, hi, pr, STE)        \
                                              : BLOCK(g + at, x + at, dx + at, n, s, zero, lo, hi, pr, CLIPPED_STE); \
        }                                                                                                          \
    }

FORWARD(forward_f32, float, load_f32, store_f32)
FORWARD(forward_bf16, bf16, load_bf16, store_bf16)
BACKWARD_BLOCK(block_f32, float, load_f32, store_f32)
BACKWARD_BLOCK(block_bf16, bf16, load_bf16, store_bf16)
BACKWARD(backward_f32, block_f32, float)
BACKWARD(backward_bf16, block_bf16, bf16)
