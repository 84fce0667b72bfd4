/* Convolutions: direct over contiguous runs, Winograd F(2x2, 3x3) in integers, depth-wise. */

/* What sums become codes by, kept in registers. */
typedef struct {
    VF lo, hi;
    int32_t zero;
} PATH(rule);

INLINE PATH(rule) PATH(rule_of)(const Op *op) {
    return (PATH(rule)){PATH(splat)((float)(op->lo - op->zy)), PATH(splat)((float)(op->hi - op->zy)), op->zy};
}

/* 16 sums as codes. */
INLINE void PATH(emit_codes)(PATH(rule) rule, const VI *sums, const float *multiplier, uint8_t *to) {
    for (int i = 0; i < GROUP; i++) {
        const VF v = __builtin_convertvector(sums[i], VF) * *(const VF *)(multiplier + i * LANES);
        PATH(narrow)(to + i * LANES, PATH(nearest)(PATH(clamp)(v, rule.lo, rule.hi)) + rule.zero);
    }
}

/* 16 sums as codes or floats: `count` output channels from co on, of one pixel. */
INLINE void PATH(emit)(const Op *op, PATH(rule) rule, const VI *sums, int64_t co, int64_t count, int64_t pixel) {
    const int64_t at = pixel * op->oc + co;
    if (op->to_float) {
        float values[PANEL];
        for (int i = 0; i < GROUP; i++) {
            VF v = __builtin_convertvector(sums[i], VF) * *(const VF *)(op->multiplier + co + i * LANES);
            if (op->bias) v += *(const VF *)(op->bias + co + i * LANES);
            *(VF *)(values + i * LANES) = v;
        }
        if (op->relu)
            for (int i = 0; i < PANEL; i++) values[i] = values[i] > 0 ? values[i] : 0;
        memcpy((float *)op->y + at, values, 4 * (size_t)count);
    } else if (count == PANEL) {
        PATH(emit_codes)(rule, sums, op->multiplier + co, (uint8_t *)op->y + at);
    } else {
        uint8_t codes[PANEL];
        PATH(emit_codes)(rule, sums, op->multiplier + co, codes);
        memcpy((uint8_t *)op->y + at, codes, (size_t)count);
    }
}

/* Copy one image into a frame of zero points. */
TARGET static void PATH(frame)(const Op *op, const uint8_t *x, uint8_t *to) {
    const int64_t row = op->pw * op->c;
    memset(to, op->zx, op->ph * row);
    const int64_t bottom = min64(op->h, op->ph - op->top), right = min64(op->w, op->pw - op->left);
    for (int64_t y = 0; y < bottom; y++)
        memcpy(to + (y + op->top) * row + op->left * op->c, x + y * op->w * op->c, right * op->c);
}

TARGET static void PATH(conv)(const Op *given) {
    const Op local = *given, *op = &local;  /* stores of bytes cannot change it */
    const PATH(rule) rule = PATH(rule_of)(op);
    int32_t sums[TALL * 2 * PANEL] __attribute__((aligned(64)));
    const int64_t depth = op->runs * op->k4 * 64, channels = op->oc / op->groups, row = op->pw * op->c;
    const int64_t panels = (channels + PANEL - 1) / PANEL, pieces = (op->ow + TALL - 1) / TALL;
    const int framed = op->ph != op->h || op->pw != op->w;
    for (int64_t n = 0; n < op->n; n++) {
        const uint8_t *x = (const uint8_t *)op->x + n * op->h * op->w * op->c;
        if (framed) {
            PATH(frame)(given, x, op->scratch);
            x = op->scratch;
        }
        for (int64_t g = 0; g < op->groups; g++)
            for (int64_t p = 0; p < panels; p += 2) {
                const int two = p + 1 < panels ? 2 : 1;
                const int64_t panel = g * panels + p;
                for (int64_t oy = 0; oy < op->oh; oy++)
                    for (int64_t i = 0; i < pieces; i++) {
                        const int64_t from = op->ow * i / pieces, rows = op->ow * (i + 1) / pieces - from;
                        const uint8_t *a = x + oy * op->sy * row + from * op->sx * op->c + g * (op->c / op->groups);
                        PATH(tile)((int)rows, two, op->wide, a, op->sx * op->c, op->segments, op->runs, op->k4,
                                   op->weight + panel * depth, depth, op->init + panel * PANEL, PANEL, sums);
                        for (int64_t m = 0; m < rows; m++)
                            for (int q = 0; q < two; q++)
                                PATH(emit)(op, rule, (const VI *)(sums + (m * two + q) * PANEL),
                                           g * channels + (p + q) * PANEL, min64(PANEL, channels - (p + q) * PANEL),
                                           (n * op->oh + oy) * op->ow + from + m);
                    }
            }
    }
}

