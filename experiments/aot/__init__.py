"""Compiling ahead of time for TPUs and GPUs that are not there, and counting what the programs do.

`hlo` reads the text of a compiled program, `hlo_bytes` and `collectives` count what it moves and sends: all reading of
compiled programs is done with them, by the benchmarks and the tests too. `targets` describes machines, `programs` what
is compiled for them, `listing` in which combinations; `cost` is what is counted of one program, `record` what is kept.
To count another program, add it to `programs` and `listing`.
"""
