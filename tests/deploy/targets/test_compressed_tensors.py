"""compressed-tensors folders: read back by the package itself; everything but linear weights is refused."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bitwright as bw
from bitwright.deploy import export, verify
from bitwright.deploy.targets import packed_loader
from bitwright.errors import BitwrightError
from bitwright.training.vision import import_torchvision


@pytest.fixture
def _package():
    import_torchvision()  # which the package imports behind transformers
    pytest.importorskip("compressed_tensors", reason='needs "bitwright[compressed-tensors]"')


def net() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(11, 40),
        nn.Linear(40, 33),
        nn.GELU(),
        nn.Linear(33, 24, bias=False),
        nn.LayerNorm(24),
        nn.Linear(24, 7),
    )


def weight_only(*widths: int) -> nn.Module:
    """Linear weights quantized, one width each; the rest float."""
    rules = [bw.Rule.model_validate({"match": n, "weight": {"bits": b}}) for n, b in zip("135", widths, strict=False)]
    return bw.calibrate(bw.prepare(net().eval(), rules), [torch.randint(11, (16, 6))]).eval()


@pytest.mark.usefixtures("_package")
@pytest.mark.parametrize("widths", [(4, 4, 4), (2, 3), (8, 5, 7)])
def test_the_package_reads_back_what_was_trained(widths, tmp_path):
    model, x = weight_only(*widths), torch.randint(11, (16, 6))
    report = export(model, tmp_path / "net", x, target="compressed-tensors")
    assert report.size_bytes == sum(p.stat().st_size for p in (tmp_path / "net").iterdir())
    found = verify(model, tmp_path / "net", [x])
    assert found.target == "compressed-tensors"
    assert found.ok, found.first_difference
    assert found.different_file == 0
    assert sum(r["different_file"] for r in found.rows()) == 0
    assert [r["bits"] for r in found.rows()] == list(widths)
    tensors = load_file(tmp_path / "net" / "model.safetensors")
    assert tensors["1.weight_packed"].shape == (33, -(-40 * widths[0] // 32))
    first = packed_loader.unpack(tensors["1.weight_packed"][0], widths[0], 40) - 2 ** (widths[0] - 1)
    values = model[1].weight_quantizer(model[1].weight)[0]
    assert torch.equal(first * tensors["1.weight_scale"][0], values.detach())
    config = json.loads((tmp_path / "net" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ([] if len(widths) == 3 else ["5"])
    assert {g["weights"]["num_bits"] for g in config["config_groups"].values()} == set(widths)


@pytest.mark.usefixtures("_package")
def test_a_folder_is_replaced_only_where_it_is_one_of_ours(tmp_path):
    model, x = weight_only(4, 4, 4), torch.randint(11, (2, 6))
    export(model, tmp_path / "net", x, target="compressed-tensors")
    export(weight_only(8, 8, 8), tmp_path / "net", x, target="compressed-tensors")
    assert verify(model, tmp_path / "net", [x]).first_difference.startswith("1: ")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for act in (
        lambda: export(model, tmp_path / "mine", x, target="compressed-tensors"),
        lambda: verify(model, tmp_path / "mine", [x]),
    ):
        with pytest.raises(BitwrightError, match=r"mine: is a folder without a config.json"):
            act()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "net"]
    whole = (tmp_path / "net" / "model.safetensors").read_bytes()
    (tmp_path / "net" / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(BitwrightError, match="net: compressed_tensors cannot load it: ") as caught:
        verify(model, tmp_path / "net", [x])
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_package")
@pytest.mark.parametrize(
    ("layer", "rule", "message"),
    [
        (nn.Conv1d(4, 3, 1), {"weight": {"bits": 4}}, "^0.weight_quantizer: .* weights of linear layers only"),
        (nn.Linear(4, 3), {"weight": {"bits": 4}, "input": {"bits": 8}}, "^0.input_quantizer: .* weights of linear"),
        (nn.Linear(4, 3), {"weight": {"bits": 1}}, "^0: .* not 1 bit or grids without a 0"),
    ],
)
def test_the_rest_is_refused_in_one_line(layer, rule, message, tmp_path):
    x = torch.randn(2, 4, 4)
    model = bw.prepare(nn.Sequential(layer), [bw.Rule.model_validate({"match": "0", **rule})])
    with pytest.raises(BitwrightError, match=message):
        export(bw.calibrate(model, [x]).eval(), tmp_path / "net", x, target="compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(BitwrightError, match=r"not installed: pip install \"bitwright\[compressed-tensors\]\""):
        export(weight_only(4), tmp_path / "net", torch.randint(11, (2, 6)), target="compressed-tensors")
