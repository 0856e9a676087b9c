"""MobileNetV2, half width, for 32 x 32 images (Sandler et al., arXiv 1801.04381)."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import Builder, conv, conv_bn_relu, global_pool, init_convs

# Expansion, channels, blocks, stride of the first block. Table 2 of the paper with the channels halved, but
# stride 1 in the second row: a 32-pixel image has one halving less to give.
STAGES = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)
STEM, LAST = 16, 1280  # the last layer is not halved: the paper's rule for widths below 1


class InvertedResidual(nn.Module):
    """Expand by a 1 x 1, filter by a depthwise 3 x 3, project by a linear 1 x 1; add the input where it fits.

    As published for CIFAR: plain ReLU, not ReLU6, and the expanding convolution is there at expansion 1 too.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *conv_bn_relu(in_channels, hidden, 1),
            *conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            conv(hidden, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, without an activation: the bottleneck is linear."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Strided stem, seven stages of inverted residuals, a 1 x 1 to 1280 channels, classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*conv_bn_relu(3, STEM, 3, 2))
        self.blocks = nn.Sequential()
        width = STEM
        for expansion, channels, blocks, stride in STAGES:
            stage = nn.Sequential(InvertedResidual(width, channels, stride, expansion))
            stage.extend(InvertedResidual(channels, channels, 1, expansion) for _ in range(blocks - 1))
            self.blocks.append(stage)
            width = channels
        self.conv2 = nn.Sequential(*conv_bn_relu(width, LAST, 1))
        self.classifier = nn.Sequential(nn.Linear(LAST, num_classes))
        init_convs(self)
        nn.init.normal_(self.classifier[0].weight, 0, 0.01)
        nn.init.zeros_(self.classifier[0].bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, 3, H, W]`."""
        return self.classifier(global_pool(self.conv2(self.blocks(self.conv1(x)))))


MODELS: dict[str, Builder] = {"MobileNetV2": MobileNetV2}
