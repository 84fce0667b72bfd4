"""`build_model`: a network from its name."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.training.lookup import check_options, close_matches, first_line
from bitwright.training.models.own import own_model
from bitwright.training.models.resnet import CifarResNet
from bitwright.training.models.vgg import VGGSmall
from bitwright.training.models.weights import load_weights, read_weights
from bitwright.training.vision import import_timm, import_torchvision


def _resnet(depth: int, num_classes: int, in_channels: int, image_size: int | None, **options: Any) -> nn.Module:
    check_options(CifarResNet.__init__, options, f"model 'resnet{depth}'")
    return CifarResNet(depth, num_classes, in_channels, **options)


def _vgg_small(num_classes: int, in_channels: int, image_size: int | None, **options: Any) -> nn.Module:
    check_options(VGGSmall.__init__, options, "model 'vgg_small'")
    return VGGSmall(num_classes, in_channels, 32 if image_size is None else image_size, **options)


OWN_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": functools.partial(_resnet, 8),
    "resnet20": functools.partial(_resnet, 20),
    "resnet32": functools.partial(_resnet, 32),
    "resnet56": functools.partial(_resnet, 56),
    "vgg_small": _vgg_small,
}


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    example: Tensor | None = None,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """The float network called `name`, in training mode, drawn from torch's global random state.

    name: a key of `OWN_MODELS`, `torchvision/<name>`, `timm/<name>`, or `FILE.py:NAME` for one of the user's own
    (`own.own_model`).
    image_size: height and width of the images; needed only by models that fix it (vgg_small: 32 by default,
    vision transformers: their own default).
    example: one sample of the data, (1, ...), that networks of the user's own are tried on.
    pretrained: weights that torchvision or timm publishes (a download into their own caches); a classifier for
    another number of classes starts fresh.
    checkpoint: a file with a state dict that fits exactly (`weights.read_weights`).
    options: for resnets `width` and `shortcut`, for vgg_small `width`, else what the library's model takes.

    Raises: BitwrightError for an unknown name (with close matches), unknown or bad options, a missing extra, weights
    that cannot be had or do not fit.
    """
    for key, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise BitwrightError(f"model {name!r}: {key} is {value}, accepted is at least 1")
    library, _, inner = name.rpartition("/")
    without = BitwrightError(f"model {name!r} has no published weights; give checkpoint=FILE instead")
    if ":" in name:
        if pretrained:
            raise without
        sizes: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
        model = own_model(name, **sizes, example=example, options=options)
    elif library == "torchvision":
        model = _torchvision(inner, num_classes, in_channels, image_size, pretrained, options)
    elif library == "timm":
        model = _timm(inner, num_classes, in_channels, image_size, pretrained, options)
    elif name in OWN_MODELS:
        if pretrained:
            raise without
        model = OWN_MODELS[name](num_classes, in_channels, image_size, **options)
    else:
        known = [*OWN_MODELS, "torchvision/<name>", "timm/<name>", "FILE.py:NAME"]
        raise BitwrightError(f"unknown model {name!r}; {close_matches(name, known)}")
    if checkpoint is not None:
        load_weights(model, read_weights(checkpoint), str(checkpoint))
    return model


def _torchvision(
    name: str,
    classes: int,
    in_channels: int,
    image_size: int | None,
    pretrained: bool,
    options: dict[str, Any],
) -> nn.Module:
    models = import_torchvision().models
    known = models.list_models(module=models)  # classification only: detection and the rest are submodules
    if name not in known:
        raise BitwrightError(f"unknown model 'torchvision/{name}'; {close_matches(name, known)}")
    if in_channels != 3:
        raise BitwrightError(
            f"model 'torchvision/{name}' takes 3 input channels, the data has {in_channels}; "
            "timm models and our own take any number"
        )
    if image_size is not None and name.startswith("vit_"):
        options = {"image_size": image_size} | options
    try:
        model = models.get_model(name, weights=None, num_classes=classes, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise BitwrightError(f"model 'torchvision/{name}' with options {options}: {first_line(error)}") from error
    if pretrained:
        weights = models.get_model_weights(name).DEFAULT
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise BitwrightError(
                f"cannot get the weights of 'torchvision/{name}' from {weights.url}: {first_line(error)}"
            ) from error
        own, published = model.state_dict(), len(weights.meta["categories"])
        for key, tensor in own.items():
            is_classifier = tensor.shape[:1] == (classes,) and state[key].shape[:1] == (published,)
            if classes != published and is_classifier:
                state[key] = tensor
        load_weights(model, state, str(weights))
    return model


def _timm(
    name: str,
    classes: int,
    in_channels: int,
    image_size: int | None,
    pretrained: bool,
    options: dict[str, Any],
) -> nn.Module:
    timm = import_timm()
    if not timm.is_model(name):
        raise BitwrightError(f"unknown model 'timm/{name}'; {close_matches(name, timm.list_models())}")
    try:
        config = timm.get_pretrained_cfg(name)
        if image_size is not None and config is not None and config.fixed_input_size:
            options = {"img_size": image_size} | options
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=in_channels, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        what = f"options {options}" + " and published weights" * pretrained
        raise BitwrightError(f"model 'timm/{name}' with {what}: {first_line(error)}") from error