#define BYTES(V)                                                                                                     \
    for (; c + (int64_t)sizeof(V) <= op->c; c += sizeof(V)) {                                                        \
        V d[4][4], t[4][4];                                                                                          \
        for (int i = 0; i < 4; i++)                                                                                  \
            for (int j = 0; j < 4; j++) memcpy(&d[i][j], x + i * row + j * op->c + c, sizeof(V));                    \
        for (int j = 0; j < 4; j++) {                                                                                \
            t[0][j] = d[0][j] - d[2][j];                                                                             \
            t[1][j] = d[1][j] + d[2][j];                                                                             \
            t[2][j] = d[2][j] - d[1][j];                                                                             \
            t[3][j] = d[1][j] - d[3][j];                                                                             \
        }                                                                                                            \
        for (int i = 0; i < 4; i++) {                                                                                \
            const V v[4] = {t[i][0] - t[i][2] + shift, t[i][1] + t[i][2] + (uint8_t)(i == 1 ? center : shift),       \
                            t[i][2] - t[i][1] + shift, t[i][1] - t[i][3] + shift};                                   \
            for (int j = 0; j < 4; j++) memcpy(to + (4 * i + j) * next + c, &v[j], sizeof(V));                       \
        }                                                                                                            \
    }

typedef uint8_t PATH(bytes64) __attribute__((vector_size(64)));
typedef uint8_t PATH(bytes32) __attribute__((vector_size(32)));
typedef uint8_t PATH(bytes16) __attribute__((vector_size(16)));

/* B^T d B of one tile, all channels, plus what makes it unsigned; wraps around modulo 256, the true value fits.
   x: the first of 4 x 4 pixels, rows `row` bytes apart; position k goes to + k * next. */
TARGET static __attribute__((noinline)) void PATH(input_tile)(const Op *op, const uint8_t *restrict x, int64_t row,
                                                              uint8_t *restrict to, int64_t next) {
    const uint8_t shift = (uint8_t)op->zx2, center = (uint8_t)(op->zx2 - 4 * op->zx);
    int64_t c = 0;
#if LEVEL == 2
    BYTES(PATH(bytes64))
#endif
#if LEVEL >= 1
    BYTES(PATH(bytes32))
#endif
    BYTES(PATH(bytes16))
    BYTES(uint8_t)
}
#undef BYTES

/* A^T m A of `rows` tiles and one panel: four pixels each, those inside the image are written.
   next: sums between positions; pixels: where a tile's first output lies; ends: 1 a row below, 2 a column behind. */
TARGET static __attribute__((noinline)) void PATH(output_tiles)(const Op *given, const int32_t *sums, int64_t rows,
                                                                int64_t apart, int64_t next, int64_t co,
                                                                const int64_t *pixels, const int64_t *ends) {
    const Op local = *given, *op = &local;
    const PATH(rule) rule = PATH(rule_of)(op);
    const int64_t count = min64(PANEL, op->oc - co), below = op->ow * op->oc;
    const float *multiplier = op->multiplier + co;
    const int plain = count == PANEL && !op->to_float;
    for (int64_t m = 0; m < rows; m++, sums += apart) {
        VI y[4][GROUP];
        for (int i = 0; i < GROUP; i++) {
            VI s[2][4];
            for (int j = 0; j < 4; j++) {
                const int32_t *at = sums + j * next + i * LANES;
                const VI m0 = *(const VI *)at, m1 = *(const VI *)(at + 4 * next), m2 = *(const VI *)(at + 8 * next);
                const VI m3 = *(const VI *)(at + 12 * next);
                s[0][j] = m0 + m1 + m2;
                s[1][j] = m1 - m2 - m3;
            }
            for (int j = 0; j < 2; j++) {
                y[2 * j][i] = s[j][0] + s[j][1] + s[j][2];
                y[2 * j + 1][i] = s[j][1] - s[j][2] - s[j][3];
            }
        }
        if (plain && ends[m] == 3) {
            uint8_t *to = (uint8_t *)op->y + pixels[m] * op->oc + co;
            PATH(emit_codes)(rule, y[0], multiplier, to);
            PATH(emit_codes)(rule, y[1], multiplier, to + op->oc);
            PATH(emit_codes)(rule, y[2], multiplier, to + below);
            PATH(emit_codes)(rule, y[3], multiplier, to + below + op->oc);
            continue;
        }
        for (int q = 0; q < 4; q++)
            if (((q & 1) == 0 || ends[m] & 2) && (q < 2 || ends[m] & 1))
                PATH(emit)(op, rule, y[q], co, count, pixels[m] + (q & 1) + (q >> 1) * op->ow);
    }
}

