"""Other projects' caches on the reference model, each tuned to an allowance of block evaluations.

From diffusers: FirstBlockCache, TaylorSeer, MagCache, SeaCache. From cache-dit: DBCache with plain
reuse, TaylorSeer, DMD and FoCa. Each `Peer` lists the settings to try; the bench takes the one of
best fidelity within the allowance.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Peer", "calibrate_magnitudes", "peers"]

Install = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Peer:
    """A cache, and how to find its best setting.

    settings(steps): (description, install) of each setting to try, for a cache that chooses its
    steps itself. placed(placement, steps): install, for one that is told which steps to compute.
    One of the two is given. install(model) switches the cache on.
    first_block: whether it runs the first block on every step.
    """

    name: str
    settings: Callable[[int], Iterator[tuple[str, Install]]] | None = None
    placed: Callable[[Sequence[int], int], Install] | None = None
    first_block: bool = False


def _first_block(steps: int) -> Iterator[tuple[str, Install]]:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    for index in range(24):
        threshold = round(0.03 * 1.15**index, 4)
        config = FirstBlockCacheConfig(threshold=threshold)
        yield f"threshold {threshold}", partial(apply_first_block_cache, config=config)


def _taylorseer(steps: int) -> Iterator[tuple[str, Install]]:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    for order in (1, 2):
        for interval in (2, 3, 4):
            for before in (1, 2, 3, 4):
                for after in (None, steps - 1):
                    config = TaylorSeerCacheConfig(
                        cache_interval=interval,
                        disable_cache_before_step=before,
                        disable_cache_after_step=after,
                        max_order=order,
                        taylor_factors_dtype=torch.float32,
                        # Its default patterns match nothing in a DiT; whole blocks suit it best.
                        cache_identifiers=[r"transformer_blocks\.\d+"],
                    )
                    text = f"order {order}, interval {interval}, full before {before}"
                    text += "" if after is None else f" and from {after}"
                    yield text, partial(apply_taylorseer_cache, config=config)


def calibrate_magnitudes(model: nn.Module, run: Callable[[nn.Module], Any], steps: int) -> Tensor:
    """MagCache's magnitude ratios of a model, by its own calibration."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    printed = io.StringIO()
    config = MagCacheConfig(calibrate=True, num_inference_steps=steps)
    with contextlib.redirect_stdout(printed):
        apply_mag_cache(model, config)
        run(model)
    line = next(x for x in reversed(printed.getvalue().splitlines()) if x.startswith("["))
    return torch.tensor([float(number) for number in line.strip("[]").split(",")])


def _magnitude(ratios: Tensor) -> Callable[[int], Iterator[tuple[str, Install]]]:
    def settings(steps: int) -> Iterator[tuple[str, Install]]:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        for retention in (0.0, 0.1, 0.2):
            for most in (2, 3, 4):
                for threshold in (0.02, 0.05, 0.1, 0.2, 0.4, 1.0):
                    config = MagCacheConfig(
                        threshold=threshold,
                        max_skip_steps=most,
                        retention_ratio=retention,
                        num_inference_steps=steps,
                        mag_ratios=ratios,
                    )
                    text = f"threshold {threshold}, at most {most} skips, retention {retention}"
                    yield text, partial(apply_mag_cache, config=config)

    return settings


def _spectral(steps: int) -> Iterator[tuple[str, Install]]:
    from diffusers.hooks import SeaCacheConfig, apply_sea_cache

    def latents(module: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
        sample = args[0] if args else kwargs["hidden_states"]
        return [each[:, None] for each in sample]  # (C, T, H, W) of one frame

    for order in (0, 1):
        for most in (2, 3, 4):
            for index in range(9):
                threshold = round(0.08 * 1.3**index, 4)
                config = SeaCacheConfig(
                    threshold=threshold,
                    residual_order=order,
                    max_consecutive_cached=most,
                    cache_end_steps=0,
                    raw_vision_callback=latents,
                )
                text = f"order {order}, threshold {threshold}, at most {most} skips"
                yield text, partial(apply_sea_cache, config=config)


def _cache_dit(calibrator: str | None) -> Callable[[Sequence[int], int], Install]:
    def placed(placement: Sequence[int], steps: int) -> Install:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        import cache_dit
        from cache_dit.caching.cache_blocks import pattern_3_4_5

        kinds: dict[str | None, Any] = {
            None: lambda: None,
            "TaylorSeer": lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
            "DMD": cache_dit.DMDCalibratorConfig,
            "FoCa": cache_dit.FoCaCalibratorConfig,
        }

        def install(model: nn.Module) -> None:
            blocks = model.get_submodule("transformer_blocks")
            assert isinstance(blocks, nn.ModuleList)
            cache_dit.enable_cache(
                cache_dit.BlockAdapter(
                    transformer=model,
                    blocks=blocks,
                    forward_pattern=cache_dit.ForwardPattern.Pattern_3,
                    check_forward_pattern=False,
                ),
                cache_config=cache_dit.DBCacheConfig(
                    Fn_compute_blocks=1,
                    Bn_compute_blocks=0,
                    steps_computation_mask=[int(step in placement) for step in range(steps)],
                    steps_computation_policy="static",
                    num_inference_steps=steps,
                ),
                calibrator_config=kinds[calibrator](),
            )
            # Its stand-in for the blocks lacks the timestep embedding that DiT's last layer
            # borrows from the first block.
            stand_in: Any = pattern_3_4_5.CachedBlocks_Pattern_3_4_5
            stand_in.norm1 = blocks[0].norm1

        return install

    return placed


def peers(magnitudes: Tensor) -> list[Peer]:
    """All peers. magnitudes: MagCache's calibrated ratios for this model and step count."""
    names = {
        None: "cache-dit DBCache",
        "TaylorSeer": "cache-dit DBCache + TaylorSeer",
        "DMD": "cache-dit DBCache + DMD",
        "FoCa": "cache-dit DBCache + FoCa",
    }
    return [
        Peer("diffusers FirstBlockCache", _first_block, first_block=True),
        Peer("diffusers TaylorSeer", _taylorseer),
        Peer("diffusers MagCache", _magnitude(magnitudes)),
        Peer("diffusers SeaCache", _spectral),
        *(Peer(name, placed=_cache_dit(kind), first_block=True) for kind, name in names.items()),
    ]
