"""Where the visual tokens of a prompt are, from its token ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import OptionError

__all__ = ["visual_span"]

PLACEHOLDERS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")


def visual_span(model: Any, input_ids: Tensor) -> tuple[int, int]:
    """Positions [start, stop), from the first to the last visual token of any sample.

    model: a transformers model whose configuration names the placeholders of pictures or videos.
    input_ids: whole numbers [batch, tokens]. Returns (0, 0) where there are none.
    Raises OptionError for a model that names no placeholders.
    """
    names = [each for each in PLACEHOLDERS if getattr(model.config, each, None) is not None]
    if not names:
        raise OptionError(
            f"the configuration of {type(model).__name__} has none of {', '.join(PLACEHOLDERS)}: "
            "its visual tokens can't be told from its ids. Give the span itself"
        )
    placeholders = torch.tensor([getattr(model.config, each) for each in names])
    visual = torch.isin(input_ids, placeholders.to(input_ids.device)).any(0).nonzero()
    return (int(visual[0]), int(visual[-1]) + 1) if len(visual) else (0, 0)
