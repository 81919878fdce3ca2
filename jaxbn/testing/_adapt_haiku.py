"""Haiku modules as subjects."""

import inspect
from typing import Any

from jaxbn._normalizer import Normalizer
from jaxbn.testing._calls import NO_TEST_MODE, call_options, fill, modes, with_capabilities
from jaxbn.testing._layer import AXIS
from jaxbn.testing._signatures import defaults, name_of, parameters_of, unwrapped
from jaxbn.testing._subject import Subject


def haiku(module: Any, **options: Any) -> Subject | None:
    """The subject of a class of Haiku modules, or of a partial of one; None for anything else."""
    import haiku as hk

    if not (inspect.isclass(unwrapped(module)) and issubclass(unwrapped(module), hk.Module)):
        return None
    keywords = fill(module, options.get("features", 2))
    parameters = parameters_of(module)
    call = inspect.signature(unwrapped(module).__call__).parameters

    def normalizer(**changes):
        def forward(x, train, where=None, weights=None):
            return module(**keywords | changes)(x, **call_options(call, train=train, where=where, weights=weights))

        pure = hk.without_apply_rng(hk.transform_with_state(forward))

        # Haiku makes its averages where it first trains; no named axis is bound there.
        alone = {name: value for name, value in (keywords | changes).items() if name != "cross_replica_axis"}

        def first(x):
            return module(**alone)(x, **call_options(call, train=True))

        def init(key, x):
            params, batch_stats = hk.transform_with_state(first).init(key, x)
            return {"params": params, "batch_stats": batch_stats}

        def run(variables, x, train, where, weights):
            return pure.apply(variables["params"], variables["batch_stats"], x, train, where, weights)

        return Normalizer(init, with_capabilities(run, call))

    stated = defaults(module) | keywords
    found: dict[str, Any] = {
        "name": name_of(module),
        "epsilon": stated.get("eps"),
        "decay": stated.get("decay_rate"),
    }
    if not modes(call, train=True):
        found["lacks"] = {"test mode": NO_TEST_MODE}
    if "cross_replica_axis" in parameters:
        found["sharded"] = normalizer(cross_replica_axis=AXIS)
    if "data_format" in parameters:
        found["channels_first"] = normalizer(data_format="channels_first")
    return Subject(normalizer(), **found | options)
