"""Fused fake quantization in Triton: one pass forward, one pass backward and a sum over its parts.

The arithmetic is the reference's in the forward pass: a true division, rounding of ties to even, NaN kept, the same
random mask. `rows` rows of `columns` elements lie one after another; row r uses scale[r % channels]; a program does
`BLOCK` elements of one row.
"""

import triton
import triton.language as tl

CLIPPED_STE, STE, EWGS, SCALAR, CONSTANT, DSQ = (tl.constexpr(i) for i in range(6))
# c + MAGIC - MAGIC rounds to nearest, ties to even, where |c| < 2^22; libdevice's rint is one vendor's.
MAGIC = tl.constexpr(1.5 * 2**23)
EPS = tl.constexpr(1e-12)
KEEP = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def mix(h):
    """`reference.mix` on uint32."""
    h = (h ^ (h >> 16)) * 0x045D9F3B
    h = (h ^ (h >> 16)) * 0x045D9F3B
    return h ^ (h >> 16)


@triton.jit
def uniform(at, seed):
    """The uniform number of the elements at `at`, in [0, 1), float32."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return (mix(mix(at.to(tl.uint32) + low) ^ high) >> 8).to(tl.float32) * (1.0 / 2**24)


@triton.jit
def place(columns, BLOCK: tl.constexpr):
    """(row, offsets into the tensor, which of them are inside) of this program."""
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(columns, BLOCK)
    row, column = program // blocks, (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, row * columns + column, column < columns


@triton.jit
def channel_numbers(scale, zeros, zero, channel, LEARNED: tl.constexpr, ZEROS: tl.constexpr):
    """(scale as it is used, zero) of a channel."""
    s = tl.load(scale + channel)
    if LEARNED:
        s = tl.abs(s) + EPS
    z = zero
    if ZEROS:
        z = tl.load(zeros + channel)
    return s, z


@triton.jit
def codes(x, s, z, lo, hi, at, rate, seed, MASKED: tl.constexpr):
    """(v, clipped to c, rounded to r, and k: r or c as the random mask says)."""
    v = tl.div_rn(x, s) + z
    c = tl.clamp(v, lo, hi, propagate_nan=KEEP)
    r = (c + MAGIC) - MAGIC
    k = r
    if MASKED:
        k = tl.where(uniform(at, tl.load(seed)) < tl.load(rate), r, c)
    return v, c, r, k


@triton.jit
def forward_kernel(
    x,
    y,
    scale,
    zeros,
    lo,
    hi,
    rate,
    seed,
    zero,
    channels,
    columns,
    LEARNED: tl.constexpr,
    ZEROS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = (k - z) * s."""
    row, at, inside = place(columns, BLOCK)
    s, z = channel_numbers(scale, zeros, zero, row % channels, LEARNED, ZEROS)
    xs = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    _, _, _, k = codes(xs, s, z, tl.load(lo), tl.load(hi), at, rate, seed, MASKED)
    tl.store(y + at, ((k - z) * s).to(y.dtype.element_ty), mask=inside)


@triton.jit
def pulled(g, c, e, s, width, strength, mean, RULE: tl.constexpr):
    """The gradient of v inside the range; see `reference.KernelRule`. mean: of |gradient of the codes|, for SCALAR."""
    if RULE == EWGS:
        g += tl.load(strength) / width * tl.abs(g) * e
    elif RULE == SCALAR:
        g += tl.load(strength) * tl.load(mean) / width / s * e
    elif RULE == CONSTANT:
        g += tl.load(strength) / width / width / s * e
    elif RULE == DSQ:
        alpha = tl.load(strength)
        steep = tl.log(2.0 / alpha - 1.0)
        t = tl.exp(-2.0 * steep * tl.abs(c - tl.floor(c) - 0.5))
        g *= 2.0 * steep / (1.0 - alpha) * t / ((1.0 + t) * (1.0 + t))
    return g


@triton.jit
def backward_kernel(
    g,
    x,
    dx,
    parts,
    scale,
    zeros,
    lo,
    hi,
    strength,
    rate,
    seed,
    mean,
    zero,
    channels,
    columns,
    LEARNED: tl.constexpr,
    ZEROS: tl.constexpr,
    MASKED: tl.constexpr,
    RULE: tl.constexpr,
    REPLACED_ONLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx, and this program's part of the gradient of scale in parts (programs,), of zero, with ZEROS, behind those."""
    row, at, inside = place(columns, BLOCK)
    s, z = channel_numbers(scale, zeros, zero, row % channels, LEARNED, ZEROS)
    low, high = tl.load(lo), tl.load(hi)
    gs = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    xs = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    v, c, r, k = codes(xs, s, z, low, high, at, rate, seed, MASKED)
    e = c - (k if REPLACED_ONLY else r)
    gk = pulled(gs, c, e, s, high - low, strength, mean, RULE)
    gv = tl.where((v == c) & inside, gk, 0.0)
    tl.store(dx + at, (gs if RULE == STE else gv).to(dx.dtype.element_ty), mask=inside)
    program = tl.program_id(0)
    tl.store(parts + program, tl.sum(tl.where(inside, gs * (k - z) - gv * (c - z), 0.0)))
    if ZEROS:
        tl.store(parts + tl.num_programs(0) + program, tl.sum(gv - gs))


@triton.jit
def finish_kernel(
    parts,
    dscale,
    dzeros,
    scale,
    hi,
    programs,
    channels,
    blocks,
    count,
    LEARNED: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of one channel's scale and zero: sums of its rows' parts, always in the same order."""
    channel = tl.program_id(0).to(tl.int64)
    mine = programs // channels
    ds, dz = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, mine, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        at = (i // blocks * channels + channel) * blocks + i % blocks
        ds += tl.load(parts + at, mask=i < mine, other=0.0)
        if ZEROS:
            dz += tl.load(parts + programs + at, mask=i < mine, other=0.0)
    s = tl.load(scale + channel)
    total = tl.sum(ds)
    if LEARNED:
        sign = tl.where(s > 0, 1.0, tl.where(s < 0, -1.0, 0.0))
        total *= sign / tl.sqrt_rn(count * tl.load(hi))
        s = tl.abs(s) + EPS
    tl.store(dscale + channel, total)
    if ZEROS:
        tl.store(dzeros + channel, tl.sum(dz) * s)
