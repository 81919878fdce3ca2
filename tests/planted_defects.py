"""Copies of the textbook batch norm with one defect each, for testing the laws."""

import jax
import jax.numpy as jnp
from jax import lax
from textbook import Textbook

# ---- defects of the statistics


class UnbiasedInTheOutput(Textbook):
    def mean_square(self, c, w):
        n = self.count(w)
        return self.total(c**2, w) / jnp.maximum(n - 1, 1)


class UnbiasedInTheRunningVariance(Textbook):
    def standardize(self, x, w):
        xhat, mean, var = super().standardize(x, w)
        n = self.count(w)
        return xhat, mean, var * n / jnp.maximum(n - 1, 1)


class Cancelling(Textbook):
    """E[x^2] - E[x]^2, cut off at zero as Flax does."""

    def standardize(self, x, w):
        mean = self.average(x, w)
        var = jnp.maximum(self.average(x**2, w) - mean**2, 0)
        return (x - mean) / self.root(var), mean, var


class CancellingToNaN(Textbook):
    """E[x^2] - E[x]^2, not cut off, as in Haiku."""

    def standardize(self, x, w):
        mean = self.average(x, w)
        var = self.average(x**2, w) - mean**2
        return (x - mean) / self.root(var), mean, var


class TwoPassWithARoundedMean(Textbook):
    def mean(self, x, w):
        first = self.average(x, w)
        return first, jnp.zeros_like(first)


class StatisticsInBfloat16(Textbook):
    def mean(self, x, w):
        first, rest = super().mean(x, w)
        return first.astype(jnp.bfloat16).astype(x.dtype), 0 * rest


class NarrowInside(Textbook):
    """Computes in the dtype of x, whatever it is."""

    def widened(self, x):
        return x


# ---- defects of epsilon


class EpsilonOutsideTheRoot(Textbook):
    def root(self, var):
        return jnp.sqrt(var) + self.epsilon

    def standardize(self, x, w):
        first, rest = self.mean(x, w)
        var = self.mean_square(x - first - rest, w)
        safe = jnp.where(var > 0, var, 1)
        return (x - first - rest) / (jnp.where(var > 0, jnp.sqrt(safe), 0) + self.epsilon), first, var


class EpsilonMissing(Textbook):
    def root(self, var):
        return jnp.sqrt(var)

    def standardize(self, x, w):
        first, rest = self.mean(x, w)
        c = x - first - rest
        var = self.mean_square(c, w)
        unit = lax.stop_gradient(jnp.sqrt(var))
        return c / unit * lax.rsqrt(self.mean_square(c / unit, w)), first, var


class EpsilonTwice(Textbook):
    def root(self, var):
        return jnp.sqrt(var + 2 * self.epsilon)

    def standardize(self, x, w):
        self.epsilon, kept = 2 * self.epsilon, self.epsilon
        result = super().standardize(x, w)
        self.epsilon = kept
        return result


# ---- defects of the gradient


class StopGradientOnTheMean(Textbook):
    def mean(self, x, w):
        return lax.stop_gradient(super().mean(x, w))


class StopGradientOnTheVariance(Textbook):
    def mean_square(self, c, w):
        return lax.stop_gradient(super().mean_square(c, w))


class RunningStatisticsGetGradients(Textbook):
    def evaluate(self, x, stats, params, w):
        mean, var = (self.shaped(v, x) for v in (stats["mean"], stats["var"]))
        return self.affine((x - mean) / self.root(var), params)


class UpdateLeaksGradients(Textbook):
    def train(self, x, w, stats, params):
        y, moved = super().train(x, w, stats, params)
        _, mean, var = self.standardize(x, w)
        batch = {"mean": jnp.squeeze(mean, self.axes(x)), "var": jnp.squeeze(var, self.axes(x))}
        # The value of the update, with the gradient of the batch.
        leak = {name: (1 - self.decay) * (batch[name] - lax.stop_gradient(batch[name])) for name in moved}
        return y, jax.tree.map(jnp.add, moved, leak)


class NoForwardMode(Textbook):
    """A custom_vjp, which JAX cannot differentiate forwards."""

    def affine(self, xhat, params):
        @jax.custom_vjp
        def same(v):
            return v

        same.defvjp(lambda v: (v, None), lambda _, dv: (dv,))
        return super().affine(same(xhat), params)


