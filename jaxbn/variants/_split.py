"""Split batch normalization: every domain its own statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._batch_norm import batch_norm
from jaxbn._factory import normalizer_factory
from jaxbn._inputs import inexact
from jaxbn._normalizer import Normalizer


@normalizer_factory(options_of=batch_norm)
def split_batch_norm(num_domains: int = 2, *, share_affine: bool = False, **options: Any) -> Normalizer:
    """Split batch norm (AdvProp: Xie et al. 2020, section 4): one batch norm for each domain, as clean and adversarial.

    `apply` takes `domain`: an int, or an int scalar array, for a batch of one domain; or int [batch], one for each
    example of x's first axis, and then each domain is normalized by its own part of the batch. Without it all of x is
    of domain 0, the main one, which the paper uses at test time. A domain of which the batch has nothing keeps its
    running statistics. Examples whose domain is out of range come out as NaN and count nowhere.

    Args:
      num_domains: how many domains there are; the paper has 2.
      share_affine: one scale and bias for all domains; False, the paper's, gives each its own.
      **options: of `batch_norm`; not group_size.

    Returns:
      A Normalizer with batch_stats {"mean", "var"} of shape [num_domains, features] and params {"scale", "bias"} of the
      same shape, or [features] where shared.

    Raises:
      ValueError: num_domains below 1, group_size; as `batch_norm`; and from apply, a domain of the wrong shape or out
        of range (where it is known when the function is traced), or variables made for another num_domains.
      TypeError: domains that are not integers.
    """
    if num_domains < 1:
        raise ValueError(f"num_domains={num_domains}; expected at least 1.")
    if options.get("group_size") is not None:
        raise ValueError("group_size splits the batch by position, domain by content; use one of them.")
    norm = batch_norm(**options)

    def init(key, x):
        x = jax.ShapeDtypeStruct(x.shape, x.dtype)
        if share_affine:
            one = norm.init(key, x)
            rows = jax.tree.map(lambda v: jnp.broadcast_to(v, (num_domains, *v.shape)), one["batch_stats"])
            return {"params": one["params"], "batch_stats": rows}
        return jax.vmap(lambda k: norm.init(k, x))(jax.random.split(key, num_domains))

    def apply(variables, x, *, train, domain=None, where=None, weights=None, rng=None, residual=None):
        x = inexact(x)
        arguments = dict(train=train, weights=weights, rng=rng, residual=residual)
        _check_rows(variables)
        domain = _checked_domain(domain, x)
        if domain.ndim == 0:
            return _one(variables, x, domain, dict(arguments, where=where))
        return _mixed(variables, x, domain, where, arguments)

    def _one(variables, x, domain, arguments):
        params, batch_stats = variables.get("params", {}), variables["batch_stats"]
        # Where the domain is known only when the program runs: out of range it gives NaN and moves nothing.
        known = (domain >= 0) & (domain < num_domains)
        row = jnp.clip(domain, 0, num_domains - 1)
        chosen = {
            "params": params if share_affine else jax.tree.map(lambda v: v[row], params),
            "batch_stats": jax.tree.map(lambda v: v[row], batch_stats),
        }
        y, moved = norm.apply(chosen, x, **arguments)
        to = jnp.where(known, domain, num_domains)
        moved = jax.tree.map(lambda v, one: v.at[to].set(one, mode="drop"), batch_stats, moved)
        return jnp.where(known, y, jnp.nan), moved

    def _mixed(variables, x, domain, where, arguments):
        shape = (-1,) + (1,) * (x.ndim - 1)

        def each(params, batch_stats, index):
            own = (domain == index).reshape(shape)
            counted = own if where is None else own & _of_rank(where, x.ndim)
            variables = {"params": params, "batch_stats": batch_stats}
            y, moved = norm.apply(variables, x, where=counted, **arguments)
            return jnp.where(own, y, 0), moved

        axes = {"params": None if share_affine else 0, "batch_stats": 0}
        mapped = jax.vmap(each, in_axes=(axes["params"], axes["batch_stats"], 0))
        y, batch_stats = mapped(variables.get("params", {}), variables["batch_stats"], jnp.arange(num_domains))
        # Each example has one term that is not zero, so the sum is exact in any dtype.
        known = ((domain >= 0) & (domain < num_domains)).reshape(shape)
        return jnp.where(known, jnp.sum(y, axis=0), jnp.nan), batch_stats

    def _check_rows(variables):
        rows = {"batch_stats": variables.get("batch_stats", {})}
        rows |= {} if share_affine else {"params": variables.get("params", {})}
        for collection, tree in rows.items():
            shapes = {jnp.shape(v) for v in jax.tree.leaves(tree)}
            if any(shape[:1] != (num_domains,) for shape in shapes):
                raise ValueError(
                    f"{collection} has shapes {sorted(shapes)}; num_domains={num_domains} wants {num_domains} rows:"
                    " what init made with these arguments."
                )

    def _checked_domain(domain, x):
        known = isinstance(domain, int | np.integer | np.ndarray)
        if known and np.any((np.asarray(domain) < 0) | (np.asarray(domain) >= num_domains)):
            raise ValueError(f"domain={domain}; expected 0 to {num_domains - 1}.")
        domain = jnp.asarray(0 if domain is None else domain)
        if not jnp.issubdtype(domain.dtype, jnp.integer):
            raise TypeError(f"domain has dtype {domain.dtype}; expected integers from 0 to {num_domains - 1}.")
        if domain.shape not in ((), (x.shape[0],)):
            raise ValueError(
                f"domain has shape {domain.shape}; x of shape {x.shape} wants a scalar, or shape {(x.shape[0],)}."
            )
        return domain

    return Normalizer(init, apply)


def _of_rank(where, ndim):
    where = jnp.asarray(where)
    return where.reshape((1,) * (ndim - where.ndim) + where.shape)
