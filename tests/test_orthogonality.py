"""Every grid with every estimator, through every way in which a model is run: one matrix."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import bitwright as bw
from bitwright.deploy import export, snap_biases, verify
from bitwright.estimators import ESTIMATORS
from bitwright.grids import GRIDS

MATRIX = [pytest.param(g, e, id=f"{g}-{e}") for g in GRIDS for e in ESTIMATORS]
matrix = pytest.mark.parametrize(("grid", "estimator"), MATRIX)


class Net(nn.Module):
    """A convolution with its norm, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 6, 6, dtype=dtype, generator=generator), torch.arange(8) % 5


def prepared(grid, estimator, dtype=torch.float64, bits="w4a3"):
    model, (x, _) = Net().to(dtype), data(dtype)
    return bw.calibrate(bw.prepare(model, bw.rules(bits, grid=grid, estimator=estimator)), [x])


def losses_and_gradients(call, model):
    x, y = data(next(model.parameters()).dtype)
    model.zero_grad()
    loss = F.cross_entropy(call(x), y)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@matrix
def test_eager_gradients_are_finite_and_reach_every_parameter(grid, estimator):
    model = prepared(grid, estimator)
    loss, gradients = losses_and_gradients(model, model)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients.values())
    silent = [n for n, g in gradients.items() if not g.abs().sum()]
    assert not [n for n in silent if "quantizer" not in n]


def compiled_equals_eager(grid, estimator, backend):
    """Values and gradients, at three bit-widths, from one compilation of one graph."""
    torch.compiler.reset()
    model = prepared(grid, estimator)
    other = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(other, fullgraph=True, backend=counter)
    seen = []
    for bits in (8, 4, 3):
        for quantizer in (*bw.quantizers(model).values(), *bw.quantizers(other).values()):
            quantizer.set_bits(bits)
        loss, gradients = losses_and_gradients(model, model)
        loss_compiled, gradients_compiled = losses_and_gradients(compiled, other)
        torch.testing.assert_close(loss_compiled, loss, rtol=1e-10, atol=1e-12)
        assert gradients_compiled.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradients_compiled[name], gradient, rtol=1e-8, atol=1e-10, msg=name)
        seen.append(loss.item())
    assert counter.frame_count == 1
    assert len(set(seen)) == 3, "the bits did change"


@matrix
def test_compiled_once_for_all_bits_with_the_gradients_of_eager(grid, estimator):
    compiled_equals_eager(grid, estimator, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize(
    ("grid", "estimator"), [("lsq", "ewgs"), ("lsq+", "ste"), ("pact", "dsq"), ("sat", "clipped_ste")]
)
def test_compiled_by_inductor(grid, estimator):
    compiled_equals_eager(grid, estimator, "inductor")


@matrix
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_torch_export(grid, estimator, strict):
    model = prepared(grid, estimator).eval()
    x, _ = data()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(x), model(x))
    assert torch.equal(program.module()(x[:3]), model(x[:3]))


@matrix
def test_onnx_is_the_same_network(grid, estimator, tmp_path):
    model = prepared(grid, estimator, torch.float32).eval()
    x, _ = data(torch.float32)
    snap_biases(model, x)
    file = tmp_path / "net.onnx"
    export(model, file, x)
    report = verify(model, file, [x])
    assert report.ok, str(report)
