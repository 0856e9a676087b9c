"""The model zoo: `build_model` by name, `model_names` of a data set, `load_weights` from a file.

The CIFAR names, keys and shapes are mdistiller's, so that its published teachers load; every model's forward
returns logits and nothing else. A family is a file that registers its models in a plain dict, `MODELS`.
"""

from __future__ import annotations

from torch import nn

from . import digits, mobilenetv1, mobilenetv2, resnet, shufflenetv1, shufflenetv2, vgg, wrn
from .external import nearest, timm_model, torchvision_model
from .layers import Builder
from .weights import load_weights

__all__ = ["build_model", "load_weights", "model_names"]

_BUILDERS: dict[str, dict[str, Builder]] = {
    "cifar100": {
        **resnet.MODELS,
        **wrn.MODELS,
        **vgg.MODELS,
        **mobilenetv2.MODELS,
        **shufflenetv1.MODELS,
        **shufflenetv2.MODELS,
    },
    "imagenet": mobilenetv1.MODELS,
    "digits": digits.MODELS,
}

# Either library's models, for any data set: the name after the prefix is the library's own.
_LIBRARIES = {"torchvision/": torchvision_model, "timm/": timm_model}

# The field's ImageNet pairs use torchvision's networks and weights under mdistiller's names.
_FROM_TORCHVISION = {"ResNet18": "resnet18", "ResNet34": "resnet34", "ResNet50": "resnet50"}


def model_names(dataset: str) -> list[str]:
    """Names that `build_model` knows for `dataset` (cifar100, imagenet, digits), the libraries' left out."""
    if dataset not in _BUILDERS:
        raise ValueError(f"model_names: expected a data set out of {', '.join(_BUILDERS)}, got {dataset!r}")
    return [*(_FROM_TORCHVISION if dataset == "imagenet" else ()), *_BUILDERS[dataset]]


def build_model(
    name: str,
    num_classes: int,
    *,
    dataset: str = "cifar100",
    weights: str | None = None,
) -> nn.Module:
    """A new model `name` with `num_classes` outputs, in training mode, on the default device.

    `weights`: None for a fresh start, or the path of a file for `load_weights`; torchvision's models also
    take the name of published weights (`v1`, or in full `IMAGENET1K_V1`), and timm's take `pretrained`.
    `timm/<name>` and `torchvision/<name>` reach every model of those libraries, for any data set.
    """
    for prefix, build in _LIBRARIES.items():
        if name.startswith(prefix):
            return build(name.removeprefix(prefix), num_classes, weights)
    known = model_names(dataset)
    if name not in known:
        elsewhere = [other for other in _BUILDERS if name in model_names(other)]
        hint = f"; it belongs to data set {elsewhere[0]}" if elsewhere else nearest(name, known)
        raise ValueError(
            f"build_model: expected a model of data set {dataset}, got {name!r}{hint}; "
            f"all of them: {', '.join(known)}; any other as timm/<name> or torchvision/<name>"
        )
    if name not in _BUILDERS[dataset]:
        return torchvision_model(_FROM_TORCHVISION[name], num_classes, weights)
    model = _BUILDERS[dataset][name](num_classes)
    if weights is not None:
        load_weights(model, weights)
    return model
