"""`accel.dynamize`: chosen linear layers of a recommender become layers of each user's own."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ....kernels.errors import OptionError
from .codebook import Codebook
from .generators import Generator, dynamic_layer
from .hypernetwork import Encoded, Hypernetwork

__all__ = ["DynamicModel", "Dynamics", "UserWeights", "WithWeights", "dynamize"]


@dataclass(frozen=True)
class Dynamics:
    """How weights are generated.

    width: of embeddings and states in the hypernetworks. rank: None generates whole matrices
    (DUET); a number only a core of that rank (APG). metacode: with semantics, whether the items
    themselves add a remainder to what the semantics give; it stays within +-`bound`.
    straight_through: see `Codebook`. commitment: how much an item's embedding is pulled towards its
    code, beside the pull on the semantics' embeddings (as in VQ-VAE).
    """

    width: int = 32
    rank: int | None = None
    metacode: bool = True
    bound: float = 0.1
    straight_through: bool = True
    commitment: float = 0.25

    def __post_init__(self) -> None:
        if self.width < 1:
            raise OptionError(f"width is {self.width}; it has to be at least 1")
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"rank is {self.rank}; it has to be at least 1, or None")
        if not self.bound > 0:
            raise OptionError(f"bound is {self.bound}; it has to be above 0")


class DynamicModel(nn.Module):
    """A model some of whose layers are each user's own; called as the model was.

    Made by `dynamize`, which says what it is. All that is learnt is among its parameters; the
    codebook is a buffer.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], history: str, hypernetwork: Hypernetwork,
        dynamics: Dynamics, bound: float | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = copy.deepcopy(model)
        self.hypernetwork = hypernetwork
        self.history = history
        self.__signature__ = inspect.signature(model.forward)
        self.position = list(self.__signature__.parameters).index(history)
        self.layers = tuple(layers)
        generators = []
        for name in layers:
            layer, start = dynamic_layer(self.model.get_submodule(name), dynamics.rank)
            self.model.set_submodule(name, layer)
            generators.append(Generator(start, dynamics.width, bound))
        self.generators = nn.ModuleList(generators)

    @property
    def codes(self) -> Tensor:
        """The semantics' embeddings, [semantics, width]: a codebook for a model to come."""
        return self.hypernetwork.codes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own. History: int64 [B, L], with `padding` where there is no item."""
        return self._run(args, kwargs)[0]

    def with_code_loss(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """The model's result, and what is to be added to its loss, times a factor: how far the
        semantics' embeddings are from their items' codes, squared, mean over items.

        SOLID's codebook loss as in the released code, which counts padding, too; and `commitment`
        times the distance of the items' embeddings. 0 without a codebook.
        """
        return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        if self.history not in kwargs and len(args) <= self.position:
            raise OptionError(f"the call lacks {self.history!r}, the user's history")
        history = kwargs[self.history] if self.history in kwargs else args[self.position]
        weights, code_loss = self.weights_of(history)
        return functional_call(self.model, weights, args, kwargs), code_loss

    def weights_of(self, history: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The weights of the layers by their names, [B, ...] each; and the codebook's loss."""
        if history.dim() != 2 or history.dtype not in (torch.int64, torch.int32):
            raise OptionError(
                f"{self.history!r} is {history.dtype} of shape {list(history.shape)}; needed are "
                "ids of items, int64 [batch, length]"
            )
        encoded: Encoded = self.hypernetwork(history)
        weights: dict[str, Tensor] = {}
        for name, generator in zip(self.layers, self.generators, strict=True):
            for part, value in generator(encoded.trunk, encoded.remainder).items():
                weights[f"{name}.{part}"] = value
        return weights, encoded.code_loss

    def split(self) -> tuple[UserWeights, WithWeights]:
        """What generates weights, and the model that is given them; they share all parameters.

        For servers: a user's weights can be kept until the history changes, wherever the server
        keeps such things, and handed in. Each can be compiled and exported.
        """
        return UserWeights(self), WithWeights(self)


class UserWeights(nn.Module):
    """From histories, int64 [B, L], to the weights of a dynamic model's layers, [B, ...] each."""

    def __init__(self, dynamic: DynamicModel) -> None:
        super().__init__()
        self.dynamic = dynamic

    def forward(self, history: Tensor) -> dict[str, Tensor]:
        """See the class."""
        return self.dynamic.weights_of(history)[0]


