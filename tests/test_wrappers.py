"""Models in other people's wrappers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bitwright as bw
from bitwright.errors import BitwrightError
from bitwright.wrappers import say_autocast, unwrap

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # by torch.compile itself

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5))


def prepared() -> nn.Module:
    model = net()
    rules = bw.rules("w4a4") + bw.topology(model, X)
    return bw.calibrate(bw.prepare(model, rules), [X])


WRAPPERS = {
    "compiled": torch.compile,
    "averaged": AveragedModel,
    "moving average": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "parallel": nn.DataParallel,
    "compiled average": lambda m: torch.compile(AveragedModel(m)),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_file_is_that_of_the_module_inside(kind: str, tmp_path: Path) -> None:
    plain, wrapped = prepared(), WRAPPERS[kind](prepared())
    for model, name in ((plain, "plain.onnx"), (wrapped, "wrapped.onnx")):
        assert bw.snap_biases(model, X) == 2
        bw.export(model, tmp_path / name, X)
        assert bw.verify(model, tmp_path / name, [X]).ok
    assert (tmp_path / "plain.onnx").read_bytes() == (tmp_path / "wrapped.onnx").read_bytes()
    assert bw.coverage(wrapped, X).complete
    assert type(unwrap(wrapped)) is nn.Sequential


def test_a_wrapped_model_is_prepared_in_place_under_its_own_names() -> None:
    inner = net()
    wrapped = nn.DataParallel(inner)
    rules = [*bw.rules("w4a4"), bw.Rule(match="2", weight=bw.QuantizerSpec(bits=2)), *bw.topology(wrapped, X)]
    assert bw.prepare(wrapped, rules) is wrapped
    assert bw.calibrate(wrapped, [X]) is wrapped
    assert int(inner[2].weight_quantizer.bits) == 2  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    assert list(bw.quantizers(inner)) == [q.name for q in bw.quantizers(inner).values()]


class Named(nn.Module):
    """Puts its logits into a dict, as many libraries' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)}


def test_a_model_that_puts_out_a_dict_of_one_tensor(tmp_path: Path) -> None:
    model = Named()
    bw.calibrate(bw.prepare(model, bw.rules("w4a4")), X)
    bw.snap_biases(model, X)
    bw.export(model, tmp_path / "m.onnx", X)
    report = bw.verify(model, tmp_path / "m.onnx", X)
    assert report.ok
    assert report.images == 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    model = prepared().to(dtype)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(BitwrightError, match=rf"^export: 0\.weight is {kind}; .*model\.float\(\)"):
        bw.export(model, tmp_path / "m.onnx", X.to(dtype))
    assert not (tmp_path / "m.onnx").exists()


def test_an_average_of_buffers_too_deploys(tmp_path: Path) -> None:
    """torchvision's training script averages buffers; batch norms make that worth while."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    bw.calibrate(bw.prepare(model, bw.rules("w3a3", ends=None)), [X])
    average = AveragedModel(model, use_buffers=True)
    for _ in range(3):
        model(X)
        average.update_parameters(model)
    average.eval()
    bw.snap_biases(average, X)
    bw.export(average, tmp_path / "m.onnx", X)
    assert bw.verify(average, tmp_path / "m.onnx", [X]).ok
    assert {int(q.bits) for q in bw.quantizers(average).values()} == {3}


def test_a_forward_under_accelerates_autocast_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    model = prepared()
    assert unwrap(model) is model
    assert not caplog.records
    model._original_forward = model.forward  # pyright: ignore[reportArgumentType]
    say_autocast.cache_clear()
    assert unwrap(model) is model
    assert "keep_fp32_wrapper=False" in caplog.text
