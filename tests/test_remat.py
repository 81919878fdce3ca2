"""What a checkpoint with the policy for batch norm keeps, computes again and sends; the benchmark that counts it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from experiments.aot.collectives import collectives
from experiments.bench import memory as bench_memory
from experiments.bench.memory import BLOCKS, CONVOLUTION_FIRST, NORMS, PEER

SHAPE = (8, 6, 6, 4)
BARE, FUSED = "jaxbn", "jaxbn, relu fused"
RNG = np.random.default_rng(0)
X, DY = RNG.normal(0.5, 1.0, (2, *SHAPE)).astype(np.float32)
policy = jaxbn.dots_and_statistics_saveable


def units(norm):
    """Six blocks with weights drawn at random."""
    shapes = bench_memory.arguments(norm, SHAPE)[1]
    drawn = jax.tree.map(lambda leaf: RNG.normal(1, 0.3, leaf.shape).astype(np.float32), shapes)
    return {**drawn, "kernel": RNG.normal(0, 0.2, shapes["kernel"].shape).astype(np.float32)}


def loss(chain, x, units):
    y, moved = chain(x, units)
    return jnp.vdot(y, DY), moved


def recorded(name, checkpointed):
    norm = NORMS[name]()
    return bench_memory.recorded(partial(bench_memory.unrolled(checkpointed), norm), norm, SHAPE)


@pytest.mark.parametrize("name", NORMS)
def test_under_the_policy_a_chain_keeps_its_input_and_the_outputs_of_its_convolutions(name):
    assert recorded(name, True) == 1 + BLOCKS


def test_without_it_the_fused_norm_keeps_inputs_and_outputs_and_a_bare_one_relus_mask_and_zeros_too():
    inputs, outputs, mask, zeros = BLOCKS, BLOCKS - 1, BLOCKS / 4, BLOCKS
    assert recorded(FUSED, False) == 1 + inputs + outputs
    assert recorded(BARE, False) == 1 + inputs + outputs + mask + zeros


@pytest.mark.parametrize(("block", "each"), [(bench_memory.convolve_first, 2), (bench_memory.norm_first, 1)])
@pytest.mark.parametrize("name", [BARE, FUSED])
def test_a_loop_keeps_the_norms_input_once_and_what_it_carries(name, block, each):
    norm = NORMS[name]()
    assert bench_memory.recorded(partial(bench_memory.loop(block, True), norm), norm, SHAPE) == BLOCKS * each


@pytest.mark.parametrize(
    ("name", "program"), [(FUSED, program) for program in bench_memory.NOTES] + [(BARE, CONVOLUTION_FIRST)]
)
def test_gradients_and_statistics_are_the_same(name, program):
    norm = NORMS[name]()
    weights = units(norm)

    def gradients(checkpointed):
        chain = partial(bench_memory.programs(checkpointed)[program], norm)
        return jax.jit(jax.grad(partial(loss, chain), argnums=(0, 1), has_aux=True))(X, weights)

    # Both compute the same formulas; programs differ in the order of their sums. Six layers amplify that.
    jax.tree.map(lambda a, b: assert_close(a, b, 2e-5), gradients(True), gradients(False))


def test_second_derivatives_are_the_same():
    norm = jaxbn.batch_norm(activation=jnp.tanh)
    variables = norm.init(jax.random.key(0), X)

    def curved(f):
        return jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), X)))(X)

    def f(x):
        return jnp.vdot(norm.apply(variables, x**2, train=True)[0], DY)

    assert_close(curved(jax.checkpoint(f, policy=policy)), curved(f), 1e-5)


def assert_close(found, wanted, share):
    """Within that share of the norm."""
    assert np.linalg.norm(found - wanted) <= share * np.linalg.norm(wanted)


@pytest.mark.parametrize(("kept", "measures"), [(policy, 0), (jax.checkpoint_policies.dots_saveable, 1)])
def test_the_backward_pass_measures_again_only_if_the_statistics_are_not_kept(kept, measures):
    """Measuring is the one thing here that takes a while loop."""
    norm = NORMS[FUSED]()
    variables = norm.init(jax.random.key(0), X)
    f = jax.checkpoint(lambda x: norm.apply(variables, jnp.sin(x), train=True)[0], policy=kept)
    y, pull = jax.vjp(f, X)
    assert str(jax.make_jaxpr(pull)(y)).count("while[") == measures


def sent(checkpoint):
    """Collectives in the compiled gradient of the chain, spread over eight devices."""
    norm = jaxbn.batch_norm(axis_name="data", activation=jax.nn.relu)
    chain = checkpoint(partial(bench_memory.unrolled(False), norm))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    gradient = jax.grad(lambda x, units, dy: jnp.vdot(chain(x, units)[0], dy), argnums=(0, 1))
    spread = jax.shard_map(gradient, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=(P("data"), P()))
    text = jax.jit(spread).lower(X, units(NORMS[FUSED]()), DY).compile().as_text()
    return len([c for c in collectives(text) if not c.in_loop])


def test_nothing_more_is_sent():
    assert sent(partial(jax.checkpoint, policy=policy)) == sent(lambda chain: chain)


@pytest.mark.parametrize("block", [bench_memory.convolve_first, bench_memory.norm_first])
def test_a_loop_with_the_fused_norm_takes_less_than_with_norm_and_relu_apart(block):
    fused, bare = (temporary(name, block, False) for name in (FUSED, BARE))
    assert fused < 0.95 * bare  # 15 activations against 16.5.


def test_a_loop_that_carries_the_norms_input_takes_less_under_the_policy():
    block = bench_memory.norm_first
    assert temporary(FUSED, block, True) < 0.65 * temporary(FUSED, block, False)  # 9 against 15.


def temporary(name, block, checkpointed):
    norm = NORMS[name]()
    return bench_memory.temporary_bytes(partial(bench_memory.loop(block, checkpointed), norm), norm, (8, 16, 16, 16))


def test_the_benchmark_counts_every_program():
    found = bench_memory.measure(FUSED, True, SHAPE)
    assert found.recorded == 1 + BLOCKS
    assert set(found.temporary) == set(bench_memory.NOTES)
    assert all(count > 0 for count in found.temporary.values())


def test_a_table_has_units_of_an_activation_and_shares_of_flax():
    rows = [
        bench_memory.Row(name, checkpointed, (4, 4, 4, 4), 8 * size, dict.fromkeys(bench_memory.NOTES, 4096 * size))
        for name, checkpointed, size in ((FUSED, False, 1), (FUSED, True, 0.5), (PEER, False, 2))
    ]
    first, *rest = bench_memory.tabulate(rows)
    assert first.rows == [[FUSED, "8.0", "50%"], [f"{FUSED}, under the policy", "4.0", "25%"], [PEER, "16.0", "100%"]]
    assert len(rest) == 3
    assert [row[2:] for row in rest[0].rows] == [["4.0", "50%"], ["2.0", "25%"], ["8.0", "100%"]]
