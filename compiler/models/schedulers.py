"""What a sampler of diffusers makes of a model's answers, found by trying out a copy of it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

__all__ = ["weights_of"]

log = logging.getLogger(__name__)
EQUAL = 1e-3  # relative: schedulers compute in float32, and divide by small differences


def weights_of(scheduler: Any) -> list[float] | None:
    """The weight of each step's output in the samples that come after it, in units of the sample.

    scheduler: set to its timesteps; it stays as it is, and so do random numbers. It is linear in
    outputs and samples, so a copy is shown a sample of 1 without outputs, and for each step an
    output of 1 without a sample. None where the next sample is not made of the newest sample and
    output alone (samplers of higher order, or that add noise), or where that can't be told.
    """
    try:
        found = _responses(copy.deepcopy(scheduler))
    except Exception as error:  # whatever another project's code raises
        log.debug("%s can't be tried out: %r", type(scheduler).__name__, error)
        return None
    alone, answers = found[:, -1], found[:, :-1]
    count = answers.shape[1]
    if not torch.isfinite(found).all() or bool((alone == 0).any()):
        return None
    # In units in which a sample without outputs stays what it is, what has once come in stays.
    answers = answers / alone[:, None]
    own = answers[torch.arange(1, count + 1), torch.arange(count)]
    later = torch.ones(count + 1, count, dtype=torch.bool).tril(-1)
    apart = (answers - own).abs()[later]
    if bool((apart > EQUAL * own.abs().expand(count + 1, -1)[later]).any()):
        return None
    weights: list[float] = own.tolist()
    return weights


def _responses(scheduler: Any) -> torch.Tensor:
    """[steps + 1, steps + 1]: the sample after each number of steps, for an output of 1 at each
    step alone, and last for none at all but a sample of 1."""
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor):
            setattr(scheduler, name, value.cpu())  # read once, not at every step
    if hasattr(scheduler, "set_begin_index"):  # which a run from a picture has set otherwise
        scheduler.set_begin_index(0)
        scheduler._step_index = None
    count = len(scheduler.timesteps)
    sample = torch.zeros(count + 1, 1, 1, 1, dtype=torch.float64)
    sample[-1] = 1
    found = [sample]
    with torch.random.fork_rng(devices=[]):
        for step, time in enumerate(scheduler.timesteps):
            output = torch.zeros_like(sample)
            output[step] = 1
            if hasattr(scheduler, "scale_model_input"):  # which some wait for
                scheduler.scale_model_input(found[-1], time)
            # Not its own: another may stand in for it while a pipeline runs.
            made = type(scheduler).step(scheduler, output, time, found[-1], return_dict=False)
            found.append(made[0].double())
    return torch.stack(found).flatten(1)
