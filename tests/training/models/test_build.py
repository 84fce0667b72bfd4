from pathlib import Path

import pytest
import torch

from bitwright.errors import BitwrightError
from bitwright.training.models import OWN_MODELS, build_model
from bitwright.training.models.resnet import CifarResNet
from bitwright.training.vision import import_timm


@pytest.mark.parametrize("name", sorted(OWN_MODELS))
def test_own_models_by_name(name: str) -> None:
    model = build_model(name, num_classes=4, in_channels=1, image_size=8, width=4)
    assert model.training
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 4)


def test_depth_and_options_arrive() -> None:
    model = build_model("resnet20", num_classes=10, width=8, shortcut="B")
    expected = CifarResNet(20, 10, width=8, shortcut="B")
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}


def test_the_global_seed_decides_the_weights() -> None:
    def first() -> torch.Tensor:
        torch.manual_seed(3)
        return torch.cat([p.flatten() for p in build_model("resnet8", num_classes=2).parameters()])

    assert torch.equal(first(), first())


def test_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    source = build_model("resnet8", num_classes=4, width=4)
    torch.save(source.state_dict(), tmp_path / "r8.pt")
    loaded = build_model("resnet8", num_classes=4, width=4, checkpoint=tmp_path / "r8.pt")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in source.state_dict().items())
    with pytest.raises(BitwrightError, match=r"r8\.pt does not fit the model \(shape: fc\.weight is \(4, 16\)"):
        build_model("resnet8", num_classes=5, width=4, checkpoint=tmp_path / "r8.pt")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet21", {}, r"unknown model 'resnet21'; did you mean resnet(20|32)"),
        ("lenet", {}, r"unknown model 'lenet'; .*"),
        ("torch/resnet18", {}, r"unknown model 'torch/resnet18'"),
        ("resnet8", {"shortcuts": "A"}, r"unknown option 'shortcuts' for model 'resnet8'; did you mean shortcut\?"),
        ("vgg_small", {"shortcut": "A"}, r"unknown option 'shortcut' for model 'vgg_small'; accepted: width"),
        ("resnet8", {"pretrained": True}, "model 'resnet8' has no published weights; give checkpoint=FILE instead"),
        ("resnet8", {"in_channels": 0}, "model 'resnet8': in_channels is 0, accepted is at least 1"),
    ],
)
def test_names_and_options_that_are_not_there(name: str, options: dict, message: str) -> None:
    with pytest.raises(BitwrightError, match=message):
        build_model(name, num_classes=10, **options)


class TestLibraries:
    @pytest.fixture(autouse=True)
    def _imported(self) -> None:
        try:
            import_timm()
        except BitwrightError as error:
            pytest.skip(str(error))

    @pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet10t", "torchvision/squeezenet1_1"])
    def test_convolutional_networks_take_any_size(self, name: str) -> None:
        model = build_model(name, num_classes=3, image_size=64)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)

    def test_timm_takes_any_channel_count(self) -> None:
        model = build_model("timm/resnet10t", num_classes=3, in_channels=1)
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)

    def test_networks_of_fixed_size_get_the_image_size(self) -> None:
        options = {"embed_dim": 32, "depth": 1, "num_heads": 2}
        model = build_model("timm/vit_tiny_patch16_224", num_classes=3, image_size=32, **options)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
        model = build_model("torchvision/vit_b_32", num_classes=3, image_size=64)
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("torchvision/resnet19", {}, r"unknown model 'torchvision/resnet19'; did you mean resnet18, "),
            ("timm/resnet19", {}, r"unknown model 'timm/resnet19'; did you mean resnet18, "),
            ("torchvision/fcos_resnet50_fpn", {}, "unknown model 'torchvision/fcos_resnet50_fpn'"),
            ("torchvision/resnet18", {"in_channels": 1}, "takes 3 input channels, the data has 1"),
            ("torchvision/resnet18", {"wdith": 1}, r"model 'torchvision/resnet18' with options \{'wdith': 1\}: .*"),
            (
                "timm/resnet18.nope_in1k",
                {},
                r"model 'timm/resnet18.nope_in1k' with options \{\}: Invalid pretrained tag",
            ),
            ("torchvision/vit_b_16", {"image_size": 30}, "'torchvision/vit_b_16' with options .*: Input shape"),
            ("torchvision/zzz", {}, r"unknown model 'torchvision/zzz'; accepted: \d+ names, among them alexnet, "),
            ("timm/resnet18", {"wdith": 1}, r"model 'timm/resnet18' with options \{'wdith': 1\}: .*"),
        ],
    )
    def test_names_and_options_that_are_not_there(self, name: str, options: dict, message: str) -> None:
        with pytest.raises(BitwrightError, match=message):
            build_model(name, num_classes=10, **options)

    def test_published_weights_with_another_number_of_classes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision.models import WeightsEnum, resnet18

        published = {k: v + 0 for k, v in resnet18(weights=None).state_dict().items()}
        monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(published))
        model = build_model("torchvision/resnet18", num_classes=7, pretrained=True)
        for key, value in model.state_dict().items():
            assert value.shape[0] == 7 if key.startswith("fc.") else torch.equal(value, published[key])
        same = build_model("torchvision/resnet18", num_classes=1000, pretrained=True)
        assert torch.equal(same.fc.weight, published["fc.weight"])  # pyright: ignore

    def test_published_weights_without_a_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from urllib.error import URLError

        def refuse(*_, **__):
            raise URLError("no network")

        monkeypatch.setattr("urllib.request.urlopen", refuse)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(BitwrightError, match=r"cannot get the weights of 'torchvision/resnet18' from https://"):
            build_model("torchvision/resnet18", num_classes=10, pretrained=True)