class WithWeights(nn.Module):
    """A dynamic model that is handed its weights before all else that it is called with."""

    def __init__(self, dynamic: DynamicModel) -> None:
        super().__init__()
        self.model = dynamic.model
        own = inspect.Parameter("weights", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        others = dynamic.__signature__.parameters.values()
        self.__signature__ = inspect.Signature([own, *others])

    def forward(self, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """weights: as `UserWeights` gives them, of users in the order of the histories."""
        return functional_call(self.model, weights, args, kwargs)


def dynamize(
    model: nn.Module,
    layers: Sequence[str],
    *,
    history: str,
    items: int,
    semantics: Tensor | Sequence[int] | None = None,
    codebook: Tensor | None = None,
    padding: int = 0,
    dynamics: Dynamics | None = None,
) -> DynamicModel:
    """A copy of a recommender in which linear layers have weights generated from the history.

    model: any module, called with a user's history among its arguments. layers: names of its
    `nn.Linear`s. history: the argument's name; int64 [B, L], with `padding` where there is no item,
    at either end. items: how many ids there are, `padding` among them; other ids are taken for one
    unknown item by what generates the weights (the model's own tables are its own). semantics:
    int64 [items], each item's category or cluster from 0 on; below 0 it has none. codebook:
    [codes, dynamics.width], codes that items are replaced by; of a model that was trained before
    with semantics alone: its `.codes`.

    Without semantics this is DUET, or APG with a rank; with them SOLID (arXiv 2408.00123) on either
    of them: semantic parameter generation; with `dynamics.metacode` the items' remainder; with a
    codebook the semantic codebook. Before training it computes what the model does (with a rank
    below a layer's own nearly so). Inputs of the layers: [B, ..., in], candidates in a dimension of
    their own.

    Raises OptionError for names that are no linear layers, a history that `model.forward` does not
    take, semantics of another length or none but unknown ones, and a codebook of another width or
    without semantics and metacode.
    """
    dynamics = dynamics or Dynamics()
    if not layers:
        raise OptionError("no layer is named; name the linear layers that are to become dynamic")
    _check_layers(model, layers)
    parameters = list(inspect.signature(model.forward).parameters)
    if history not in parameters:
        raise OptionError(
            f"{type(model).__name__}.forward takes {', '.join(parameters)}, but no {history!r}"
        )
    if items < 1:
        raise OptionError(f"items is {items}; needed is how many ids there are")
    if semantics is not None:
        semantics = torch.as_tensor(semantics).long().cpu()  # where the tables are made
        if semantics.shape != (items,):
            raise OptionError(
                f"semantics has shape {list(semantics.shape)}; needed is one label for each of the "
                f"{items} items (-1: none)"
            )
        if int(semantics.max()) < 0:
            raise OptionError("semantics gives no item a label; leave it out")
    if codebook is not None:
        if semantics is None or not dynamics.metacode:
            raise OptionError(
                "a codebook is for what items add to semantics: give semantics, and keep metacode"
            )
        if codebook.dim() != 2 or codebook.shape[1] != dynamics.width or len(codebook) == 0:
            raise OptionError(
                f"codebook has shape {list(codebook.shape)}; needed is [codes, {dynamics.width}], "
                "see dynamics.width"
            )
    like = next(model.get_submodule(layers[0]).parameters())
    by_item = semantics is None or dynamics.metacode
    codes = (
        None if codebook is None else Codebook(codebook.float().cpu(), dynamics.straight_through)
    )
    hypernetwork = Hypernetwork(
        items, padding, dynamics.width, semantics, by_item, codes, dynamics.commitment
    )
    bound = dynamics.bound if semantics is not None and by_item else None
    return DynamicModel(model, layers, history, hypernetwork, dynamics, bound).to(
        like.device, like.dtype
    )


def _check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    linear = [name for name, each in model.named_modules() if type(each) is nn.Linear]
    for name in layers:
        if name not in linear:
            near = difflib.get_close_matches(name, linear, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(
                f"{name!r} is no nn.Linear of {type(model).__name__}, which has "
                f"{', '.join(linear) or 'none'}{hint}"
            )
    if len(set(layers)) < len(layers):
        raise OptionError("a layer is named twice")
