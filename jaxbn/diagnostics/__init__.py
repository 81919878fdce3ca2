"""What batch norm does inside a network, measured: on any network of linen, nnx or plain functions.

Diagnostics call a network in one way, by the loss function that `jaxbn.training` trains it with:

    def loss(variables, batch, rng):
        logits, batch_stats = network.apply(variables, batch["image"], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return LossOutput(losses.sum(), losses.size, batch_stats)

`variables` is {"params": .., "batch_stats": ..}, `batch` any tree, and what is looked at is the mean loss, loss_sum /
weight_sum, as a function of params. Whether the network runs in training or in evaluation mode is up to the loss: with
`train=False` statistics are frozen, which is often the control. For linen and nnx models see `jaxbn.training`. `rng` is
the same in all calls of one diagnostic, so that dropout draws one mask.

Those that look into a network take a *tapped* loss, with one argument more, which it calls with a name and the output
of each layer, and goes on with what it gets back:

    def loss(variables, batch, rng, tap):
        h = tap("hidden", batch["x"] @ variables["params"]["w"])
        ...

`linen_taps(loss)` makes one of a loss with a linen model, which stays as it is. An nnx model takes `tap` as an argument
of its call.

Everything but `train_eval_gap`, which reads many batches, is one compiled, pure function: it can stand inside of `jit`,
`vmap` and `scan`. They are compiled once for each loss (and optimizer): pass the same function again, not a new lambda.
Results are NamedTuples of arrays.
"""

from jaxbn.diagnostics._covariate_shift import GradientShift, InputShift, covariate_shift, gradient_shift
from jaxbn.diagnostics._gradient_flow import GradientFlow, LayerFlow, ParamFlow, gradient_flow
from jaxbn.diagnostics._interpolate import Interpolation, interpolate
from jaxbn.diagnostics._landscape import Landscape, landscape
from jaxbn.diagnostics._network import Loss, over_batches
from jaxbn.diagnostics._running import LayerSummary, running_stats_summary, running_stats_table
from jaxbn.diagnostics._spectrum import Spectrum, hessian_vector_product, spectrum
from jaxbn.diagnostics._taps import Tap, TappedLoss, linen_taps
from jaxbn.diagnostics._taylor import Taylor, taylor
from jaxbn.diagnostics._train_eval_gap import Performance, TrainEvalGap, train_eval_gap, train_eval_gap_table

__all__ = [
    # How diagnostics call a network
    "Loss",
    "TappedLoss",
    "Tap",
    "linen_taps",
    "over_batches",
    # Health of the running statistics
    "LayerSummary",
    "running_stats_summary",
    "running_stats_table",
    # Fine in training, bad in evaluation
    "Performance",
    "TrainEvalGap",
    "train_eval_gap",
    "train_eval_gap_table",
    # Signals up the network, gradients down
    "GradientFlow",
    "LayerFlow",
    "ParamFlow",
    "gradient_flow",
    # What layers notice of those below them
    "InputShift",
    "GradientShift",
    "covariate_shift",
    "gradient_shift",
    # The loss around params
    "Taylor",
    "taylor",
    "Landscape",
    "landscape",
    "Spectrum",
    "spectrum",
    "hessian_vector_product",
    "Interpolation",
    "interpolate",
]
