"""A small video model that we trained: a patch projector before frozen SmolLM2."""
