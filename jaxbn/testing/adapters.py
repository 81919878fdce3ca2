"""From what libraries call a layer to what laws can check: a `Subject`.

`subject_of` finds the adapter: `linen`, `nnx_module`, `haiku`, `equinox`, `torch`, `factory` or `function`. Each makes
pure init and apply functions and reads off the layer what it states of itself. What is not stated is found by trying:
the number of features and the ranks of the inputs that it takes, and which values it normalizes together.
"""

import sys
from collections.abc import Mapping
from typing import Any

import jax

from jaxbn._normalizer import Normalizer
from jaxbn.testing._adapt_equinox import equinox
from jaxbn.testing._adapt_flax import flax, linen, nnx_module
from jaxbn.testing._adapt_functions import factory, function
from jaxbn.testing._adapt_haiku import haiku
from jaxbn.testing._adapt_torch import torch
from jaxbn.testing._coupling import infer_scope
from jaxbn.testing._scope import BATCH, scope_named
from jaxbn.testing._signatures import required
from jaxbn.testing._subject import Subject

__all__ = ["equinox", "factory", "flax", "function", "haiku", "linen", "nnx_module", "subject_of", "torch"]

# Numbers of features that are tried in turn where none is given: group norm often has 32 groups.
_FEATURES = (2, 4, 32)
# Of two values normalized together, every y is 1 or -1: too little to tell one layer from another.
_TOGETHER = 4


def subject_of(norm: Any, **options: Any) -> Subject:
    """The Subject that `norm` stands for, its fields overridden by options.

    Args:
      norm: a Subject, Normalizer, factory of Normalizers, module of a library whose adapter is here (class or
        instance), or function x -> y.
      **options: fields of Subject; `scope` may be a name, as on the command line.

    Raises:
      TypeError: nothing that fits.
      ValueError: no such scope.
    """
    if isinstance(options.get("scope"), str):
        options["scope"] = scope_named(options["scope"])
    if "scope" in options:
        options.setdefault("scope_source", "stated")
    if isinstance(norm, Subject):
        return _with(norm, options)
    subject = _that_runs(norm, options, [options["features"]] if "features" in options else _FEATURES)
    if "scope" in options or subject.refusal(subject.ranks[0]) or _has_state(subject):
        return subject
    return _with_inferred_scope(norm, subject, options)


def _with(subject: Subject, options: Mapping[str, Any]) -> Subject:
    fields = {name: getattr(subject, name) for name in subject.__dataclass_fields__}
    return Subject(**fields | dict(options))


def _adapted(norm: Any, options: Mapping[str, Any]) -> Subject:
    """The subject as the adapter of its library makes it."""
    if isinstance(norm, Normalizer):
        return Subject(norm, **options)
    for package, adapt in (("flax", flax), ("haiku", haiku), ("equinox", equinox), ("torch", torch)):
        if package in sys.modules and (subject := adapt(norm, **options)) is not None:
            return _with(subject, {"lacks": {**subject.lacks, "switches": "a module's call is asked for one mode"}})
    if not callable(norm):
        raise TypeError(
            f"{norm!r} is no Normalizer, module or function; expected one of them, such as jaxbn.batch_norm() or"
            " lambda x: layer(x)."
        )
    return factory(norm, **options) if required(norm) == [] else function(norm, **options)


def _that_runs(norm: Any, options: Mapping[str, Any], features: Any) -> Subject:
    """The subject with the first number of features on which it runs, and with the ranks on which it does.

    Where it runs on none, as it is with the first: whoever uses it meets the error of the layer itself.
    """
    first = None
    for number in features:
        subject = _adapted(norm, {**options, "features": number})
        first = first or subject
        refused = {rank: why for rank in subject.ranks if (why := subject.refusal(rank))}
        if not refused:
            return subject
        if len(refused) < len(subject.ranks):
            ranks = tuple(rank for rank in subject.ranks if rank not in refused)
            lacks = {f"rank {rank}": why for rank, why in refused.items()}
            return _with(subject, {"ranks": ranks, "lacks": {**subject.lacks, **lacks}})
    assert first is not None
    return first


def _has_state(subject: Subject) -> bool:
    """Whether it has running statistics."""
    return bool(jax.tree.leaves(subject.variables(subject.shapes[0])["batch_stats"]))


def _with_inferred_scope(norm: Any, subject: Subject, options: Mapping[str, Any]) -> Subject:
    """The subject with the scope that its outputs show, on enough features to show it; unchanged if none fits."""
    scope = infer_scope(subject)
    if scope is None or scope is BATCH:
        return subject
    if "features" not in options and subject.features < _TOGETHER:
        wider = _that_runs(norm, options, [_TOGETHER])
        if (
            set(wider.ranks) >= set(subject.ranks)
            and not wider.refusal(wider.ranks[0])
            and (found := infer_scope(wider))
        ):
            subject, scope = wider, found
    return _with(subject, {"scope": scope, "scope_source": "inferred"})
