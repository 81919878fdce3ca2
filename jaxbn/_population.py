"""Exact statistics of a whole data set for a trained network: precise batch norm (Wu and Johnson 2021, section 3)."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._layers import Layers, find_layers, replace_layers
from jaxbn._moments import Moments
from jaxbn._recording import recorded_moments, start_record

Apply = Callable[[dict, Any], Any]


def population_statistics(
    apply: Apply,
    variables: dict,
    batches: Iterable,
    *,
    layer_by_layer: bool = False,
    unbiased: bool = False,
    tolerance: float = 1e-6,
    max_passes: int = 100,
) -> Any:
    """Running statistics that are the exact mean and variance of every layer's input over a data set.

    Batches are pooled by the number of values that each feature saw, so that they may be of unequal size and masked,
    and the sums are float64: what remains is the rounding within a batch. Layers used more than once in a forward pass
    pool all their uses. A layer or feature that saw nothing keeps its statistics, and a network without running
    statistics (layer, group, RMS norm) has none to measure: they come back as they are.

    All at once (the default) is one pass over the data in which every layer normalizes by its batch, as in training:
    deeper layers are measured on inputs that carry the noise of small batches below them. With layer_by_layer every
    layer is measured on what it gets at test time, its lower layers normalized by the population. The result then does
    not depend on how the data is cut into batches. It takes one pass more than the longest chain of normalizations.
    Each pass measures all layers; a layer's statistics are exact once those of all layers below it are, and the last
    pass sees that nothing changes. A layer that feeds itself (one set of statistics used twice in a chain) settles
    geometrically, to within `tolerance`.

    Shards: with `axis_name` in the layers, or under `jit` with sharded inputs, the statistics are those of all shards.
    With several processes each passes the same global batches and gets the same result; `apply` then has to return
    replicated statistics (`jax.jit(..., out_shardings=...)`).

    Args:
      apply: apply(variables, batch) -> moved batch_stats, the network in training mode; jit it for speed. In linen:
        `lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[1].get("batch_stats", {})`. Its layers are
        jaxbn's normalizers and modules, or made `recordable`.
      variables: {"params", "batch_stats", ...}; params as trained, or averaged over steps (EMA, SWA). Without
        "batch_stats" the network has none.
      batches: what `apply` takes, one after the other; with layer_by_layer something that can be iterated again.
      layer_by_layer: see above.
      unbiased: multiply the variance by n / (n - 1), n the count.
      tolerance: the change, relative to a feature's |mean| + std and variance, at which layer_by_layer ends.
      max_passes: at which layer_by_layer gives up.

    Returns:
      batch_stats of the same structure, shapes and dtypes. Variances are biased unless told otherwise; "weight", where
      there is one, is 1; the "length" of `recurrent_batch_norm` is that of the longest sequence seen.

    Raises:
      TypeError: a layer does not record: it is neither jaxbn's nor made `recordable`, or it is one whose statistics are
        not moments of its input, as those of `whitening_norm` and `virtual_batch_norm`.
      ValueError: no batches, statistics that are not finite, nothing recorded (apply not in training mode),
        batches that can be read only once, or layers that do not settle within max_passes.
    """
    if not _measurable(variables):
        return variables.get("batch_stats", {})
    if not layer_by_layer:
        return _with_statistics(variables["batch_stats"], _sweep(apply, variables, batches, by_running=False), unbiased)
    if iter(batches) is batches:
        raise ValueError(
            "batches is an iterator, which ends after one pass; layer_by_layer takes several: pass a list, or an"
            " object whose __iter__ starts anew."
        )
    for _ in range(max_passes):
        old, pooled = variables["batch_stats"], _sweep(apply, variables, batches, by_running=True)
        variables = {**variables, "batch_stats": _with_statistics(old, pooled, unbiased)}
        if _settled(_layers(old), _layers(variables["batch_stats"]), pooled, tolerance):
            return variables["batch_stats"]
    raise ValueError(
        f"statistics still change by more than {tolerance} of their size after {max_passes} passes; raise max_passes"
        " for a deeper network, or tolerance for one whose layers feed themselves."
    )


def input_moments(apply: Apply, variables: dict, batches: Iterable) -> dict[str, Moments]:
    """Moments of every layer's input over a data set, the network normalizing by its running statistics.

    Args:
      apply: as in `population_statistics`.
      variables: as there.
      batches: as there; read once.

    Returns:
      {path: Moments} of float64 numpy arrays, [features]; paths as in `find_layers`: "" for a single normalizer.
    """
    if not _measurable(variables):
        return {}
    measured = _sweep(apply, variables, batches, by_running=True)
    return {path: layer.moments for path, layer in measured.items()}


class _Measured(NamedTuple):
    """What a layer recorded: moments in float64, and what it counts besides, such as the "length" of a sequence."""

    moments: Moments
    counts: dict[str, np.ndarray]


def _layers(batch_stats) -> Layers:
    return find_layers(batch_stats, ("mean",))


def _measurable(variables) -> bool:
    return bool(_layers(variables.get("batch_stats", {})))


def _sweep(apply, variables, batches, *, by_running) -> dict[str, _Measured]:
    layers = _layers(variables["batch_stats"])
    records = {path: start_record(stats, by_running=by_running) for path, stats in layers.items()}
    started = {**variables, "batch_stats": replace_layers(variables["batch_stats"], records)}
    pooled: dict[str, _Measured] = {}
    for moved in _one_behind(_applied(apply, started, variables, batch) for batch in batches):
        batch = _read(records, _layers(moved))
        pooled = {path: _merge(pooled[path], batch[path]) for path in batch} if pooled else batch
    _check({path: layer.moments for path, layer in pooled.items()})
    return pooled


def _applied(apply, started, variables, batch):
    """The network with records; TypeError where it takes its plain statistics only."""
    try:
        return apply(started, batch)
    except (AttributeError, TypeError) as error:
        apply(variables, batch)
        raise TypeError(
            "a layer did not record: the network takes its batch_stats, but no records in their place. Every layer that"
            " keeps a mean has to be a normalizer or a module of jaxbn that records, or made jaxbn.recordable. The"
            f" network said: {error}"
        ) from error


def _one_behind(results: Iterator) -> Iterator:
    """Each result once the next is under way: reading one would otherwise wait for the device."""
    waiting = []
    for result in results:
        waiting.append(result)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _read(records: Layers, moved: Layers) -> dict[str, _Measured]:
    """What one batch recorded."""
    read = {}
    for path, record in records.items():
        measured = recorded_moments(record, moved.get(path, {}))
        if measured is None:
            raise TypeError(
                f"layer {path!r} did not record: a record went in, and what came back is none, or its running"
                " statistics moved. The layer has to be a normalizer or a module of jaxbn, or made jaxbn.recordable;"
                " and apply has to return the moved batch_stats alone, in linen apply(...,"
                " mutable=['batch_stats'])[1]['batch_stats']."
            )
        wide: list[Any] = [np.asarray(v).astype(np.result_type(v.dtype, np.float64)) for v in measured]
        count, mean, remainder, var = wide
        counts = {n: np.asarray(v.moved) for n, v in moved[path].items() if np.issubdtype(v.dtype, np.integer)}
        read[path] = _Measured(Moments(count, mean + remainder, var), counts)
    return read


def _merge(a: _Measured, b: _Measured) -> _Measured:
    """Moments pooled; of what is counted the larger, since counts only grow."""
    counts = {name: np.maximum(a.counts[name], b.counts[name]) for name in a.counts}
    return _Measured(_merge_moments(a.moments, b.moments), counts)


def _merge_moments(a: Moments, b: Moments) -> Moments:
    """`merge_moments` in numpy's float64."""
    count = a.count + b.count
    share = b.count / np.where(count == 0, 1, count)
    apart = b.mean - a.mean
    var = a.var * (1 - share) + b.var * share + np.abs(apart) ** 2 * share * (1 - share)
    return Moments(count, a.mean + apart * share, var)


