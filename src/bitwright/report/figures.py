"""The page's pictures, as SVG text. Drawn by matplotlib without its global state, so that no display is needed."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bitwright.report.runs import RunData

WEIGHT, INPUT = "#1f77b4", "#ff7f0e"


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element, equal for equal figures (no date in it)."""
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of this size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    made = figure.add_subplot()
    made.spines[["top", "right"]].set_visible(False)
    return figure, made


def curves(runs: Sequence[RunData], key: str, label: str, scale: float = 1.0) -> str | None:
    """A metric over the epochs, one line per run; None where no run has it."""
    found = [(run.name, *run.curve(key)) for run in runs]
    found = [(name, epochs, values) for name, epochs, values in found if epochs]
    if not found:
        return None
    figure, plot = axes(6.0, 3.2)
    for name, epochs, values in found:
        plot.plot(
            epochs, [scale * v for v in values], marker="o" if len(epochs) < 30 else None, markersize=3, label=name
        )
    plot.set_xlabel("epoch")
    plot.set_ylabel(label)
    plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    plot.legend(frameon=False, fontsize="small")
    return svg(figure)


def bits_per_layer(run: RunData) -> str | None:
    """Bits of weights and inputs, layer by layer; None before the run has ended."""
    weights, inputs = run.value("weight_bits"), run.value("input_bits")
    if not isinstance(weights, dict) or not isinstance(inputs, dict) or not (weights or inputs):
        return None
    names = list(dict.fromkeys([*weights, *inputs]))
    figure, plot = axes(max(4.0, 0.28 * len(names) + 1.0), 3.2)
    for shift, colour, label, bits in ((-0.2, WEIGHT, "weights", weights), (0.2, INPUT, "inputs", inputs)):
        plot.bar(
            [i + shift for i in range(len(names))], [bits.get(n) or 0 for n in names], 0.4, color=colour, label=label
        )
    plot.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
    plot.set_ylabel("bits")
    plot.set_ylim(0, 9.5)
    plot.legend(frameon=False, fontsize="small", ncols=2, loc="upper center")
    return svg(figure)


def learned_widths(run: RunData) -> str | None:
    """How learned bit-widths moved: mean bits of weights and of inputs over the steps; None where none were learned."""
    path = ((run.value("methods") or {}).get("adaqat") or {}).get("path") or []
    if not path:
        return None
    figure, plot = axes(6.0, 3.2)
    for role, colour in (("weight", WEIGHT), ("input", INPUT)):
        steps, means = mean_path(path, role)
        plot.step(steps, means, where="post", color=colour, label=f"{role}s")
    plot.set_xlabel("step")
    plot.set_ylabel("mean bits")
    plot.legend(frameon=False, fontsize="small")
    return svg(figure)


def mean_path(path: Sequence[Sequence[Any]], role: str) -> tuple[list[int], list[float]]:
    """(steps, means): mean bits of `role` over layers after each recorded move [step, layer, role, bits]."""
    now: dict[str, int] = {}
    means: dict[int, float] = {}
    for step, layer, moved, bits in path:
        if moved == role:
            now[layer] = bits
            means[int(step)] = sum(now.values()) / len(now)
    return list(means), list(means.values())
