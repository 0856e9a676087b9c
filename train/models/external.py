"""Models of torchvision and timm, imported only when one is asked for: optional both, and slow to import."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from torch import nn

from .weights import load_weights

# Short names of published weights, as configurations in the field write them.
_SHORT = {"v1": "IMAGENET1K_V1", "v2": "IMAGENET1K_V2"}

# In training these two return auxiliary logits beside the real ones unless told not to.
_WITH_AUXILIARY = ("googlenet", "inception_v3")


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error that names the closest valid names, whatever their case; empty if none is close."""
    folded = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(folded[match] for match in close)}" if close else ""


def torchvision_model(name: str, num_classes: int, weights: str | None) -> nn.Module:
    """torchvision's classifier `name`; `weights` is `v1`, `v2`, a published name in full, or a path."""
    models = _library("torchvision").models
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"build_model: expected a model of torchvision, got {name!r}{nearest(name, known)}")
    options = {"aux_logits": False} if name in _WITH_AUXILIARY else {}
    published = models.get_model_weights(name).__members__
    chosen = published.get(_SHORT.get(weights, weights))
    if chosen is not None:
        _check_classes(name, num_classes, len(chosen.meta["categories"]))
        # torchvision's own loader renames the keys of older files, and checks the hash in the file's name.
        return models.get_model(name, weights=chosen, **options)
    if options:
        options["init_weights"] = True  # what these two do today; they warn unless told
    model = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return _with_file(model, weights, f"one of torchvision's {', '.join(published)}")


def timm_model(name: str, num_classes: int, weights: str | None) -> nn.Module:
    """timm's model `name` (with or without its `.tag`); `weights` is `pretrained` or a path."""
    timm = _library("timm")
    if not timm.is_model(name):
        close = nearest(name, timm.list_models())
        raise ValueError(f"build_model: expected a model of timm, got {name!r}{close}")
    if weights != "pretrained":
        model = timm.create_model(name, num_classes=num_classes)
        return _with_file(model, weights, "'pretrained'")
    published = timm.get_pretrained_cfg(name)
    if published is None or not published.has_weights:
        raise ValueError(
            f"build_model: expected a model of timm with published weights, got {name!r}, which has none; "
            "leave weights out, or give a path"
        )
    # timm would put a fresh, random classifier behind published weights: no teacher, and nothing would tell.
    _check_classes(name, num_classes, published.num_classes)
    return timm.create_model(name, pretrained=True)


def _library(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"build_model: expected {name}, which this model needs, got '{error}'; pip install {name}"
        ) from error


def _with_file(model: nn.Module, weights: str | None, otherwise: str) -> nn.Module:
    if weights is not None:
        try:
            load_weights(model, weights)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; weights can also be {otherwise}") from None
    return model


def _check_classes(name: str, num_classes: int, published: int) -> None:
    if num_classes != published:
        raise ValueError(
            f"build_model: expected num_classes={published}, as the published weights of {name} have, "
            f"got {num_classes}; leave weights out, or give the path of weights for your classes"
        )
