"""The teacher that is run: frozen for good."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


class FrozenTeacher(nn.Module):
    """A network that never trains: its parameters ask for no gradient, and `train()` leaves it in evaluation mode."""

    def __init__(
        self,
        model: nn.Module,
        *,
        amp_dtype: torch.dtype | None = None,
        compile: bool = False,
        channels_last: bool = True,
        weights_digest: str = "",
    ) -> None:
        """`model` is frozen in place. `amp_dtype`: autocast to it; `compile`: run it through torch.compile."""
        super().__init__()
        self.weights_digest = weights_digest
        self.model = model.requires_grad_(False).eval()
        self.amp_dtype = amp_dtype
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        if compile:
            self.model.compile()
        self.eval()

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in evaluation mode: BatchNorm in training mode would let the students' batches change the teacher."""
        return super().train(False)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """float32 logits ``[B, num_classes]`` of `images`, on their device."""
        with torch.autocast(images.device.type, self.amp_dtype, self.amp_dtype is not None):
            return self.model(images).float()


def state_digest(model: nn.Module) -> str:
    """A digest of a network's parameters and buffers, names included: the `weights_digest` of a model in memory."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