class ForwardModeOff(Textbook):
    """A rule for forward mode that is not the transpose of the one for reverse mode."""

    def affine(self, xhat, params):
        @jax.custom_jvp
        def same(v):
            return v

        # JAX transposes the linear part: doubling only what is not transposed needs a hand-written transpose.
        def doubled(dv):
            return jax.custom_derivatives.linear_call(lambda _, t: 2 * t, lambda _, t: t, (), dv)

        same.defjvp(lambda primals, tangents: (primals[0], doubled(tangents[0])))
        return super().affine(same(xhat), params)


class WeightGradientNotRescaled(Textbook):
    """The gradient of the input lacks its factor 1 / std."""

    def standardize(self, x, w):
        xhat, mean, var = super().standardize(x, w)
        constant, unit = lax.stop_gradient((xhat, self.root(var)))
        return constant + unit * (xhat - constant), mean, var  # which is xhat, to the last digit


class ShardGradientAveraged(Textbook):
    """The transpose of the sum over shards taken to be the mean over them."""

    def summed(self, v):
        if self.axis_name is None:
            return v
        size = lax.axis_size(self.axis_name)
        whole = lax.psum(v, self.axis_name)
        return whole / size + lax.stop_gradient(whole - whole / size)


# ---- defects of counting


class AveragedVariances(Textbook):
    """Mean over shards of each shard's own variance about its own mean."""

    def standardize(self, x, w):
        own = type(self)(self.decay, self.epsilon, self.feature_axis, None)
        if self.axis_name is None:
            return super().standardize(x, w)
        mean = lax.pmean(own.average(x, w), self.axis_name)
        var = lax.pmean(own.average((x - own.average(x, w)) ** 2, w), self.axis_name)
        return (x - mean) * lax.rsqrt(var + self.epsilon), mean, var


class AveragedMoments(Textbook):
    """Mean over shards of E[x] and E[(x - mean)^2]: right for equal counts only."""

    def average(self, v, w):
        n = jnp.sum(w, self.axes(v), keepdims=True)
        own = jnp.sum(jnp.where(w > 0, w * v, 0), self.axes(v), keepdims=True) / jnp.where(n > 0, n, 1)
        return own if self.axis_name is None else lax.pmean(own, self.axis_name)


class ShardsKeptApart(Textbook):
    def summed(self, v):
        return v


def unpadded(self, x, where):
    """Leave what the mask leaves out where it is."""
    del self, where
    return x


class MaskIgnored(Textbook):
    padded = unpadded

    def train(self, x, w, stats, params):
        return super().train(x, jnp.where(w == 0, 1, w), stats, params)


class MaskIgnoredInTheCount(Textbook):
    def average(self, v, w):
        return self.total(v, w) / self.total(jnp.ones_like(v), jnp.maximum(w, 1))


class MaskSubtracted(Textbook):
    """The sum of everything, less what the mask leaves out: which cancels, and NaN does not even do that."""

    padded = unpadded

    def total(self, v, w):
        return self.summed(jnp.sum(v, self.axes(v), keepdims=True) - jnp.sum((1 - w) * v, self.axes(v), keepdims=True))


class PaddingInTheGradient(Textbook):
    """Masks the sums only: the derivative of what a sum leaves out is 0 times NaN."""

    padded = unpadded


class WeightsAsMask(Textbook):
    def train(self, x, w, stats, params):
        return super().train(x, (w > 0).astype(x.dtype), stats, params)


# ---- defects of running statistics


class DecayAndMomentumSwapped(Textbook):
    def update(self, stats, batch):
        return {name: (1 - self.decay) * stats[name] + self.decay * batch[name] for name in stats}


class StandardDeviationsAveraged(Textbook):
    def update(self, stats, batch):
        moved = super().update(stats, batch)
        root = self.decay * jnp.sqrt(stats["var"]) + (1 - self.decay) * jnp.sqrt(batch["var"])
        return moved | {"var": root**2}


class EvaluatesWithTheBatch(Textbook):
    def evaluate(self, x, stats, params, w):
        return self.affine(self.standardize(x, w)[0], params)


class EvaluationForgetsTheScale(Textbook):
    def evaluate(self, x, stats, params, w):
        return super().evaluate(x, stats, {**params, "scale": jnp.ones_like(params["scale"])}, w)


class EvaluationForgetsTheBias(Textbook):
    def evaluate(self, x, stats, params, w):
        return super().evaluate(x, stats, {**params, "bias": jnp.zeros_like(params["bias"])}, w)


class EvaluationForgetsEpsilon(Textbook):
    def evaluate(self, x, stats, params, w):
        del w
        mean, var = (self.shaped(v, x) for v in lax.stop_gradient((stats["mean"], stats["var"])))
        return self.affine((x - mean) * lax.rsqrt(var), params)


