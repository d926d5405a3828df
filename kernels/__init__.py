"""The arithmetic under the passes: one folder an op, each with a plain torch reference."""
