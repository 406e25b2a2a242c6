"""Benchmarks of the package: ``python -m benchmarks.<name> [--quick] [--out FILE]``."""
