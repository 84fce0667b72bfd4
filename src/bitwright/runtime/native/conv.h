/* Convolutions: direct over contiguous runs, Winograd F(2x2, 3x3) in integers, depth-wise. */

/* 16 sums as codes or floats: `count` output channels from co on, of one pixel. */
INLINE void PATH(emit)(const Op *op, const VI *sums, int64_t co, int64_t count, int64_t pixel) {
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
        memcpy((float *)op->y + at, values, 4 * count);
        return;
    }
    uint8_t codes[PANEL], *to = count == PANEL ? (uint8_t *)op->y + at : codes;
    const VF lo = PATH(splat)((float)(op->lo - op->zy)), hi = PATH(splat)((float)(op->hi - op->zy));
    for (int i = 0; i < GROUP; i++) {
        const VF v = __builtin_convertvector(sums[i], VF) * *(const VF *)(op->multiplier + co + i * LANES);
        PATH(narrow)(to + i * LANES, PATH(nearest)(PATH(clamp)(v, lo, hi)) + op->zy);
    }
    if (to == codes) memcpy((uint8_t *)op->y + at, codes, count);
}

/* Copy one image into a frame of zero points. */
TARGET static void PATH(frame)(const Op *op, const uint8_t *x, uint8_t *to) {
    const int64_t row = op->pw * op->c;
    memset(to, op->zx, op->ph * row);
    const int64_t bottom = min64(op->h, op->ph - op->top), right = min64(op->w, op->pw - op->left);
    for (int64_t y = 0; y < bottom; y++)
        memcpy(to + (y + op->top) * row + op->left * op->c, x + y * op->w * op->c, right * op->c);
}

TARGET static void PATH(conv)(const Op *op) {
    int32_t sums[TALL * 2 * PANEL] __attribute__((aligned(64)));
    const int64_t depth = op->runs * op->k4 * 64, channels = op->oc / op->groups, row = op->pw * op->c;
    const int64_t panels = (channels + PANEL - 1) / PANEL, pieces = (op->ow + TALL - 1) / TALL;
    const int framed = op->ph != op->h || op->pw != op->w;
    for (int64_t n = 0; n < op->n; n++) {
        const uint8_t *x = (const uint8_t *)op->x + n * op->h * op->w * op->c;
        if (framed) {
            PATH(frame)(op, x, op->scratch);
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
                                PATH(emit)(op, (const VI *)(sums + (m * two + q) * PANEL),
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
            for (int j = 0; j < 4; j++) memcpy(&d[i][j], from[i][j] + c, sizeof(V));                                 \
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

/* B^T d B of one tile, all channels, plus what makes it unsigned; wraps around modulo 256, the true value fits. */
INLINE void PATH(input_tile)(const Op *op, const uint8_t *from[4][4], uint8_t *to, int64_t next) {
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

/* A^T m A of one tile and 16 channels: four pixels, those inside the image are written. */
INLINE void PATH(output_tile)(const Op *op, const int32_t *m, int64_t next, int64_t co, int64_t pixel, int down,
                              int right) {
    VI y[4][GROUP];
    for (int i = 0; i < GROUP; i++) {
        VI s[2][4];
        for (int j = 0; j < 4; j++) {
            const int32_t *at = m + j * next + i * LANES;
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
    const int64_t count = min64(PANEL, op->oc - co);
    PATH(emit)(op, y[0], co, count, pixel);
    if (right) PATH(emit)(op, y[1], co, count, pixel + 1);
    if (down) PATH(emit)(op, y[2], co, count, pixel + op->ow);
    if (down && right) PATH(emit)(op, y[3], co, count, pixel + op->ow + 1);
}

/* Weights are 4 G g G^T, so sums are four times the true ones; `multiplier` holds the quarter and `init` four biases.
   scratch: op->block tiles of 16 * 4 * k4 bytes, then 16 * TALL * 2 * PANEL sums, then two numbers a tile. */
TARGET static void PATH(winograd)(const Op *op) {
    static const int64_t start = 0;
    const int64_t deep = 4 * op->k4, high = (op->oh + 1) / 2, across = (op->ow + 1) / 2, tiles = op->n * high * across;
    const int64_t panels = (op->oc + PANEL - 1) / PANEL, depth = 16 * op->k4 * 64;
    uint8_t *v = op->scratch;
    int32_t *sums = (int32_t *)(v + 16 * op->block * deep);
    int64_t *pixels = (int64_t *)(sums + 16 * TALL * 2 * PANEL), *ends = pixels + op->block;
    int64_t n = 0, ty = 0, tx = 0;
    for (int64_t first = 0; first < tiles; first += op->block) {
        const int64_t many = min64(op->block, tiles - first), pieces = (many + TALL - 1) / TALL;
        for (int64_t t = 0; t < many; t++) {
            const uint8_t *from[4][4], *image = (const uint8_t *)op->x + n * op->h * op->w * op->c;
            const int64_t top = 2 * ty - op->top, left = 2 * tx - op->left;
            for (int64_t i = 0; i < 4; i++) {
                const int64_t y = top + i;
                const uint8_t *row = image + (y * op->w + left) * op->c;
                for (int64_t j = 0; j < 4; j++) {
                    const int inside = y >= 0 && y < op->h && left + j >= 0 && left + j < op->w;
                    from[i][j] = inside ? row + j * op->c : op->table;
                }
            }
            PATH(input_tile)(op, from, v + t * deep, op->block * deep);
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
                for (int64_t m = 0; m < rows; m++)
                    for (int q = 0; q < two; q++)
                        PATH(output_tile)(op, sums + (m * two + q) * PANEL, rows * two * PANEL, (p + q) * PANEL,
                                          pixels[low + m], ends[low + m] & 1, ends[low + m] >> 1);
            }
        }
    }
}

/* One input channel a group and one output channel each; weight: int32 [position][channel padded to 16]. */
TARGET static void PATH(depthwise)(const Op *op) {
    const int64_t padded = (op->c + PANEL - 1) / PANEL * PANEL, row = op->pw * op->c;
    for (int64_t n = 0; n < op->n; n++) {
        PATH(frame)(op, (const uint8_t *)op->x + n * op->h * op->w * op->c, op->scratch);
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
                    PATH(emit)(op, sums, c, min64(PANEL, op->c - c), (n * op->oh + oy) * op->ow + ox);
                }
    }
}
