"""What every generator says of itself, and how it is sampled."""

from __future__ import annotations

import abc
import json
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["NOTHING", "PADDING", "Data", "Generator", "Network", "Predict"]

HERE = Path(__file__).parent
PADDING, NOTHING = 0, 1  # word numbers: the end of a caption, and the caption "nothing"

Predict = Callable[..., Tensor]


class Data(NamedTuple):
    """samples: uint8 [count, *shape]. conditions: int64 [count, words], a caption each, or a class.
    words: what the numbers of a caption stand for; empty where conditions are classes.
    """

    samples: Tensor
    conditions: Tensor
    words: list[str]


class Network(nn.Module):
    """A transformer, and the embedding of its captions' words, which stands for a text encoder."""

    def __init__(self, transformer: nn.Module, words: int = 0, width: int = 1) -> None:
        super().__init__()
        self.transformer = transformer
        self.words = nn.Embedding(words, width) if words else None


class Generator(abc.ABC):
    """One kind of generator.

    what: for the table of all. shape: of one sample. guidance: the scale it is sampled with.
    zeroed: patterns of parameters that begin as zeros, so that each block begins as the identity
    (adaLN-Zero, Peebles & Xie 2023, section 3.2).
    steps, batch, rate: of its training. distilled: from which share of the training on guidance is
    learnt as an input (Meng et al. 2023), from the network as it is then; 1: never.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    shape: ClassVar[tuple[int, ...]]
    guidance: ClassVar[float]
    zeroed: ClassVar[tuple[str, ...]]
    steps: ClassVar[int] = 2000
    batch: ClassVar[int] = 64
    rate: ClassVar[float] = 1e-3
    distilled: ClassVar[float] = 1.0

    @abc.abstractmethod
    def data(self, source: Path | None) -> Data:
        """What it is trained on. source: a file, where the data is no installed package."""

    @abc.abstractmethod
    def build(self, words: int) -> Network:
        """The untrained network. words: of the captions' vocabulary."""

    @abc.abstractmethod
    def nothing(self, conditions: Tensor) -> Tensor:
        """The conditions that stand for none, as many as `conditions` `[batch, words]`."""

    @abc.abstractmethod
    def embed(self, network: Network, conditions: Tensor) -> dict[str, Tensor]:
        """What the transformer is told of conditions `[batch, words]`, once for a run."""

    @abc.abstractmethod
    def predict(
        self,
        transformer: Callable[..., Any],
        sample: Tensor,
        timestep: Tensor,
        told: dict[str, Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The transformer's output for a sample `[batch, *shape]`. timestep: `[batch]`, 0 to 1000.
        guidance: `[batch]`, for a transformer that takes it as an input.
        """

    @abc.abstractmethod
    def corrupt(self, clean: Tensor, noise: Tensor, draw: torch.Generator) -> tuple[Tensor, ...]:
        """A noisy sample, its timestep `[batch]` and what is to be predicted."""

    @abc.abstractmethod
    def scheduler(self, steps: int) -> Any:
        """Its sampler: one of diffusers' schedulers, set to `steps`."""

    def guided(
        self,
        transformer: Callable[..., Any],
        sample: Tensor,
        timestep: Tensor,
        told: dict[str, Tensor],
        untold: dict[str, Tensor],
        scale: float,
    ) -> Tensor:
        """One step's output with classifier-free guidance in one call (Ho & Salimans 2022)."""
        both = {key: torch.cat([value, untold[key]]) for key, value in told.items()}
        output = self.predict(transformer, torch.cat([sample] * 2), timestep.repeat(2), both)
        with_condition, without = output.chunk(2)
        return without + scale * (with_condition - without)

    @torch.no_grad()
    def sample(
        self,
        network: Network,
        noise: Tensor,
        conditions: Tensor,
        *,
        steps: int,
        transformer: Callable[..., Any] | None = None,
        guidance: float | None = None,
        scheduler: Any = None,
    ) -> Iterator[Tensor]:
        """A sampling run; yields the sample after each step, and last the result in [-1, 1].

        transformer: called instead of the network's own, as a compiled one. scheduler: instead of
        its own; already set.
        """
        scheduler = scheduler or self.scheduler(steps)
        told = self.embed(network, conditions)
        untold = self.embed(network, self.nothing(conditions))
        scale = self.guidance if guidance is None else guidance
        call = network.transformer if transformer is None else transformer
        state = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        for timestep in scheduler.timesteps:
            times = timestep.float().expand(len(state))
            output = self.guided(call, state, times, told, untold, scale)
            state = scheduler.step(output, timestep, state, return_dict=False)[0]
            yield state

    def zero(self, network: Network) -> None:
        """Sets the parameters to zero that begin so."""
        for name, parameter in network.transformer.named_parameters():
            if any(fnmatch(name, pattern) for pattern in self.zeroed):
                nn.init.zeros_(parameter)

    @property
    def checkpoint(self) -> Path:
        """Where its trained weights are."""
        return HERE / f"{self.name}.safetensors"

    def load(self, path: Path | None = None) -> tuple[Network, Tensor, list[str]]:
        """The trained network in float32, 64 conditions `[64, words]` to sample with, the words.

        path: of a checkpoint; None for its own. Raises FileNotFoundError where it was not trained
        yet.
        """
        from safetensors import safe_open
        from safetensors.torch import load_file

        path = path or self.checkpoint
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: train it by "
                f"python -m accel.examples.generators.train {self.name}"
            )
        with safe_open(path, framework="pt") as file:
            words = json.loads(file.metadata()["words"])
        weights = load_file(path)
        conditions = weights.pop("conditions").long()
        network = self.build(len(words)).eval()
        network.load_state_dict({name: value.float() for name, value in weights.items()})
        return network, conditions, words
