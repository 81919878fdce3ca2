"""Compiling ahead of time for TPUs and GPUs that are not there, and counting what the programs do."""
