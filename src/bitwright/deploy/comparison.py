"""What `verify` compares and when a difference is beyond what rounding explains."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitwright.deploy.output_row import OutputRow
from bitwright.errors import BitwrightError
from bitwright.layers import OUTPUT

# Two exact implementations still disagree where float32 rounding upstream (a norm, a softmax, a requantization) puts
# a value on the other side of a tie. Over images whose earlier codes all agree this stays below one in a thousand.
FLIP_RATE = 1e-3
# Such a disagreement is one step of the grid, never more.
LARGEST_STEP = 1


@dataclass
class Comparison:
    """Codes of one quantizer in two forms of the network.

    codes, flips, steps: elements compared, elements that differ, largest difference in steps of the grid.
    clean_codes, clean_flips, clean_steps: the same over images whose codes agreed in every quantizer before.
    """

    codes: int = 0
    flips: int = 0
    steps: int = 0
    clean_codes: int = 0
    clean_flips: int = 0
    clean_steps: int = 0

    @property
    def rate(self) -> float:
        """Share of codes that differ."""
        return self.flips / max(self.codes, 1)

    @property
    def ok(self) -> bool:
        """Whether what differs is what rounding explains; a single flip always is."""
        allowed = max(1.0, FLIP_RATE * self.clean_codes)
        return self.clean_flips <= allowed and self.clean_steps <= LARGEST_STEP

    def add(self, a: Tensor, b: Tensor, clean: Tensor) -> Tensor:
        """Take in two int16 tensors of codes (images, n); returns which images are still clean."""
        self.codes += a.numel()
        self.clean_codes += int(clean.sum()) * a.shape[1]
        if torch.equal(a, b):
            return clean
        apart = (a != b).any(1)
        off = (a[apart] - b[apart]).abs()
        counts, steps = off.count_nonzero(1), off.amax(1)
        self.flips += int(counts.sum())
        self.steps = max(self.steps, int(steps.max()))
        before = clean[apart]
        if bool(before.any()):
            self.clean_flips += int(counts[before].sum())
            self.clean_steps = max(self.clean_steps, int(steps[before].max()))
        return clean & ~apart


@dataclass
class InputRow:
    """One quantizer of an input or an output: training form against frozen form, frozen form against file."""

    name: str
    bits: int
    frozen: Comparison = field(default_factory=Comparison)
    file: Comparison = field(default_factory=Comparison)

    def difference(self) -> str | None:
        """What is beyond tolerance, or None."""
        hint = " (was snap_biases called before the last evaluation?)"
        forms = (
            ("the training form and the frozen form", self.frozen, hint),
            ("the frozen form and the file", self.file, ""),
        )
        for forms_named, c, remark in forms:
            if not c.ok:
                return (
                    f"{self.name}: {c.clean_flips} of {c.clean_codes} codes differ between {forms_named}, "
                    f"by up to {c.clean_steps} steps{remark}"
                )
        return None


@dataclass
class WeightRow:
    """One layer's weight and bias: the frozen form against what the runtime dequantizes from the file."""

    name: str
    bits: int
    weights: int
    different: int
    bias_different: int

    def difference(self) -> str | None:
        """What is beyond tolerance, or None."""
        if self.different:
            return f"{self.name}: {self.different} of {self.weights} weights in the file differ from the trained ones"
        if self.bias_different:
            return f"{self.name}: {self.bias_different} biases in the file differ from the trained ones"
        return None


@dataclass
class VerifyReport:
    """What `verify` found.

    target: what kind of file it is. layers: weights and inputs in the order of execution. images: how many were
    compared. clean_images: of these, images whose codes agree everywhere in all three forms. different_frozen,
    different_file: images on which the predictions of the training form differ from the frozen form's and from the
    file's. float32_differs: images on which the training form in float32 disagrees with the other forms, and with
    itself in float64, which is then what they are compared with. outputs: what the network puts out, by name;
    logit_difference, clean_logit_difference, largest_logit: the largest of them all. file_difference: what a target
    found by itself whose weights cannot be seen.
    first_difference: one line, None where everything is within tolerance.
    """

    path: str
    layers: list[WeightRow | InputRow]
    target: str = "onnx"
    images: int = 0
    clean_images: int = 0
    different_frozen: int = 0
    different_file: int = 0
    float32_differs: int = 0
    outputs: list[OutputRow] = field(default_factory=lambda: [OutputRow()])
    file_difference: str | None = None

    def name_outputs(self, outputs: Iterable[str], found: int) -> None:
        """Make a row for each of the network's outputs, of which the file has `found`.

        Raises:
            BitwrightError: the file has more or fewer.
        """
        names = list(outputs)
        if found != len(names):
            raise BitwrightError(
                f"{self.path}: is of another network: it has {found} outputs, the network has {len(names)}"
            )
        if [row.name for row in self.outputs] != names:
            self.outputs = [OutputRow(name) for name in names]

    @property
    def logit_difference(self) -> float:
        """Largest absolute difference of outputs between training form and file."""
        return max(row.difference for row in self.outputs)

    @property
    def clean_logit_difference(self) -> float:
        """The same over clean images."""
        return max(row.clean_difference for row in self.outputs)

    @property
    def largest_logit(self) -> float:
        """Largest |output| of the training form."""
        return max(row.largest for row in self.outputs)

    @property
    def first_difference(self) -> str | None:
        """The first thing beyond tolerance, in the order of execution."""
        found = next((d for row in self.layers if (d := row.difference()) is not None), None)
        if found is not None:
            return found
        if self.different_frozen or self.different_file:
            moved = [r.name for r in self.layers if isinstance(r, InputRow) and r.frozen.flips + r.file.flips]
            where = f"codes first differ at {moved[0]}" if moved else "all codes agree"
            count = max(self.different_frozen, self.different_file)
            return f"output: {count} of {self.images} predictions differ; {where}{self.taken_along()}"
        return next((off for row in self.outputs if (off := row.off()) is not None), self.file_difference)

    def taken_along(self) -> str:
        """A remark on what predictions are, for outputs whose shape does not tell."""
        named = ", ".join(f"axis {row.class_axis} of {row.name}" for row in self.outputs if row.class_axis > 1)
        return f"; predictions are the largest along {named}; class_axis= changes that" if named else ""

    @property
    def ok(self) -> bool:
        """Whether the file is the network that was trained."""
        return self.first_difference is None

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per weight and per input, for a table."""
        out = []
        for row in self.layers:
            if isinstance(row, WeightRow):
                out.append(
                    {
                        "name": row.name,
                        "what": "weight",
                        "bits": row.bits,
                        "values": row.weights,
                        "different_frozen": 0,
                        "different_file": row.different + row.bias_different,
                        "largest_steps": 0,
                        "ok": row.difference() is None,
                    }
                )
            else:
                out.append(
                    {
                        "name": row.name,
                        "what": "output" if row.name.endswith(OUTPUT) else "input",
                        "bits": row.bits,
                        "values": row.file.codes,
                        "different_frozen": row.frozen.flips,
                        "different_file": row.file.flips,
                        "largest_steps": max(row.frozen.steps, row.file.steps),
                        "ok": row.difference() is None,
                    }
                )
        return out

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        sizes = {name: getattr(self, name) for name in ("logit_difference", "clean_logit_difference", "largest_logit")}
        return {
            **asdict(self),
            **sizes,
            "ok": self.ok,
            "first_difference": self.first_difference,
            "layers": self.rows(),
        }
