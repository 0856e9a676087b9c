"""ShuffleNet, 3 groups, for 32 x 32 images (Zhang et al., arXiv 1707.01083)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Builder, conv, global_pool

STEM, GROUPS = 24, 3
STAGES = ((240, 4), (480, 8), (960, 4))  # output channels and units: table 1 of the paper, g = 3


class ShuffleUnit(nn.Module):
    """Grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1 (figure 2 of the paper).

    A strided unit joins its pooled input as further channels, so the branch makes only the rest of the width.
    Unlike the paper, a ReLU also follows the depthwise convolution: published weights were trained with it.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.strided = stride == 2
        branch = channels - in_channels if self.strided else channels
        middle = branch // 4
        self.groups = 1 if in_channels == STEM else GROUPS  # the stem is too narrow to be split (section 3.2)
        self.conv1 = conv(in_channels, middle, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = conv(middle, middle, 3, stride, groups=middle)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = conv(middle, branch, 1, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output, after the ReLU on sum or join."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out = torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if self.strided else out + x
        return F.relu(out, inplace=True)


def _stage(in_channels: int, channels: int, units: int) -> nn.Sequential:
    rest = [ShuffleUnit(channels, channels, 1) for _ in range(units - 1)]
    return nn.Sequential(ShuffleUnit(in_channels, channels, 2), *rest)


class ShuffleNetV1(nn.Module):
    """A 1 x 1 stem at full size, three stages that each halve the image, classifier.

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
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, 3, H, W]`."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(global_pool(x))


MODELS: dict[str, Builder] = {"ShuffleV1": ShuffleNetV1}
