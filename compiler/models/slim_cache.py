"""`accel.SlimCache`: once the prompt has been read, each head keeps what its queries look at.

After the abstract of OmniSparse (arXiv 2511.12201), where slimming is for the visual entries of the
cache and decided by each head's decoding queries. The rules are ours: the last rows of the prompt
stand for the decoding queries; a head to which the span of visual entries matters little drops
it, and the others share one budget, set by the flattest, of which each keeps its own best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from ...kernels.errors import OptionError
from ...kernels.omnisparse.selection import by_rank, shared_budget
from .handed import Handed

__all__ = ["SlimCache"]


@dataclass(frozen=True)
class _Rules:
    """See `SlimCache`."""

    span: tuple[int, int] | None
    recall: float
    heads: float
    window: int
    sinks: int
    probes: int


@dataclass
class _Group:
    """Key heads of one layer that keep as many entries each.

    heads: int64 [G'], which they are. keys, values: [B, G', L, D]. positions: int32 [B, G', L],
    ascending.
    """

    heads: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor

    def append(self, keys: Tensor, values: Tensor, start: int) -> None:
        """Tokens of all heads [B, G, new, D]; the first one is at position `start`."""
        here = torch.arange(start, start + keys.shape[2], dtype=torch.int32, device=keys.device)
        here = here.expand(*self.positions.shape[:2], -1)
        self.keys = torch.cat([self.keys, keys[:, self.heads]], 2)
        self.values = torch.cat([self.values, values[:, self.heads]], 2)
        self.positions = torch.cat([self.positions, here], 2)

    def columns(self, rows: Tensor) -> Tensor:
        """The positions, int64, for each row of [B, G', H / G, R, ...]."""
        return self.positions.long()[:, :, None, None].expand(*rows.shape[:-1], -1)

    def index(self, samples: Tensor) -> None:
        """Take these samples."""
        self.keys, self.values, self.positions = (
            each.index_select(0, samples.to(each.device))
            for each in (self.keys, self.values, self.positions)
        )

    def crop(self, tokens: int) -> None:
        """Without the last ones."""
        self.keys, self.values, self.positions = (
            each[:, :, : each.shape[2] - tokens].clone()
            for each in (self.keys, self.values, self.positions)
        )

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes


class _SlimLayer(CacheLayerMixin):
    """One layer. Whole until attention has seen the prompt, then in groups; see `Owner`."""

    is_croppable = True

    def __init__(self, index: int, rules: _Rules) -> None:
        super().__init__()
        self.index = index
        self.rules = rules
        self.groups: list[_Group] = []
        self.prompt: tuple[Tensor, Tensor] | None = None  # keys and values, until there are groups
        self.seen = 0  # tokens
        self.settled = 0  # of them, before which entries may be missing
        self.awaited: set[str] = set()  # which of keys and values attention has still to take

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.groups:
            self.prompt = key_states, value_states
        for group in self.groups:
            group.append(key_states, value_states, self.seen)
        self.seen += key_states.shape[2]
        self.awaited = {"keys", "values"}
        keys, values = (
            Handed(self, what, (*new.shape[:2], self.seen, new.shape[3]), new.dtype, new.device)
            for what, new in (("keys", key_states), ("values", value_states))
        )
        return keys, values

    def take(self, *handed: Handed) -> None:
        """Attention takes these."""
        for each in handed:
            if each.what not in self.awaited or each.shape[-1 if each.turned else -2] != self.seen:
                raise OptionError(
                    f"the {each.what} of layer {self.index} were used a second time; SlimCache "
                    "needs a model in which each layer attends once to what the cache returns"
                )
            self.awaited.remove(each.what)

    def score(self, query: Tensor, keys: Handed) -> Tensor:
        self.take(keys)
        if self.prompt is not None:
            return query @ _whole(self.prompt[0], keys)
        asking, found = self.by_head(query), []
        for group in self.groups:
            products = asking[:, group.heads] @ group.keys.to(keys.dtype)[:, :, None].mT
            scores = products.new_full((*products.shape[:-1], self.seen), -torch.inf)
            found.append(scores.scatter(-1, group.columns(products), products))
        return self.joined(found)

    def mix(self, weights: Tensor, values: Handed) -> Tensor:
        self.take(values)
        by_head = self.by_head(weights)
        if self.prompt is not None:
            output = weights @ _whole(self.prompt[1], values)
            shares = by_head[..., -self.rules.probes :, :].float()
            if bool((shares < 0).any()):
                raise OptionError(
                    f"weights of layer {self.index} are negative; SlimCache keeps what has the "
                    "largest, and needs such as softmax gives"
                )
            self.slim(shares.mean(-2), (shares > 0).flatten(1, 3).any(1))
            return output
        found = []
        for group in self.groups:
            given = by_head[:, group.heads]
            columns = group.columns(given)
            if columns.shape[-1] < self.seen and bool(given.scatter(-1, columns, 0).any()):
                raise OptionError(
                    f"attention of layer {self.index} gives weight to entries whose score is -inf; "
                    "SlimCache needs such as softmax gives"
                )
            held = group.values.to(values.dtype)[:, :, None]
            found.append(given.gather(-1, columns) @ held)
        return self.joined(found)

    def attend(
        self, query: Tensor, keys: Handed, values: Handed, mask: Tensor | None, dropout: float,
        is_causal: bool, scale: float | None, enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        self.take(keys, values)
        if dropout:
            raise OptionError(f"dropout_p is {dropout}; SlimCache needs 0: model.eval()")
        if self.prompt is not None:
            output = scaled_dot_product_attention(
                query, _whole(self.prompt[0], keys), _whole(self.prompt[1], values), mask,
                is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
            self.slim(*self.shares(query, mask, is_causal, scale))
            return output
        if is_causal:
            raise OptionError(
                f"layer {self.index} asks for is_causal with {query.shape[2]} queries on "
                f"{self.seen} keys, which hides all but the first keys; SlimCache needs a mask"
            )
        asking, found = self.by_head(query), []
        if mask is not None:  # its columns are positions
            mask = self.by_head(mask.expand(*query.shape[:3], self.seen))
        for group in self.groups:
            own = None
            if mask is not None:
                own = mask[:, group.heads]
                own = own.gather(-1, group.columns(own)).flatten(1, 2)
            output = scaled_dot_product_attention(
                asking[:, group.heads].flatten(1, 2), group.keys, group.values, attn_mask=own,
                scale=scale, enable_gqa=True,
            )  # fmt: skip
            found.append(output.unflatten(1, (len(group.heads), -1)))
        return self.joined(found)

    def by_head(self, rows: Tensor) -> Tensor:
        """[B, H, ...] as [B, G, H / G, ...]."""
        heads = sum(len(group.heads) for group in self.groups)
        if self.prompt is not None:
            heads = self.prompt[0].shape[1]
        if rows.dim() != 4 or rows.shape[1] % heads:
            raise OptionError(
                f"layer {self.index} attends with {list(rows.shape)} to {heads} key heads; "
                f"SlimCache needs [batch, heads, rows, width] with a multiple of {heads} heads"
            )
        return rows.unflatten(1, (heads, -1))

    def joined(self, found: list[Tensor]) -> Tensor:
        """The groups' [B, G', H / G, ...], one for each, as [B, H, ...]."""
        order = torch.cat([group.heads for group in self.groups]).argsort()
        return torch.cat(found, 1)[:, order].flatten(1, 2)

    def shares(
        self, query: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """What `slim` takes, of the prompt's attention."""
        assert self.prompt is not None
        keys = self.prompt[0]
        last = self.by_head(query[:, :, -self.rules.probes :])  # [B, G, H / G, P, D]
        rows, tokens = last.shape[3], self.seen
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = ((last * scale).flatten(2, 3) @ keys.mT).float().unflatten(2, (-1, rows))
        if is_causal:
            mask = torch.ones(rows, tokens, dtype=torch.bool, device=keys.device)
            mask = mask.tril(tokens - rows)
        if mask is not None:
            if mask.dim() > 1 and mask.shape[-2] > rows:
                mask = mask[..., -rows:, :]
            mask = self.by_head(mask.expand(*query.shape[:2], rows, tokens))
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            else:  # far below every score stands for -inf
                hidden = mask <= torch.finfo(mask.dtype).min / 2
                scores = (scores + mask).masked_fill(hidden, -torch.inf)
        seen = scores > -torch.inf
        looking = seen.any(-1, keepdim=True)  # rows of padding are not
        attention = scores.masked_fill(~looking, 0).softmax(-1).masked_fill(~looking, 0)
        mean = attention.sum(-2) / looking.sum(-2).clamp(min=1)
        return mean, seen.flatten(1, 3).any(1)

    def slim(self, attention: Tensor, there: Tensor) -> None:
        """Keep what the last rows of the prompt look at.

        attention: [B, G, H / G, N], how much they do on average. there: bool [B, N], without what
        is padding.
        """
        assert self.prompt is not None
        rules, (key, value), tokens = self.rules, self.prompt, self.seen
        start, stop = rules.span or (0, tokens)
        place = torch.arange(tokens, device=key.device)
        visual = (place >= start) & (place < min(stop, tokens - rules.window))
        self.settled = min(stop, max(tokens - rules.window, 0))
        sinks = (there & (there.cumsum(-1) <= rules.sinks))[:, visual]  # each sample's own
        places = visual.nonzero()[:, 0]
        chosen = _chosen(attention, places, sinks, rules.recall, rules.heads)
        always = (~visual).nonzero()[:, 0]
        for heads, entries in chosen:
            kept = always.expand(len(key), len(heads), -1)
            kept = torch.cat([kept, entries], -1).sort(-1).values
            keys, values = (
                each[:, heads].gather(2, kept[..., None].expand(-1, -1, -1, each.shape[3]))
                for each in (key, value)
            )
            self.groups.append(_Group(heads, keys, values, kept.int()))
        self.prompt = None

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.groups, self.prompt, self.seen, self.settled = [], None, 0, 0
        self.awaited, self.is_initialized = set(), False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for group in self.groups:
            group.index(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for group in self.groups:
            group.index(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for group in self.groups:
            group.index(torch.arange(len(group.keys)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Without the last -`tokens_to_remove` tokens, as transformers counts them."""
        count = -tokens_to_remove
        if not 0 <= count <= self.seen - self.settled:
            raise OptionError(
                f"crop({tokens_to_remove}): needed is a number from {self.settled - self.seen} to "
                "0, since entries before that are no longer whole"
            )
        if count:
            for group in self.groups:
                group.crop(count)
            self.seen -= count


def _chosen(
    attention: Tensor, visual: Tensor, sinks: Tensor, recall: float, quantile: float
) -> list[tuple[Tensor, Tensor]]:
    """Which of the `visual` entries [V] each key head keeps, from the `attention` [B, G, H / G, N]
    of its queries: for heads that keep the `sinks` [B, V] only, and for the others, [G'] and
    positions [B, G', k]."""
    far = attention[..., visual]
    order, kept = by_rank(far, far.mean(2) + sinks[:, None].float())  # sinks before all others
    total = attention.sum(-1, keepdim=True)  # less than 1 where some goes to no entry
    kept = kept + total - far.sum(-1, keepdim=True)
    needed = (kept < recall * total).sum(-1).clamp(max=len(visual))  # [B, G, H / G]
    if recall == 1:  # not what is lost in rounding, either
        needed = torch.full_like(needed, len(visual))
    least = int(sinks.sum(-1).max())
    spread = (needed > least).any(2).any(0)
    heads = torch.arange(len(spread), device=far.device)
    groups = []
    if not bool(spread.all()):
        groups.append((heads[~spread], visual[order[:, ~spread, :least]]))
    if bool(spread.any()):
        budget = int(shared_budget(needed[:, spread].flatten(1), quantile).max())
        groups.append((heads[spread], visual[order[:, spread, : max(budget, least)]]))
    return groups


class SlimCache(Cache):
    """A key/value cache for `generate` that, after the prompt, keeps what decoding looks at.

    model: a transformers model all of whose layers have full attention, "sdpa" or "eager". It is
    left as it is: the cache hands it stand-ins for keys and values, see `Handed`.
    span: positions [start, stop) of the prompt whose entries may go, such as those of a video;
    None: all of it. Sinks (the first `sinks` tokens), the last `window` tokens of the prompt, and
    what is generated always stay.
    recall: the share of attention that every query head's last `probes` rows of the prompt keep,
    in (0, 1]. Key heads that reach it without the span drop that; the others share one budget.
    heads: the quantile of their budgets that all get; 1 is the flattest head's.

    The prompt has to come in one piece: what comes later is kept whole. A cache is for one sequence
    (a batch, or beams) at a time; `reset()` empties it.

    Raises OptionError for values out of range, for models with other layers, and, once it is used,
    where a model does anything else with keys and values than attend to them once in each layer.
    """

    def __init__(
        self,
        model: Any,
        *,
        span: tuple[int, int] | None = None,
        recall: float = 0.99,
        heads: float = 1.0,
        window: int = 128,
        sinks: int = 4,
        probes: int = 16,
    ) -> None:
        if not 0 < recall <= 1:
            raise OptionError(f"recall is {recall}; needed is a share in (0, 1]")
        if not 0 <= heads <= 1:
            raise OptionError(f"heads is {heads}; needed is a number in [0, 1]")
        if window < 1 or sinks < 0 or probes < 1:
            raise OptionError(
                f"window is {window}, sinks {sinks} and probes {probes}; needed are at least 1, 0 "
                "and 1"
            )
        if span is not None and (len(span) != 2 or not 0 <= span[0] <= span[1]):
            raise OptionError(f"span is {span}; needed is 0 <= start <= stop")
        config = model.config.get_text_config()
        kinds = sorted(set(get_layer_types_and_kwargs(config)[0]))
        if kinds != ["full_attention"]:
            raise OptionError(
                f"{type(model).__name__} has layers of {', '.join(kinds)}; SlimCache needs full "
                "attention in all of them"
            )
        rules = _Rules(span, recall, heads, window, sinks, probes)
        self.slim = [_SlimLayer(index, rules) for index in range(config.num_hidden_layers)]
        super().__init__(layers=list(self.slim))

    @torch.compiler.disable  # its sizes change with each token
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        for layer in self.slim:
            if layer.awaited:
                raise OptionError(
                    f"the {' and '.join(sorted(layer.awaited))} of layer {layer.index} did not "
                    "reach attention; SlimCache needs a model in which each layer attends to what "
                    "the cache returns"
                )
        if layer_idx >= len(self.slim):
            raise OptionError(
                f"the model has a layer {layer_idx}, and its config {len(self.slim)} layers; "
                "SlimCache needs to know all of them"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes that are held, those of positions included."""
        return sum(group.nbytes for layer in self.slim for group in layer.groups)

    @property
    def full_nbytes(self) -> int:
        """Bytes that a cache of all entries would hold."""
        total = 0
        for layer in self.slim:
            for group in layer.groups:
                entries = group.positions.shape[2]
                total += (group.keys.nbytes + group.values.nbytes) // entries * layer.seen
        return total

    def kept(self) -> list[list[float]]:
        """For each layer and key head the share of the entries that it keeps."""
        shares = []
        for layer in self.slim:
            own: dict[int, float] = {}
            for group in layer.groups:
                share = group.positions.shape[2] / layer.seen
                own |= dict.fromkeys(group.heads.tolist(), share)
            shares.append([own[head] for head in sorted(own)])
        return shares


def _whole(prompt: Tensor, handed: Handed) -> Tensor:
    """The prompt's keys or values in the form that they have been brought into."""
    prompt = prompt.to(handed.dtype)
    if handed.repeats > 1:
        prompt = prompt.repeat_interleave(handed.repeats, 1)
    return prompt.mT if handed.turned else prompt
