"""The rules of a sampling run: what is computed, what the predictor is given, what is kept.

Written once, for Python's values and for tensors alike: the back end's numbers and truth values
are Python's, those of a step that decides inside a graph are tensors. `choose` is `if` for the
former and `torch.where` for the latter.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.predictors import Predictor
from ...kernels.predictors.base import safe_divide
from .state import StreamInputs, StreamOutputs

__all__ = ["Carried", "CarriedAnswer", "CarriedStream", "arguments", "begin", "choose", "decide",
           "given_back", "nothing_owed", "owed_more", "owing", "record", "sample_times",
           "share_given_back", "trusted"]  # fmt: skip

Flag = bool | Tensor  # of bool, with one element
Number = int | Tensor  # of int64, with one element


@dataclass(frozen=True)
class CarriedStream:
    """What a run carries of one stream.

    moments: of the newest computed residual. residuals: the predictor's history, newest first.
    previous: the stack's input on the step before; None where the predictor does not read it.
    """

    moments: Tensor
    residuals: tuple[Tensor, ...]
    previous: Tensor | None = None


@dataclass(frozen=True)
class CarriedAnswer:
    """What a run carries of one of the model's answers, to give back what predicted steps missed.

    computed: the answer of the newest computed step, at `time`. predicted: the sum of those since,
    each times the weight that it has in the samples to come; weight, moment: the sums of these
    weights, and of weights times times. Numbers are float64 `[batch]`.
    """

    computed: Tensor
    predicted: Tensor
    time: Tensor
    weight: Tensor
    moment: Tensor


@dataclass(frozen=True)
class Carried:
    """What a run carries from one step to the next.

    step: how many steps there were. last: the newest computed one, counted from 1; 0 for none.
    known: how many residuals there are; entries of the history beyond them repeat the oldest.
    trusted: whether they may be predicted from. times: of each residual, `[batch]`.
    """

    step: Number
    last: Number
    known: Number
    trusted: Flag
    times: tuple[Tensor, ...]
    streams: tuple[CarriedStream, ...]
    answers: tuple[CarriedAnswer, ...] = ()

    def forget_newest(self) -> Carried:
        """As if the newest residual had never been there: it was found not to be finite."""
        streams = tuple(
            replace(
                each,
                residuals=(*each.residuals[1:], each.residuals[-1]),
                moments=torch.zeros_like(each.moments),
            )
            for each in self.streams
        )
        times = (*self.times[1:], self.times[-1])
        return replace(self, streams=streams, times=times, known=max(int(self.known) - 1, 0))


def begin(history: int, now: Tensor, streams: Sequence[CarriedStream]) -> Carried:
    """A run before its first step. streams: blank."""
    return Carried(0, 0, 0, True, (now,) * history, tuple(streams))


def nothing_owed(answer: Tensor, now: Tensor) -> CarriedAnswer:
    """What is carried of an answer after a computed step: as the model gave it, at `now`."""
    nothing = torch.zeros_like(now)
    none = torch.zeros_like(answer, dtype=torch.float32)
    # A copy: whoever is given the answer may write into it.
    return CarriedAnswer(answer.clone(), none, now, nothing, nothing)


def choose(condition: Flag, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`."""
    if isinstance(condition, Tensor):
        if isinstance(yes, Tensor) and yes.dtype is torch.bool:
            return (condition & yes) | (~condition & no)  # onnxruntime selects no truth values
        return torch.where(condition, yes, no)
    return yes if condition else no


def _not(flag: Flag) -> Flag:
    return ~flag if isinstance(flag, Tensor) else not flag


def _same(left: Tensor, right: Tensor, like: Flag) -> Flag:
    """Whether two tensors are equal, as a flag of the kind of `like`."""
    return (left == right).all() if isinstance(like, Tensor) else torch.equal(left, right)


def decide(carried: Carried, planned: Flag) -> Flag:
    """Whether the next step is computed. planned: whether the schedule computes it."""
    return planned | (carried.known == 0) | _not(carried.trusted)


def arguments(
    predictors: Sequence[Predictor], carried: Carried, now: Tensor, remaining: Tensor
) -> list[StreamInputs]:
    """What the graph is given of each stream.

    predictors: of each stream, or one for all. now: the step's own time, float64 `[batch]`.
    remaining: 0-d float64, the fraction of the run still to go.
    """
    # On the first step there is nothing to predict from; its own time stands for all.
    first = carried.known == 0
    times = torch.stack([now, *(choose(first, now, each) for each in carried.times)])
    found = []
    each_predictor = itertools.cycle(predictors)
    for stream, predictor in zip(carried.streams, each_predictor, strict=False):
        # Moments that nobody has read stay on their device, and what comes of them too.
        where = stream.moments.device
        known = predictor.coefficients(
            times.to(where), remaining.to(where), stream.moments.double()
        )
        coefficients = None if known is None else known.to(stream.residuals[0].device).float()
        found.append(StreamInputs(coefficients, stream.residuals, stream.previous))
    return found


def trusted(known: Number, finite: Flag, error: Any, max_error: float) -> Flag:
    """Whether residuals may be predicted from, by what the newest computed step said.

    known: how many residuals there were with it. On a run's first step there was nothing to predict
    from: its error means nothing. error: a number or a tensor, of the kind of `finite`.
    """
    return finite & ((known < 2) | (error <= max_error))


