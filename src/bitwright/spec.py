"""What a user asks of a quantizer, as data: `QuantizerSpec`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitwright.errors import BitwrightError

GridName = Literal["lsq", "lsq+", "pact", "dorefa", "sat", "minmax", "tqt", "seq", "hard"]
Role = Literal["weight", "input"]

MIN_BITS, MAX_BITS = 1, 8


def one_line(error: ValidationError) -> str:
    """The first complaint of pydantic in one line: key, what is accepted, what was given."""
    first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{error.title}{'.' + key if key else ''}: {first['msg']}, not {first['input']!r}{more}"


class OneLineErrors(type(BaseModel)):
    """Makes `Model(...)` raise BitwrightError; `Model.model_validate`, for files, still raises ValidationError."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise BitwrightError(one_line(error)) from None


class QuantizerSpec(BaseModel, metaclass=OneLineErrors):
    """One quantizer, described: grid, estimator, bit-width, granularity.

    Attributes:
        bits: bit-width, 1 to 8.
        grid: where the representable values are (`bitwright.grids`). Default `lsq`: a learned scale is the
            strongest baseline of the field at 2 to 4 bits.
        grid_options: keyword arguments of the grid, for example `{"init": "mse"}`.
        estimator: the gradient across the rounding (`bitwright.estimators`). Default `clipped_ste`, which is
            what LSQ, PACT and DoReFa use in their papers.
        estimator_options: keyword arguments of the estimator.
        per_channel: one scale per output channel (weights) or input channel (inputs). None: True for weights,
            False for inputs, because runtimes take per-channel weights and per-tensor inputs.
        signed: whether negative values are representable. None: weights are signed, inputs are decided by
            `calibrate` from the data (after a ReLU: unsigned).
        learn: False freezes the grid's parameters after calibration. None: True, except for the input of the
            first layer (the image), whose learned scale would cost a backward-data convolution for nothing.

    Raises:
        BitwrightError: a key or a value is not accepted (one line).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: int = Field(ge=MIN_BITS, le=MAX_BITS, strict=True)
    grid: GridName = "lsq"
    grid_options: dict[str, Any] = Field(default_factory=dict)
    estimator: str = "clipped_ste"
    estimator_options: dict[str, Any] = Field(default_factory=dict)
    per_channel: bool | None = None
    signed: bool | None = None
    learn: bool | None = None