def _check(pooled: dict[str, Moments]):
    if not pooled:
        raise ValueError("batches is empty; pass at least one batch.")
    if not any(np.any(moments.count > 0) for moments in pooled.values()):
        raise ValueError(
            f"none of the layers {sorted(pooled)} recorded anything; apply has to run the network in training mode"
            " (train=True, use_running_average=False) and to return the moved batch_stats."
        )
    for path, moments in pooled.items():
        if not (np.all(np.isfinite(moments.mean)) and np.all(np.isfinite(moments.var))):
            raise ValueError(f"the input of layer {path!r} has a mean or variance that is not finite on this data.")


def _with_statistics(batch_stats, pooled: dict[str, _Measured], unbiased):
    """batch_stats with the pooled mean and variance, and the old ones for what saw nothing."""
    layers = _layers(batch_stats)
    moved = {}
    for path, ((count, mean, var), counts) in pooled.items():
        if unbiased:
            var = var * np.where(count > 1, count / np.where(count > 1, count - 1, 1), 1)
        new = {"mean": mean, "var": var, "weight": np.ones_like(var)}
        names = [name for name in new if name in layers[path]]
        moved[path] = {name: _in_place_of(layers[path][name], new[name], count > 0) for name in names}
        moved[path] |= {name: _in_place_of(layers[path][name], value, True) for name, value in counts.items()}
    return replace_layers(batch_stats, moved)


def _in_place_of(old, new, seen):
    """New where seen, in the dtype of the old and on its devices."""
    value = np.where(seen, new, np.asarray(old)).astype(old.dtype)
    if not getattr(old, "committed", False):
        return jnp.asarray(value)
    # device_put would have all processes compare the value first.
    return jax.make_array_from_callback(value.shape, old.sharding, lambda index: value[index])


def _settled(old: Layers, new: Layers, pooled: dict[str, _Measured], tolerance) -> bool:
    for path, stats in new.items():
        mean, var = np.asarray(stats["mean"]), pooled[path].moments.var
        size = {"mean": np.abs(mean) + np.sqrt(var), "var": var}
        for name in size.keys() & stats.keys():
            change = np.abs(np.asarray(stats[name]) - np.asarray(old[path][name]))
            if not np.all(change <= tolerance * size[name]):
                return False
    return True
