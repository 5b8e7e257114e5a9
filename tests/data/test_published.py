"""Readers of published sets on tiny files in their publishers' forms; what is missing or wrong is named."""

import gzip
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gen_invariance.data.readers import characters, photos, published
from gen_invariance.data.readers.registry import load_source, missing_files
from gen_invariance.errors import DataError, DataNotFoundError, SettingsError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(published.urllib.request, "urlopen", refuse)


def refuse(*_, **__):
    raise OSError("no network")


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def small(monkeypatch, reader, **counts):
    for name, value in counts.items():
        monkeypatch.setattr(reader, name, value)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, quality=100)


def write_k49(folder, *, train=60, test=50):
    arrays = {}
    for part, number in (("train", train), ("test", test)):
        arrays[part] = pixels(number, 28, 28), (np.arange(number) % 49).astype(np.uint8)
        for kind, array in zip(("imgs", "labels"), arrays[part], strict=True):
            np.savez(folder / f"k49-{part}-{kind}.npz", array)
    return arrays


def test_k49(tmp_path, monkeypatch):
    arrays = write_k49(tmp_path)
    with pytest.raises(DataError, match=r"k49: got 60 training images, the published set has 232365"):
        load_source("k49", tmp_path)
    small(monkeypatch, characters.Kuzushiji49, train_images=60, test_images=50)
    source = load_source("k49", tmp_path)
    assert not source.flip_safe
    for part in ("train", "test"):
        data, (images, labels) = getattr(source, part), arrays[part]
        assert (data.num_classes, data.name) == (49, "k49")
        assert np.array_equal(data.images[:, 0].numpy(), images)
        assert np.array_equal(data.labels.numpy(), labels)
    assert load_source("k49", tmp_path, image_size=14).train.images.shape == (60, 1, 14, 14)


def test_k49_of_another_shape_is_refused(tmp_path, monkeypatch):
    write_k49(tmp_path)
    np.savez(tmp_path / "k49-test-imgs.npz", pixels(50, 14, 14))
    with pytest.raises(DataError, match=r"k49: test images are torch.uint8 \(50, 14, 14\)"):
        load_source("k49", tmp_path)
    np.savez(tmp_path / "k49-test-imgs.npz", other=pixels(50, 28, 28))
    with pytest.raises(DataError, match="arr_0"):
        load_source("k49", tmp_path)


def test_what_is_missing_is_named_in_one_line(tmp_path):
    write_k49(tmp_path)
    (tmp_path / "k49-test-imgs.npz").unlink()
    assert missing_files("k49", tmp_path) == ["k49-test-imgs.npz"]
    with pytest.raises(DataNotFoundError) as caught:
        load_source("k49", tmp_path)
    assert "\n" not in str(caught.value)
    for word in ("k49-test-imgs.npz", str(tmp_path), "codh.rois.ac.jp", "k49.npz"):
        assert word in str(caught.value)
    with pytest.raises(DataNotFoundError, match=r"k49-train-imgs\.npz"):  # in the cache, and there is no network
        load_source("k49")


def test_k49_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    publisher = tmp_path / "publisher"
    publisher.mkdir()
    write_k49(publisher)
    files = tuple(
        replace(file, md5=hashlib.md5((publisher / file.name).read_bytes()).hexdigest())
        for file in characters.Kuzushiji49.files
    )
    small(monkeypatch, characters.Kuzushiji49, train_images=60, test_images=50, files=files)
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return open(publisher / url.rsplit("/", 1)[1], "rb")

    monkeypatch.setattr(published.urllib.request, "urlopen", urlopen)
    assert len(load_source("k49").train) == 60
    assert asked == [file.url for file in files]
    assert all(url.startswith("http://codh.rois.ac.jp/kmnist/dataset/k49/") for url in asked)
    load_source("k49")
    assert len(asked) == 4

    place = characters.Kuzushiji49(None).folder
    (place / files[0].name).unlink()
    (publisher / files[0].name).write_bytes(b"an error page")
    with pytest.raises(DataNotFoundError, match=r"k49-train-imgs\.npz"):
        load_source("k49")
    assert sorted(path.name for path in place.iterdir()) == sorted(file.name for file in files[1:])


