"""Measurements of ZipAR on the small picture model: `accel bench zipar`."""
