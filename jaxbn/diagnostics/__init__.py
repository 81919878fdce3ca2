"""What batch norm does inside a network, measured."""

from jaxbn.diagnostics._running import LayerSummary, running_stats_summary, running_stats_table

__all__ = [
    # Health of the running statistics
    "LayerSummary",
    "running_stats_summary",
    "running_stats_table",
]
