"""Seeds from names: every random choice of the data has its own generator, none touches the global one.

So an epoch can be replayed from (seed, epoch) alone, in any process, with any number of workers or ranks.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed for the purpose that `parts` name; close parts (seed 1 and 2, epoch 1 and 2) share nothing."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A host generator for that purpose. Host, whatever the training device: a GPU run draws what a CPU run draws."""
    return torch.Generator().manual_seed(derive_seed(*parts))
