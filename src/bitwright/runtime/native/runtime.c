/* Integer inference on the CPU: one source, three paths, chosen when it runs.

   Tensors are NHWC. Codes are uint8 with a zero point; sums are int32; a sum becomes a code by
   clip(round_half_even((float)sum * multiplier) + zero, lo, hi), a float by (float)sum * multiplier + bias.
   The caller has checked every size; buffers of codes have SLACK readable bytes behind their end. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { QUANTIZE, TABLE, ADD, MAX_POOL, MEAN, CONV, WINOGRAD, DEPTHWISE, DEQUANTIZE, ADD_FLOAT };
enum { PANEL = 16, TALL = 14 };  /* output channels of a weight panel, pixels of a register tile */

/* One operator. Mirrored field by field by `Op` in native.py. */
typedef struct {
    const void *x, *x2;
    void *y, *scratch;
    const int8_t *weight;     /* packed: panels of 16 output channels, 4 inputs interleaved */
    const int32_t *init;      /* what sums start from: bias and corrections for offsets */
    const float *multiplier;  /* per output channel, padded to whole panels */
    const float *bias;        /* added to float outputs, or NULL */
    const int64_t *segments;  /* byte offsets of the contiguous runs under a kernel */
    const uint8_t *table;     /* 256 codes, or one pixel of padding */
    int64_t n, h, w, c, oh, ow, oc;
    int64_t kh, kw, sy, sx, dy, dx, top, left, ph, pw; /* ph, pw: padded input */
    int64_t groups, runs, k4, block;
    int32_t kind, zx, zx2, zy, lo, hi, to_float, wide, relu, planar;
    float scale, scale2;
} Op;

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define PATH(name) JOIN(name, SUFFIX)
#define INLINE TARGET static inline __attribute__((always_inline))

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

#define LEVEL 0
#define SUFFIX _plain
#define TARGET
#include "simd.h"
#include "gemm.h"
#include "conv.h"
#include "elementwise.h"
#undef LEVEL
#undef SUFFIX
#undef TARGET

#if defined(__x86_64__)
#define LEVEL 1
#define SUFFIX _avx2
#define TARGET __attribute__((target("avx2")))
#include "simd.h"
#include "gemm.h"
#include "conv.h"
#include "elementwise.h"
#undef LEVEL
#undef SUFFIX
#undef TARGET

#define LEVEL 2
#define SUFFIX _vnni
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#include "simd.h"
#include "gemm.h"
#include "conv.h"
#include "elementwise.h"
#undef LEVEL
#undef SUFFIX
#undef TARGET
#endif

/* The best path of this processor: 0 plain, 1 AVX2, 2 AVX512-VNNI. */
int bw_best_path(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

/* The size of `Op`, which the caller's mirror must have. */
int64_t bw_op_size(void) { return (int64_t)sizeof(Op); }

/* Run `count` operators in order. */
void bw_run(const Op *ops, int64_t count, int path) {
    for (int64_t i = 0; i < count; i++) {
#if defined(__x86_64__)
        if (path == 2) {
            run_vnni(ops + i);
            continue;
        }
        if (path == 1) {
            run_avx2(ops + i);
            continue;
        }
#endif
        run_plain(ops + i);
    }
}