/* F(2x2, 3x3). Weights are 4 G g G^T, so sums are four times the true ones; `multiplier` holds the quarter and `init`
   four biases.
   scratch: op->block tiles of 16 * 4 * k4 bytes, then 16 * TALL * 2 * PANEL sums, two numbers a tile, 4 x 4 pixels. */
TARGET static void PATH(winograd)(const Op *op) {
    static const int64_t start = 0;
    const int64_t deep = 4 * op->k4, high = (op->oh + 1) / 2, across = (op->ow + 1) / 2, tiles = op->n * high * across;
    const int64_t panels = (op->oc + PANEL - 1) / PANEL, depth = 16 * op->k4 * 64;
    uint8_t *v = op->scratch;
    int32_t *sums = (int32_t *)(v + 16 * op->block * deep);
    int64_t *pixels = (int64_t *)(sums + 16 * TALL * 2 * PANEL), *ends = pixels + op->block;
    uint8_t *patch = (uint8_t *)(ends + op->block);
    int64_t n = 0, ty = 0, tx = 0;
    for (int64_t first = 0; first < tiles; first += op->block) {
        const int64_t many = min64(op->block, tiles - first), pieces = (many + TALL - 1) / TALL;
        for (int64_t t = 0; t < many; t++) {
            const int64_t y = 2 * ty - op->top, x = 2 * tx - op->left, row = op->w * op->c;
            const uint8_t *image = (const uint8_t *)op->x + n * op->h * row;
            if (y >= 0 && x >= 0 && y + 4 <= op->h && x + 4 <= op->w) {
                PATH(input_tile)(op, image + y * row + x * op->c, row, v + t * deep, op->block * deep);
            } else {
                for (int64_t i = 0; i < 16; i++) {
                    const int64_t iy = y + i / 4, ix = x + i % 4;
                    const int inside = iy >= 0 && iy < op->h && ix >= 0 && ix < op->w;
                    memcpy(patch + i * op->c, inside ? image + iy * row + ix * op->c : op->table, (size_t)op->c);
                }
                PATH(input_tile)(op, patch, 4 * op->c, v + t * deep, op->block * deep);
            }
            pixels[t] = (n * op->oh + 2 * ty) * op->ow + 2 * tx;
            ends[t] = (2 * ty + 1 < op->oh) + 2 * (2 * tx + 1 < op->ow);
            if (++tx == across) {
                tx = 0;
                if (++ty == high) {
                    ty = 0;
                    n++;
                }
            }
        }
        for (int64_t p = 0; p < panels; p += 2) {
            const int two = p + 1 < panels ? 2 : 1;
            for (int64_t piece = 0; piece < pieces; piece++) {
                const int64_t low = many * piece / pieces, rows = many * (piece + 1) / pieces - low;
                for (int64_t k = 0; k < 16; k++)
                    PATH(tile)((int)rows, two, op->wide, v + (k * op->block + low) * deep, deep, &start, 1, op->k4,
                               op->weight + p * depth + k * op->k4 * 64, depth, op->init + (p * 16 + k) * PANEL,
                               16 * PANEL, sums + k * rows * two * PANEL);
                for (int q = 0; q < two; q++)
                    PATH(output_tiles)(op, sums + q * PANEL, rows, two * PANEL, rows * two * PANEL, (p + q) * PANEL,
                                       pixels + low, ends + low);
            }
        }
    }
}

/* One input channel a group and one output channel each; weight: int32 [position][channel padded to 16]. */
TARGET static void PATH(depthwise)(const Op *given) {
    const Op local = *given, *op = &local;  /* stores of bytes cannot change it */
    const PATH(rule) rule = PATH(rule_of)(op);
    const int64_t padded = (op->c + PANEL - 1) / PANEL * PANEL, row = op->pw * op->c;
    for (int64_t n = 0; n < op->n; n++) {
        PATH(frame)(given, (const uint8_t *)op->x + n * op->h * op->w * op->c, op->scratch);
        for (int64_t oy = 0; oy < op->oh; oy++)
            for (int64_t ox = 0; ox < op->ow; ox++)
                for (int64_t c = 0; c < op->c; c += PANEL) {
                    const uint8_t *a = (const uint8_t *)op->scratch + oy * op->sy * row + ox * op->sx * op->c + c;
                    VI sums[GROUP];
                    for (int i = 0; i < GROUP; i++) sums[i] = *(const VI *)(op->init + c + i * LANES);
                    for (int64_t t = 0; t < op->runs; t++)
                        for (int i = 0; i < GROUP; i++) {
                            const VI w = *(const VI *)((const int32_t *)op->weight + t * padded + c + i * LANES);
                            sums[i] += PATH(widen)(a + op->segments[t] + i * LANES) * w;
                        }
                    PATH(emit)(op, rule, sums, c, min64(PANEL, op->c - c), (n * op->oh + oy) * op->ow + ox);
                }
    }
}
