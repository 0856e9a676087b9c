"""Wide residual networks `wrn_<depth>_<width>` (Zagoruyko & Komodakis, arXiv 1605.07146)."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Builder, conv, global_pool, init_convs


class PreactBlock(nn.Module):
    """Batch norm and ReLU before each of two 3 x 3 convolutions; nothing after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        # Chosen by width alone, as published: every strided block of this family widens too.
        self.convShortcut = None if in_channels == channels else conv(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Where the width changes, the shortcut reads the activated input, elsewhere the raw one."""
        active = F.relu(self.bn1(x), inplace=True)
        identity = x if self.convShortcut is None else self.convShortcut(active)
        out = F.relu(self.bn2(self.conv1(active)), inplace=True)
        return self.conv2(out) + identity


class Stage(nn.Module):
    """A row of blocks. A module of its own only because published keys say `block1.layer.0`."""

    def __init__(self, blocks: int, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        rest = [PreactBlock(channels, channels, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(PreactBlock(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """All blocks in turn."""
        return self.layer(x)


class WideResNet(nn.Module):
    """Three stages of `(depth - 4) / 6` blocks, `width` times the channels of the thin network; no dropout.

    mdistiller's forward runs three of the batch norms a second time, for features that only its feature
    distillers read. That changes no output, but moves those running statistics twice a step; here it is once.
    """

    def __init__(self, num_classes: int, *, depth: int, width: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = conv(3, channels[0], 3)
        self.block1 = Stage(blocks, channels[0], channels[1], 1)
        self.block2 = Stage(blocks, channels[1], channels[2], 2)
        self.block3 = Stage(blocks, channels[2], channels[3], 2)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)
        init_convs(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, 3, H, W]`."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.relu(self.bn1(x), inplace=True)
        return self.fc(global_pool(x))


MODELS: dict[str, Builder] = {
    f"wrn_{depth}_{width}": partial(WideResNet, depth=depth, width=width)
    for depth, width in ((16, 1), (16, 2), (40, 1), (40, 2))
}
