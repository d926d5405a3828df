"""SmolLM2-135M, a small language model with real weights, as a subject for sparse attention."""
