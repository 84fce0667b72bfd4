/* A register tile: sums of `rows` pixels times one or two weight panels.

   a: first pixel; pixel m is at a + m * lda. The depth is `runs` runs of k4 groups of 4 bytes, at a + segments[r].
   b: weights [run][k4][16 channels][4]; the second panel is b_next bytes behind. init: as b, 16 a panel.
   out: [rows][panels * 16]. Sums are exact: `wide` says that a pair of products may exceed 16 bits. */

#if LEVEL == 2

INLINE void PATH(tile_of)(const int rows, const int panels, const uint8_t *a, int64_t lda, const int64_t *segments,
                          int64_t runs, int64_t k4, const int8_t *b, int64_t b_next, const int32_t *init,
                          int64_t init_next, int32_t *out) {
    __m512i sum[TALL][2];
#pragma GCC unroll 14
    for (int m = 0; m < rows; m++) {
        sum[m][0] = _mm512_loadu_si512(init);
        if (panels == 2) sum[m][1] = _mm512_loadu_si512(init + init_next);
    }
    for (int64_t r = 0; r < runs; r++) {
        const uint8_t *base[(TALL + 2) / 3];  /* few addresses: base, + lda, + 2 lda */
#pragma GCC unroll 5
        for (int i = 0; i < (rows + 2) / 3; i++) base[i] = a + segments[r] + 3 * i * lda;
        for (int64_t k = 0; k < k4; k++) {
            const __m512i b0 = _mm512_loadu_si512(b);
            const __m512i b1 = panels == 2 ? _mm512_loadu_si512(b + b_next) : b0;
            _mm_prefetch((const char *)b + 2048, _MM_HINT_T0);
            if (panels == 2) _mm_prefetch((const char *)b + b_next + 2048, _MM_HINT_T0);
            b += 64;
#pragma GCC unroll 14
            for (int m = 0; m < rows; m++) {
                int32_t four;
                memcpy(&four, base[m / 3] + (m % 3) * lda, 4);
                const __m512i v = _mm512_set1_epi32(four);
                sum[m][0] = _mm512_dpbusd_epi32(sum[m][0], v, b0);
                if (panels == 2) sum[m][1] = _mm512_dpbusd_epi32(sum[m][1], v, b1);
            }
#pragma GCC unroll 5
            for (int i = 0; i < (rows + 2) / 3; i++) base[i] += 4;
        }
    }
#pragma GCC unroll 14
    for (int m = 0; m < rows; m++) {
        _mm512_storeu_si512(out + (int64_t)m * panels * PANEL, sum[m][0]);
        if (panels == 2) _mm512_storeu_si512(out + (int64_t)m * panels * PANEL + PANEL, sum[m][1]);
    }
}

#define TILE(ROWS, PANELS)                                                                                           \
    TARGET static __attribute__((noinline)) void PATH(tile_##ROWS##_##PANELS)(const uint8_t *a, int64_t lda, const int64_t *segments,          \
                                                    int64_t runs, int64_t k4, const int8_t *b, int64_t b_next,       \
                                                    const int32_t *init, int64_t init_next, int32_t *out) {          \
        PATH(tile_of)(ROWS, PANELS, a, lda, segments, runs, k4, b, b_next, init, init_next, out);                    \
    }
#define TILES(PANELS)                                                                                                \
    TILE(1, PANELS) TILE(2, PANELS) TILE(3, PANELS) TILE(4, PANELS) TILE(5, PANELS) TILE(6, PANELS) TILE(7, PANELS)  \
    TILE(8, PANELS) TILE(9, PANELS) TILE(10, PANELS) TILE(11, PANELS) TILE(12, PANELS) TILE(13, PANELS)              \
    TILE(14, PANELS)
