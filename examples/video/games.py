"""Videos of Atari games with known content: scenes of several games, one after the other.

pip install ale-py     # 3 MB: the emulator with its games. Nothing is downloaded or kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...compiler.extras import optional

__all__ = ["GAMES", "PATCHES", "WIDTH", "Video", "make_video", "recording", "screens"]

GAMES = {
    "pong": "Pong", "breakout": "Breakout", "freeway": "Freeway", "seaquest": "Seaquest",
    "space_invaders": "Space Invaders", "tennis": "Tennis", "boxing": "Boxing", "enduro": "Enduro",
}  # fmt: skip
EVERY = 4  # frames of the console, of which one is shown
ROWS, COLUMNS = 2, 2  # patches of a picture of 208 by 160 pixels
PATCHES = ROWS * COLUMNS
SHRINK = 8  # pixels that become one, in both directions
WIDTH = (208 // ROWS // SHRINK) * (160 // COLUMNS // SHRINK) * 3  # numbers of a patch
RECORDED = 1500  # frames of a recording


class Video(NamedTuple):
    """patches: uint8 [frames, PATCHES, WIDTH]. scenes: the games' names, in order."""

    patches: Tensor
    scenes: list[str]


@cache
def recording(game: str, seed: int) -> Tensor:
    """Random play from the start, uint8 [RECORDED, PATCHES, WIDTH]."""
    return torch.stack([_patches(screen) for screen in screens(game, seed, RECORDED)])


def screens(game: str, seed: int, count: int) -> Iterator[Tensor]:
    """Random play from the start, uint8 [210, 160, 3] each; a new game after each end."""
    ale_py: Any = optional("ale_py", "bench")
    roms: Any = optional("ale_py.roms", "bench")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    console = ale_py.ALEInterface()
    console.setInt("random_seed", seed)
    console.setInt("frame_skip", EVERY)
    console.loadROM(roms.get_rom_path(game))
    actions = console.getMinimalActionSet()
    generator = torch.Generator().manual_seed(seed)
    for choice in torch.randint(len(actions), (count,), generator=generator).tolist():
        if console.game_over():
            console.reset_game()
        console.act(actions[choice])
        yield torch.from_numpy(console.getScreenRGB())


def _patches(picture: Tensor) -> Tensor:
    """A screen, uint8 [210, 160, 3], cut into patches and shrunk: uint8 [PATCHES, WIDTH]."""
    small = picture[:208].unflatten(1, (-1, SHRINK)).unflatten(0, (-1, SHRINK))
    small = small.float().mean((1, 3)).to(torch.uint8)
    small = small.unflatten(1, (COLUMNS, -1)).unflatten(0, (ROWS, -1))
    return small.transpose(1, 2).flatten(0, 1).flatten(1)


def make_video(frames: int, scenes: int, seeds: Sequence[int], generator: torch.Generator) -> Video:
    """Scenes of different games, none shorter than half of its share of the frames.

    seeds: of the recordings that it may be taken from.
    """

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    names = [list(GAMES)[index] for index in torch.randperm(len(GAMES), generator=generator)]
    least = frames // (2 * scenes)
    spare = frames - scenes * least
    cuts = sorted(pick(spare + 1) for _ in range(scenes - 1))
    parts = []
    for name, start, stop in zip(names, [0, *cuts], [*cuts, spare], strict=False):
        length = least + stop - start
        source = recording(name, seeds[pick(len(seeds))])
        begin = pick(len(source) - length + 1)
        parts.append(source[begin : begin + length])
    return Video(torch.cat(parts), [GAMES[name] for name in names[:scenes]])
