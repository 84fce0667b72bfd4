"""Rules: which layer gets what, in which order, and what is refused."""

import pytest
from torch import nn

from bitwright import BitwrightError, QuantizerSpec, Rule, rules
from bitwright.layers import Add
from bitwright.rules import resolve, weight_layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.add = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), Add()


def net():
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "layer1": nn.ModuleList([Block(), Block()]),
            "attn": nn.MultiheadAttention(4, 2),
            "table": nn.Embedding(3, 4),
            "head": nn.Linear(4, 2),
        }
    )


def bits(found):
    return {name: {field: spec.bits for field, spec in fields.items()} for name, fields in found.items()}


def test_the_usual_rules():
    found = bits(resolve(net(), rules("w3a5")))
    assert found["stem"] == found["head"] == {"weight": 8, "input": 8}
    assert found["layer1.1.conv2"] == {"weight": 3, "input": 5}
    assert found["attn"] == {"weight": 3, "input": 5, "attention": 5}
    assert found["attn.out_proj"] == {"weight": 3, "input": 5}
    assert found["table"] == {"weight": 3}
    assert "layer1.0.add" not in found, "residual sums are quantized on demand only"
    assert bits(resolve(net(), rules("w3a5", ends=None)))["stem"] == {"weight": 3, "input": 5}


def test_a_later_rule_wins_field_by_field_and_none_means_float():
    spec = {b: QuantizerSpec(bits=b) for b in range(1, 9)}
    found = resolve(
        net(),
        [
            Rule(match="*", weight=spec[4], input=spec[4], attention=spec[4]),
            Rule(match="layer1.*.conv1", weight=spec[2]),
            Rule(match=("type:Linear", "layer1.0.conv2"), input=None),
            Rule(match="layer1.1.conv1", weight=spec[3]),
            Rule(match="*.add", residual=spec[8]),
            Rule(match="stem", weight=None, input=None),
        ],
    )
    assert bits(found) == {
        "layer1.0.conv1": {"weight": 2, "input": 4},
        "layer1.0.conv2": {"weight": 4},
        "layer1.0.add": {"residual": 8},
        "layer1.1.conv1": {"weight": 3, "input": 4},
        "layer1.1.conv2": {"weight": 4, "input": 4},
        "layer1.1.add": {"residual": 8},
        "attn": {"weight": 4, "input": 4, "attention": 4},
        "attn.out_proj": {"weight": 4, "input": 4},
        "table": {"weight": 4},
        "head": {"weight": 4},
    }


def test_first_and_last_are_by_definition():
    assert weight_layers(net())[0] == "stem"
    assert weight_layers(net())[-1] == "head"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("xyz", r"rules\[1\].match: 'xyz' names no layer of the model; layers are stem, layer1.0.conv1"),
        ("haed", r"'haed' names no layer of the model; did you mean head\?"),
        ("norm", r"'norm' is a BatchNorm2d; layers of this class have no quantized form"),
        ("layer1", r"'layer1' is a ModuleList; for the layers inside it write 'layer1.\*'"),
        ("type:Conv3d", "'type:Conv3d' names no layer"),
    ],
)
def test_a_rule_that_matches_no_layer_is_refused_with_a_hint(pattern, expected):
    with pytest.raises(BitwrightError, match=expected) as caught:
        resolve(net(), [*rules("w4a4", ends=None), Rule(match=pattern, weight=QuantizerSpec(bits=4))])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", ["w9a4", "w4", "4a4", "w44a4", "a4w4", "", "w0a1", "w4a4a4"])
def test_bits_have_one_form(bad):
    with pytest.raises(BitwrightError, match="use wNaM with N and M from 1 to 8"):
        rules(bad)


@pytest.mark.parametrize("options", [{"ends": 9}, {"ends": 0}, {"grid": "lsk"}])
def test_options_are_checked_in_one_line(options):
    with pytest.raises(BitwrightError) as caught:
        rules("w4a4", **options)
    assert "\n" not in str(caught.value)


def test_unknown_keys_and_empty_matches_are_refused():
    with pytest.raises(BitwrightError, match=r"Rule\.wieght"):
        Rule(match="*", wieght=None)
    with pytest.raises(BitwrightError, match=r"Rule\.match"):
        Rule(match=())
    assert rules("W4A4") == rules("w4a4")


@pytest.mark.parametrize("wrong", ["w4a4", ("*", 4), {"match": "*"}, None])
def test_what_is_no_rule_is_said_in_one_line(wrong: object) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(BitwrightError, match=r"^rules\[1\]: .* is not accepted; use a bitwright\.Rule"):
        resolve(model, [*rules("w4a4", ends=None), wrong])  # pyright: ignore[reportArgumentType]
