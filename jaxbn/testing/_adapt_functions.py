"""Functions x -> y, and factories of Normalizers, as subjects."""

from collections.abc import Callable
from typing import Any

import jax

from jaxbn._normalizer import Normalizer
from jaxbn.testing._layer import AXIS
from jaxbn.testing._signatures import defaults, name_of
from jaxbn.testing._subject import Subject


def function(f: Callable[[jax.Array], jax.Array], **options: Any) -> Subject:
    """The subject of a function x -> y: no variables, no modes."""

    def init(key, x):
        del key, x
        return {"params": {}, "batch_stats": {}}

    def apply(variables, x, *, train):
        del train
        return f(x), variables["batch_stats"]

    found: dict[str, Any] = {"name": getattr(f, "__name__", "function")}
    return Subject(Normalizer(init, apply), **found | options)


def factory(make: Callable[..., Normalizer], **options: Any) -> Subject:
    """The subject of a function of keyword arguments that returns a Normalizer.

    Its axis_name and feature_axis, where it takes them, make the versions for shards and for channels first.

    Raises:
      TypeError: it returns something else.
    """
    norm = make()
    if not isinstance(norm, Normalizer):
        raise TypeError(
            f"{name_of(make)}() returned {type(norm).__name__}; expected a Normalizer, or take x and return y."
        )
    stated = defaults(make)
    found: dict[str, Any] = {
        "name": name_of(make),
        "epsilon": stated.get("epsilon"),
        "decay": stated.get("decay"),
    }
    if "axis_name" in stated:
        found["sharded"] = make(axis_name=AXIS)
    # Beside `axis`, which says what is reduced, feature_axis says only where scale and bias run: that is no layout.
    if "feature_axis" in stated and "axis" not in stated:
        found["channels_first"] = make(feature_axis=1)
    if found["decay"] is None and "decay" in stated:
        found["rule"] = "cumulative"
    if "debias" in stated and "rule" not in found:
        found["rule"] = "debiased" if stated["debias"] else "exponential"
    if "unbiased" in stated:
        found["unbiased"] = stated["unbiased"]
    return Subject(norm, **found | options)
