"""`Lowering` for onnxruntime: numbers per channel are streams of as few bits as hold them."""

import numpy as np
from onnx import TensorProto, numpy_helper

from bitwright.deploy.compact import Stream, shortest, whole
from bitwright.deploy.integer import DOMAIN
from bitwright.deploy.packing import varints
from bitwright.deploy.split import SplitLowering
from bitwright.deploy.streams import FIXED, FLOATING, WHOLE, functions_of

# What a stream costs beside its bits: a node and two more tensors. Below, float32 is smaller.
BESIDE = 70
KINDS = {"floating": FLOATING, "fixed": FIXED}


class CompactLowering(SplitLowering):
    """Scales and biases as streams, where they are short numbers; else as they are."""

    def stream(self, name: str, kind: str, made: Stream, plain: int) -> bool:
        """Make `name` from a stream, once; False if that is not smaller than `plain` bytes."""
        if made.nbytes + BESIDE >= plain:
            return False
        self.made.add(name)
        for function, proto in functions_of(kind).items():
            self.functions.setdefault(function, proto)
        packed = self.constant(f"{name}_bits", made.packed[:, None])
        about = f"{name}_about"
        self.initializers[about] = varints(about, made.about)
        self.node(kind, [packed, about], name, domain=DOMAIN)
        return True

    def vector(self, name: str, values: np.ndarray) -> str:
        found = shortest(values)
        if name in self.made or (found is not None and self.stream(name, KINDS[found[0]], found[1], values.nbytes)):
            return name
        return super().vector(name, values)

    def parameter(self, tensor: TensorProto) -> None:
        if tensor.data_type != TensorProto.FLOAT or not tensor.dims:
            super().parameter(tensor)
            return
        name, values = tensor.name, numpy_helper.to_array(tensor)
        line = name if values.ndim == 1 else f"{name}.line"
        if self.vector(line, values.reshape(-1)) not in self.made:
            self.initializers.pop(line, None)
            self.initializers[name] = tensor
        elif line != name:
            shape = f"shape_{'x'.join(map(str, values.shape))}"
            self.initializers[shape] = varints(shape, values.shape)
            self.node("Reshape", [line, shape], name)

    def integers(self, name: str, numbers: np.ndarray) -> str:
        found, plain = whole(numbers), (2 if np.abs(numbers).max() < 2**15 else 4) * numbers.size
        if found is not None and self.stream(name, WHOLE, found, plain):
            return name
        return super().integers(name, numbers)

    def column(self, name: str, values: np.ndarray, axes: int) -> str:
        line = self.vector(f"{name}_line" if axes else name, values)
        if not axes or name in self.made:
            return name
        if line not in self.made:
            del self.initializers[line]
            return super().column(name, values, axes)
        self.made.add(name)
        shape = self.constant(f"shape_{axes}", np.array([-1, *[1] * axes], np.int64))
        return self.node("Reshape", [line, shape], name)
