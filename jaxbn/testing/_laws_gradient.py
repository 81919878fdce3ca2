"""Laws of derivatives: what the gradient is, what it is orthogonal to, where it must not go."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.testing import _bounds as bounds
from jaxbn.testing import _oracle as oracle
from jaxbn.testing._agree import LawDoesNotApplyError, agree, require
from jaxbn.testing._bounds import FLOAT32
from jaxbn.testing._law import law
from jaxbn.testing._laws_value import IOFFE
from jaxbn.testing._layer import as_float64
from jaxbn.testing.strategies import values

EIGHT = "8 slack r D (1 + X^2), where slack = (n + 8) u (1 + (peak r)^2), D = max |scale dy|, X = max |xhat|"
BACKWARD = "Ioffe and Szegedy 2015, section 3, the chain rule through mean and variance"


def with_cotangent(subject):
    """An input and a cotangent of its shape whose sum does not vanish."""
    pairs = [st.tuples(values(s), values(s, offsets=(0.5,), scales=(1.0,))) for s in subject.shapes]
    return {"x_dy": st.one_of(pairs)}


@law(
    statement="the input gradient sums to 0 over what is normalized together, since a common shift changes nothing",
    bound=f"n times {EIGHT}",
    source=IOFFE,
    inputs=with_cotangent,
    needs=("gradient",),
)
def gradient_orthogonal_to_ones(subject, x_dy):
    x, dy = x_dy
    split = subject.scope.split
    dx, bound = split(subject.pull(x, dy)[0]), split(subject.gradient_bound(x, dy))
    agree(np.zeros(dx.shape[1]), dx.sum(0), bound.sum(0), "sum of dx")


@law(
    statement="the input gradient is orthogonal to xhat as epsilon -> 0, since a common factor changes nothing",
    bound=f"epsilon / (var + epsilon) |r sum(dy xhat)|, and sum |xhat| times {EIGHT}",
    source=IOFFE,
    inputs=with_cotangent,
    needs=("gradient",),
)
def gradient_orthogonal_to_xhat(subject, x_dy):
    x, dy = x_dy
    s, split = subject.standardized(x), subject.scope.split
    dx, bound = split(subject.pull(x, dy)[0]), split(subject.gradient_bound(x, dy))
    with np.errstate(invalid="ignore", divide="ignore"):
        effect = np.abs(subject.eps * s.rstd**3 * (split(dy) * s.xhat).sum(0))
        error = (np.abs(s.xhat) * bound).sum(0)
    got = np.nansum(dx * s.xhat, axis=0)
    agree(np.zeros_like(got), got, np.where(np.isnan(effect + error), np.inf, effect + error), "sum of dx xhat")


@law(
    statement="gradients with respect to x, scale and bias are those of float64",
    bound=f"{EIGHT}; for scale the sum of |dy| times the error of xhat, for bias n u sum |dy|",
    source=BACKWARD,
    inputs=lambda s: with_cotangent(s) | {"scale": st.sampled_from([1.0, -2.0, 0.25])},
    needs=("gradient",),
)
def gradient_matches_float64(subject, x_dy, scale):
    x, dy = x_dy
    scale = np.float32(scale if "scale" not in subject.missing else 1.0)
    dx, dscale, dbias = subject.pull(x, dy, variables=subject.variables(x.shape, scale))
    g = scale * dy
    agree(oracle.gradient(x, g, subject.scope, subject.eps), dx, subject.gradient_bound(x, g), "dx")
    flat, xhat = _rows(dy), _rows(subject.exact(x))
    rounding = (len(flat) + 4) * FLOAT32 * np.abs(flat)
    if dbias is not None:
        agree(flat.sum(0), dbias, rounding.sum(0), "dbias")
    if dscale is not None:
        with np.errstate(invalid="ignore"):
            bound = (np.abs(flat) * _rows(subject.output_bound(x)) + rounding * np.abs(xhat)).sum(0)
        agree((flat * xhat).sum(0), dscale, np.where(np.isnan(bound), np.inf, bound), "dscale")


def _rows(x):
    return np.reshape(x, (-1, np.shape(x)[-1])).astype(np.float64)


@law(
    statement="the gradient agrees with central differences in float64",
    bound="h^2 M / rho^3 (Cauchy's estimate: M = 4 sqrt(n) sum |dy| in a disc of rho = std / (4 max |direction|)), "
    "and 2 slack M / h for rounding, in the precision that comes back",
    source=BACKWARD,
    inputs=lambda s: {name: values(s.shapes[0], offsets=(0.5,), scales=(1.0,)) for name in ("x", "direction", "dy")},
    needs=("gradient", "float64"),
    examples=0.5,
)
def gradient_matches_differences(subject, x, direction, dy):
    x, direction, dy = (v.astype(np.float64) for v in (x, direction, dy))
    s = subject.standardized(x)
    steepest = np.abs(direction).max()
    hypothesis.assume(steepest > 0 and s.var.min() > 0.5)
    rho = np.sqrt(s.var.min()) / (4 * steepest)
    with jax.enable_x64(True):
        variables = subject.variables(x.shape)
        u = bounds.roundoff(jnp.result_type(subject.runs[True](variables, x, None, None)[0]))
        h = rho * u ** (1 / 3)
        high, low = (np.sum(dy * subject.train(x + t * direction, variables=variables)) for t in (h, -h))
        slope = np.sum(direction * subject.pull(x, dy, variables=variables)[0])
    size = 4 * np.sqrt(len(s.values)) * np.abs(dy).sum()
    rounding = 2 * bounds.slack(s, u=u).max() * size / h
    agree((high - low) / (2 * h), slope, h**2 * size / rho**3 + rounding, "directional derivative")


@law(
    statement="forward mode and reverse mode give one derivative: <dy, J v> = <J^T dy, v>",
    bound=f"twice sum |v| times {EIGHT}",
    source="they are transposes",
    inputs=with_cotangent,
    needs=("gradient", "forward mode"),
    examples=0.5,
)
def forward_equals_reverse(subject, x_dy):
    x, dy = x_dy
    if missing := _no_forward_mode(subject, x):
        raise LawDoesNotApplyError(missing)
    v = np.roll(dy, 1, axis=0)
    pushed = as_float64(_pushes(subject)(subject.variables(x.shape), x, v))
    agree(
        np.sum(subject.pull(x, dy)[0] * v),
        np.sum(pushed * dy),
        np.sum(2 * subject.gradient_bound(x, dy) * np.abs(v)) + _forward_bound(subject, x, v, dy),
        "<dy, J v>",
    )


@law(
    statement="jvp, linearize and hessian work; a layer with only a custom_vjp refuses them",
    bound="none: it runs",
    source="jaxbn's promise: derivatives of every mode",
    inputs=lambda s: {"x": values(s.shapes[0])},
    needs=("gradient", "forward mode"),
    examples=0,
    promise=True,
)
def forward_mode_exists(subject, x):
    missing = _no_forward_mode(subject, x)
    require(not missing, missing)


def _no_forward_mode(subject, x) -> str:
    """Why JAX cannot differentiate the layer forwards, or "": a custom_vjp refuses with a TypeError when it runs."""
    try:
        _pushes(subject)(subject.variables(x.shape), x, x)
    except TypeError as error:
        return f"needs forward mode ({str(error).splitlines()[0]})"
    return ""


def _forward_bound(subject, x, v, dy):
    # J is symmetric: what bounds J^T dy bounds J v with v in dy's place.
    return np.sum(subject.gradient_bound(x, v) * np.abs(dy))


def _pushes(subject):
    return _cached(subject, "pushes", lambda: subject.compiled(_push(subject)))


def _push(subject):
    def push(variables, x, v):
        return jax.jvp(lambda x: subject.call(variables, x)[0], (x,), (v,))[1]

    return push


def _cached(subject, name, make):
    """The subject's own copy of a compiled function that one law needs."""
    if name not in subject.__dict__:
        subject.__dict__[name] = make()
    return subject.__dict__[name]


