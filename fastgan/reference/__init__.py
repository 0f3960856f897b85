"""Plain PyTorch of every op: the oracle of tests and benchmarks, and the path taken on a CPU."""
