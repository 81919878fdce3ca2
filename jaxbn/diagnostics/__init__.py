"""What batch norm does inside a network, measured."""

from jaxbn.diagnostics._running import LayerSpread, spread, spread_table

__all__ = [
    # Health of the running statistics
    "LayerSpread",
    "spread",
    "spread_table",
]
