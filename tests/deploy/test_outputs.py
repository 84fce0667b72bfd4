"""Networks of several outputs: detectors, segmentation with an auxiliary head."""

import onnx
import pytest
import torch
from deploy_nets import quantized
from torch import nn

import bitwright as bw
from bitwright.batches import inputs_of
from bitwright.deploy import export, freeze, snap_biases, verify
from bitwright.deploy.predictions import beaten
from bitwright.deploy.unread import unread
from bitwright.errors import BitwrightError


class Pyramid(nn.Module):
    """Two levels joined from above, two heads on each; outputs as `form` says."""

    def __init__(self, form="lists"):
        super().__init__()
        self.form = form
        self.low, self.high = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.classes, self.boxes = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        low = torch.relu(self.low(x))
        top = self.right(torch.relu(self.high(low)))
        levels = [self.left(low) + nn.functional.interpolate(top, scale_factor=2.0), top]
        classes, boxes = [self.classes(p) for p in levels], [100 * self.boxes(p) for p in levels]
        if self.form == "lists":
            return classes, boxes
        # Names that the graph has tensors of, the input's, and one that no name may hold.
        return {"conv2d": classes[0], "input": boxes[0], "relu.1": (classes[1].flatten(1), boxes[1])}


NAMES = {
    "lists": ["output_0_0", "output_0_1", "output_1_0", "output_1_1"],
    "dict": ["conv2d", "output_input", "relu_1_0", "relu_1_1"],
}


def made(form, target, tmp_path):
    torch.manual_seed(0)
    model, x = Pyramid(form).eval(), torch.randn(6, 3, 16, 16)
    bits = "w4a4"
    sums = [] if target == "openvino" else bw.topology(model, x)
    bw.calibrate(bw.prepare(model, bw.rules(bits) + sums), [x])
    snap_biases(model, x)
    path = tmp_path / ("net.safetensors" if target == "packed" else "net.onnx")
    export(model, path, x[:1], target=target)
    return model, path, x


@pytest.mark.parametrize("form", ["lists", "dict"])
def test_files_have_every_output_under_its_name(form, tmp_path):
    model, path, x = made(form, "onnx", tmp_path)
    assert [value.name for value in onnx.load(str(path)).graph.output] == NAMES[form]
    found = verify(model, path, x.split(4))
    assert found.ok, found.first_difference
    assert [row.name for row in found.outputs] == NAMES[form]
    assert found.images == 6
    assert found.outputs[1].largest > 10 * found.outputs[0].largest or form == "lists"
    assert found.logit_difference == max(row.difference for row in found.outputs)
    assert {"logit_difference", "largest_logit"} <= found.as_dict().keys()


@pytest.mark.parametrize("target", ["packed", "openvino", "qonnx"])
def test_other_targets(target, tmp_path):
    if target != "packed":
        pytest.importorskip(target)
    model, path, x = made("lists", target, tmp_path)
    found = verify(model, path, x)
    assert found.ok, found.first_difference
    assert len(found.outputs) == 4


def test_a_difference_in_one_output_is_found_and_named(tmp_path):
    model, path, x = made("lists", "onnx", tmp_path)
    proto = onnx.load(str(path))
    last = next(node for node in proto.graph.node if "output_1_1" in node.output)
    last.output[0] = "before"
    proto.graph.node.append(onnx.helper.make_node("Mul", ["before", "factor"], ["output_1_1"]))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(torch.tensor(1.01).numpy(), "factor"))
    onnx.save(proto, str(path))
    found = verify(model, path, [x])
    assert not found.ok
    assert found.first_difference.startswith("output: output_1_1 differ by")


def test_an_image_whose_outputs_all_differ_counts_once():
    from bitwright.deploy.comparison import VerifyReport
    from bitwright.deploy.predictions import compare_outputs

    report = VerifyReport("f", [])
    report.name_outputs(["a", "b"], 2)
    one, other = torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    clean = torch.ones(2, dtype=torch.bool)
    compare_outputs(report, [one, one], [one, one], [other, other], clean, lambda rows: [one[rows], one[rows]])
    assert (report.images, report.different_frozen, report.different_file) == (2, 0, 1)
    with pytest.raises(BitwrightError, match=r"^f: is of another network: it has 1 outputs, the network has 2"):
        report.name_outputs(["a", "b"], 1)


@pytest.mark.parametrize(
    ("pixels", "codes_agree", "wrong"), [(1, True, 1), (1, False, 0), (4, False, 0), (5, False, 1)]
)
@pytest.mark.parametrize("signal", [False, True])
def test_where_codes_differ_one_pixel_in_a_thousand_may(pixels, codes_agree, wrong, signal):
    from bitwright.deploy.comparison import VerifyReport
    from bitwright.deploy.predictions import compare_outputs

    trained = torch.zeros(2, 3, 64, 64)
    trained[:, 1] = 1.0
    file = trained.clone()
    file[0, 2, 0, :pixels] = 2.0
    file[1, 2, 5] = 1 + 1e-7  # a tie by rounding
    clean = torch.tensor([codes_agree, True])
    report = VerifyReport("f", [])
    trained[1, 2, 5] = 1 - 1e-7
    if signal:  # (signals, classes, times)
        trained, file = trained.flatten(2), file.flatten(2)
    axis = 1 if signal else None
    compare_outputs(report, [trained], [trained], [file], clean, lambda rows: [trained[rows].double()], axis)
    assert (report.different_frozen, report.different_file) == (0, wrong)