@law(
    statement="multiplying the weights of a preceding linear map by a divides their gradient by a, as epsilon -> 0",
    bound=f"sum |x| times ({EIGHT}, at z and at a z, and 4 |1 - 1/a^2| epsilon / var r D (1 + X^2))",
    source="Ioffe and Szegedy 2015, section 3.3",
    inputs=lambda s: _linear(s) | {"factor": st.sampled_from([4.0, -0.5, 8.0])},
    needs=("batch", "gradient", "rank 2"),
)
def weight_gradient_inverse_scale(subject, x, kernel, dy, factor):
    z = x @ kernel
    grown = (factor * z).astype(np.float32)
    expected = x.T @ subject.pull(z, dy)[0] / abs(factor)
    got = x.T @ subject.pull(grown, dy)[0]
    s = subject.standardized(z)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 4 * abs(1 - factor**-2) * subject.eps / s.var
        effect = share * s.rstd * np.abs(dy).max(0) * (1 + np.abs(s.xhat).max(0) ** 2) / abs(factor)
    per_z = subject.gradient_bound(z, dy) / abs(factor) + subject.gradient_bound(grown, dy) + effect
    size = np.maximum(np.abs(x).sum(0), 1)[:, None]  # At least 1: an infinite bound times 0 is no bound.
    agree(expected, got, np.where(np.isnan(per_z), np.inf, per_z).max(0) * size, "gradient of the weights")


