import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gen_invariance.data.readers.folder import read_image_folder
from gen_invariance.errors import DataError, DataNotFoundError, GenInvarianceError, SettingsError, printable

RED, GREEN, GREY = (200, 10, 20), (10, 200, 20), (90, 90, 90)


def save(path, colour=RED, *, size=(6, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    save(tmp_path / "cat" / "1.png")
    save(tmp_path / "dog" / "1.png", GREEN)
    return tmp_path


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def only_image(path, **options):
    """The picture in `path`, alone in its class, as uint8 (C, H, W)."""
    data, _ = read_image_folder(path.parent.parent, **options)
    assert len(data) == 1
    return data.images[0].numpy()


def test_classes_and_files_come_in_sorted_order(tmp_path):
    for name in ("b/2.PNG", "b/10.png", "a/x.JpEg", "a/.hidden.png", ".git/z.png", "b/notes.txt", "c/1.webp"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("not an image")
        else:
            save(tmp_path / name, format={"g": None, "G": "png", "p": "webp"}[name[-1]])
    (tmp_path / "b" / "folder.png").mkdir()
    (tmp_path / "readme.md").write_text("not a class")
    data, report = read_image_folder(tmp_path)
    assert data.class_names == ("a", "b", "c")
    assert data.labels.tolist() == [0, 1, 1, 2]
    assert [str(path.relative_to(tmp_path)) for path in report.paths] == ["a/x.JpEg", "b/10.png", "b/2.PNG", "c/1.webp"]
    assert report.skipped == ()
    assert tuple(data.images.shape) == (4, 3, 4, 6)


def test_rows_stay_in_order_when_many_threads_decode(tmp_path):
    for number in range(60):
        save(tmp_path / f"class{number % 3}" / f"{number:03d}.png", (number, 0, 255), size=(1 + 97 * (number % 2), 9))
    data, report = read_image_folder(tmp_path, image_size=5, progress=True)
    expected = [int(path.stem) for path in report.paths]
    assert data.images[:, 0, 2, 2].tolist() == expected
    assert data.labels.tolist() == [number % 3 for number in expected]


@pytest.mark.parametrize("name", ["naïve Käse", "猫", "a'b\"c", "line\nbreak", "100%", "-"])
def test_odd_class_names_are_kept(tmp_path, name):
    save(tmp_path / name / "1.png")
    data, _ = read_image_folder(tmp_path)
    assert data.class_names == (name,)
    (tmp_path / name / "2.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read_image_folder(tmp_path)
    one_line(caught, "2.png", "empty file")


def test_grey_pictures_give_one_channel_unless_one_is_coloured(tmp_path):
    save(tmp_path / "a" / "rgb.png", GREY)
    Image.new("L", (6, 4), 70).save(tmp_path / "a" / "grey.png")
    Image.new("P", (6, 4), 0).save(tmp_path / "a" / "palette.png")
    data, _ = read_image_folder(tmp_path)
    assert tuple(data.images.shape) == (3, 1, 4, 6)
    assert data.images[:, 0, 0, 0].tolist() == [70, 0, 90]
    assert read_image_folder(tmp_path, channels=3)[0].images[:, :, 0, 0].tolist() == [[70] * 3, [0] * 3, [90] * 3]
    save(tmp_path / "a" / "colour.png")
    data, _ = read_image_folder(tmp_path)
    assert data.images[:, :, 0, 0].tolist() == [list(RED), [70] * 3, [0] * 3, [90] * 3]
    grey, _ = read_image_folder(tmp_path, channels=1)
    assert grey.images[0, 0, 0, 0].item() == round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])


def test_exif_orientation_is_applied(tmp_path):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, :, 0] = 255  # the top row is red
    for orientation, stored in (
        (1, upright),
        (3, upright[::-1, ::-1]),
        (6, np.rot90(upright)),
        (8, np.rot90(upright, -1)),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / str(orientation) / "class" / "photo.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
        assert np.array_equal(only_image(path), upright.transpose(2, 0, 1)), orientation


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 0], pixels[0, :, 3] = 200, [255, 0, 51]  # opaque, clear, a fifth
    path = tmp_path / "rgba" / "1.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    found = read_image_folder(tmp_path)[0].images[0].numpy()
    expected = np.array([[200, 255, 244], [0, 255, 204], [0, 255, 204]])
    assert np.abs(found[:, 0].astype(int) - expected).max() <= 1


def test_a_transparent_palette_colour_is_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, *RED])
    picture.putpixel((1, 0), 1)
    (tmp_path / "a").mkdir()
    picture.save(tmp_path / "a" / "1.png", transparency=0)
    assert read_image_folder(tmp_path)[0].images[0, :, 0].T.tolist() == [[255] * 3, list(RED)]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    (tmp_path / "a").mkdir()
    Image.fromarray(values).save(tmp_path / "a" / f"1.{suffix}")
    expected = [[round(int(value) / 257) for value in values[0]]]
    assert read_image_folder(tmp_path)[0].images[0, 0].tolist() == expected


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "tif"), ("CMYK", "jpg"), ("YCbCr", "jpg"), ("LAB", "tif")])
def test_other_colour_modes_become_rgb(tmp_path, mode, suffix):
    (tmp_path / "a").mkdir()
    picture = Image.new("RGB", (8, 8), RED)
    picture = Image.new("LAB", (8, 8), (128, 10, 240)) if mode == "LAB" else picture.convert(mode)
    picture.save(tmp_path / "a" / f"1.{suffix}")
    found = read_image_folder(tmp_path)[0].images
    assert tuple(found.shape) == (1, 3, 8, 8)
    if mode != "LAB":
        assert np.abs(found[0, :, 0, 0].numpy().astype(int) - RED).max() <= 4


