"""Benchmarks against the other libraries, interleaved in one process."""
