"""Data sets, networks, and the loop that trains many of them at once."""
