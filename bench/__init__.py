"""Benchmarks. Each states its method first: hardware, settings, workload, what is emulated."""
