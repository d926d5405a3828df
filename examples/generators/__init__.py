"""Small generators of different kinds, trained by us on real data, to judge forecasts on.

README.md says what they are. `GENERATORS` has them by name; `train` makes their checkpoints.
"""
