"""How a model becomes an accelerated one: options, backend, pipeline, state and reports."""

__version__ = "0.1.0"
