/* Everything that is no convolution. Flat operators see n * h * w * c elements. */

INLINE int64_t PATH(count)(const Op *op) { return op->n * op->h * op->w * op->c; }

/* clip(round_half_even(x / scale) + zero, lo, hi); NaN becomes lo. */
INLINE void PATH(quantize_run)(const Op *op, const float *x, uint8_t *y, int64_t count) {
    const VF lo = PATH(splat)((float)(op->lo - op->zy)), hi = PATH(splat)((float)(op->hi - op->zy));
    for (int64_t i = 0; i < count; i += LANES) {
        VF v = {0};
        uint8_t codes[LANES];
        const int whole = count - i >= LANES;
        memcpy(&v, x + i, whole ? sizeof v : 4 * (size_t)(count - i));
        v = PATH(clamp)(v / op->scale, lo, hi);
        PATH(narrow)(whole ? y + i : codes, PATH(nearest)(v) + op->zy);
        if (!whole) memcpy(y + i, codes, (size_t)(count - i));
    }
}

TARGET static void PATH(quantize)(const Op *given) {
    const Op local = *given, *op = &local;
    if (!op->planar) {
        PATH(quantize_run)(op, op->x, op->y, PATH(count)(op));
        return;
    }
    uint8_t codes[1024];
    const int64_t plane = op->h * op->w;
    for (int64_t n = 0; n < op->n; n++)
        for (int64_t from = 0; from < plane; from += 1024)
            for (int64_t c = 0; c < op->c; c++) {
                const int64_t count = min64(1024, plane - from);
                PATH(quantize_run)(op, (const float *)op->x + (n * op->c + c) * plane + from, codes, count);
                uint8_t *to = (uint8_t *)op->y + (n * plane + from) * op->c + c;
                for (int64_t i = 0; i < count; i++) to[i * op->c] = codes[i];
            }
}

#if LEVEL == 2
/* 64 lookups at once: the two halves of the table are permutations of 128 bytes. */
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) static int64_t PATH(table_fast)(const Op *op) {
    const __m512i t0 = _mm512_loadu_si512(op->table), t1 = _mm512_loadu_si512(op->table + 64);
    const __m512i t2 = _mm512_loadu_si512(op->table + 128), t3 = _mm512_loadu_si512(op->table + 192);
    const int64_t count = op->n * op->h * op->w * op->c;
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
        const __m512i k = _mm512_loadu_si512((const uint8_t *)op->x + i);
        const __m512i low = _mm512_permutex2var_epi8(t0, k, t1), high = _mm512_permutex2var_epi8(t2, k, t3);
        _mm512_storeu_si512((uint8_t *)op->y + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(k), low, high));
    }
    return i;
}
#endif

TARGET static void PATH(table)(const Op *given) {
    const Op local = *given, *op = &local;
    const uint8_t *x = op->x;
    uint8_t *y = op->y;
    const int64_t count = PATH(count)(op);
    int64_t i = 0;
#if LEVEL == 2
    if (__builtin_cpu_supports("avx512vbmi")) i = PATH(table_fast)(given);
#endif
    for (; i < count; i++) y[i] = op->table[x[i]];
}

/* clip(round_half_even((a - za) * ra + (b - zb) * rb) + zy, lo, hi), every step in float32. */
TARGET static void PATH(add)(const Op *given) {
    const Op local = *given, *op = &local;
    const uint8_t *a = op->x, *b = op->x2;
    uint8_t *y = op->y;
    const VF lo = PATH(splat)((float)(op->lo - op->zy)), hi = PATH(splat)((float)(op->hi - op->zy));
    const int64_t count = PATH(count)(op);
    for (int64_t i = 0; i < count; i += LANES) {
        const VF va = __builtin_convertvector(PATH(widen)(a + i) - op->zx, VF) * op->scale;
        const VF vb = __builtin_convertvector(PATH(widen)(b + i) - op->zx2, VF) * op->scale2;
        const VI k = PATH(nearest)(PATH(clamp)(va + vb, lo, hi)) + op->zy;
        uint8_t codes[LANES];
        const int whole = count - i >= LANES;
        PATH(narrow)(whole ? y + i : codes, k);
        if (!whole) memcpy(y + i, codes, (size_t)(count - i));
    }
}

