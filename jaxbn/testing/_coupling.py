"""Which values a layer normalizes together, found by changing one value and looking at which outputs move."""

from collections.abc import Iterator

import numpy as np

from jaxbn.testing._layer import Layer
from jaxbn.testing._scope import SCOPES, Scope, ghost, group
from jaxbn.testing._subject import Subject

# An outlier moves everything that shares its statistics by far more than this; rounding moves nothing so far.
_MOVED = 1e-3


def infer_scope(layer: Layer) -> Scope | None:
    """The scope that matches which outputs move with which inputs in training, or None where no known one does."""
    try:
        seen = [(shape, index, moved) for shape in _shapes(layer) for index, moved in _probes(layer, shape)]
    except Exception:  # What the layer raises on some input is for the laws to report.
        return None
    if not any(moved.any() for _, _, moved in seen):
        return None
    return next((scope for scope in _candidates(layer) if all(_matches(scope, *probe) for probe in seen)), None)


def coupling_hint(subject: Subject) -> str:
    """A sentence that names the scope to try, where what moves with what speaks against the subject's; else ""."""
    found = infer_scope(subject)
    if found is None or found.name == subject.scope.name:
        return ""
    return (
        f"These laws were checked with scope {subject.scope.name}, but the outputs that move together are those of"
        f" scope {found.name}. If that is what the layer is meant to do, try --scope {found.name} (in Python, scope=)."
    )


def _shapes(layer: Layer) -> list[tuple[int, ...]]:
    by_rank: dict[int, tuple[int, ...]] = {2: (8, layer.features), 4: (2, 2, 2, layer.features)}
    return [by_rank[rank] for rank in layer.ranks]


def _candidates(layer: Layer) -> Iterator[Scope]:
    yield from SCOPES.values()
    yield from (group(g) for g in range(2, layer.features) if layer.features % g == 0)
    yield ghost(2)


def _probes(layer: Layer, shape: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """Pairs of the flat index of a changed value and which other outputs moved, a mask of that shape."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    before = layer.train(x)
    size = int(np.prod(shape))
    for index in sorted({0, size // 3, size // 2, size - 1}):
        moved = np.zeros(shape, bool)
        # Of two values the larger stays the larger in one of the two directions, and then nothing moves.
        for outlier in (10.0, -10.0):
            changed = x.copy()
            changed.reshape(-1)[index] = outlier
            moved |= np.abs(layer.train(changed) - before) > _MOVED
        moved.reshape(-1)[index] = False
        yield index, moved


def _matches(scope: Scope, shape: tuple[int, ...], index: int, moved: np.ndarray) -> bool:
    ids = scope.split(np.arange(moved.size).reshape(shape))
    column = int(np.nonzero((ids == index).any(0))[0][0])
    together = np.isin(np.arange(moved.size).reshape(shape), ids[:, column])
    together.reshape(-1)[index] = False
    return bool((moved == together).all())
