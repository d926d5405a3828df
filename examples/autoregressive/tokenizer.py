"""The VQ tokenizer: a picture becomes 16 rows of 16 codes, one for each 2 by 2 pixels.

After VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937), with a codebook that follows the encoder
by moving averages; the networks are ours.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ...compiler.extras import optional

__all__ = ["CHECKPOINT", "CODES", "COLUMNS", "ROWS", "Tokenizer", "load_tokenizer"]

CHECKPOINT = Path(__file__).parent / "tokenizer.safetensors"
ROWS = COLUMNS = 16
CODES = 256
MARGIN = 2  # pixels around the picture of 28 by 28, so that it has 16 times 2


class _Block(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.inner(x)
        return found


class Tokenizer(nn.Module):
    """Pictures [batch, 1, 28, 28] in [-1, 1] to codes, int64 [batch, ROWS, COLUMNS], and back."""

    codebook: Tensor

    def __init__(self, width: int = 48, channels: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1), nn.SiLU(), _Block(width), _Block(width),
            nn.Conv2d(width, channels, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), _Block(width), _Block(width),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
        )  # fmt: skip
        self.register_buffer("codebook", torch.randn(CODES, channels))

    def features(self, images: Tensor) -> Tensor:
        """What the codebook is compared to, [batch, ROWS, COLUMNS, channels]."""
        padded = nn.functional.pad(images, (MARGIN,) * 4, value=-1.0)
        features: Tensor = self.encoder(padded).permute(0, 2, 3, 1)
        return features

    def nearest(self, features: Tensor) -> Tensor:
        """The codes of features."""
        book = self.codebook
        return (book.square().sum(1) - 2 * features @ book.T).argmin(-1)

    def picture(self, features: Tensor) -> Tensor:
        """Features as a picture, [batch, 1, 28, 28]; not clamped."""
        whole: Tensor = self.decoder(features.permute(0, 3, 1, 2))
        return whole[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]

    def encode(self, images: Tensor) -> Tensor:
        """The codes of pictures."""
        return self.nearest(self.features(images))

    def decode(self, codes: Tensor) -> Tensor:
        """The pictures of codes."""
        return self.picture(self.codebook[codes])


def load_tokenizer() -> Tokenizer:
    """The trained one."""
    network = Tokenizer()
    weights = optional("safetensors.torch", "examples").load_file(CHECKPOINT)
    network.load_state_dict({name: each.float() for name, each in weights.items()})
    return network.eval()
