"""Both integer topologies from placement to file, against a computation by hand, on a small residual network."""

import copy
import functools
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitwright as bw
from bitwright.costs import cost_table
from bitwright.deploy import export, freeze, snap_biases, verify
from bitwright.deploy.bench import FLOAT, session
from bitwright.layers import SharedInput, quantizer_in

RULES = bw.rules("w4a3")


class Sum(nn.Module):
    """The end of a residual block: a functional sum, in place, then relu."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a += b
        return torch.relu(a)


class Net(nn.Module):
    """A block with an identity, then one with a convolution beside; the second sum is averaged."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        self.conv1, self.norm1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.sum = Sum()
        self.main, self.main_norm = nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.side, self.side_norm = nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8)
        self.end = Sum()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = torch.relu(self.norm1(self.conv1(x)))
        x = self.sum(self.norm2(self.conv2(y)), x)
        x = self.end(self.main_norm(self.main(x)), self.side_norm(self.side(x)))
        return self.fc(x.mean((2, 3)))


def made(kind: str) -> nn.Module:
    """Calibrated, snapped; norms have statistics and gains of both signs. A copy of what is made once."""
    return copy.deepcopy(original(kind))


@functools.cache
def original(kind: str) -> nn.Module:
    torch.manual_seed(3)
    model = Net().train()
    with torch.no_grad():
        model(torch.randn(64, 2, 6, 6))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_()
                module.bias.normal_(0, 0.5)
    x = torch.randn(64, 2, 6, 6)
    bw.prepare(model.eval(), RULES + bw.topology(model, x, kind, rules=RULES))
    bw.calibrate(model, [x])
    snap_biases(model, x[:2])
    return model


def rounded(x: Tensor, quantizer: bw.Quantizer | None) -> Tensor:
    """`x` on a symmetric grid, in float64, from nothing but its scale, bits and signedness."""
    if quantizer is None:
        return x
    bits, scale = int(quantizer.bits), quantizer.grid.scale.detach().double().abs() + 1e-12
    scale = scale.view(-1, *[1] * (x.ndim - 1)) if scale.numel() > 1 else scale
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if bool(quantizer.signed) else (0, 2**bits - 1)
    return torch.clamp(torch.round(x / scale), lo, hi) * scale


