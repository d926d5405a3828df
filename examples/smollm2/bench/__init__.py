"""Measurements of sparse attention on SmolLM2-135M; `accel bench omnisparse` runs them."""
