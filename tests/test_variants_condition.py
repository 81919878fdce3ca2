"""Conditional, split and virtual batch norm: which scale, which statistics, which reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from normalizers import CLASSES, DOMAINS, KEY, QUICK, VECTORS, draw, in_training

import jaxbn
from jaxbn import variants

X = draw()
CLOSE = {"rtol": 3e-6, "atol": 3e-6}  # A few roundings of float32 of outputs of size one.


def train(norm, variables, x, **arguments):
    return jax.jit(lambda v, x: norm.apply(v, x, train=True, **arguments), compiler_options=QUICK)(variables, x)


def standardized(x, epsilon=1e-5, of=None):
    """X by the mean and variance of `of`, per feature."""
    x = np.asarray(x, np.float64)
    of = (x if of is None else np.asarray(of, np.float64)).reshape(-1, x.shape[-1])
    return (x - of.mean(0)) / np.sqrt(of.var(0) + epsilon)


def test_class_chooses_scale_and_bias():
    norm = variants.conditional_batch_norm(3)
    variables = in_training(norm, X)
    scale, bias = (np.asarray(variables["params"][name], np.float64)[CLASSES][:, None] for name in ("scale", "bias"))
    y, _ = train(norm, variables, X, condition=CLASSES)
    np.testing.assert_allclose(y, scale * standardized(X) + bias, **CLOSE)


def test_vector_shifts_scale_and_bias():
    norm = variants.conditional_batch_norm(condition_size=5, kernel_init=jax.nn.initializers.normal())
    variables = in_training(norm, X)
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), variables["params"])
    scale, bias = (p[name] + VECTORS @ p[f"{name}_kernel"] for name in ("scale", "bias"))
    y, _ = train(norm, variables, X, condition=VECTORS)
    np.testing.assert_allclose(y, scale[:, None] * standardized(X) + bias[:, None], **CLOSE)


def test_training_by_vectors_starts_at_batch_norm():
    norm = variants.conditional_batch_norm(condition_size=5)
    y, _ = train(norm, norm.init(KEY, X), X, condition=VECTORS)
    np.testing.assert_allclose(y, standardized(X), **CLOSE)


def test_conditional_batch_norm_takes_channels_first():
    last, first = variants.conditional_batch_norm(3), variants.conditional_batch_norm(3, feature_axis=1)
    variables = in_training(last, X)
    y, _ = train(first, variables, jnp.swapaxes(X, 1, 2), condition=CLASSES)
    expected, _ = train(last, variables, X, condition=CLASSES)
    np.testing.assert_allclose(jnp.swapaxes(y, 1, 2), expected, **CLOSE)


def test_class_that_there_is_not_gives_nan():
    norm = variants.conditional_batch_norm(3)
    y, _ = norm.apply(norm.init(KEY, X), X, train=False, condition=np.full(8, 3))
    assert np.all(np.isnan(y))


@pytest.mark.parametrize("condition", [None, np.zeros(7, int), np.zeros((8, 1), int)])
def test_condition_of_another_shape_is_refused(condition):
    norm = variants.conditional_batch_norm(3)
    with pytest.raises(ValueError, match=r"condition= of shape \(8,\)"):
        norm.apply(norm.init(KEY, X), X, train=True, condition=condition)


def test_classes_that_are_not_integers_are_refused():
    norm = variants.conditional_batch_norm(3)
    with pytest.raises(TypeError, match="integers"):
        norm.apply(norm.init(KEY, X), X, train=True, condition=np.zeros(8, np.float32))


@pytest.mark.parametrize("options", [{}, {"num_classes": 2, "condition_size": 2}, {"num_classes": 0}])
def test_conditional_batch_norm_without_one_kind_of_condition_is_refused(options):
    with pytest.raises(ValueError, match="expected one"):
        variants.conditional_batch_norm(**options)


def test_each_domain_is_normalized_by_its_own_part_of_the_batch():
    norm = variants.split_batch_norm(use_scale=False, use_bias=False, decay=0.0)
    y, stats = train(norm, norm.init(KEY, X), X, domain=DOMAINS)
    for domain in (0, 1):
        own = np.asarray(X)[domain == DOMAINS]
        np.testing.assert_allclose(y[domain == DOMAINS], standardized(own), **CLOSE)
        np.testing.assert_allclose(stats["mean"][domain], own.reshape(-1, 4).mean(0), rtol=1e-5)


def test_batch_of_one_domain_is_batch_norm_and_leaves_the_other_alone():
    norm = variants.split_batch_norm(3, share_affine=True)
    variables = in_training(norm, X)
    row = {"params": variables["params"], "batch_stats": {n: v[1] for n, v in variables["batch_stats"].items()}}
    y, stats = train(norm, variables, X, domain=1)
    expected, moved = train(jaxbn.batch_norm(), row, X)
    np.testing.assert_allclose(y, expected, **CLOSE)
    for name, value in variables["batch_stats"].items():
        np.testing.assert_allclose(stats[name], np.stack([value[0], moved[name], value[2]]), rtol=1e-6)


def test_all_of_one_domain_by_example_equals_one_domain_for_the_batch():
    norm = variants.split_batch_norm()
    variables = in_training(norm, X)
    one, each = (train(norm, variables, X, domain=domain) for domain in (1, np.ones(8, np.int32)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), one, each)


def test_domain_left_out_is_the_main_one():
    norm = variants.split_batch_norm()
    variables = in_training(norm, X)
    jax.tree.map(
        np.testing.assert_array_equal, train(norm, variables, X), train(norm, variables, X, domain=jnp.asarray(0))
    )


@pytest.mark.parametrize("share_affine", [True, False])
def test_affine_is_shared_or_each_domains_own(share_affine):
    norm = variants.split_batch_norm(3, share_affine=share_affine)
    assert norm.init(KEY, X)["params"]["scale"].shape == ((4,) if share_affine else (3, 4))


@pytest.mark.parametrize(
    ("domain", "error"), [(2, ValueError), (np.zeros(3, int), ValueError), (np.zeros(8), TypeError)]
)
def test_domain_that_does_not_fit_is_refused(domain, error):
    norm = variants.split_batch_norm()
    with pytest.raises(error, match="domain"):
        norm.apply(norm.init(KEY, X), X, train=True, domain=domain)


def test_ghost_groups_beside_domains_are_refused():
    with pytest.raises(ValueError, match="group_size"):
        variants.split_batch_norm(group_size=4)


def test_example_is_normalized_by_the_reference_batch_and_itself():
    norm = variants.virtual_batch_norm(5)
    variables = in_training(norm, X)
    scale, bias = (np.asarray(variables["params"][name], np.float64) for name in ("scale", "bias"))
    y, _ = train(norm, variables, X)
    np.testing.assert_allclose(y[:5], scale * standardized(X[:5]) + bias, **CLOSE)
    for i in range(5, 8):
        with_itself = np.concatenate([X[:5], X[i : i + 1]])
        np.testing.assert_allclose(y[i], scale * standardized(X[i], of=with_itself) + bias, **CLOSE)


def test_virtual_batch_norm_is_exact_far_from_zero():
    x = draw(3, offset=2e6)
    norm = variants.virtual_batch_norm(5, use_scale=False, use_bias=False)
    y, _ = train(norm, norm.init(KEY, x), x)
    np.testing.assert_allclose(y[6], standardized(x[6], of=np.concatenate([x[:5], x[6:7]])), **CLOSE)


def test_evaluation_needs_no_reference_batch_in_front():
    norm = variants.virtual_batch_norm(5)
    variables = in_training(norm, X)
    y, stats = train(norm, variables, X)
    evaluated, _ = norm.apply({"params": variables["params"], "batch_stats": stats}, X[5:], train=False)
    np.testing.assert_allclose(evaluated, y[5:], **CLOSE)


def test_reference_batch_may_be_sharded():
    norm, sharded = variants.virtual_batch_norm(4), variants.virtual_batch_norm(2, axis_name="shards")
    variables = in_training(norm, X)
    # Each shard has half of the reference batch and half of the rest.
    order = np.array([0, 1, 4, 5, 2, 3, 6, 7])
    parts = X[order].reshape(2, 4, 3, 4)
    mapped = jax.vmap(lambda x: sharded.apply(variables, x, train=True), axis_name="shards")
    y, _ = jax.jit(mapped, compiler_options=QUICK)(parts)
    np.testing.assert_allclose(y.reshape(X.shape), train(norm, variables, X)[0][order], **CLOSE)


def test_gradient_of_an_example_reaches_the_reference_batch_but_no_other_example():
    norm = variants.virtual_batch_norm(5)
    variables = norm.init(KEY, X)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(norm.apply(variables, x, train=True)[0][6] ** 3)))(X)
    touched = np.any(np.asarray(grad) != 0, axis=(1, 2))
    np.testing.assert_array_equal(touched, [True, True, True, True, True, False, True, False])


def test_batch_shorter_than_its_reference_is_refused():
    norm = variants.virtual_batch_norm(9)
    with pytest.raises(ValueError, match="first 9 examples"):
        norm.apply(norm.init(KEY, X), X, train=True)


@pytest.mark.parametrize("bad", [-1, 3, 100])
def test_classes_out_of_range_are_nan_and_the_others_are_as_ever(bad):
    norm = variants.conditional_batch_norm(3)
    variables = in_training(norm, X)
    y, _ = train(norm, variables, X, condition=jnp.asarray(CLASSES).at[2].set(bad))
    expected, _ = train(norm, variables, X, condition=CLASSES)
    assert np.all(np.isnan(y[2]))
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(expected, 2, 0))


@pytest.mark.parametrize("bad", [-1, 2, 100])
def test_domains_out_of_range_are_nan_and_count_nowhere(bad):
    norm = variants.split_batch_norm(2)
    variables = in_training(norm, X)
    y, moved = train(norm, variables, X, domain=jnp.asarray(DOMAINS).at[2].set(bad))
    without = (np.arange(8) != 2)[:, None, None]
    expected, stats = train(norm, variables, X, domain=DOMAINS, where=without)
    assert np.all(np.isnan(y[2]))
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(expected, 2, 0))
    jax.tree.map(np.testing.assert_array_equal, moved, stats)


@pytest.mark.parametrize("share_affine", [False, True])
@pytest.mark.parametrize("bad", [-1, 2, 100])
def test_a_traced_domain_out_of_range_gives_nan_and_moves_nothing(bad, share_affine):
    norm = variants.split_batch_norm(2, share_affine=share_affine)
    variables = in_training(norm, X)
    for mode in (True, False):
        y, moved = jax.jit(lambda d, mode=mode: norm.apply(variables, X, train=mode, domain=d))(bad)
        assert np.all(np.isnan(y))
        jax.tree.map(np.testing.assert_array_equal, moved, variables["batch_stats"])


@pytest.mark.parametrize("bad", [-1, 2, np.int32(2), np.asarray(2), np.array([0, 1, 0, 1, 0, 1, 0, 2])])
def test_a_known_domain_out_of_range_is_refused(bad):
    norm = variants.split_batch_norm(2)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        norm.apply(norm.init(KEY, X), X, train=False, domain=bad)


@pytest.mark.parametrize("share_affine", [False, True])
@pytest.mark.parametrize("made_for", [2, 5])
def test_variables_of_another_number_of_domains_are_refused(made_for, share_affine):
    made = variants.split_batch_norm(made_for, share_affine=share_affine).init(KEY, X)
    with pytest.raises(ValueError, match=r"num_domains=3 wants 3 rows"):
        variants.split_batch_norm(3, share_affine=share_affine).apply(made, X, train=True, domain=0)
