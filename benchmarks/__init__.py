"""How fast asupervise is, beside the limit that the system sets: ``python -m benchmarks``."""
