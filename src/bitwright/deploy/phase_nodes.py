"""The nodes that make the weight of all phases of the stored one; runtimes fold them at load."""

import numpy as np

from bitwright.deploy.builder import GraphBuilder
from bitwright.deploy.phases import PhaseConv, numbers_of

LAST = np.iinfo(np.int64).min  # an end in front of the first element


def laid_out(builder: GraphBuilder, layer: PhaseConv, taps: str, out: str) -> str:
    """`out`: the tensor `taps`, (out, in / groups, kernel, ...), as `bitwright.deploy.phases.phases` lays it out."""
    axes = len(layer.steps)
    shape = list(numbers_of(layer.taps).shape)
    made = 0

    def numbers(values: list[int]) -> str:
        return builder.constant(f"numbers_{'_'.join(map(str, values))}", np.array(values, np.int64))

    def step(kind: str, x: str, *inputs: str, **attributes) -> str:
        nonlocal made
        made += 1
        return builder.node(kind, [x, *inputs], f"{layer.name}.laid{made}", **attributes)

    x = taps
    if set(layer.dilations) != {1}:  # zeros between taps
        wide = [n for k, d in zip(shape[2:], layer.dilations, strict=True) for n in (k, d)]
        x = step("Reshape", x, numbers([*shape[:2], *(n for k in shape[2:] for n in (k, 1))]))
        behind = [n for d in layer.dilations for n in (0, d - 1)]
        x = step("Pad", x, numbers([0] * (2 + 2 * axes) + [0, 0, *behind]))
        shape[2:] = [k * d for k, d in zip(wide[::2], wide[1::2], strict=True)]
        x = step("Reshape", x, numbers(shape))
    full = [t * s for t, s in zip(layer.kernel_size, layer.steps, strict=True)]
    if full != shape[2:]:
        x = step("Pad", x, numbers([0] * (2 + axes) + [0, 0, *(f - n for f, n in zip(full, shape[2:], strict=True))]))
    pairs = [n for t, s in zip(layer.kernel_size, layer.steps, strict=True) for n in (t, s)]
    x = step("Reshape", x, numbers([*shape[:2], *pairs]))
    turned = [2 + 2 * a for a in range(axes)]
    ends = [numbers([-1] * axes), numbers([LAST] * axes), numbers(turned), numbers([-1] * axes)]
    x = step("Slice", x, *ends)
    x = step("Transpose", x, perm=[0, *(a + 1 for a in turned), 1, *turned])
    channels = shape[0] * int(np.prod(layer.steps))
    return builder.node("Reshape", [x, numbers([channels, shape[1], *layer.kernel_size])], out)
