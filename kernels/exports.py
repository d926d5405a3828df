"""How accel's own operators leave it: as plain torch, in the one place where each says so.

An exported file must run where accel is not installed. An operator that has a kernel of its own
therefore names a body of plain torch for it, which every format can hold:

    EXPORT_BODIES[torch.ops.accel.omnisparse_attend.default] = reference.omnisparse_attend

`compiler.export` puts the bodies in the place of the operators, inside branches too; but for
AOTInductor, whose packages call the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["EXPORT_BODIES"]

EXPORT_BODIES: dict[Any, Callable[..., Any]] = {}
