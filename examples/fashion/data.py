"""Fashion-MNIST, read from Debian's package `dataset-fashion-mnist`. Nothing is downloaded."""

import gzip
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def _read(path: Path, header: int) -> Tensor:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing. Fashion-MNIST comes from Debian's package: "
            "apt-get install dataset-fashion-mnist"
        )
    with gzip.open(path) as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=header)


def load(split: str, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Images `[count, 1, 28, 28]` in [-1, 1] and labels `[count]` of `"train"` or `"test"`.

    Raises FileNotFoundError with the install line where the package is missing.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    # The idx format: 16 bytes of header before images, 8 before labels.
    pixels = _read(folder / f"{prefix}-images-idx3-ubyte.gz", header=16)
    labels = _read(folder / f"{prefix}-labels-idx1-ubyte.gz", header=8)
    images = pixels.view(-1, 1, 28, 28).float() / 127.5 - 1.0
    return images, labels.long()
