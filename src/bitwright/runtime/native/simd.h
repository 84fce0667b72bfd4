/* The few vector operations that the operators need, per path; a group is PANEL = 16 numbers, GROUP vectors. */

#undef LANES
#if LEVEL == 2
#define LANES 16
#elif LEVEL == 1
#define LANES 8
#else
#define LANES 4
#endif
#define GROUP (PANEL / LANES)

#define VI PATH(vi)
#define VF PATH(vf)
typedef int32_t VI __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float VF __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE VF PATH(splat)(float v) { return v - (VF){0}; }

INLINE VF PATH(clamp)(VF v, VF lo, VF hi) {
#if LEVEL == 2
    return (VF)_mm512_min_ps(_mm512_max_ps((__m512)v, (__m512)lo), (__m512)hi);
#elif LEVEL == 1
    return (VF)_mm256_min_ps(_mm256_max_ps((__m256)v, (__m256)lo), (__m256)hi);
#else
    VI low = ~(v >= lo);
    v = (VF)((low & (VI)lo) | (~low & (VI)v));
    VI high = v > hi;
    return (VF)((high & (VI)hi) | (~high & (VI)v));
#endif
}

/* LANES bytes as int32. */
INLINE VI PATH(widen)(const uint8_t *p) {
#if LEVEL == 2
    return (VI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif LEVEL == 1
    return (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return (VI){p[0], p[1], p[2], p[3]};
#endif
}

/* The low bytes of LANES int32. */
INLINE void PATH(narrow)(uint8_t *p, VI v) {
#if LEVEL == 2
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif LEVEL == 1
    const __m128i firsts = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i low = _mm256_broadcastsi128_si256(firsts);
    const __m256i bytes = _mm256_shuffle_epi8((__m256i)v, low);
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64((__m128i *)p, both);
#else
    for (int i = 0; i < LANES; i++) p[i] = (uint8_t)v[i];
#endif
}

/* Round |v| < 2^22 to the nearest whole number, ties to even. */
INLINE VI PATH(nearest)(VF v) {
#if LEVEL == 2
    return (VI)_mm512_cvtps_epi32((__m512)v);
#elif LEVEL == 1
    return (VI)_mm256_cvtps_epi32((__m256)v);
#else
    return (VI)(v + 12582912.0f) - 0x4B400000;  /* the sum has no bits below one */
#endif
}