@pytest.mark.parametrize(
    ("class_axis", "shape", "axis"),
    [(None, (2, 3, 50), 2), (1, (2, 3, 50), 1), (-2, (2, 3, 50), 1), (None, (2, 3, 5, 5), 1), (-1, (2, 5, 5, 3), 3)],
)
def test_predictions_are_taken_along_the_axis_of_classes(class_axis, shape, axis):
    """A change of one class along `axis` is found, and predictions along no other axis are looked at."""
    from bitwright.deploy.comparison import VerifyReport
    from bitwright.deploy.predictions import compare_outputs

    torch.manual_seed(0)
    trained = torch.rand(shape)
    low = trained.clone().transpose(axis, -1)  # a view: what follows changes each sort of prediction by itself
    low[1, 0] = low[1, 0].roll(1, -1)
    changed = low.transpose(axis, -1)
    raised = trained + torch.rand([n if i != axis else 1 for i, n in enumerate(shape)])  # the order of classes is kept
    for file, different in ((changed, 1), (raised, 0)):
        report = VerifyReport("f", [])
        clean = torch.ones(2, dtype=torch.bool)
        one, other = [trained], [file]
        compare_outputs(report, one, one, other, clean, lambda rows, t=trained: [t[rows].double()], class_axis)
        assert report.different_file == different
        assert report.outputs[0].class_axis == axis
        if different and axis > 1:
            assert f"predictions are the largest along axis {axis} of logits; class_axis= " in report.first_difference


def test_a_signal_with_a_class_a_time_is_told_so(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 3, 1)).eval()
    x = torch.randn(4, 2, 40)
    model = quantized(net, "w4a4", x)
    snap_biases(model, x)
    export(model, tmp_path / "net.onnx", x)
    found = verify(model, tmp_path / "net.onnx", [x], class_axis=1)
    assert found.ok, found.first_difference
    assert found.as_dict()["outputs"][0]["class_axis"] == 1
    assert verify(model, tmp_path / "net.onnx", [x]).outputs[0].class_axis == 2
    for wrong in (0, "1", True):
        with pytest.raises(
            BitwrightError, match=r"^verify: class_axis=.* is not accepted; use an axis behind the first"
        ):
            verify(model, tmp_path / "net.onnx", [x], class_axis=wrong)


def test_outputs_that_are_no_rows_of_images_or_no_floats(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.register_buffer("anchors", torch.arange(12.0).view(3, 4))

        def forward(self, x):
            y = self.conv(x)
            return {"map": y, "best": y.argmax(1), "any": y.amax((1, 2, 3)) > 0, "anchors": self.anchors * 2}

    x = torch.randn(5, 3, 8, 8)
    model = quantized(Odd().eval(), "w8a8", x)
    snap_biases(model, x)
    export(model, tmp_path / "net.onnx", x)
    found = verify(model, tmp_path / "net.onnx", [x])
    assert found.ok, found.first_difference
    assert [row.name for row in found.outputs] == ["map", "best", "any", "anchors"]


def test_the_native_runtime_and_executorch_refuse_in_one_line(tmp_path):
    from bitwright.deploy.targets.executorch_form import refuse_several_outputs

    model, path, x = made("dict", "onnx", tmp_path)
    with pytest.raises(BitwrightError, match="the runtime takes files of one float32 input and one output"):
        verify(model, path, [x], runtime="native")
    with pytest.raises(BitwrightError, match="target executorch takes models of one tensor out"):
        refuse_several_outputs(freeze(model, x), x[:1])


class WithoutAux(nn.Module):
    """A network whose second head is computed and dropped, as wrappers around segmentation networks do."""

    adds = False

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 1)
        self.aux = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        aux = self.aux(x)
        return self.head(x) + aux if self.adds else self.head(x)


@pytest.mark.parametrize("target", ["onnx", "packed", "qonnx"])
def test_heads_without_effect_on_an_output_are_not_asked_for(target, tmp_path):
    model, x = WithoutAux().eval(), torch.randn(6, 3, 16, 16)
    bw.calibrate(bw.prepare(model, bw.rules("w4a4")), [x])
    snap_biases(model, x)
    assert {name.partition(".")[0] for name in unread(model, inputs_of(x, "test"))} == {"aux"}
    path = tmp_path / "net.file"
    export(model, path, x, target=target)
    found = verify(model, path, [x])
    assert found.ok, found.first_difference
    assert {row["name"].partition(".")[0] for row in found.rows() if row["values"]} >= {"stem", "head"}
    assert all(p.grad is None for p in model.parameters())


class Overwrites(WithoutAux):
    """Runs well, and cannot be differentiated: a value that a gradient needs is written over."""

    def forward(self, x):
        y = torch.sigmoid(self.stem(x))
        z = self.head(y)
        y.zero_()
        return z


def test_a_network_that_cannot_be_differentiated_is_verified(tmp_path):
    model, x = Overwrites().eval(), torch.randn(6, 3, 16, 16)
    bw.calibrate(bw.prepare(model, [bw.Rule(match="stem", weight=bw.QuantizerSpec(bits=4))]), [x])
    assert unread(model, inputs_of(x, "test")) == set()


def test_one_prediction_an_image_is_no_map():
    outputs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[:, :, None, None]
    wrong = torch.tensor([[[0]], [[1]]])
    assert beaten(outputs, wrong, 1, torch.tensor([False, False])).tolist() == [False, True]


def test_a_file_without_a_layer_that_counts_is_another_network(tmp_path):
    model, x = WithoutAux().eval(), torch.randn(6, 3, 16, 16)
    bw.calibrate(bw.prepare(model, bw.rules("w4a4")), [x])
    snap_biases(model, x)
    export(model, tmp_path / "net.onnx", x)
    model.adds = True
    with pytest.raises(BitwrightError, match=r"is of another network: it has no tensor 'aux"):
        verify(model, tmp_path / "net.onnx", [x])