def share_given_back(correction: float, left: int) -> float:
    """How much of what was missed a step gives back: less towards the end, and nothing there.

    What is left of the run makes up for the rest, and for what is given back too much. left: steps
    of the run, this one included; 0 where that is not known.
    """
    return correction * (1 - 1 / left if left > 0 else 1.0)


def owing(owed: CarriedAnswer, now: Tensor, weight: Tensor) -> Tensor:
    """For which samples steps were predicted whose weights are known, as is this step's: bool
    `[batch]`. now, weight: see `given_back`."""
    known = torch.isfinite(owed.weight) & torch.isfinite(weight) & (weight != 0)
    return known & (owed.weight != 0) & (now != owed.time)


def given_back(
    owed: CarriedAnswer, answer: Tensor, now: Tensor, weight: Tensor, share: Tensor
) -> Tensor:
    """A computed step's answer, with a share of what the predicted steps before it missed (ours).

    By now what they should have answered is known better: it lies between the computed answers on
    both sides. A sampler adds up its model's answers, so what is missing in the sample is their
    difference, and it gets there through this answer. All of it would be too much: the model has
    seen the sample that they led to, and has begun to make up for it.

    now: the step's time; weight: of its answer in the samples to come, like those of the steps
    before; share: of what is missing; float64 `[batch]`. Where a weight is not known (NaN), nothing
    is given back (see `owing`).
    """
    # Of the predicted steps, how far they lay between the computed ones: the mean, by weight.
    later = safe_divide(owed.moment - owed.weight * owed.time, now - owed.time)
    factors = torch.stack([later, owed.weight - later, -torch.ones_like(later)])
    factors = torch.where(owing(owed, now, weight), share * safe_divide(factors, weight), 0.0)
    factors = factors.to(answer.device).float()
    known = (answer, owed.computed, owed.predicted)
    missed = sum(
        factor.view(-1, *[1] * (answer.dim() - 1)) * each.float()
        for factor, each in zip(factors, known, strict=True)
    )
    # Predicted answers that overflow are nothing to go by.
    return torch.where(torch.isfinite(missed), answer.float() + missed, answer).to(answer.dtype)


def owed_more(owed: CarriedAnswer, answer: Tensor, now: Tensor, weight: Tensor) -> CarriedAnswer:
    """What is carried of an answer after a predicted step."""
    each = weight.to(answer.device).float().view(-1, *[1] * (answer.dim() - 1))
    return replace(
        owed,
        predicted=owed.predicted + each * answer.float(),
        weight=owed.weight + weight,
        moment=owed.moment + weight * now,
    )


def record(
    carried: Carried,
    predictor: Predictor,
    computed: Flag,
    finite: Flag,
    now: Tensor,
    results: Sequence[StreamOutputs],
) -> Carried:
    """What the run carries after a step; `trusted` and `answers` stay as they were.

    finite: whether its residuals are; True where that is not known yet (see `forget_newest`).
    """
    history = predictor.history
    first = carried.known == 0
    # Two steps at one time (Heun's) replace each other; moments then describe nothing.
    repeated = _same(now, carried.times[0], first) & _not(first)
    # A residual that is not finite never enters the history.
    stored = computed & finite
    if predictor.keeps_predictions:
        stored = stored | _not(computed)

    def pushed(new: Tensor, old: Sequence[Tensor]) -> tuple[Tensor, ...]:
        filled = [choose(first, new, each) for each in old]
        later = [choose(repeated, filled[i + 1], filled[i]) for i in range(history - 1)]
        return tuple(
            choose(stored, kept, before)
            for kept, before in zip([new, *later], old, strict=True)
        )  # fmt: skip

    more = carried.known + 1
    more = more.clamp(max=history) if isinstance(more, Tensor) else min(more, history)
    streams = []
    for stream, result in zip(carried.streams, results, strict=True):
        # Where they do not describe the history, they say nothing.
        fitting = choose(repeated | _not(finite), torch.zeros_like(stream.moments), result.moments)
        streams.append(
            CarriedStream(
                choose(computed, fitting, stream.moments),
                pushed(result.residual, stream.residuals),
                result.stack_input,
            )
        )
    step = carried.step + 1
    return Carried(
        step=step,
        last=choose(computed, step, carried.last),
        known=choose(stored, choose(repeated, carried.known, more), carried.known),
        trusted=carried.trusted,
        times=pushed(now, carried.times),
        streams=tuple(streams),
        answers=carried.answers,
    )


def sample_times(values: Sequence[Tensor], batch: int) -> Tensor:
    """The time of every sample, float64 `[batch]` on the CPU, from a graph's timestep inputs."""
    total = torch.zeros(batch, dtype=torch.float64)
    for value in values:
        each = value.detach().to("cpu", torch.float64)
        # [batch, tokens]: one time a sample, that of its noisiest token.
        each = each.flatten(1).amax(1) if each.dim() > 1 else each.flatten()
        if each.numel() not in (1, batch):
            each = each.mean().reshape(1)
        total = total + each
    return total
