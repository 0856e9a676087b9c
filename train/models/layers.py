"""Pieces that several families share, each written once: a family's file holds only what is its own."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Builder = Callable[[int], nn.Module]
"""What a family registers under a model's name: number of classes in, network out."""


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the image size at stride 1, without bias: batch norm follows with its own."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    """Convolution, batch norm, ReLU, to be unpacked: the keys of the MobileNets number them in flat rows."""
    layer = conv(in_channels, out_channels, kernel, stride, groups)
    return layer, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


def global_pool(x: Tensor) -> Tensor:
    """Mean over the image, `[N, C, H, W]` to `[N, C]`: for any image size."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def init_convs(model: nn.Module) -> None:
    """Draw every convolution from `N(0, 2 / (k*k*out))` ("MSRA", fan out), bias 0: arXiv 1502.01852.

    Batch norm needs nothing: PyTorch already starts it at weight 1 and bias 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
