"""VGG for 32 x 32 images (Simonyan & Zisserman, arXiv 1409.1556), with batch norm and a linear classifier."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Builder, global_pool, init_convs

CHANNELS = (64, 128, 256, 512, 512)
# Convolutions in each of the five blocks: 11 to 19 are table 1 of the paper, 8 is the usual student.
LAYERS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


def _block(in_channels: int, channels: int, layers: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for _ in range(layers):
        # The bias is redundant before batch norm; published weights contain it.
        modules.append(nn.Conv2d(in_channels, channels, 3, padding=1))
        modules += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        in_channels = channels
    return nn.Sequential(*modules)


class VGG(nn.Module):
    """Five blocks of 3 x 3 convolutions with max pooling between them, then the mean over the image."""

    def __init__(self, num_classes: int, *, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.block0 = _block(3, CHANNELS[0], layers[0])
        self.block1 = _block(CHANNELS[0], CHANNELS[1], layers[1])
        self.block2 = _block(CHANNELS[1], CHANNELS[2], layers[2])
        self.block3 = _block(CHANNELS[2], CHANNELS[3], layers[3])
        self.block4 = _block(CHANNELS[3], CHANNELS[4], layers[4])
        self.classifier = nn.Linear(CHANNELS[4], num_classes)
        init_convs(self)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, 3, H, W]`."""
        # A 32-pixel image stays 4 x 4 after three poolings; mdistiller pools a 64-pixel one once more.
        large = x.shape[2] == 64
        for block in (self.block0, self.block1, self.block2):
            x = F.max_pool2d(block(x), 2)
        x = self.block3(x)
        x = self.block4(F.max_pool2d(x, 2) if large else x)
        return self.classifier(global_pool(x))


MODELS: dict[str, Builder] = {name: partial(VGG, layers=layers) for name, layers in LAYERS.items()}
