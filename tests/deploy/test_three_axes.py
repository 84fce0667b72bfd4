"""Convolutions over three axes: videos and volumes."""

import collections

import pytest
import torch
from safetensors import safe_open
from torch import nn

import bitwright as bw
from bitwright.deploy import freeze
from bitwright.deploy.bench import session
from bitwright.deploy.predictions import beaten
from bitwright.deploy.targets.executorch_form import refuse_layer
from bitwright.deploy.targets.packed_loader import NEWER


class Classifier(nn.Module):
    """Strides, groups and kernels that differ by axis; a pooling between codes."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv3d(2, 6, 3, 1, 1, bias=False), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2)),
            *(nn.Conv3d(6, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1), groups=2), nn.ReLU()),
            *(nn.Conv3d(6, 8, (3, 1, 1), padding="same"), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5)),
        )

    def forward(self, x):
        return self.features(x)


class UNet(nn.Module):
    """A map of two classes at the volume's size."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(2, 6, 3, 1, 1, bias=False), nn.BatchNorm3d(6), nn.ReLU())
        self.inner = nn.Sequential(nn.MaxPool3d(2), nn.Conv3d(6, 8, 3, 1, 1), nn.ReLU())
        self.up, self.out = nn.ConvTranspose3d(8, 6, 2, 2), nn.Conv3d(12, 2, 1)

    def forward(self, x):
        wide = self.down(x)
        return self.out(torch.cat([self.up(self.inner(wide)), wide], 1))


def prepared(make, topology, x):
    torch.manual_seed(0)
    model = make().train()
    for _ in range(3):
        model(torch.randn_like(x) + 0.2)
    bw.prepare(model.eval(), bw.rules("w4a4") + bw.topology(model, x, topology))
    return bw.calibrate(model, [x]).eval()


VOLUMES = torch.randn(2, 2, 4, 6, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [Classifier, UNet])
@pytest.mark.parametrize(
    ("target", "topology"), [("onnx", "res8"), ("packed", "res8"), ("qonnx", "fpres"), ("openvino", "fpres")]
)
def test_the_file_is_the_network(make, target, topology, tmp_path):
    model = prepared(make, topology, VOLUMES)
    bw.snap_biases(model, VOLUMES)
    bw.export(model, tmp_path / "file", VOLUMES, target=target)
    found = bw.verify(model, tmp_path / "file", [VOLUMES, VOLUMES.flip(-1)])
    assert found.ok, found.first_difference


def test_evaluation_is_the_file_to_the_bit_and_so_is_the_native_runtime(tmp_path):
    model = bw.make_reproducible(prepared(UNet, "fpres", VOLUMES))
    bw.snap_biases(model, VOLUMES)
    bw.export(model, tmp_path / "file.onnx", VOLUMES)
    for runtime in ("default", "native"):
        found = bw.verify(model, tmp_path / "file.onnx", [VOLUMES], runtime=runtime)
        assert found.ok, found.first_difference
    run = session(tmp_path / "file.onnx", 1, None)[0]
    with torch.no_grad():
        assert torch.from_numpy(run.run(None, {"input": VOLUMES.numpy()})[0]).equal(model(VOLUMES))


def test_all_convolutions_run_on_integer_kernels(tmp_path):
    model = prepared(Classifier, "res8", VOLUMES)
    bw.snap_biases(model, VOLUMES)
    bw.export(model, tmp_path / "file.onnx", VOLUMES)
    graph = session(tmp_path / "file.onnx", 1, tmp_path / "run.onnx")[1].graph
    kinds = collections.Counter(node.op_type for node in graph.node)
    assert kinds["QLinearConv"] == 3
    assert not {"Conv", "FusedConv", "MatMul", "Gemm"} & kinds.keys()


def test_packed_files_say_that_earlier_loaders_cannot_read_them(tmp_path):
    model = prepared(Classifier, "res8", VOLUMES)
    bw.snap_biases(model, VOLUMES)
    bw.export(model, tmp_path / "file", VOLUMES, target="packed")
    with safe_open(str(tmp_path / "file"), framework="pt") as file:
        assert file.metadata()["version"] == NEWER


def test_executorch_refuses_them():
    frozen = freeze(prepared(Classifier, "res8", VOLUMES), VOLUMES)
    with pytest.raises(bw.BitwrightError, match=r"features\.0: target executorch keeps no .* over three axes"):
        refuse_layer(frozen.features[0])


def test_one_voxel_of_a_volume_may_differ_where_codes_do():
    """A volume has a prediction a voxel, one of which may differ where codes do."""
    outputs = torch.zeros(1, 3, 2, 3, 4)
    outputs[:, 0] = 1.0
    wrong = outputs.argmax(1)
    wrong[0, 0, 0, 0] = 2
    assert beaten(outputs, wrong, 1, torch.tensor([False])).tolist() == [False]
    assert beaten(outputs, wrong, 1, torch.tensor([True])).tolist() == [True]
