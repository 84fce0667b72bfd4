"""`QuantizerSpec`: what is accepted, and one line for what is not."""

import pickle

import pytest
from pydantic import BaseModel, ValidationError

from bitwright import BitwrightError, QuantizerSpec


@pytest.mark.parametrize(
    ("key", "value"),
    [("bits", 9), ("bits", 0), ("bits", 4.0), ("bits", "4"), ("grid", "lsk"), ("signed", "maybe"), ("learned", True)],
)
def test_a_bad_value_is_one_line_that_names_key_and_value(key, value):
    with pytest.raises(BitwrightError) as caught:
        QuantizerSpec(**{"bits": 4, key: value})
    message = str(caught.value)
    assert "\n" not in message
    assert f"QuantizerSpec.{key}" in message
    assert repr(value) in message


def test_files_still_get_pydantics_error_with_the_place():
    class Recipe(BaseModel):
        weight: QuantizerSpec

    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"weight": {"bits": 9}})
    assert caught.value.errors()[0]["loc"] == ("weight", "bits")


def test_a_spec_cannot_change_and_survives_pickling():
    spec = QuantizerSpec(bits=3, grid="pact", grid_options={"calibrated": True})
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(ValidationError, match="frozen"):
        spec.bits = 4