def by_hand(net: nn.Module, x: Tensor) -> Tensor:
    """The network written out in float64."""

    def conv(layer: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        x = rounded(x, getattr(layer, "input_quantizer", None) if not shares(layer) else None)
        y = F.conv2d(x, rounded(layer.weight.double(), layer.weight_quantizer), None, layer.stride, layer.padding)
        gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        y = (y - norm.running_mean.double().view(-1, 1, 1)) * gain.view(-1, 1, 1) + norm.bias.double().view(-1, 1, 1)
        return rounded(y, quantizer_in(norm, "output_quantizer"))

    def shares(layer: nn.Module) -> bool:
        return isinstance(layer.input_quantizer, SharedInput)

    def at(module: nn.Module, x: Tensor) -> Tensor:
        return rounded(x, quantizer_in(module, "output_quantizer"))

    x = at(net.relu, conv(net.stem, net.norm, x.double()).relu())
    y = conv(net.conv2, net.norm2, conv(net.conv1, net.norm1, x).relu())
    x = at(net.sum, (y + x).relu())
    x = at(net.end, (conv(net.main, net.main_norm, x) + conv(net.side, net.side_norm, x)).relu())
    x = rounded(x.mean((2, 3)), net.fc.input_quantizer)
    return x @ rounded(net.fc.weight.double(), net.fc.weight_quantizer).T + net.fc.bias.double()


@pytest.mark.parametrize("kind", ["res8", "shared"])
def test_training_form_integer_form_and_file_are_the_network_written_out(kind, tmp_path):
    model, x, path = made(kind), torch.randn(16, 2, 6, 6), tmp_path / "net.onnx"
    with torch.no_grad():
        expected = by_hand(model, x)
        size = float(expected.abs().max())
        assert torch.allclose(model(x).double(), expected, atol=1e-5 * size)
        assert torch.allclose(freeze(model, x[:2])(x).double(), expected, atol=1e-5 * size)
    export(model, path, x[:2])
    runtime, graph = session(path, 1, tmp_path / "optimized.onnx")
    file = torch.from_numpy(runtime.run(None, {"input": x.numpy()})[0]).double()
    assert torch.allclose(file, expected, atol=1e-5 * size)
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert (kinds["QLinearConv"], kinds["MatMulIntegerToFloat"], kinds["QLinearAdd"]) == (5, 1, 2)
    assert not FLOAT & kinds.keys()
    report = verify(model, path, [x])
    assert report.ok, report.first_difference
    rows = {row["name"]: row for row in report.rows()}
    found = {name: row for name, row in rows.items() if row["what"] == "output"}
    assert found.keys() == {f"{name}.output_quantizer" for name in outputs(model)}
    assert all(row["values"] > 0 for row in found.values())
    assert all((f"{n}.input_quantizer" in rows) == (kind == "res8") for n in ("conv1", "main", "side"))


def outputs(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """{module: (bits, signed)} of output quantizers."""
    found = {n: q for n, q in bw.quantizers(model).items() if n.endswith(".output_quantizer")}
    return {n.rpartition(".")[0]: (int(q.bits), bool(q.signed)) for n, q in found.items()}


def test_places_bits_and_signs():
    model = made("res8")
    signs = {"relu": False, "norm2": True, "sum": False, "main_norm": True, "side_norm": True, "end": False}
    assert outputs(model) == {name: (8, sign) for name, sign in signs.items()}
    model = made("shared")
    # What is averaged has no reader whose bits it could take.
    assert outputs(model) == {name: (3 if name in ("relu", "sum") else 8, sign) for name, sign in signs.items()}
    assert [n for n, m in model.named_modules() if isinstance(m, SharedInput)] == [
        f"{n}.input_quantizer" for n in ("conv1", "main", "side")
    ]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_shares_its_own_quantizer(clone):
    model = made("shared")
    twin = clone(model)
    assert twin.main.input_quantizer.source is twin.sum.output_quantizer
    assert twin.main.input_quantizer.source is not model.sum.output_quantizer
    x = torch.randn(4, 2, 6, 6)
    assert torch.equal(twin(x), model(x))


def test_costs_and_bits_know_the_shared_input():
    shared, fpres = made("shared"), made("fpres")
    x = torch.randn(1, 2, 6, 6)
    assert cost_table(shared, x).bitops == cost_table(fpres, x).bitops
    assert cost_table(made("res8"), x).bitops == cost_table(fpres, x).bitops
    before = cost_table(shared, x).bitops
    shared.sum.output_quantizer.set_bits(6)
    rows = {row.name: row.input_bits for row in cost_table(shared, x).rows}
    assert (rows["conv1"], rows["main"], rows["side"]) == (3, 6, 6)
    assert cost_table(shared, x).bitops > before


def test_one_parameter_and_one_state_for_a_shared_quantizer():
    model = made("shared")
    keys = [k for k in model.state_dict() if "sum" in k or "main.input" in k]
    assert keys
    assert all(k.startswith("sum.output_quantizer.") for k in keys)
    scale = model.sum.output_quantizer.grid.scale
    assert sum(p is scale for p in model.parameters()) == 1
    model.train()
    model(torch.randn(8, 2, 6, 6)).square().sum().backward()
    assert float(scale.grad.abs()) > 0


def test_adaqat_refuses_a_shared_input():
    with pytest.raises(bw.BitwrightError, match="conv1 shares the quantizer of its input with a sum"):
        bw.AdaQAT(made("shared"), total_steps=100)
    learned = bw.AdaQAT(made("res8"), total_steps=100)
    assert not any("output" in q.name for width in learned.widths() for q in width.quantizers)


def test_shared_needs_the_rules_and_an_output_quantizer():
    with pytest.raises(bw.BitwrightError, match="give rules="):
        bw.topology(Net(), torch.randn(1, 2, 6, 6), "shared")
    with pytest.raises(bw.BitwrightError, match="main: shares: 'sum' has no output quantizer"):
        bw.prepare(Net(), [*RULES, bw.Rule(match="main", shares="sum")])


def test_a_branch_leaves_a_block_with_what_the_next_block_gets():
    model, x, y = made("res8").train(), torch.randn(8, 2, 6, 6), torch.randint(0, 3, (8,))
    method = bw.BWRF(model, Net(), blocks=["sum", "end"])
    outputs = model(x)
    quantizer, branch = model.sum.output_quantizer, method.taps[0].output
    steps = branch.detach() / quantizer.affine().scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    sum(method.losses(bw.Batch(x, y), outputs).values()).backward()
    assert float(quantizer.grid.scale.grad.abs()) > 0
