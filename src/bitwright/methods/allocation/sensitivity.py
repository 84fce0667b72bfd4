"""How much the network's output suffers from few bits in one place."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.batches import Inputs, class_axis, logits_of
from bitwright.methods.probe import forward_fast, untouched
from bitwright.prepare import quantizers
from bitwright.quantizer import Quantizer


def divergence(outputs: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(outputs)) over classes (`class_axis`), mean over the rest; a scalar in nats."""
    axis = class_axis(outputs)
    log_p, log_q = (F.log_softmax(t.double(), axis) for t in (outputs, reference))
    rows = log_p.numel() // log_p.shape[axis]
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) / rows


@torch.no_grad()
def sensitivities(
    model: nn.Module, inputs: Inputs, places: Sequence[Sequence[Quantizer]], candidates: Sequence[int]
) -> Tensor:
    """Divergence of the outputs from the float network's with one place quantized, all else float.

    Args:
        model: prepared and calibrated, neither compiled nor wrapped; as it was afterwards, to the last bit.
        inputs: one batch.
        places: quantizers that share one width, per place. candidates: bits to try.

    Returns:
        (places, candidates), float64, in nats. Norms use what the mode of the model says: in evaluation mode each
        place is seen alone, in training mode batch statistics hide what they normalise away.
    """
    every = list(quantizers(model).values())
    before = [q.bypass for q in every]
    found = torch.zeros(len(places), len(candidates), dtype=torch.float64, device=inputs.device)
    try:
        for quantizer in every:
            quantizer.bypass = True
        with untouched(model):
            reference = logits_of(forward_fast(model, inputs), "allocation")
        for i, place in enumerate(places):
            for quantizer in place:
                quantizer.bypass = False
            for j, bits in enumerate(candidates):
                with untouched(model):
                    for quantizer in place:
                        quantizer.set_bits(bits)
                    found[i, j] = divergence(logits_of(forward_fast(model, inputs), "allocation"), reference)
            for quantizer in place:
                quantizer.bypass = True
    finally:
        for quantizer, bypass in zip(every, before, strict=True):
            quantizer.bypass = bypass
    return found
