"""What a cache hands to a model in place of keys and values, to see what the model does with them.

A cache that has dropped entries can't hand out tensors of all of them. It hands out `Handed`, which
say the shape of the whole and hold nothing. What attention does with keys and values is little:
each head is repeated for the queries that share it, and then either they go to
scaled_dot_product_attention, or queries are multiplied by the keys and weights by the values. These
are answered by the cache; whatever else a model tries is refused, so that a model is either served
with what it would have computed, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...kernels.errors import OptionError

__all__ = ["Handed", "Owner"]

# What may be read: sizes and kinds, never numbers. An attribute's reader is called "__get__".
READ = {
    "__get__", "__len__", "size", "dim", "ndimension", "numel", "nelement", "stride",
    "element_size", "get_device", "is_contiguous", "is_floating_point", "is_complex",
}  # fmt: skip
SAME = {"contiguous", "clone", "detach"}  # what leaves the numbers as they are
CAST = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
WHOLE = slice(None)


class Owner(Protocol):
    """Who has handed out keys and values, of G heads each, and answers for them.

    Queries are [B, H, R, D] and weights [B, H, R, N], where a key head serves H / G neighbours.
    """

    index: int  # of the layer

    def score(self, query: Tensor, keys: Handed) -> Tensor:
        """Products of queries with the keys, [B, H, R, N]; -inf for entries that are gone."""

    def mix(self, weights: Tensor, values: Handed) -> Tensor:
        """Products of weights with the values, [B, H, R, D]."""

    def attend(
        self, query: Tensor, keys: Handed, values: Handed, mask: Tensor | None, dropout: float,
        is_causal: bool, scale: float | None, enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        """scaled_dot_product_attention: [B, H, R, D]."""


class Handed(Tensor):
    """All keys (or values) of a layer, without memory: [B, G, N, D].

    owner: who answers for them. what: "keys" or "values". repeats: how often each head follows
    itself. opened: whether there is an axis for that after the heads', as there is in between.
    turned: whether the last two axes have changed places.
    """

    owner: Owner
    what: str
    repeats: int
    opened: bool
    turned: bool

    @staticmethod
    def __new__(
        cls, owner: Owner, what: str, shape: Sequence[int], dtype: torch.dtype,
        device: torch.device, repeats: int = 1, opened: bool = False, turned: bool = False,
    ) -> Handed:  # fmt: skip
        self: Handed = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.owner, self.what = owner, what
        self.repeats, self.opened, self.turned = repeats, opened, turned
        return self

    # Tensor's own takes a keyword that torch alone hands over.
    def __repr__(self) -> str:  # type: ignore[override]
        return f"Handed({self.what} of layer {self.owner.index}, {list(self.shape)})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _answer(func, args, kwargs or {})

    # Tensor holds a C function there, for whose type mypy has no class method.
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """What comes here has passed by all that we answer, such as another library's kernel."""
        raise _refusal(_first(args, kwargs or {}), str(func))

    def like(self, shape: Sequence[int], **changes: Any) -> Handed:
        """The same in another form."""
        form: dict[str, Any] = {
            "dtype": self.dtype, "repeats": self.repeats, "opened": self.opened,
            "turned": self.turned,
        }  # fmt: skip
        return Handed(self.owner, self.what, shape, device=self.device, **form | changes)


@torch.compiler.disable  # whose sizes change with each token
def _answer(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    if func is scaled_dot_product_attention:
        return _attend(*args, **kwargs)
    if name in READ:
        return func(*args, **kwargs)
    if name in ("matmul", "__matmul__") and len(args) == 2 and not kwargs:
        left, right = args
        if isinstance(right, Handed) and not isinstance(left, Handed) and not right.opened:
            if right.what == "keys" and right.turned:
                return right.owner.score(left, right)
            if right.what == "values" and not right.turned:
                return right.owner.mix(left, right)
    moved = _moved(name, *args, **kwargs) if args and isinstance(args[0], Handed) else None
    if moved is None:
        raise _refusal(_first(args, kwargs), name)
    return moved


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Arguments of scaled_dot_product_attention."""
    if (
        not isinstance(key, Handed) or not isinstance(value, Handed)
        or isinstance(query, Handed) or isinstance(attn_mask, Handed)
        or (key.what, value.what) != ("keys", "values") or key.owner is not value.owner
    ):  # fmt: skip
        seen = _first((query, key, value, attn_mask), {})
        raise _refusal(seen, "scaled_dot_product_attention, not as the keys and values of a layer")
    if key.opened or key.turned or value.opened or value.turned or key.repeats != value.repeats:
        raise _refusal(key, f"scaled_dot_product_attention as {key}, with {value}")
    return key.owner.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _moved(name: str, handed: Handed, *args: Any, **kwargs: Any) -> Handed | None:
    """What it is after an operation that only moves numbers; None: that is not known."""
    if name in SAME:
        return handed
    if name in CAST:
        like = torch.empty(0, dtype=handed.dtype, device=handed.device)
        cast = getattr(like, name)(*args, **kwargs)
        known = isinstance(cast, Tensor) and cast.device == handed.device
        return handed.like(handed.shape, dtype=cast.dtype) if known else None
    if kwargs and name != "repeat_interleave":
        return None
    shape, whole = tuple(handed.shape), not handed.opened and not handed.turned
    opened = (*shape[:2], 1, *shape[2:])
    once = whole and handed.repeats == 1
    if name == "__getitem__" and once and args == ((WHOLE, WHOLE, None, WHOLE, WHOLE),):
        return handed.like(opened, opened=True)
    if name == "unsqueeze" and once and args == (2,):
        return handed.like(opened, opened=True)
    if name == "expand" and handed.opened and handed.repeats == 1:
        sizes = torch.empty(shape, device="meta").expand(*args).shape
        if sizes == (*shape[:2], sizes[2], *shape[3:]):
            return handed.like(sizes, repeats=sizes[2])
    if name in ("reshape", "view") and handed.opened:
        sizes = torch.empty(shape, device="meta").reshape(*args).shape
        if sizes == (shape[0], shape[1] * shape[2], *shape[3:]):
            return handed.like(sizes, opened=False)
    if name == "repeat_interleave" and once:
        given = dict(zip(("repeats", "dim"), args, strict=False)) | kwargs
        count = given.get("repeats")
        if set(given) == {"repeats", "dim"} and given["dim"] in (1, -3) and isinstance(count, int):
            return handed.like((shape[0], shape[1] * count, *shape[2:]), repeats=count)
    swap = name in ("transpose", "swapaxes") and not handed.opened
    if swap and sorted(axis % 4 for axis in args) == [2, 3]:
        return handed.like((*shape[:2], shape[3], shape[2]), turned=not handed.turned)
    return None


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Handed:
    """The first that is among the arguments of a call."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    return next(leaf for leaf in leaves if isinstance(leaf, Handed))


def _refusal(handed: Handed, place: str) -> OptionError:
    return OptionError(
        f"{handed.what} of layer {handed.owner.index} went into {place}; SlimCache serves "
        "attention that gives keys and values to scaled_dot_product_attention, or multiplies "
        'queries by keys and weights by values (attn_implementation "sdpa" or "eager"), and has '
        "no other use for them"
    )
