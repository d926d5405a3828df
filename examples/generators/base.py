"""What every generator says of itself, and how it is sampled."""

from __future__ import annotations

import abc
import json
from collections.abc import Callable, Iterator
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Data", "Form", "Generator", "Network", "between"]

HERE = Path(__file__).parent
PADDING, NOTHING = 0, 1  # word numbers: the end of a caption, and the caption "nothing"


class Form(Enum):
    """How classifier-free guidance (Ho & Salimans 2022) calls the transformer."""

    FUSED = "one call on a batch of both"
    TWO_CALLS = "a call each"
    EMBEDDED = "one call, which is told the scale"


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


def between(start: Tensor, end: Tensor, share: float | Tensor) -> Tensor:
    """`start` at 0, `end` at 1, and beyond; a share for all, or one for each sample `[batch]`."""
    if isinstance(share, Tensor):
        share = share.view(-1, *[1] * (start.ndim - 1))
    return start + share * (end - start)


class Generator(abc.ABC):
    """One kind of generator.

    what: for the table of all. shape: of one sample. guidance, form: the scale it is sampled with,
    and how.
    zeroed: patterns of parameters that begin as zeros, so that each block begins as the identity
    (adaLN-Zero, Peebles & Xie 2023, section 3.2).
    steps, batch, rate: of its training. distilled: from which share of the training on guidance is
    learnt as an input (Meng et al. 2023), from the network as it is then; 1: never.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    shape: ClassVar[tuple[int, ...]]
    guidance: ClassVar[float]
    form: ClassVar[Form] = Form.FUSED
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

    def nothing(self, conditions: Tensor) -> Tensor:
        """The conditions that stand for none, as many as `conditions` `[batch, words]`."""
        empty = torch.full_like(conditions, PADDING)
        empty[:, 0] = NOTHING
        return empty

    def embed(self, network: Network, conditions: Tensor) -> dict[str, Tensor]:
        """What the transformer is told of conditions `[batch, words]`, once for a run."""
        assert network.words is not None
        return {"encoder_hidden_states": network.words(conditions)}

    def predict(
        self,
        transformer: Callable[..., Any],
        sample: Tensor,
        timestep: Tensor,
        told: dict[str, Tensor],
    ) -> Tensor:
        """The transformer's output for a sample `[batch, *shape]`. timestep: `[batch]`, 0 to 1000.
        told: by `embed`; a transformer that takes guidance as an input finds it there, `[batch]`.
        """
        output: Tensor = transformer(sample, timestep=timestep, **told, return_dict=False)[0]
        return output

    def corrupt(
        self, clean: Tensor, noise: Tensor, draw: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A noisy sample, its timestep `[batch]` and what is to be predicted of it.

        Where `noising` is None it lies on the straight line from the sample to noise, whose
        velocity is predicted (Liu et al. 2022), at logit-normal times (Esser et al. 2024, section
        3.1) of spread 1.2 around 0.2. Else it is noised as that scheduler does it.
        """
        if self.noising is None:
            time = torch.sigmoid(torch.randn(len(clean), generator=draw) * 1.2 + 0.2)
            return between(clean, noise, time), time * 1000, noise - clean
        config = self.noising.config
        steps = torch.randint(config.num_train_timesteps, (len(clean),), generator=draw)
        noisy = self.noising.add_noise(clean, noise, steps)
        velocity = config.prediction_type == "v_prediction"
        target = self.noising.get_velocity(clean, noise, steps) if velocity else noise
        return noisy, steps.float(), target

    @property
    def noising(self) -> Any:
        """The scheduler of diffusers that it is trained by, or None."""
        return None

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
        """One step's output with guidance."""
        if self.form is Form.EMBEDDED:
            told = {**told, "guidance": torch.full_like(timestep, scale)}
            return self.predict(transformer, sample, timestep, told)
        if self.form is Form.FUSED:
            both = {key: torch.cat([value, untold[key]]) for key, value in told.items()}
            twice = torch.cat([sample, sample]), timestep.repeat(2)
            one, other = self.predict(transformer, *twice, both).chunk(2)
        else:
            one, other = (
                self.predict(transformer, sample, timestep, each) for each in (told, untold)
            )
        return between(other, one, scale)

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
        for number, timestep in enumerate(scheduler.timesteps, 1):
            times = timestep.float().expand(len(state))
            output = self.guided(call, state, times, told, untold, scale)
            state = scheduler.step(output, timestep, state, return_dict=False)[0]
            # What a picture can show; some samplers leave more.
            yield state if number < len(scheduler.timesteps) else state.clamp(-1, 1)

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
