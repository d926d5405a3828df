"""The state of a batch, put together sample by sample: each may come from another call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...passes.pade.rules import Carried, CarriedAnswer, CarriedStream

__all__ = ["begun_anew", "gathered"]


def gathered(begun: Carried, parts: Sequence[tuple[Carried, Sequence[tuple[int, int]]]]) -> Carried:
    """A state put together from those of several calls.

    begun: a blank one for the whole batch. parts: states, each with pairs (a place in the batch,
    the sample's place in that state). Samples that are in none have nothing yet.
    """

    def put(blank: Tensor, each: Sequence[Tensor], dim: int = 0) -> Tensor:
        whole = blank.clone()
        for taken, (_, pairs) in zip(each, parts, strict=True):
            to = torch.tensor([place for place, _ in pairs], device=blank.device)
            come = torch.tensor([place for _, place in pairs], device=taken.device)
            values = taken.index_select(dim, come).to(blank.device, blank.dtype)
            whole.index_copy_(dim, to, values)
        return whole

    states = [carried for carried, _ in parts]
    streams = []
    for index, stream in enumerate(begun.streams):
        own = [carried.streams[index] for carried in states]
        residuals = tuple(
            put(blank, [each.residuals[age] for each in own])
            for age, blank in enumerate(stream.residuals)
        )
        previous = stream.previous
        if previous is not None:
            previous = put(previous, [each.previous for each in own if each.previous is not None])
        moments = put(stream.moments, [each.moments for each in own], 1)
        streams.append(CarriedStream(moments, residuals, previous))
    times = tuple(
        put(blank, [carried.times[age] for carried in states])
        for age, blank in enumerate(begun.times)
    )
    answers = []
    # Where a call kept none, nothing is given back to any.
    for each_answer in zip(*(carried.answers for carried in states), strict=False):
        values = zip(*(vars(each).values() for each in each_answer), strict=True)
        # To a sample that has nothing yet nothing is owed: its weight is 0.
        answers.append(
            CarriedAnswer(
                *[put(own[0].new_zeros(len(begun.times[0]), *own[0].shape[1:]), own)
                  for own in values]
            )
        )  # fmt: skip
    return Carried(
        step=max(int(carried.step) for carried in states),
        last=max(int(carried.last) for carried in states),
        known=min(int(carried.known) for carried in states),
        trusted=all(bool(carried.trusted) for carried in states),
        times=times,
        streams=tuple(streams),
        answers=tuple(answers),
    )


def begun_anew(carried: Carried, fresh: Sequence[int]) -> Carried:
    """With the newest residual of the samples `fresh`, which had none, as all of their history."""

    def filled(newest: Tensor, older: Tensor) -> Tensor:
        where = torch.tensor(list(fresh), device=newest.device)
        return older.index_copy(0, where, newest.index_select(0, where))

    streams = []
    for stream in carried.streams:
        first, *older = stream.residuals
        moments = stream.moments.clone()
        moments[:, list(fresh)] = 0  # they say nothing of a sample that had no history
        residuals = (first, *(filled(first, each) for each in older))
        streams.append(replace(stream, residuals=residuals, moments=moments))
    now, *earlier = carried.times
    times = (now, *(filled(now, each) for each in earlier))
    return replace(carried, streams=tuple(streams), times=times)
