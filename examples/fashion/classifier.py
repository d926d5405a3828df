"""A small classifier of Fashion-MNIST: agreement of labels, and features for Fréchet distances.

    python -m accel.examples.fashion.classifier

trains it (5 epochs, about 5 minutes on 2 CPU cores) and writes classifier.safetensors, with the
mean and covariance of its features on the 10,000 test images, and classifier_training.csv.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from . import data

CHECKPOINT = Path(__file__).parent / "classifier.safetensors"
FEATURES = 64


class Classifier(nn.Module):
    """Three convolutions and two linear layers."""

    real_mean: Tensor
    real_covariance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.hidden = nn.Linear(64 * 7 * 7, FEATURES)
        self.output = nn.Linear(FEATURES, len(data.CLASSES))
        # Of the real test images, for the Fréchet distance.
        self.register_buffer("real_mean", torch.zeros(FEATURES))
        self.register_buffer("real_covariance", torch.zeros(FEATURES, FEATURES))

    def features(self, images: Tensor) -> Tensor:
        """`[batch, 1, 28, 28]` in [-1, 1] to `[batch, 64]`."""
        return nn.functional.relu(self.hidden(self.convolutions(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits `[batch, 10]`."""
        return self.output(nn.functional.dropout(self.features(images), 0.3, self.training))

    @torch.no_grad()
    def frechet_distance(self, images: Tensor) -> float:
        """Fréchet distance of the images' features to those of the real test images.

        As the FID (Heusel et al. 2017), on this classifier's features instead of Inception's.
        """
        mean, covariance = moments(self.features(images))
        product = covariance.double() @ self.real_covariance.double()
        # The trace of the product's square root: its eigenvalues are real and not negative.
        root = torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()
        traces = covariance.double().trace() + self.real_covariance.double().trace()
        return float((mean - self.real_mean).double().square().sum() + traces - 2 * root)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[features]` and covariance `[features, features]` of a batch."""
    return features.mean(0), torch.cov(features.T)


def load(path: Path = CHECKPOINT) -> Classifier:
    """The trained classifier."""
    from safetensors.torch import load_file

    network = Classifier()
    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return network.eval()


def main(epochs: int = 5, batch: int = 128, seed: int = 0) -> None:
    """Train, measure on the test images, write the checkpoint."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    images, labels = data.load("train")
    test_images, test_labels = data.load("test")
    network = Classifier()
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    log = [f"# seed {seed}, batch {batch}", "epoch,test_accuracy"]
    for epoch in range(epochs):
        network.train()
        order = torch.randperm(len(images))
        for start in range(0, len(images) - batch + 1, batch):
            chosen = order[start : start + batch]
            loss = nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            right = sum(
                (network(some).argmax(1) == truth).sum().item()
                for some, truth in zip(test_images.split(500), test_labels.split(500), strict=True)
            )
        log.append(f"{epoch + 1},{right / len(test_images):.4f}")
        print(log[-1], flush=True)
    with torch.no_grad():
        features = torch.cat([network.features(some) for some in test_images.split(500)])
    network.real_mean, network.real_covariance = moments(features)
    weights = {
        name: value.float() if name.startswith("real") else value.half()
        for name, value in network.state_dict().items()
    }
    save_file(weights, CHECKPOINT)
    CHECKPOINT.with_name("classifier_training.csv").write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    main()