TILES(1)
TILES(2)
#define CASE(ROWS, PANELS)                                                                                           \
    case ROWS:                                                                                                       \
        PATH(tile_##ROWS##_##PANELS)(a, lda, segments, runs, k4, b, b_next, init, init_next, out);                   \
        break;
#define CASES(PANELS)                                                                                                \
    switch (rows) {                                                                                                  \
        CASE(1, PANELS) CASE(2, PANELS) CASE(3, PANELS) CASE(4, PANELS) CASE(5, PANELS) CASE(6, PANELS)              \
        CASE(7, PANELS) CASE(8, PANELS) CASE(9, PANELS) CASE(10, PANELS) CASE(11, PANELS) CASE(12, PANELS)           \
        CASE(13, PANELS) CASE(14, PANELS)                                                                            \
    }

INLINE void PATH(tile)(int rows, int panels, int wide, const uint8_t *a, int64_t lda, const int64_t *segments,
                       int64_t runs, int64_t k4, const int8_t *b, int64_t b_next, const int32_t *init,
                       int64_t init_next, int32_t *out) {
    (void)wide;
    if (panels == 2) {
        CASES(2)
    } else {
        CASES(1)
    }
}
#undef TILE
#undef TILES
#undef CASE
#undef CASES

#elif LEVEL == 1

/* Pairs of products are added in 16 bits; where that could saturate (`wide`), odd and even products go apart. */
INLINE void PATH(tile_of)(const int rows, const int wide, const uint8_t *a, int64_t lda, const int64_t *segments,
                          int64_t runs, int64_t k4, const int8_t *b, const int32_t *init, int32_t *out, int64_t ldo) {
    const __m256i ones = _mm256_set1_epi16(1), even = _mm256_set1_epi16(0x00ff);
    __m256i sum[4][2];
    for (int m = 0; m < rows; m++)
        for (int i = 0; i < 2; i++) sum[m][i] = _mm256_loadu_si256((const __m256i *)init + i);
    for (int64_t r = 0; r < runs; r++) {
        const uint8_t *base = a + segments[r];
        for (int64_t k = 0; k < k4; k++, b += 64, base += 4) {
            const __m256i w[2] = {_mm256_loadu_si256((const __m256i *)b), _mm256_loadu_si256((const __m256i *)b + 1)};
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                int32_t four;
                memcpy(&four, base + m * lda, 4);
                const __m256i v = _mm256_set1_epi32(four);
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) {
                    __m256i pairs;
                    if (wide) {
                        const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(v, even), w[i]);
                        const __m256i high = _mm256_maddubs_epi16(_mm256_andnot_si256(even, v), w[i]);
                        pairs = _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones));
                    } else {
                        pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(v, w[i]), ones);
                    }
                    sum[m][i] = _mm256_add_epi32(sum[m][i], pairs);
                }
            }
        }
    }
    for (int m = 0; m < rows; m++)
        for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i *)(out + m * ldo) + i, sum[m][i]);
}

TARGET static void PATH(tile)(int rows, int panels, int wide, const uint8_t *a, int64_t lda, const int64_t *segments,
                              int64_t runs, int64_t k4, const int8_t *b, int64_t b_next, const int32_t *init,
                              int64_t init_next, int32_t *out) {
    const int64_t ldo = panels * PANEL;
    for (int p = 0; p < panels; p++, b += b_next, init += init_next) {
        for (int m = 0; m < rows;) {
            const uint8_t *from = a + m * lda;
            int32_t *to = out + m * ldo + p * PANEL;
            if (rows - m >= 4) {
                if (wide) PATH(tile_of)(4, 1, from, lda, segments, runs, k4, b, init, to, ldo);
                else PATH(tile_of)(4, 0, from, lda, segments, runs, k4, b, init, to, ldo);
                m += 4;
            } else {
                if (wide) PATH(tile_of)(1, 1, from, lda, segments, runs, k4, b, init, to, ldo);
                else PATH(tile_of)(1, 0, from, lda, segments, runs, k4, b, init, to, ldo);
                m += 1;
            }
        }
    }
}

#else

TARGET static void PATH(tile)(int rows, int panels, int wide, const uint8_t *a, int64_t lda, const int64_t *segments,
                              int64_t runs, int64_t k4, const int8_t *b, int64_t b_next, const int32_t *init,
                              int64_t init_next, int32_t *out) {
    (void)wide;
    for (int m = 0; m < rows; m++) {
        for (int p = 0; p < panels; p++) {
            int32_t sum[PANEL];
            memcpy(sum, init + p * init_next, sizeof sum);
            const int8_t *w = b + p * b_next;
            for (int64_t r = 0; r < runs; r++) {
                const uint8_t *from = a + m * lda + segments[r];
                for (int64_t k = 0; k < k4; k++, w += 64)
                    for (int j = 0; j < PANEL; j++)
                        for (int i = 0; i < 4; i++) sum[j] += from[4 * k + i] * w[4 * j + i];
            }
            memcpy(out + (int64_t)m * panels * PANEL + p * PANEL, sum, sizeof sum);
        }
    }
}

#endif