@law(
    statement="multiplying the weights of a preceding linear map by a positive factor leaves y, as epsilon -> 0",
    bound="as scale_invariance",
    source="Ioffe and Szegedy 2015, section 3.3",
    inputs=lambda s: _linear(s) | {"factor": st.sampled_from([4.0, 0.5, 8.0])},
    needs=("batch", "rank 2"),
)
def weight_scale_invariance(subject, x, kernel, dy, factor):
    del dy
    z, grown = x @ kernel, x @ (factor * kernel).astype(np.float32)
    effect = bounds.epsilon_effect(subject.standardized(z), subject.eps, factor)
    bound = subject.output_bound(z) + subject.output_bound(grown) + effect
    agree(subject.train(z), subject.train(grown), bound, "y of the larger weights")


@law(
    statement="a bias in a preceding linear map gets no gradient, since the normalization subtracts it again",
    bound=f"n times {EIGHT}",
    source="Ioffe and Szegedy 2015, section 3.2",
    inputs=lambda s: _linear(s) | {"bias": st.sampled_from([0.0, 2.0, -5.0])},
    needs=("batch", "gradient", "rank 2"),
)
def preceding_bias_has_no_gradient(subject, x, kernel, dy, bias):
    z = (x @ kernel + np.float32(bias)).astype(np.float32)
    agree(
        np.zeros(z.shape[1]),
        subject.pull(z, dy)[0].sum(0),
        subject.gradient_bound(z, dy).sum(0),
        "gradient of the bias",
    )


def _linear(subject):
    rows = subject.shapes[-1][0] if len(subject.shapes[-1]) == 2 else subject.shapes[0][0]
    return {
        "x": values((rows, 3), offsets=(0.0, 2.0), scales=(1.0,)),
        "kernel": values((3, subject.features), offsets=(0.0, 1.0), scales=(1.0,), largest=3),
        "dy": values((rows, subject.features), offsets=(0.5,), scales=(1.0,)),
    }


@law(
    statement="running statistics get no gradient from the output, in training or at test time",
    bound="none: exactly 0",
    source="jaxbn's promise: they are averages of the past, not parameters",
    inputs=lambda s: {"x": values(s.shapes[0])},
    needs=("running", "test mode", "gradient"),
    examples=0.2,
    promise=True,
)
def running_statistics_get_no_gradient(subject, x):
    variables = subject.trained(x)
    for train in (True, False):
        pulled = _cached(subject, f"stats pull {train}", lambda t=train: subject.compiled(_stats_pull(subject, t)))
        for leaf in pulled(variables, x):
            agree(np.zeros(np.shape(leaf)), leaf, 0.0, f"gradient of batch_stats, train={train}")


def _stats_pull(subject, train):
    def pull(variables, x):
        leaves, structure = jax.tree.flatten(variables["batch_stats"])
        real = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]

        def loss(some):
            some = iter(some)
            all_leaves = [next(some) if r else leaf for r, leaf in zip(real, leaves, strict=True)]
            stats = jax.tree.unflatten(structure, all_leaves)
            y = subject.call({**variables, "batch_stats": stats}, x, train=train)[0]
            # Weights that no symmetry of y hides.
            return jnp.sum(y * jnp.arange(1.0, y.size + 1).reshape(y.shape))

        return jax.grad(loss)([leaf for r, leaf in zip(real, leaves, strict=True) if r])

    return pull


@law(
    statement="the batch_stats that training returns carry no gradient back to x",
    bound="none: exactly 0",
    source="jaxbn's promise: a loss that reads them must not train through the average",
    inputs=lambda s: {"x": values(s.shapes[0])},
    needs=("running", "gradient"),
    examples=0.2,
    promise=True,
)
def updated_statistics_are_constants(subject, x):
    pulled = _cached(subject, "leak", lambda: subject.compiled(_leak(subject)))
    agree(np.zeros(x.shape), pulled(subject.variables(x.shape), x), 0.0, "dx of the returned batch_stats")


def _leak(subject):
    def pull(variables, x):
        def loss(x):
            leaves = jax.tree.leaves(subject.call(variables, x)[1])
            return sum(jnp.sum(v) for v in leaves if jnp.issubdtype(v.dtype, jnp.floating))

        return jax.grad(loss)(x)

    return pull
