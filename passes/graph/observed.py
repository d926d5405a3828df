"""Runs a call on fake values, without data, and notes what it does.

Nothing is looked up by name: torch says which operators a call dispatches. Their schemas tell what
they write, their tags whether they draw random numbers, `torch.utils.flop_counter` what they cost,
and the storages of the results what they share. What can't be run, or acts on something that is no
value of the graph, is taken to do everything.

Two things no schema says, so they are read from what an operator calls its arguments: whether its
randomness is turned off (`training`, `train`, `dropout_p`), and that a batch normalisation in
training writes its running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels.costs import COSTS
from .nodes import fake_mode, hint, storage_of, value_of

__all__ = ["FORMULAS", "Facts", "attribute_of", "leaves", "observed", "operands_of", "tensors_in",
           "unknown", "value_in"]  # fmt: skip

LARGEST_CACHE = 2**14  # calls of different targets, shapes or constants


@dataclass(frozen=True)
class Facts:
    """Of one call.

    writes: which of its operands' memory it changes, as numbers of tensors among the operands (see
        `_leaves`). shares: pairs (a tensor of the result, a tensor of the operands) that share
        memory. results: how many tensors the result has.
    draws: whether it takes random numbers. acts: what else it does or might do, in words; empty
        where it only computes. opaque: whether that is not known, so that it may write to all that
        it is given, and its result may share memory with that.
    flops: multiplications and additions of matrix products, attention and convolutions, at the
        captured sizes.
    """

    writes: frozenset[int] = frozenset()
    shares: tuple[tuple[int, int], ...] = ()
    results: int = 0
    draws: bool = False
    acts: str = ""
    flops: int = 0
    opaque: bool = False

    @property
    def pure(self) -> bool:
        """Whether it only computes its result."""
        return not (self.writes or self.draws or self.acts)


def unknown(why: str) -> Facts:
    """Facts of a call of which nothing is known."""
    return Facts(acts=why, opaque=True)


_CACHE: dict[Any, Facts] = {}


def observed(node: fx.Node) -> Facts:
    """The facts of a call that is no higher-order operator; the first time by running it."""
    key = _key_of(node)
    found = _CACHE.get(key) if key is not None else None
    if found is None:
        found = _run(node)
        if key is not None:
            if len(_CACHE) >= LARGEST_CACHE:
                _CACHE.clear()
            _CACHE[key] = found
    return found


def attribute_of(node: fx.Node) -> Any:
    """The tensor that a graph refers to by name."""
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None


def value_in(node: fx.Node) -> Any:
    """The fake value of a node; of an attribute without one, the tensor itself."""
    value = value_of(node)
    return attribute_of(node) if value is None and node.op == "get_attr" else value


def operands_of(node: fx.Node) -> tuple[Any, Any]:
    """Positional and named operands of a call, with values in the place of nodes."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_in)
    return args, kwargs


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [each for item in value.values() for each in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [each for item in value for each in tensors_in(item)]
    if isinstance(value, slice):
        return tensors_in((value.start, value.stop, value.step))
    return []


def leaves(node: fx.Node) -> list[Tensor]:
    """The tensors among a call's operands, in order: what `Facts` numbers."""
    return tensors_in(operands_of(node))


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A value with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, change) for item in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items) if type(value) in (tuple, list) else tuple(items)
    if isinstance(value, slice):
        return slice(*(_mapped(each, change) for each in (value.start, value.stop, value.step)))
    return value


class _UnkeyedError(Exception):
    """A value that can't be part of a key of the cache."""


def _key_of(node: fx.Node) -> Any:
    """Equal for two calls that do the same; None where that can't be told."""
    try:
        return (node.op, node.target, _key(node.args), _key(node.kwargs), _key(node))
    except _UnkeyedError:
        return None


