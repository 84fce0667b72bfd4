"""The runtime's own answer to the same network: onnxruntime's static post-training quantization."""

import logging
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from bitwright.deploy.capture import first_line, quiet_export
from bitwright.errors import BitwrightError


class OneBatch(CalibrationDataReader):
    """Feeds one batch to the calibration."""

    def __init__(self, batch: np.ndarray):
        self.batches = iter([{"input": batch}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The batch, then None."""
        return next(self.batches, None)


def quantize(float_file: Path, example: np.ndarray, out: Path) -> None:
    """Write the float network in `float_file` to `out`, quantized to 8 bits by the runtime's own tool.

    The settings are those that its documentation recommends for convolutional networks on a CPU: graph optimisation
    first, QDQ format, per-channel weights, uint8 inputs and int8 weights, ranges from the extremes of `example`.

    Args:
        example: (N, ...) float32, the calibration data.

    Raises:
        BitwrightError: the tool cannot quantize this network.
    """
    prepared = out.with_suffix(".prepared.onnx")
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # the tool advises pre-processing, to the root logger, whatever was done
    try:
        with quiet_export():
            quant_pre_process(str(float_file), str(prepared))
            quantize_static(
                str(prepared),
                str(out),
                OneBatch(example),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
    except Exception as error:
        raise BitwrightError(f"onnxruntime's static quantization failed: {first_line(error)}") from error
    finally:
        logging.root.setLevel(level)
