"""ShuffleNetV2, width 1.0, for 32 x 32 images (Ma et al., arXiv 1807.11164)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Builder, conv, global_pool

STEM, LAST = 24, 1024
STAGES = ((116, 3), (232, 7), (464, 3))  # channels, units after the strided one: table 5 of the paper, 1x


class SplitUnit(nn.Module):
    """Half the channels pass untouched, half go through 1 x 1, depthwise 3 x 3, 1 x 1 (figure 3c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Both halves, joined and shuffled."""
        kept, out = x.chunk(2, 1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)), inplace=True)
        return F.channel_shuffle(torch.cat([kept, out], 1), 2)


class DownUnit(nn.Module):
    """Two strided branches over the whole input, half the output each (figure 3d): 1-2 left, 3-5 right."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(in_channels, in_channels, 3, 2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv(in_channels, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(in_channels, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv(half, half, 3, 2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Both branches, joined and shuffled."""
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return F.channel_shuffle(torch.cat([left, right], 1), 2)


def _stage(in_channels: int, channels: int, units: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_channels, channels), *(SplitUnit(channels) for _ in range(units)))


class ShuffleNetV2(nn.Module):
    """A 1 x 1 stem at full size, three halving stages, a 1 x 1 to 1024 channels, classifier.

    Weights start at PyTorch's defaults, as in the published runs.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv(3, STEM, 1)
        self.bn1 = nn.BatchNorm2d(STEM)
        width = STEM
        stages = []
        for channels, units in STAGES:
            stages.append(_stage(width, channels, units))
            width = channels
        self.layer1, self.layer2, self.layer3 = stages
        self.conv2 = conv(width, LAST, 1)
        self.bn2 = nn.BatchNorm2d(LAST)
        self.linear = nn.Linear(LAST, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, 3, H, W]`."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.linear(global_pool(x))


MODELS: dict[str, Builder] = {"ShuffleV2": ShuffleNetV2}
