"""Experiments that test what batch normalization does: `python -m experiments` lists them."""
