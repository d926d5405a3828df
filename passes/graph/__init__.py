"""Reading and changing FX graphs, for every pass: nodes, facts, emit, regions, verify."""