def _key(value: Any) -> Any:
    kind = type(value)
    if kind is fx.Node:
        known = value.meta.get("accel_key")
        held = value_in(value)
        if known is None or known[0] is not held:
            known = value.meta["accel_key"] = held, _key(held)
        return known[1]
    if kind in _NUMBERS:
        return kind, value  # True and 1 are equal, but not the same
    if kind in _PLAIN:
        return value
    if kind is tuple or kind is list or kind is torch.Size:
        return kind, tuple(map(_key, value))
    if kind is dict:
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, Tensor):
        if kind not in _SIMPLE or value.layout is not torch.strided:
            raise _UnkeyedError
        return (_sizes(value.shape), _sizes(value.stride()), value.dtype, value.device,
                value.is_conj(), value.is_neg())  # fmt: skip
    if isinstance(value, (tuple, list)):
        return kind, tuple(map(_key, value))
    if isinstance(value, dict):
        return kind, tuple((name, _key(item)) for name, item in value.items())
    if kind is slice:
        return slice, _key(value.start), _key(value.stop), _key(value.step)
    if kind in (torch.SymInt, torch.SymFloat, torch.SymBool):
        return kind, str(value), value.node.hint if value.node.has_hint() else None
    raise _UnkeyedError


_NUMBERS = frozenset({bool, int, float, complex})
_PLAIN = frozenset({str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout,
                    torch.memory_format})  # fmt: skip


def _sizes(sizes: Iterable[Any]) -> tuple[Any, ...]:
    found = tuple(sizes)
    return tuple(map(_key, found)) if any(type(each) is not int for each in found) else found


def _simple_types() -> tuple[type, ...]:
    from torch._subclasses.fake_tensor import FakeTensor

    return (FakeTensor, Tensor, torch.nn.Parameter)


_SIMPLE = _simple_types()


