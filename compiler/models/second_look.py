"""Models that make something at their first call, which Dynamo can't capture."""

from __future__ import annotations

import functools
import types
import weakref
from typing import Any

from torch import Tensor, nn

from ..backend import compiled_graphs, forget_graphs, is_whole

__all__ = ["SecondLook"]

# torch's own
_NOT_THEIRS = frozenset(vars(nn.Module())) | {"forward", "_compiled_call_impl"}


class SecondLook:
    """A compiled model that is captured again if its first call was captured in parts, and changed
    what the model holds: as Z-Image's tables of positions, made at the first call on a device of
    their own, where Dynamo breaks the graph for good.

    Stands for what `nn.Module.compile` makes of a model's call. A model whose `forward` is not its
    class's (offloading puts a hook there) is left as it was captured.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.compiled: Any = model._compiled_call_impl
        self.called = False
        self.own: types.MethodType | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.called:
            return self.compiled(*args, **kwargs)
        model = self.model()
        assert model is not None  # it is what calls
        before = _held(model)
        result = self.compiled(*args, **kwargs)
        self.called = True
        owners = frozenset(map(id, [*model.parameters(), *model.buffers()]))
        graphs = compiled_graphs(owners)
        broken = graphs and not is_whole(graphs)
        if broken and "forward" not in vars(model) and _held(model) != before:
            forget_graphs(owners)
            self.own = types.MethodType(_unseen(type(model).forward), model)
            model.__dict__["forward"] = self.own
        return result

    def undo(self) -> None:
        """Give the model its class's forward again."""
        model = self.model()
        if model is not None and self.own is not None and vars(model).get("forward") is self.own:
            del model.__dict__["forward"]


class _Same:
    """A value that equals itself alone, and stays what it is as long as it is compared."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _held(model: nn.Module) -> dict[tuple[str, ...], _Same]:
    """What a model's modules hold besides modules and parameters, and objects of theirs do."""
    found: dict[tuple[str, ...], _Same] = {}
    for name, module in model.named_modules():
        for key, value in [*vars(module).items(), *module._buffers.items()]:
            if key in _NOT_THEIRS:
                continue
            found[name, key] = _Same(value)
            if hasattr(value, "__dict__") and not isinstance(value, Tensor | nn.Module | type):
                found.update({(name, key, own): _Same(each) for own, each in vars(value).items()})
    return found


def _unseen(function: Any) -> Any:
    """A function with the same code in an object that Dynamo keeps nothing of."""
    copied = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    copied.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copied, function)