class EvaluationAlongTheWrongAxisOfImages(Textbook):
    """Broadcasts the running statistics along the last position of images whose sizes allow it."""

    def evaluate(self, x, stats, params, w):
        if x.ndim == 2 or self.feature_axis != -1 or x.shape[-2] != x.shape[-1]:
            return super().evaluate(x, stats, params, w)
        return jnp.swapaxes(super().evaluate(jnp.swapaxes(x, -1, -2), stats, params, w), -1, -2)


class ChannelsFirstEvaluatedLast(Textbook):
    """Right in training; at test time the statistics run along the last axis."""

    def evaluate(self, x, stats, params, w):
        if self.feature_axis != 1 or x.ndim == 2:
            return super().evaluate(x, stats, params, w)
        return jnp.swapaxes(super().evaluate(jnp.swapaxes(x, -1, 1), stats, params, w), -1, 1)


class TrainsWithTheRunningVariance(Textbook):
    def train(self, x, w, stats, params):
        _, moved = super().train(x, w, stats, params)
        _, mean, _ = self.standardize(x, w)
        return self.affine((x - mean) / self.root(self.shaped(moved["var"], x)), params), moved


class TrainsAsItEvaluates(Textbook):
    """Normalizes by the running statistics in training too, as the predecessors of batch norm did."""

    def train(self, x, w, stats, params):
        _, moved = super().train(x, w, stats, params)
        return self.evaluate(x, stats, params, w), moved


class SwitchesTiedTogether(Textbook):
    """Moves its statistics wherever it normalizes by the batch, as Flax's layers do."""

    def switches(self, train, use_running, update):
        use_running, _ = super().switches(train, use_running, update)
        return use_running, not use_running


class StartsFromWeakTypes(Textbook):
    """Statistics made of Python numbers: what the first step returns has another type for jit, if not for numpy."""

    def start(self, shape, dtype):
        del dtype
        return {"mean": jnp.broadcast_to(0.0, shape), "var": jnp.broadcast_to(1.0, shape)}


class StatisticsChangeDtype(Textbook):
    """batch_stats come back in float16: another program from the second step on."""

    def train(self, x, w, stats, params):
        y, moved = super().train(x, w, stats, params)
        return y, jax.tree.map(lambda v: v.astype(jnp.float16), moved)


class EmptyFeaturesMoved(Textbook):
    def train(self, x, w, stats, params):
        y, _ = super().train(x, w, stats, params)
        _, mean, var = self.standardize(x, w)
        batch = {"mean": jnp.squeeze(mean, self.axes(x)), "var": jnp.squeeze(var, self.axes(x))}
        return y, lax.stop_gradient(self.update(stats, batch))


# ---- defects of what is normalized


class WrongAxisForImages(Textbook):
    """Counts the batch and the last spatial axis in, the channel out, for inputs of rank 4."""

    def axes(self, x):
        return (0, 2, 3) if x.ndim == 4 and self.feature_axis == -1 else super().axes(x)

    def shaped(self, v, x):
        return v.reshape([-1 if axis not in self.axes(x) else 1 for axis in range(x.ndim)])


class ChannelsFirstIgnored(Textbook):
    """feature_axis=1 counts as -1 wherever both have the same size."""

    def __init__(self, decay, epsilon, feature_axis, axis_name):
        del feature_axis
        super().__init__(decay, epsilon, -1, axis_name)


class AllFeaturesTogether(Textbook):
    def average(self, v, w):
        return jnp.mean(super().average(v, w), keepdims=True) + jnp.zeros_like(super().average(v, w))


class EachPositionByItself(Textbook):
    """One mean per position instead of one per feature map."""

    def total(self, v, w):
        return self.summed(jnp.sum(jnp.where(w > 0, w * v, 0), 0, keepdims=True))

    def train(self, x, w, stats, params):
        if x.ndim == 2:
            return super().train(x, w, stats, params)
        return self.affine(self.standardize(x, w)[0], params), stats


class FirstExampleLeftOut(Textbook):
    def train(self, x, w, stats, params):
        return super().train(x, w.at[0].set(0) if x.shape[0] > 4 else w, stats, params)


class ScaleBeforeTheMean(Textbook):
    """(scale x - mean) r + bias."""

    def train(self, x, w, stats, params):
        _, moved = super().train(x, w, stats, params)
        _, mean, var = self.standardize(x, w)
        scaled = x * self.shaped(params["scale"], x)
        return (scaled - mean) / self.root(var) + self.shaped(params["bias"], x), moved


class BiasBeforeTheScale(Textbook):
    def affine(self, xhat, params):
        return (xhat + self.shaped(params["bias"], xhat)) * self.shaped(params["scale"], xhat)
