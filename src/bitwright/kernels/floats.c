/* The element types of the kernels, which compute in float: f32 and bf16. */
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define f32 float

typedef uint16_t bf16;

INLINE float load_f32(const float *p) { return *p; }
INLINE void store_f32(float *p, float v) { *p = v; }

INLINE float load_bf16(const bf16 *p) {
    union { uint32_t i; float f; } u;
    u.i = (uint32_t)*p << 16;
    return u.f;
}

INLINE void store_bf16(bf16 *p, float v) {
    union { float f; uint32_t i; } u;
    u.f = v;
    uint32_t rounded = (u.i + 0x7fffu + ((u.i >> 16) & 1u)) >> 16;
    *p = (bf16)((v != v) ? 0x7fc0u : rounded);
}

/* Store a value that has the type's precision already. */
INLINE void cut_f32(float *p, float v) { *p = v; }

INLINE void cut_bf16(bf16 *p, float v) {
    union { float f; uint32_t i; } u;
    u.f = v;
    *p = (bf16)(u.i >> 16);
}

/* Round to the type's precision. */
INLINE float round_f32(float v) { return v; }

INLINE float round_bf16(float v) {
    bf16 narrow;
    store_bf16(&narrow, v);
    return load_bf16(&narrow);
}
