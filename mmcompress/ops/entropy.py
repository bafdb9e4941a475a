# SPDX-License-Identifier: Apache-2.0
"""How much there is to see in a patch of pixels."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def patch_entropy(pixels: Tensor, patch: int) -> Tensor:
    """Entropy in bits of the 256 grey levels of every patch, [n, rows, columns] float32.

    pixels [n, 3, rows * patch, columns * patch], values of 8 bits (uint8, or 0 to 255 in any type) as the picture has them: not
    what an image processor has normalised. Grey is a third of red + green + blue, rounded.
    """
    if pixels.shape[-2] % patch or pixels.shape[-1] % patch:
        raise ValueError(f"patch={patch}: pictures of {tuple(pixels.shape[-2:])} pixels are not made of such patches")
    grey = (0.3333 * pixels.to(torch.uint8).float().sum(1)).round().long()
    blocks = grey.unflatten(1, (-1, patch)).unflatten(3, (-1, patch)).transpose(2, 3).flatten(3)
    counts = torch.zeros(*blocks.shape[:3], 256, dtype=torch.int64, device=pixels.device)
    part = counts.scatter_add(3, blocks, torch.ones_like(blocks)).float() / patch**2
    return torch.special.entr(part).sum(3) / torch.log(torch.tensor(2.0))
