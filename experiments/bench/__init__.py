"""Benchmarks against the other libraries, interleaved in one process: accuracy, speed, memory, time to compile.

README.md says what they found. Measure anew with `python -m experiments bench --json ...`; the record, its tables and
the figures of the page are written by commands, never by hand. Uses the readers of compiled programs in `aot`.
"""