def test_kmnist_and_emnist(tmp_path, monkeypatch):
    labels = np.arange(12, dtype=np.uint8) % 10
    images = pixels(12, 28, 28)
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    small(monkeypatch, characters.KuzushijiMnist, train_images=12, test_images=12)
    source = load_source("kmnist", tmp_path)
    assert np.array_equal(source.test.images[:, 0].numpy(), images)
    assert source.train.class_names[3] == "tsu"

    labels = np.arange(30, dtype=np.uint8) % 26 + 1
    images = pixels(30, 28, 28)
    for part in ("train", "test"):
        write_idx(tmp_path / f"emnist-letters-{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"emnist-letters-{part}-labels-idx1-ubyte.gz", labels)
    source = load_source("emnist_letters", tmp_path)
    assert np.array_equal(source.train.images[:, 0].numpy(), images.transpose(0, 2, 1))  # stored on their side
    assert source.train.labels.tolist() == (labels - 1).tolist()
    assert (source.train.class_names[0], source.train.class_names[25]) == ("A", "Z")
    write_idx(tmp_path / "emnist-letters-test-labels-idx1-ubyte.gz", labels - 1)
    with pytest.raises(DataError, match="count from 1"):
        load_source("emnist_letters", tmp_path)


def test_an_npz_stands_in_for_the_published_files(tmp_path):
    arrays = {"train_images": pixels(4, 28, 28), "train_labels": np.array([0, 1, 0, 1]),
              "test_images": pixels(2, 28, 28), "test_labels": np.array([0, 1]),
              "class_names": np.array(["a", "b"])}  # fmt: skip
    np.savez(tmp_path / "k49.npz", **arrays)
    for path in (tmp_path, tmp_path / "k49.npz"):
        assert missing_files("k49", path) == []
        source = load_source("k49", path)
        assert (source.train.name, source.train.class_names, source.flip_safe) == ("k49", ("a", "b"), False)
        assert np.array_equal(source.test.images[:, 0].numpy(), arrays["test_images"])


def test_devanagari_and_omniglot(tmp_path, monkeypatch):
    for part, number in (("Train", 3), ("Test", 2)):
        for name in ("character_1_ka", "digit_0"):
            for place in range(number):
                save(tmp_path / part / name / f"{place}.png", pixels(32, 32))
    small(monkeypatch, characters.Devanagari, train_images=6, test_images=4, classes=2)
    source = load_source("devanagari", tmp_path)
    assert source.train.class_names == ("character_1_ka", "digit_0")
    assert source.test.images.shape == (4, 1, 32, 32)

    paper = np.full((105, 105), 255, np.uint8)
    paper[40:60, 40:60] = 0
    for name in ("Greek/character01", "Greek/character02", "Latin/character01"):
        for place in range(2):
            save(tmp_path / "images_background" / name / f"{place}.png", paper)
    small(monkeypatch, characters.Omniglot, train_images=6, classes=3)
    source = load_source("omniglot", tmp_path)
    assert source.test is None
    assert source.train.class_names == ("Greek/character01", "Greek/character02", "Latin/character01")
    assert source.train.images.shape == (6, 1, 28, 28)
    assert source.train.images[:, 0, 0, 0].max() == 0  # the ground
    assert source.train.images[:, 0, 13, 13].min() == 255  # the ink

    with pytest.raises(DataError, match="file names do not tell the drawer"):
        load_source("omniglot", tmp_path, group="drawer")
    for folder in (tmp_path / "images_background").glob("*/*"):
        for place in range(2):
            (folder / f"{place}.png").rename(folder / f"0007_{place + 1:02d}.png")
    assert load_source("omniglot", tmp_path).train.groups is None
    assert load_source("omniglot", tmp_path, group="drawer").train.groups.tolist() == [0, 1, 0, 1, 2, 3]


def test_cifar(tmp_path, monkeypatch):
    names = [f"kind{number}" for number in range(10)]
    (tmp_path / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    records = {name: np.concatenate([RNG.integers(0, 10, (7, 1), dtype=np.uint8), pixels(7, 3072)], axis=1)
               for name in (*photos.Cifar10.train_files, "test_batch.bin")}  # fmt: skip
    for name, rows in records.items():
        (tmp_path / name).write_bytes(rows.tobytes())
    small(monkeypatch, photos.Cifar10, train_images=35, test_images=7)
    source = load_source("cifar10", tmp_path)
    rows = np.concatenate([records[name] for name in photos.Cifar10.train_files])
    assert source.train.labels.tolist() == rows[:, 0].tolist()
    assert np.array_equal(source.train.images.numpy(), rows[:, 1:].reshape(-1, 3, 32, 32))
    assert (source.train.class_names, source.flip_safe) == (tuple(names), True)
    (tmp_path / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"test_batch.bin is truncated"):
        load_source("cifar10", tmp_path)

    (tmp_path / "fine_label_names.txt").write_text("\n".join(map(str, range(100))))
    rows = np.concatenate(
        [np.full((5, 1), 19, np.uint8), np.arange(95, 100, dtype=np.uint8)[:, None], pixels(5, 3072)], 1
    )
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(rows.tobytes())
    small(monkeypatch, photos.Cifar100, train_images=5, test_images=5)
    assert load_source("cifar100", tmp_path).train.labels.tolist() == [95, 96, 97, 98, 99]


def test_gtsrb_and_tiny_imagenet(tmp_path, monkeypatch):
    colours = {}
    for label in (0, 42):
        colours[label] = pixels(3)
        picture = np.broadcast_to(colours[label], (40 + label, 37, 3)).copy()
        save(tmp_path / f"GTSRB/Final_Training/Images/{label:05d}/00000_00000.ppm", picture)
        save(tmp_path / f"GTSRB/Final_Test/Images/{label:05d}.ppm", picture)
    table = "Filename;Width;ClassId\n00042.ppm;37;42\n00000.ppm;37;0\n"
    (tmp_path / "GT-final_test.csv").write_text(table)
    frame = np.full((33, 33, 3), 9, np.uint8)
    for name in ("00000/00001_00000", "00042/00000_00001", "00042/00001_00000"):
        save(tmp_path / f"GTSRB/Final_Training/Images/{name}.ppm", frame)
    small(monkeypatch, photos.Gtsrb, train_images=5, test_images=2)
    assert load_source("gtsrb", tmp_path).train.groups.tolist() == [0, 1, 2, 2, 3]  # tracks begin anew in each class
    with pytest.raises(SettingsError, match="gtsrb has no group 'site'; it has 'track'"):
        load_source("gtsrb", tmp_path, group="site")
    for name in ("00000/00001_00000", "00042/00000_00001", "00042/00001_00000"):
        (tmp_path / f"GTSRB/Final_Training/Images/{name}.ppm").unlink()
    small(monkeypatch, photos.Gtsrb, train_images=2, test_images=2)
    source = load_source("gtsrb", tmp_path)
    assert source.test.groups is None
    assert source.train.labels.tolist() == [0, 42]
    assert source.test.labels.tolist() == [42, 0]
    assert source.test.images.shape == (2, 3, 32, 32)
    assert source.test.images[0, :, 3, 3].tolist() == colours[42].tolist()
    assert not source.flip_safe
    (tmp_path / "GT-final_test.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no columns Filename and ClassId"):
        load_source("gtsrb", tmp_path)

    for wnid in ("n01", "n02"):
        save(tmp_path / f"train/{wnid}/images/{wnid}_0.JPEG", np.full((64, 64, 3), 90, np.uint8))
    for place in range(2):
        save(tmp_path / f"val/images/val_{place}.JPEG", np.full((64, 64, 3), 200, np.uint8))
    (tmp_path / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n")
    small(monkeypatch, photos.TinyImageNet, train_images=2, test_images=2, classes=2)
    source = load_source("tiny_imagenet", tmp_path)
    assert source.test.labels.tolist() == [1, 0]
    assert source.test.class_names == ("n01", "n02")


@pytest.mark.parametrize(("name", "prefix", "reader"), [
    ("imagenet_lt", "ImageNet_LT", photos.ImageNetLt), ("places_lt", "Places_LT", photos.PlacesLt)])  # fmt: skip
def test_official_lists(name, prefix, reader, tmp_path, monkeypatch):
    for file in reader.files:
        if "." not in file.name:
            (tmp_path / file.name).mkdir()
    lines = {"train": ["data_256/b.jpg 1", "data_256/a.jpg 0", "data_256/b.jpg 1"], "test": ["data_256/a.jpg 0"]}
    for place, shade in (("a", 10), ("b", 240)):
        save(tmp_path / f"data_256/{place}.jpg", np.full((80, 70, 3), shade, np.uint8))
    for part, rows in lines.items():
        (tmp_path / f"{prefix}_{part}.txt").write_text("\n".join(rows) + "\n")
    published_counts = {"imagenet_lt": (115_846, 50_000, 1000), "places_lt": (62_500, 36_500, 365)}
    assert (reader.train_images, reader.test_images, reader.classes) == published_counts[name]
    small(monkeypatch, reader, train_images=3, test_images=1, classes=2)
    source = load_source(name, tmp_path)
    assert source.train.labels.tolist() == [1, 0, 1]
    assert source.train.images.shape == (3, 3, 64, 64)
    assert (source.train.images[0].float().mean() - 240).abs() < 2
    (tmp_path / "data_256/a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.jpg is missing"):
        load_source(name, tmp_path)


def test_inaturalist(tmp_path, monkeypatch):
    for place in range(2):
        save(tmp_path / f"train_val2018/{place}.jpg", np.full((70, 70, 3), 100 * place, np.uint8))
    for part, order in (("train", (1, 0)), ("val", (0,))):
        table = {"images": [{"id": place, "file_name": f"train_val2018/{place}.jpg"} for place in order],
                 "annotations": [{"image_id": place, "category_id": 5 * place} for place in (0, 1)]}  # fmt: skip
        (tmp_path / f"{part}2018.json").write_text(json.dumps(table))
    small(monkeypatch, photos.INaturalist2018, train_images=2, test_images=1, classes=6)
    source = load_source("inaturalist2018", tmp_path)
    assert source.train.labels.tolist() == [5, 0]
    assert source.test.labels.tolist() == [0]
    assert torch.equal(source.test.images, source.train.images[1:])
    (tmp_path / "val2018.json").write_text('{"images": [{"id": 3}]}')
    with pytest.raises(DataError, match=r"val2018.json is no annotation file"):
        load_source("inaturalist2018", tmp_path)