class _Watch(TorchDispatchMode):
    """Notes what the operators that pass by write, draw and cost."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()
        self.draws = self.opaque = False
        self.acts = ""
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            self.acts, self.opaque = self.acts or f"it calls {func}", True
            return func(*args, **kwargs)
        # One that stands for others says little: what counts is what it is made of.
        name = func.name()
        known = torch._C._dispatch_has_kernel(name)  # TorchScript's (prim::device) are not
        if known and torch._C._dispatch_has_kernel_for_dispatch_key(
            name, torch._C.DispatchKey.CompositeImplicitAutograd
        ):
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        schema = func._schema
        names = [each.name for each in schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        writes = {name for name, each in zip(names, schema.arguments, strict=True) if each.is_write}
        if _is_on(given, "training", "use_input_stats"):
            writes |= {name for name in names if name in ("running_mean", "running_var")}
        for name in writes:
            self.written |= {storage_of(each) for each in tensors_in(given.get(name))}
        if torch.Tag.nondeterministic_seeded in func.tags and not _is_off(schema, given):
            self.draws = True
        if not schema.returns and not writes:
            self.acts = self.acts or f"{func} returns nothing"
        if [each.type.kind() for each in schema.returns] == ["NumberType"]:
            # A number out of a tensor: any will do to see what is done with it.
            return _ZEROS.get(args[0].dtype, 0)
        result = func(*args, **kwargs)
        if func in COSTS:
            self.flops += hint(COSTS[func](*args, **kwargs))
            return result
        from torch.utils.flop_counter import flop_registry  # which imports Triton where it is

        formula = FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += hint(formula(*args, **kwargs, out_val=result))
        return result


_ZEROS: dict[torch.dtype, Any] = {
    torch.bool: False,
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), 0.0),
    **dict.fromkeys((torch.complex64, torch.complex128), 0j),
}


def _is_on(given: dict[str, Any], *names: str) -> bool:
    return any(given.get(name) is True for name in names)


def _is_off(schema: Any, given: dict[str, Any]) -> bool:
    """Whether an operator that can draw is told not to."""
    defaults = {each.name: each.default_value for each in schema.arguments
                if each.has_default_value()}  # fmt: skip
    told = {**defaults, **given}
    still = any(told.get(name) is False for name in ("training", "train"))
    return still or ("dropout_p" in told and told["dropout_p"] == 0)


def _attention_flops(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any, **kwargs: Any
) -> int:
    """Two products, [queries, width] by keys and [queries, keys] by values."""
    *outer, queries, width = map(hint, query.shape)
    keys, made = hint(key.shape[-2]), hint(value.shape[-1])
    return 2 * math.prod(outer) * queries * keys * (width + made)


# The counter knows neither this one, nor key heads that several query heads share.
FORMULAS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable: _attention_flops,
    torch.ops.higher_order.flex_attention: _attention_flops,
}


def _run(node: fx.Node) -> Facts:
    """The facts of a call, by running it."""
    args, kwargs = operands_of(node)
    operands, made = tensors_in((args, kwargs)), value_of(node)
    strange = _strange(made)
    if strange:
        return unknown(strange)
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, [*operands, *tensors_in(made)])):
        return unknown("it belongs to a torch.func transform")
    if any(each.layout is not torch.strided for each in [*operands, *tensors_in(made)]):
        return unknown("it works on tensors without a plain layout")
    if not operands and not tensors_in(made):
        # No tensor goes in or comes out: arithmetic of sizes, or a change of some global state.
        numbers = made is not None and getattr(node.target, "__module__", "") in _ARITHMETIC
        return Facts() if numbers else Facts(acts=f"{node.target} acts on no value of the graph")
    mode = next((each.fake_mode for each in [*operands, *tensors_in(made)]
                 if hasattr(each, "fake_mode")), None) or fake_mode(node.graph)  # fmt: skip
    watch = _Watch()
    before = _global_state()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
            fresh: list[Tensor] = []

            def renewed(tensor: Tensor) -> Tensor:
                fresh.append(_fresh(tensor))
                return fresh[-1]

            new_args, new_kwargs = _mapped((args, kwargs), renewed)
            places: dict[int, list[int]] = {}
            for index, each in enumerate(fresh):
                places.setdefault(storage_of(each), []).append(index)
            with watch:
                if node.op == "call_method":
                    result = getattr(new_args[0], str(node.target))(*new_args[1:], **new_kwargs)
                else:
                    target: Any = node.target
                    result = target(*new_args, **new_kwargs)
            results = tensors_in(result)
            shares = tuple(
                (mine, given)
                for mine, each in enumerate(results)
                for given in places.get(storage_of(each), ())
            )
            writes = frozenset(i for each in watch.written for i in places.get(each, ()))
    except Exception as error:
        # Whatever torch raises for it: then nothing is known of the call.
        return unknown(f"it can't be run on fake values ({type(error).__name__})")
    finally:
        changed = _restore(before)
    acts = watch.acts or changed or _strange(result)
    if not acts and result is None and not writes:
        acts = f"{node.target} returns nothing"
    opaque = watch.opaque or bool(_strange(result))
    return Facts(writes, shares, len(results), watch.draws, acts, watch.flops, opaque)


# Whose functions of numbers only compute.
_ARITHMETIC = ("_operator", "operator", "math", "builtins", "torch")
_VALUES = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, complex, bool, str,
           type(None), torch.Size, torch.dtype, torch.device, torch.layout)  # fmt: skip


def _strange(value: Any) -> str:
    """Says it where a result holds something else than tensors and numbers."""
    if isinstance(value, _VALUES):
        return ""
    if isinstance(value, (tuple, list)):
        return next(filter(None, map(_strange, value)), "")
    return f"its result is a {type(value).__name__}"


def _fresh(tensor: Tensor) -> Tensor:
    """A fake tensor of the same form with memory of its own."""
    if type(tensor) not in _SIMPLE or tensor.is_neg():
        return tensor.detach()  # a subclass: its own memory is a fake, too
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype,
                               device=tensor.device)  # fmt: skip
    return twin.conj() if tensor.is_conj() else twin


def _global_state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_any_autocast_enabled(),
        torch._C._functorch.maybe_current_level(),
    )


def _restore(before: tuple[Any, ...]) -> str:
    """Says it where a call has changed torch's state, which is put back."""
    if _global_state() == before:
        return ""
    torch._C._set_grad_enabled(before[0])
    return "it changes torch's global state"
