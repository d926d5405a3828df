"""What a sampler of diffusers makes of a model's answers, found by trying out a copy of it."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from typing import Any

import torch

from ...kernels.errors import OptionError

__all__ = ["check_steps", "weights_of"]

log = logging.getLogger(__name__)
EQUAL = 1e-3  # relative: schedulers compute in float32, and divide by small differences


def check_steps(scheduler: Any, steps: int | None) -> int:
    """How many steps a scheduler of diffusers is set to; OptionError for another, or for what is
    none."""
    times = getattr(scheduler, "timesteps", None)
    if times is None or not callable(getattr(type(scheduler), "step", None)):
        raise OptionError(
            f"scheduler is a {type(scheduler).__name__}; it has to be one of diffusers', with "
            "`step` and `timesteps`, set by its set_timesteps"
        )
    if steps not in (None, len(times)):
        raise OptionError(
            f"the scheduler has {len(times)} timesteps, but steps is {steps}; set it by "
            f"scheduler.set_timesteps({steps})"
        )
    return len(times)


def weights_of(scheduler: Any) -> list[float] | None:
    """The weight of each step's output in the samples that come after it, in units of the sample.

    scheduler: set to its timesteps; it stays as it is, and so do random numbers. It is linear in
    outputs and samples, so a copy is shown a sample of 1 without outputs, and for each step an
    output of 1 without a sample. None where the next sample is not made of the newest sample and
    output alone (samplers of higher order, or that add noise), or where that can't be told: of a
    sampler whose `step` takes no generator nobody knows whether it draws from the process's own.
    """
    if "generator" not in inspect.signature(type(scheduler).step).parameters:
        return None
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
    step = functools.partial(type(scheduler).step, scheduler)  # its own may be stood in for
    draws = torch.Generator()
    for number, time in enumerate(scheduler.timesteps):
        output = torch.zeros_like(sample)
        output[number] = 1
        if hasattr(scheduler, "scale_model_input"):  # which some wait for
            scheduler.scale_model_input(found[-1], time)
        made = step(output, time, found[-1], generator=draws, return_dict=False)
        found.append(made[0].double())
    return torch.stack(found).flatten(1)
