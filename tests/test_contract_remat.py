"""Under a checkpoint that keeps statistics no normalizer measures a batch again: it adds no collective."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from normalizers import AGAIN, CASES, QUICK, draw, in_training

import jaxbn


def all_reduces(name, policy):
    """Collectives in the compiled gradient of two layers over two shards."""
    norm, arguments = CASES[name].build("shards"), CASES[name].arguments
    per_example = {n: v for n, v in arguments.items() if jnp.ndim(v)}
    rest = {n: v for n, v in arguments.items() if n not in per_example}
    variables, weights = in_training(norm, draw()), jnp.eye(4)

    def network(params, x, per_example):
        for _ in range(2):
            here = {**variables, "params": params}
            x, _ = norm.apply(here, jnp.sin(x) @ weights, train=True, **per_example, **rest)
        return jnp.sum(jnp.sin(x))

    network = network if policy is None else jax.checkpoint(network, policy=policy)
    mesh = jax.make_mesh((2,), ("shards",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    part, everywhere = jax.P("shards"), jax.P()
    specs = dict(in_specs=(everywhere, part, part), out_specs=(everywhere, part))
    gradient = jax.jit(jax.shard_map(jax.grad(network, (0, 1)), mesh=mesh, **specs), compiler_options=QUICK)
    text = gradient.lower(variables["params"], draw(), per_example).compile().as_text()
    return text.count(" all-reduce(")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.takes_groups and name not in AGAIN])
def test_a_checkpoint_that_keeps_statistics_adds_no_collective(name):
    without = all_reduces(name, None)
    assert without > 0
    assert all_reduces(name, jaxbn.dots_and_statistics_saveable) == without


def test_a_checkpoint_adds_no_collective_for_a_reference_batch():
    name = "virtual_batch_norm"
    assert all_reduces(name, jaxbn.dots_and_statistics_saveable) == all_reduces(name, None) > 0
