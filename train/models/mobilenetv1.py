"""MobileNetV1, width 1.0, for ImageNet: the student of ResNet50 (Howard et al., arXiv 1704.04861)."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import Builder, conv_bn_relu, global_pool

# Output channels and stride of the 13 depthwise-separable layers: table 1 of the paper.
LAYERS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


class MobileNetV1(nn.Module):
    """A strided 3 x 3 stem, then pairs of a depthwise 3 x 3 and a pointwise 1 x 1 convolution.

    Weights start at PyTorch's defaults, as in the published ResNet50 -> MobileNetV1 runs.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        width = 32
        layers = [nn.Sequential(*conv_bn_relu(3, width, 3, 2))]
        for channels, stride in LAYERS:
            depthwise = conv_bn_relu(width, width, 3, stride, groups=width)
            layers.append(nn.Sequential(*depthwise, *conv_bn_relu(width, channels, 1)))
            width = channels
        self.model = nn.Sequential(*layers)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, 3, H, W]`."""
        return self.fc(global_pool(self.model(x)))


MODELS: dict[str, Builder] = {"MobileNetV1": MobileNetV1}
