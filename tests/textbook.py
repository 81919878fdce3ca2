"""A textbook batch norm that keeps every law."""

import jax.numpy as jnp
from jax import lax

import jaxbn


class Textbook:
    """Each step in a method of its own, so that a defect is a subclass which gets that step wrong."""

    def __init__(self, decay, epsilon, feature_axis, axis_name):
        self.decay, self.epsilon, self.feature_axis, self.axis_name = decay, epsilon, feature_axis, axis_name

    # ---- the batch

    def axes(self, x):
        return tuple(axis for axis in range(x.ndim) if axis != self.feature_axis % x.ndim)

    def summed(self, v):
        return v if self.axis_name is None else lax.psum(v, self.axis_name)

    def total(self, v, w):
        return self.summed(jnp.sum(jnp.where(w > 0, w * v, 0), self.axes(v), keepdims=True))

    def count(self, w):
        return self.total(jnp.ones_like(w), w)

    def average(self, v, w):
        n = self.count(w)
        return self.total(v, w) / jnp.where(n > 0, n, 1)

    def mean(self, x, w):
        """Mean, and what rounding it to one float lost."""
        first = self.average(x, w)
        return first, self.average(x - first, w)

    def mean_square(self, c, w):
        return self.average(c**2, w)

    def root(self, var):
        return jnp.sqrt(var + self.epsilon)

    def standardize(self, x, w):
        first, rest = self.mean(x, w)
        c = x - first - rest
        var = self.mean_square(c, w)
        # In units of the standard deviation: 1 / std^3, which the derivative has, leaves the range of float32.
        unit = lax.stop_gradient(self.root(var))
        u = c / unit
        ratio = self.mean_square(u, w) + self.epsilon / unit / unit
        return u * lax.rsqrt(ratio), first, var

    def widened(self, x):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def padded(self, x, where):
        """Zeros where the mask leaves out, before anything else: 0 times NaN in a derivative would be NaN."""
        return x if where is None else jnp.where(where, x, 0)

    def train(self, x, w, stats, params):
        xhat, mean, var = self.standardize(x, w)
        batch = {"mean": jnp.squeeze(mean, self.axes(x)), "var": jnp.squeeze(var, self.axes(x))}
        seen = jnp.squeeze(self.count(w), self.axes(x)) > 0
        moved = self.update(lax.stop_gradient(stats), lax.stop_gradient(batch))
        kept = {name: jnp.where(seen, moved[name].astype(stats[name].dtype), stats[name]) for name in stats}
        return self.affine(xhat, params), lax.stop_gradient(kept)

    # ---- the rest

    def switches(self, train, use_running, update):
        """Whether the running statistics normalize, and whether they move."""
        return not train if use_running is None else use_running, train if update is None else update

    def start(self, shape, dtype):
        return {"mean": jnp.zeros(shape, dtype), "var": jnp.ones(shape, dtype)}

    def update(self, stats, batch):
        return {name: self.decay * stats[name] + (1 - self.decay) * batch[name] for name in stats}

    def evaluate(self, x, stats, params, w):
        del w
        mean, var = (self.shaped(v, x) for v in lax.stop_gradient((stats["mean"], stats["var"])))
        return self.affine((x - mean) / self.root(var), params)

    def affine(self, xhat, params):
        return xhat * self.shaped(params["scale"], xhat) + self.shaped(params["bias"], xhat)

    def shaped(self, v, x):
        return jnp.expand_dims(v, self.axes(x))


def factory(kind):
    """A factory of Normalizers, as `jaxbn.batch_norm` is one."""

    def make(
        *, decay=0.99, epsilon=1e-5, feature_axis=-1, axis_name=None, unbiased=False, debias=False
    ) -> jaxbn.Normalizer:
        del unbiased, debias  # Stated by their defaults.
        book = kind(decay, epsilon, feature_axis, axis_name)

        def init(key, x):
            del key
            shape, dtype = (x.shape[feature_axis],), jnp.promote_types(x.dtype, jnp.float32)
            params = {"scale": jnp.ones(shape, dtype), "bias": jnp.zeros(shape, dtype)}
            return {"params": params, "batch_stats": book.start(shape, dtype)}

        def apply(variables, x, *, train, use_running=None, update=None, where=None, weights=None):
            params, stats, dtype = variables["params"], variables["batch_stats"], x.dtype
            x = book.padded(book.widened(x), where)
            w = jnp.ones_like(x) if where is None else jnp.broadcast_to(where, x.shape).astype(x.dtype)
            w = w if weights is None else w * jnp.broadcast_to(weights, x.shape)
            use_running, update = book.switches(train, use_running, update)
            y, moved = book.train(x, w, stats, params) if update or not use_running else (None, stats)
            y = book.evaluate(x, stats, params, w) if use_running else y
            return y.astype(dtype), moved if update else stats

        return jaxbn.Normalizer(init, apply)

    make.__name__ = kind.__name__
    return make
