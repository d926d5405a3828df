"""All of decoding as one module: from a prompt to a picture, with the loop inside the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .decoder import Decoder, State
from .request import positions_of

__all__ = ["Picture"]


class Picture(nn.Module):
    """What an exported engine does in one call. The prompt is read by passes, too.

    caches: shapes of the keys and values of each layer in turn.
    """

    def __init__(
        self, decoder: Decoder, end_of_line: int | None, caches: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.end_of_line = end_of_line
        self.caches = tuple(map(tuple, caches))
        self.width = decoder.layout.raster.width

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, uniform: Tensor,
        tests: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The tokens of pictures, int64 [B, tokens]; of Janus the codes.

        input_ids, attention_mask: int64 [B, P], the prompts, padded on the left; with guidance
        [2 B, P], the second half without what is to be followed. uniform, tests: random numbers
        in [0, 1), see `Decoder.draws`; tests with an adaptive window only.
        """
        decoder, layout = self.decoder, self.decoder.layout
        device, batch = uniform.device, len(uniform)
        random = (uniform,) if tests is None else (uniform, tests)
        known, entered, positions = layout.start(
            input_ids, positions_of(attention_mask), self.end_of_line
        )
        zeros = torch.zeros(1, dtype=torch.long, device=device)
        caches = tuple(
            torch.zeros(each, dtype=decoder.dtype, device=device) for each in self.caches
        )
        if layout.prompt > 1:
            caches = self._read(zeros, known, entered, positions, caches)
        more = decoder.begin(batch, device)

        def state_of(number: Tensor, known: Tensor, entered: Tensor, *rest: Tensor) -> State:
            return State(number, known, entered, rest[: len(more)], rest[len(more) :])

        def unfinished(*tensors: Tensor) -> Tensor:
            return decoder.unfinished(state_of(*tensors))[0]

        def one_pass(*tensors: Tensor) -> tuple[Tensor, ...]:
            state = decoder.one_pass(state_of(*tensors), positions, random)
            return state.number, state.known, state.written, *state.more, *state.caches

        result = torch.while_loop(unfinished, one_pass, (zeros, known, entered, *more, *caches))
        tokens: Tensor = result[1][:batch, layout.prompt : -1]
        return tokens - decoder.sampler.first

    def _read(
        self, number: Tensor, known: Tensor, entered: Tensor, positions: Tensor,
        caches: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The caches with all of the prompts in them but for their last token."""
        decoder, layout = self.decoder, self.decoder.layout
        before = torch.zeros_like(entered)
        place = torch.arange(self.width, device=known.device)
        batch = len(known) if decoder.sampler.guidance is None else len(known) // 2

        def unread(number: Tensor, *rest: Tensor) -> Tensor:
            return (number < -(-(layout.prompt - 1) // self.width))[0]

        def read(number: Tensor, written: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
            slots = number * self.width + place
            slots = torch.where(slots < layout.prompt - 1, slots, layout.length - 1)
            slots = slots.expand(batch, -1)
            state = State(number, known, written, (), caches)
            _, written, caches = decoder.logits(state, slots, slots, positions)
            return number + 1, written, *caches

        _, _, *caches = torch.while_loop(unread, read, (number, before, *caches))
        return tuple(caches)
