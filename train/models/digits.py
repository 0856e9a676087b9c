"""Two tiny networks for 8 x 8 grey digits: a demo of a teacher helping a student takes seconds on a CPU."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from .layers import Builder, conv_bn_relu, init_convs


class DigitsNet(nn.Module):
    """3 x 3 convolutions, all but the first strided, then a linear layer on what is left of the image."""

    def __init__(self, num_classes: int, *, channels: tuple[int, ...]) -> None:
        super().__init__()
        width, size = 1, 8
        layers: list[nn.Module] = []
        for index, out_channels in enumerate(channels):
            stride = 1 if index == 0 else 2
            layers += conv_bn_relu(width, out_channels, 3, stride)
            width, size = out_channels, size // stride
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * size * size, num_classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, 1, 8, 8]`."""
        return self.classifier(self.features(x).flatten(1))


MODELS: dict[str, Builder] = {
    "digits_teacher": partial(DigitsNet, channels=(16, 32, 32)),
    "digits_student": partial(DigitsNet, channels=(4, 4, 4)),
}
