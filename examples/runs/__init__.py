"""Which run a call belongs to: how well it is recognised, measured."""