/* The greatest of `taps` runs of `count` codes each. */
TARGET static void PATH(most_codes)(uint8_t *restrict y, const uint8_t **from, int taps, int64_t count) {
    int64_t c = 0;
#if LEVEL == 2
    for (; c + 64 <= count; c += 64) {
        __m512i most = _mm512_loadu_si512(from[0] + c);
        for (int t = 1; t < taps; t++) most = _mm512_max_epu8(most, _mm512_loadu_si512(from[t] + c));
        _mm512_storeu_si512(y + c, most);
    }
#endif
#if LEVEL >= 1
    for (; c + 32 <= count; c += 32) {
        __m256i most = _mm256_loadu_si256((const __m256i *)(from[0] + c));
        for (int t = 1; t < taps; t++) most = _mm256_max_epu8(most, _mm256_loadu_si256((const __m256i *)(from[t] + c)));
        _mm256_storeu_si256((__m256i *)(y + c), most);
    }
#endif
    for (; c < count; c++) {
        y[c] = from[0][c];
        for (int t = 1; t < taps; t++) y[c] = y[c] > from[t][c] ? y[c] : from[t][c];
    }
}

TARGET static void PATH(most_floats)(float *restrict y, const float **from, int taps, int64_t count) {
    memcpy(y, from[0], (size_t)count * sizeof(float));
    for (int t = 1; t < taps; t++) {
        const float *restrict x = from[t];
        for (int64_t c = 0; c < count; c++) y[c] = y[c] > x[c] ? y[c] : x[c];
    }
}

/* scratch: a pointer per position of the kernel. */
#define MAX_POOL_OF(NAME, T)                                                                                         \
    TARGET static void PATH(max_pool_##NAME)(const Op *op) {                                                         \
        const T **from = op->scratch;                                                                                \
        for (int64_t n = 0; n < op->n; n++)                                                                          \
            for (int64_t oy = 0; oy < op->oh; oy++)                                                                  \
                for (int64_t ox = 0; ox < op->ow; ox++) {                                                            \
                    int taps = 0;                                                                                    \
                    for (int64_t i = 0; i < op->kh; i++)                                                             \
                        for (int64_t j = 0; j < op->kw; j++) {                                                       \
                            const int64_t iy = oy * op->sy - op->top + i * op->dy;                                   \
                            const int64_t ix = ox * op->sx - op->left + j * op->dx;                                  \
                            if (iy >= 0 && iy < op->h && ix >= 0 && ix < op->w)                                      \
                                from[taps++] = (const T *)op->x + ((n * op->h + iy) * op->w + ix) * op->c;           \
                        }                                                                                            \
                    PATH(most_##NAME)((T *)op->y + ((n * op->oh + oy) * op->ow + ox) * op->c, from, taps, op->c);    \
                }                                                                                                    \
    }
MAX_POOL_OF(codes, uint8_t)
MAX_POOL_OF(floats, float)
#undef MAX_POOL_OF

/* (float)sum(k - z) * scale / pixels of codes; sum / pixels of floats, in order. */
TARGET static void PATH(mean)(const Op *op) {
    const int64_t pixels = op->h * op->w;
    for (int64_t n = 0; n < op->n; n++)
        for (int64_t c = 0; c < op->c; c++) {
            float *y = (float *)op->y + n * op->c + c;
            const int64_t at = n * pixels * op->c + c;
            int32_t sum = 0;
            float total = 0;
            for (int64_t i = 0; i < pixels; i++) {
                if (op->to_float) total += ((const float *)op->x)[at + i * op->c];
                else sum += ((const uint8_t *)op->x)[at + i * op->c] - op->zx;
            }
            *y = (op->to_float ? total : (float)sum * op->scale) / (float)pixels;
        }
}

TARGET static void PATH(dequantize)(const Op *op) {
    const uint8_t *x = op->x;
    float *y = op->y;
    const int64_t count = PATH(count)(op);
    for (int64_t i = 0; i < count; i++) y[i] = (float)(x[i] - op->zx) * op->scale;
}

TARGET static void PATH(add_float)(const Op *op) {
    const float *a = op->x, *b = op->x2;
    float *y = op->y;
    const int64_t count = PATH(count)(op);
    for (int64_t i = 0; i < count; i++) {
        const float v = a[i] + b[i];
        y[i] = op->relu && !(v > 0) ? 0 : v;
    }
}

TARGET static void PATH(run)(const Op *op) {
    switch (op->kind) {
        case QUANTIZE: PATH(quantize)(op); break;
        case TABLE: PATH(table)(op); break;
        case ADD: PATH(add)(op); break;
        case MAX_POOL: op->to_float ? PATH(max_pool_floats)(op) : PATH(max_pool_codes)(op); break;
        case MEAN: PATH(mean)(op); break;
        case CONV: PATH(conv)(op); break;
        case WINOGRAD: PATH(winograd)(op); break;
        case DEPTHWISE: PATH(depthwise)(op); break;
        case DEQUANTIZE: PATH(dequantize)(op); break;
        case ADD_FLOAT: PATH(add_float)(op); break;
    }
}