def test_black_and_white_pictures_are_grey(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("1", (3, 3), 1).save(tmp_path / "a" / "1.bmp")
    assert read_image_folder(tmp_path)[0].images.unique().tolist() == [255]


def test_image_size_crops_the_centre_and_smooths(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16, 1] = np.tile([0, 200], 4)  # stripes in the middle third only
    wide[:, :8, 0] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(wide).save(tmp_path / "a" / "1.png")
    found = read_image_folder(tmp_path, image_size=2)[0].images[0].numpy()
    assert found.shape == (3, 2, 2)
    assert found[0].max() == 0
    assert np.abs(found[1].astype(int) - 100).max() <= 20


def test_several_sizes_need_image_size(root):
    odd = save(root / "dog" / "2.png", size=(5, 7))
    with pytest.raises(DataError) as caught:
        read_image_folder(root)
    one_line(caught, root / "cat" / "1.png", "6x4", odd, "5x7", "image_size=N")
    assert tuple(read_image_folder(root, image_size=4)[0].images.shape) == (3, 3, 4, 4)


def png_bomb():
    """A valid PNG header that promises 60,000 x 60,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 9)) + chunk(b"IEND", b"")


def whole(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    return (tmp_path / f"whole.{suffix}").read_bytes()


def animated(tmp_path, suffix):
    first, second = Image.new("RGB", (6, 4), RED), Image.new("RGB", (6, 4), GREEN)
    first.save(tmp_path / f"moving.{suffix}", save_all=True, append_images=[second], duration=100)
    return (tmp_path / f"moving.{suffix}").read_bytes()


DEFECTS = {
    "empty.png": (lambda _: b"", "empty file"),
    "text.jpg": (lambda _: b"<html>404</html>", "not an image"),
    "cut.png": (lambda path: whole(path, "png")[:-400], "decoded"),
    "cut.jpg": (lambda path: whole(path, "jpg")[:-100], "decoded"),
    "cut.bmp": (lambda path: whole(path, "bmp")[:-400], "decoded"),
    "cut.webp": (lambda path: whole(path, "webp")[:-200], ""),
    "cut.ppm": (lambda path: whole(path, "ppm")[:-400], "decoded"),
    "bomb.png": (lambda _: png_bomb(), "bomb"),
    "moving.gif": (lambda path: animated(path, "gif"), "2 pictures in one file, an animation"),
    "moving.png": (lambda path: animated(path, "png"), "animation"),
    "moving.webp": (lambda path: animated(path, "webp"), "animation"),
}


@pytest.mark.parametrize("name", DEFECTS)
@pytest.mark.filterwarnings("error")
def test_a_damaged_image_is_named_or_skipped(root, tmp_path_factory, name):
    make, words = DEFECTS[name]
    bad = root / "cat" / name
    bad.write_bytes(make(tmp_path_factory.mktemp("made")))
    with pytest.raises(DataError) as caught:
        read_image_folder(root)
    one_line(caught, bad, words, "data.skip_corrupt=true")
    data, report = read_image_folder(root, skip_corrupt=True)
    assert len(data) == 2
    assert [path for path, _ in report.skipped] == [bad]
    assert words in report.skipped[0][1]
    assert bad not in report.paths


@pytest.mark.filterwarnings("error")
def test_a_large_picture_is_read_up_to_what_pillow_takes_for_a_bomb(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # 24 pixels: Pillow would warn
    assert len(read_image_folder(root)[0]) == 2
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
    with pytest.raises(DataError) as caught:
        read_image_folder(root)
    one_line(caught, "more than 22 pixels", "scale it down")


def test_a_dangling_link_is_a_damaged_image(root):
    (root / "cat" / "link.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError) as caught:
        read_image_folder(root)
    one_line(caught, "link.png")


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_altered_files_never_raise_anything_else(tmp_path, data):
    suffix = data.draw(st.sampled_from(["png", "jpg", "gif", "webp", "tif", "bmp"]))
    content = bytearray(whole(tmp_path, suffix))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, min(len(content), 200) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "set" / "a").mkdir(parents=True, exist_ok=True)
    for old in (tmp_path / "set" / "a").iterdir():
        old.unlink()
    (tmp_path / "set" / "a" / f"x.{suffix}").write_bytes(bytes(content))
    refusal = None
    try:
        found, _ = read_image_folder(tmp_path / "set")
    except GenInvarianceError as error:
        refusal = str(error)
    if refusal is None:
        assert len(found) == 1
    else:
        assert "\n" not in refusal
        assert f"x.{suffix}" in refusal


def test_a_class_without_images_is_named(root):
    (root / "empty").mkdir()
    (root / "empty" / ".DS_Store").write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        read_image_folder(root)
    one_line(caught, root / "empty")


def test_a_class_emptied_by_skipping_is_named(root):
    (root / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read_image_folder(root, skip_corrupt=True)
    one_line(caught, "'dog'")


def test_missing_folders_and_files_are_told_apart(root):
    for path, words in ((root / "nowhere", "does not exist"), (root / "cat" / "1.png", "is a file")):
        with pytest.raises(DataNotFoundError) as caught:
            read_image_folder(path)
        one_line(caught, path, words)


def test_a_folder_without_classes_is_refused(root):
    with pytest.raises(DataError) as caught:
        read_image_folder(root / "cat")
    one_line(caught, root / "cat", "sub-folders")


def test_settings_out_of_range_are_refused(root):
    for options in ({"channels": 4}, {"image_size": 0}):
        with pytest.raises(SettingsError):
            read_image_folder(root, **options)


def test_fixed_classes_number_the_labels(root):
    data, _ = read_image_folder(root, class_names=("dog", "bird", "cat"))
    assert data.class_names == ("dog", "bird", "cat")
    assert data.labels.tolist() == [0, 2]
    with pytest.raises(DataError) as caught:
        read_image_folder(root, class_names=("cat", "bird"))
    one_line(caught, "'dog'")


def test_printable_paths_are_one_line():
    assert printable("a\nb\udcff c é") == "a\\nb\\udcff c é"
