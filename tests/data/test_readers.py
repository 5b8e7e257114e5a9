import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from gen_invariance.data.images import resize_images
from gen_invariance.data.readers import photos, published
from gen_invariance.data.readers.registry import READERS, load_source, missing_files, source_names
from gen_invariance.data.split import make_long_tailed
from gen_invariance.errors import DataError, DataNotFoundError, SettingsError

PINNED_DIGITS = "2b82f2c356ba0bd3669683371f26b162e7425604949bd3be38a85dcdb29a53ca"
PINNED_DIGITS_LT = "7fefeab7c20d6ffed22b1c3f64c664b397f1dd621684ad23483e3b18ff80c1ba"
FILES = [file.name.removesuffix(".gz") for file in photos.FashionMnist.files]


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


@pytest.fixture(autouse=True)
def no_fashion_mnist_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(photos, "_DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(published, "download", lambda file, folder: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_fashion(folder, *, compressed=True):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in FILES:
        number = 12 if "train" in name else 5
        shape = (number, 28, 28) if "images" in name else (number,)
        content = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
        content += generator.integers(0, 10, shape, dtype=np.uint8).tobytes()
        path = folder / (name + (".gz" if compressed else ""))
        path.write_bytes(gzip.compress(content) if compressed else content)


def test_digits_are_the_ones_of_scikit_learn():
    source = load_source("digits")
    bunch = load_digits()
    assert source.test is None
    assert not source.flip_safe
    assert tuple(source.train.images.shape) == (1797, 1, 16, 16)
    assert source.train.class_names == tuple("0123456789")
    assert source.train.labels.tolist() == bunch.target.tolist()
    ours = source.train.images.double().mean((1, 2, 3)) / 255
    # Bilinear doubling repeats the border, so means agree only about.
    assert np.abs(ours.numpy() - bunch.images.mean((1, 2)) / 16).max() < 0.08
    kept = load_source("digits", image_size=8).train.images
    assert np.array_equal(kept[:, 0].numpy(), np.floor(bunch.images / 16 * 255 + 0.5))
    assert tuple(load_source("digits", image_size=4).train.images.shape) == (1797, 1, 4, 4)


def test_digits_are_the_same_on_every_machine():
    assert load_source("digits").train.digest == PINNED_DIGITS


def test_digits_make_a_long_tailed_set_with_a_test_part():
    split = make_long_tailed(load_source("digits"), largest=100, imbalance=20, rest_is_test=True, seed=0)
    assert sorted(split.counts.tolist())[::9] == [5, 100]
    assert len(split.train) + len(split.test) == 1797
    assert split.train.digest == PINNED_DIGITS_LT


@pytest.mark.parametrize("compressed", [True, False])
def test_fashion_mnist_is_read_from_a_folder(tmp_path, compressed):
    write_fashion(tmp_path / "fashion", compressed=compressed)
    source = load_source("fashion_mnist", tmp_path / "fashion")
    assert tuple(source.train.images.shape) == (12, 1, 28, 28)
    assert tuple(source.test.images.shape) == (5, 1, 28, 28)
    assert source.train.class_names[9] == "Ankle boot"
    assert source.flip_safe
    assert tuple(load_source("fashion_mnist", tmp_path / "fashion", image_size=16).test.images.shape[1:]) == (1, 16, 16)


def test_fashion_mnist_is_looked_for_in_the_package_then_in_the_cache(tmp_path, monkeypatch):
    write_fashion(tmp_path / "cache" / "gen_invariance" / "FashionMNIST" / "raw")
    assert len(load_source("fashion_mnist").train) == 12
    (tmp_path / "debian").mkdir()
    for name in FILES:
        (tmp_path / "debian" / name).write_bytes(b"")  # found first, and refused
    with pytest.raises(DataError) as caught:
        load_source("fashion_mnist")
    one_line(caught, tmp_path / "debian")


def test_fashion_mnist_is_downloaded_into_the_cache_as_a_last_resort(tmp_path, monkeypatch):
    write_fashion(tmp_path / "published")
    asked = []

    def download(file, folder):
        asked.append(file.url)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes((tmp_path / "published" / file.name).read_bytes())
        return True

    monkeypatch.setattr(published, "download", download)
    assert len(load_source("fashion_mnist").test) == 5
    assert [url.rpartition("/")[2] for url in asked] == [f"{name}.gz" for name in FILES]
    assert len(list((tmp_path / "cache" / "gen_invariance" / "fashion_mnist").iterdir())) == 4
    assert len(load_source("fashion_mnist").test) == len(asked) + 1 == 5, "and not twice"


def test_published_files_of_fashion_mnist_are_those_that_torchvision_knows():
    from torchvision.datasets import FashionMNIST

    known = [(FashionMNIST.mirrors[0] + name, md5) for name, md5 in FashionMNIST.resources]
    assert [(file.url, file.md5) for file in photos.FashionMnist.files] == known


def test_missing_fashion_mnist_says_what_to_put_where(tmp_path):
    with pytest.raises(DataNotFoundError) as caught:
        load_source("fashion_mnist")
    one_line(caught, "apt-get install dataset-fashion-mnist", tmp_path / "cache", *[f"{name}.gz" for name in FILES])
    with pytest.raises(DataNotFoundError) as caught:
        load_source("fashion_mnist", tmp_path / "given")
    one_line(caught, "apt-get install dataset-fashion-mnist", tmp_path / "given")


def test_a_damaged_fashion_mnist_file_is_named(tmp_path):
    write_fashion(tmp_path / "fashion")
    damaged = tmp_path / "fashion" / f"{FILES[2]}.gz"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(DataError) as caught:
        load_source("fashion_mnist", tmp_path / "fashion")
    one_line(caught, damaged)


def write_npz(path, *, test_shape=(4, 8, 8), **more):
    generator = np.random.default_rng(0)
    arrays = {"train_images": generator.integers(0, 256, (6, 8, 8), dtype=np.uint8), "train_labels": [0, 1, 2] * 2}
    arrays |= {"test_images": np.zeros(test_shape, np.uint8), "test_labels": [0, 1, 2, 0]}
    np.savez(path, **arrays, **more)
    return path


def test_npz_parts_must_be_alike_or_resized(tmp_path):
    assert not load_source("npz", write_npz(tmp_path / "a.npz")).flip_safe
    assert load_source("npz", tmp_path / "a.npz", flip_safe=True).flip_safe
    path = write_npz(tmp_path / "b.npz", test_shape=(4, 9, 12))
    with pytest.raises(DataError) as caught:
        load_source("npz", path)
    one_line(caught, path, "(1, 8, 8)", "(1, 9, 12)", "image_size=N")
    source = load_source("npz", path, image_size=5)
    assert source.train.images.shape[1:] == source.test.images.shape[1:] == (1, 5, 5)


def test_npz_with_other_test_classes_keeps_both_and_is_not_split(tmp_path):
    source = load_source("npz", write_npz(tmp_path / "a.npz", class_names=list("abc"), test_class_names=list("xyz")))
    assert (source.train.class_names, source.test.class_names) == (tuple("abc"), tuple("xyz"))
    with pytest.raises(DataError, match="rest_is_test=true"):
        make_long_tailed(source, imbalance=1)


def save(path, mode="RGB", size=(6, 6), colour=(200, 9, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if mode == "RGB" else 77).save(path)


def test_folder_gives_both_parts_the_training_classes(tmp_path):
    for name in ("train/cat", "train/dog", "train/eel", "val/eel", "val/cat"):
        save(tmp_path / name / "1.png")
    source = load_source("folder", tmp_path)
    assert source.flip_safe
    assert source.train.class_names == source.test.class_names == ("cat", "dog", "eel")
    assert source.test.labels.tolist() == [0, 2]
    assert source.train.name == source.test.name == tmp_path.name
    save(tmp_path / "val" / "fox" / "1.png")
    with pytest.raises(DataError) as caught:
        load_source("folder", tmp_path)
    one_line(caught, "'fox'", tmp_path / "val")


def test_skipped_files_of_both_parts_are_reported(tmp_path):
    for part in ("train", "test"):
        save(tmp_path / part / "cat" / "1.png")
        (tmp_path / part / "cat" / "2.png").write_bytes(b"")
    source = load_source("folder", tmp_path, skip_corrupt=True)
    assert [path.parent.parent.name for path, _ in source.skipped] == ["train", "test"]


def test_folder_parts_agree_in_channels_and_size(tmp_path):
    save(tmp_path / "train" / "cat" / "1.png", "L")
    save(tmp_path / "test" / "cat" / "1.png")
    source = load_source("folder", tmp_path)
    assert source.train.images[0, :, 0, 0].tolist() == [77] * 3
    assert source.test.images[0, :, 0, 0].tolist() == [200, 9, 9]
    save(tmp_path / "test" / "cat" / "1.png", size=(7, 7))
    with pytest.raises(DataError) as caught:
        load_source("folder", tmp_path)
    one_line(caught, tmp_path, "image_size=N")
    assert tuple(load_source("folder", tmp_path, image_size=4).test.images.shape) == (1, 3, 4, 4)


def test_folder_without_splits_is_all_training(tmp_path):
    save(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "2.png").write_bytes(b"")
    source = load_source("folder", str(tmp_path), skip_corrupt=True)
    assert len(source.train) == 1
    assert source.test is None
    assert source.skipped == ((tmp_path / "cat" / "2.png", "empty file"),)


def test_names_paths_and_sizes_are_checked():
    assert set(source_names()) >= {"digits", "fashion_mnist", "folder", "npz", "k49", "cifar100", "imagenet_lt"}
    for arguments, words in (
        (("mnist",), "digits, emnist_letters, fashion_mnist, folder"),
        (("npz",), "needs a path"),
        (("folder",), "needs a path"),
    ):
        with pytest.raises(SettingsError) as caught:
            load_source(*arguments)
        one_line(caught, words)
    with pytest.raises(SettingsError, match="image_size"):
        load_source("digits", image_size=0)


def test_every_reader_can_be_made_and_says_what_is_missing():
    assert len(READERS) > 10
    for name in READERS:
        assert bool(missing_files(name)) == (name != "digits")


def test_resizing_agrees_with_pillow_and_crops_the_centre():
    images = torch.randint(0, 256, (3, 3, 20, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for size in (5, 9, 31):
        found = resize_images(images, size)
        for image, expected in zip(found, images, strict=True):
            picture = Image.fromarray(expected[:, :, 4:24].permute(1, 2, 0).contiguous().numpy())
            theirs = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
            assert np.abs(image.permute(1, 2, 0).numpy() - theirs).max() <= 1
    assert torch.equal(resize_images(images, 20), images[..., 4:24])
