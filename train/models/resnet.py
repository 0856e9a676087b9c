"""Residual networks for 32 x 32 images (He et al., "Deep Residual Learning", arXiv 1512.03385).

Two published shapes: `resnet<depth>[x4]` is section 4.2 of the paper, three stages and 6n+2 layers, `x4` with
wider stages; `ResNet18` and `ResNet50` are the four-stage ImageNet networks with a 3 x 3 stem that keeps the
image size. Published weights of the two spell two keys differently; the blocks are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Builder, conv, global_pool, init_convs

# Channels of the stem, then of each stage.
THIN = (16, 16, 32, 64)
THIN_X4 = (32, 64, 128, 256)
WIDE = (64, 64, 128, 256, 512)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The 1 x 1 convolution on the identity path where the shape changes (the paper's option B)."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class _Residual(nn.Module):
    """Identity path plus the branch of a subclass, ReLU after the sum."""

    expansion: int

    def __init__(self, shortcut: str) -> None:
        super().__init__()
        self.shortcut_key = shortcut

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        projection = getattr(self, self.shortcut_key)
        identity = x if projection is None else projection(x)
        return F.relu(self.branch(x) + identity, inplace=True)


class BasicBlock(_Residual):
    """Two 3 x 3 convolutions (figure 5, left, of the paper)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__(shortcut)
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.add_module(shortcut, _projection(in_channels, channels, stride))

    def branch(self, x: Tensor) -> Tensor:
        """Both convolutions, before the sum."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.bn2(self.conv2(x))


class Bottleneck(_Residual):
    """1 x 1 down, 3 x 3, 1 x 1 up by four (figure 5, right); the stride is on the 3 x 3, as published."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__(shortcut)
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, channels * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.add_module(shortcut, _projection(in_channels, channels * self.expansion, stride))

    def branch(self, x: Tensor) -> Tensor:
        """All three convolutions, before the sum."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.bn3(self.conv3(x))


class ResNet(nn.Module):
    """Stem, one stage per entry of `depths` (the first at full size, each further one halves it), classifier.

    `channels` has the stem's width, then each stage's; `shortcut` and `classifier` are those parts' keys.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        channels: Sequence[int],
        depths: Sequence[int],
        num_classes: int,
        shortcut: str,
        classifier: str,
    ) -> None:
        super().__init__()
        width = channels[0]
        self.conv1 = conv(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.stage_keys = [f"layer{index}" for index in range(1, len(depths) + 1)]
        self.classifier_key = classifier
        for index, key in enumerate(self.stage_keys):
            blocks = []
            for position in range(depths[index]):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(width, channels[index + 1], stride, shortcut))
                width = channels[index + 1] * block.expansion
            self.add_module(key, nn.Sequential(*blocks))
        self.add_module(classifier, nn.Linear(width, num_classes))
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, 3, H, W]`."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for key in self.stage_keys:
            x = getattr(self, key)(x)
        return getattr(self, self.classifier_key)(global_pool(x))


def _thin(num_classes: int, *, depth: int, channels: Sequence[int]) -> ResNet:
    blocks = (depth - 2) // 6  # two convolutions a block, three stages, and the stem and classifier besides
    return ResNet(BasicBlock, channels, (blocks,) * 3, num_classes, shortcut="downsample", classifier="fc")


def _wide(num_classes: int, *, block: type[BasicBlock] | type[Bottleneck], depths: Sequence[int]) -> ResNet:
    return ResNet(block, WIDE, depths, num_classes, shortcut="shortcut", classifier="linear")


MODELS: dict[str, Builder] = {
    **{f"resnet{d}": partial(_thin, depth=d, channels=THIN) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}x4": partial(_thin, depth=d, channels=THIN_X4) for d in (8, 32)},
    "ResNet18": partial(_wide, block=BasicBlock, depths=(2, 2, 2, 2)),
    "ResNet50": partial(_wide, block=Bottleneck, depths=(3, 4, 6, 3)),
}
