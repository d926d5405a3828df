"""How a model becomes an accelerated one: options, backend, pipeline, state and reports."""
