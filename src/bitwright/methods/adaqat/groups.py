"""Layers that share one pair of learned widths."""

from bitwright.costs.bitops import FLOAT_BITS
from bitwright.errors import BitwrightError
from bitwright.methods.adaqat.rule import Width
from bitwright.methods.adjustable import ROLES
from bitwright.quantizer import Quantizer


def make_group(
    name: str, members: list[dict[str, list[Quantizer]]], start: float | None, floor: int
) -> dict[str, Width]:
    """The widths of one group by role; a role without quantizers is absent.

    Args:
        members: the group's layers, as `learned_layers` has them. start: initial N, None: as by the rules.

    Raises:
        BitwrightError: the rules' bits differ within a role, or are fewer than `floor`.
    """
    group = {}
    for role in ROLES:
        found = [q for member in members for q in member[role]]
        if not found:
            continue
        bits = {int(q.bits.item()) for q in found}
        if start is None and (len(bits) > 1 or min(bits) < floor):
            raise BitwrightError(
                f"adaqat: {name}: {role} bits are {sorted(bits)} by the rules; with start=None they must be alike "
                f"and at least {floor}"
            )
        group[role] = Width(name, role, found, float(start if start is not None else bits.pop()))
    return group


def pair_of(group: dict[str, Width], bits: int | None = None) -> tuple[int, int]:
    """(weight bits, input bits) of a group, now or with every learned width at `bits`; 32 where float."""
    w, a = (FLOAT_BITS if r not in group else (bits or group[r].bits) for r in ROLES)
    return w, a
