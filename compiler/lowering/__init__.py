"""What compiles a program, by name, and what each can't hold."""

from .table import CANNOT, LOWERINGS, check_lowering, lower

__all__ = ["CANNOT", "LOWERINGS", "check_lowering", "lower"]
