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
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..kernels.errors import OptionError
from ..kernels.omnisparse.selection import by_rank, mean_attention, shared_budget

__all__ = ["SlimCache"]

ATTENTION = "accel"  # the name of our attention function in transformers
LAYER = "accel_slim_layer"  # an attribute of the keys that a layer hands to it


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
    """One layer. Whole until our attention function has seen the prompt, then in groups."""

    is_croppable = True

    def __init__(self, rules: _Rules) -> None:
        super().__init__()
        self.rules = rules
        self.groups: list[_Group] = []
        self.seen = 0  # tokens
        self.settled = 0  # of them, before which entries may be missing
        self.awaited = False  # whether the attention function has still to take what was handed on

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for group in self.groups:
            group.append(key_states, value_states, self.seen)
        self.seen += key_states.shape[2]
        self.awaited = True
        setattr(key_states, LAYER, self)
        return key_states, value_states

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        **settings: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """What transformers asks of an attention function; the result is [B, N, H, D]."""
        self.awaited = False
        if not self.groups:
            result, _ = sdpa_attention_forward(module, query, key, value, mask, **settings)
            self.slim(query, key, value, mask, settings.get("scaling"))
            return result, None
        output = torch.empty_like(query)
        count = sum(len(group.heads) for group in self.groups)
        asking, found = query.unflatten(1, (count, -1)), output.unflatten(1, (count, -1))
        for group in self.groups:
            own = mask
            if mask is not None:  # its columns are positions
                columns = group.positions.long()[:, :, None].expand(-1, -1, mask.shape[2], -1)
                own = mask.expand(len(columns), columns.shape[1], -1, -1).gather(3, columns)
                own = own.repeat_interleave(asking.shape[2], 1)
            found[:, group.heads] = scaled_dot_product_attention(
                asking[:, group.heads].flatten(1, 2), group.keys, group.values, attn_mask=own,
                scale=settings.get("scaling"), enable_gqa=True,
            ).unflatten(1, (len(group.heads), -1))  # fmt: skip
        return output.transpose(1, 2).contiguous(), None

    def slim(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> None:
        """Keep what the last rows of the prompt look at: [B, H, N, D] on [B, G, N, D]."""
        rules, tokens = self.rules, key.shape[2]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        valid = None
        if mask is not None:
            last = mask[:, 0, -1]
            valid = (last if last.dtype == torch.bool else last == 0).expand(len(key), -1)
        rows = torch.arange(max(tokens - rules.probes, 0), tokens)
        attention = mean_attention(query, key, valid, rows, True, scale)  # [B, G, H / G, N]
        start, stop = rules.span or (0, tokens)
        place = torch.arange(tokens, device=key.device)
        visual = (place >= start) & (place < min(stop, tokens - rules.window))
        self.settled = min(stop, max(tokens - rules.window, 0))
        there = valid if valid is not None else torch.ones_like(visual).expand(len(key), -1)
        sinks = (there & (there.cumsum(-1) <= rules.sinks))[:, visual]  # each sample's own
        places = visual.nonzero()[:, 0]
        chosen = _chosen(attention, places, sinks, rules.recall, rules.heads)
        always = (~visual).nonzero()[:, 0]
        for heads, entries in chosen:
            kept = always.expand(len(key), len(heads), -1)
            kept = torch.cat([kept, entries], -1).sort(-1).values
            where = kept[..., None].expand(-1, -1, -1, key.shape[3])
            self.groups.append(
                _Group(heads, key[:, heads].gather(2, where), value[:, heads].gather(2, where),
                       kept.int())
            )  # fmt: skip

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.groups, self.seen, self.settled = [], 0, 0
        self.awaited = self.is_initialized = False

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
    kept = kept + attention.sum(-1, keepdim=True) - far.sum(-1, keepdim=True)
    needed = (kept < recall).sum(-1).clamp(max=len(visual))  # [B, G, H / G]
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

    model: a transformers model all of whose layers have full attention. Its attention function
    becomes accel's, which does what "sdpa" does, and reads this cache.
    span: positions [start, stop) of the prompt whose entries may go, such as those of a video;
    None: all of it. Sinks (the first `sinks` tokens), the last `window` tokens of the prompt, and
    what is generated always stay.
    recall: the share of attention that every query head's last `probes` rows of the prompt keep,
    in (0, 1]. Key heads that reach it without the span drop that; the others share one budget.
    heads: the quantile of their budgets that all get; 1 is the flattest head's.

    The prompt has to come in one piece: what comes later is kept whole. A cache is for one sequence
    (a batch, or beams) at a time; `reset()` empties it.

    Raises OptionError for values out of range, for models with other layers, and where a model does
    not let the cache's keys reach its attention function.
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
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)
        rules = _Rules(span, recall, heads, window, sinks, probes)
        self.slim = [_SlimLayer(rules) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(self.slim))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        waiting = [index for index, layer in enumerate(self.slim) if layer.awaited]
        if waiting:
            raise OptionError(
                f"the keys of layer {waiting[0]} did not reach accel's attention function: the "
                "model changes them on the way, or its attention implementation was set after this "
                "cache was made"
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


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it; other caches than ours are read as by "sdpa"."""
    layer: _SlimLayer | None = getattr(key, LAYER, None)
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return layer.attend(module, query, key, value, attention_mask, **settings)
