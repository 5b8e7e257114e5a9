"""New images are of the size, file format, quality and colour mode of their source, in every format of set."""

import io
import json
import tarfile
import warnings
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from export_inputs import rows_of, tree
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter, JpegImagePlugin

from gen_invariance import Identity, Lighting, Rotation
from gen_invariance.errors import SettingsError
from gen_invariance.export import units
from gen_invariance.export.encoding import convert_mode
from gen_invariance.export.formats.base import open_format
from gen_invariance.export.native import edges_kept, working_size
from gen_invariance.export.pictures import decode, decode_with_encoding, describe
from gen_invariance.export.rounds import Source, next_draws
from gen_invariance.export.runner import export_dataset
from gen_invariance.export.settings import ExportSettings, WorkerSettings

SETTINGS = ExportSettings(target="max", batch_size=4, off_distribution=None, near_copy=0)
NUISANCE = Lighting()


def scene(seed, size=(48, 32)):
    """A smooth picture with an edge in it, in colour."""
    width, height = size
    noise = np.random.default_rng(seed).integers(30, 220, (4, 4, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    image.paste((200, 40, 30), (width // 4, height // 4, width // 2, height // 2))
    return image


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


SAVED = {
    "fine.jpg": ("JPEG", "RGB", {"quality": 92, "subsampling": "4:4:4"}),
    "coarse.JPG": ("JPEG", "RGB", {"quality": 40, "subsampling": "4:2:0"}),
    "grey.jpeg": ("JPEG", "L", {"quality": 70}),
    "progressive.jpg": ("JPEG", "RGB", {"progressive": True}),
    "cmyk.jpg": ("JPEG", "CMYK", {"quality": 80}),
    "turned.jpg": ("JPEG", "RGB", {"exif": turned(6), "quality": 80}),
    "mirrored.png": ("PNG", "RGB", {"exif": turned(7)}),
    "colour.png": ("PNG", "RGB", {}),
    "grey.png": ("PNG", "L", {}),
    "palette.png": ("PNG", "P", {}),
    "clear.png": ("PNG", "RGBA", {}),
    "deep.png": ("PNG", "I;16", {}),
    "plain.bmp": ("BMP", "RGB", {}),
    "small.gif": ("GIF", "P", {}),
    "exact.webp": ("WEBP", "RGB", {"lossless": True}),
    "lossy.webp": ("WEBP", "RGB", {"quality": 60}),
    "packed.tif": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "scan.ppm": ("PPM", "RGB", {}),
    "scan.pgm": ("PPM", "L", {}),
    "scan.jp2": ("JPEG2000", "RGB", {"irreversible": True, "quality_mode": "rates", "quality_layers": [8]}),
    "exact.j2k": ("JPEG2000", "L", {"no_jp2": True}),
    "small.avif": ("AVIF", "RGB", {}),
    "misnamed.jpg": ("PNG", "RGB", {}),
}


def save(path, number, size=(48, 32)):
    name, mode, options = SAVED[path.name]
    convert_mode(scene(number, size), mode).save(path, name, **options)


@pytest.fixture
def mixed(tmp_path):
    """One picture of each kind in the small class, of two sizes, and enough in the other."""
    for number, name in enumerate(SAVED):
        path = tmp_path / "in" / "few" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, number, (48, 32) if number % 2 else (33, 50))
    (tmp_path / "in" / "many").mkdir()
    for number in range(2 * len(SAVED)):
        scene(number).save(tmp_path / "in" / "many" / f"{number}.png")
    return tmp_path / "in"


def is_like(source, result):
    """What is asked of two files: format, mode, stored size, orientation, quality."""
    first, second = Image.open(source), Image.open(result)
    assert (second.format, second.mode, second.size) == (first.format, first.mode, first.size)
    assert second.getexif().get(0x0112) == first.getexif().get(0x0112)
    if first.format == "JPEG":
        assert second.quantization == first.quantization
        assert JpegImagePlugin.get_sampling(second) == JpegImagePlugin.get_sampling(first)
        assert second.info.get("progressive") == first.info.get("progressive")
    if first.format == "TIFF":
        assert second.info["compression"] == first.info["compression"]


def test_every_kind_of_file_gets_new_images_of_its_kind(mixed, tmp_path):
    summary = export_dataset(open_format("folder", mixed), NUISANCE, tmp_path / "out", SETTINGS)
    assert summary.after == (2 * len(SAVED), 2 * len(SAVED))
    rows = rows_of(tmp_path / "out", kind="generated", status="kept")
    assert Counter(row["source"] for row in rows) == {f"few/{name}": 1 for name in SAVED}
    for row in rows:
        source, result = mixed / row["source"], tmp_path / "out" / row["file"]
        assert result.suffix == source.suffix
        is_like(source, result)
        draw = NUISANCE.sample((1, 3, 4, 4), generator=torch.Generator().manual_seed(int(row["draw_seed"], 16)))
        pixels = np.asarray(decode(source.read_bytes()).convert("RGB"))
        expected = NUISANCE.apply(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255, draw)[0]
        found = np.asarray(decode(result.read_bytes()).convert("RGB")) / 255
        if source.name == "exact.j2k":
            assert result.read_bytes()[:4] == source.read_bytes()[:4]
        if source.name not in ("exact.j2k", "grey.png", "deep.png", "scan.pgm", "grey.jpeg"):
            difference = np.abs(found - expected.permute(1, 2, 0).numpy()).mean()
            assert difference < (0.04 if source.suffix in (".gif", ".JPG") or "palette" in source.name else 0.02)
    lossless = next(tmp_path / "out" / row["file"] for row in rows if "exact.webp" in row["source"]).read_bytes()
    assert lossless[12:16] == b"VP8L"


def test_a_lossy_file_that_does_not_say_its_quality_gets_one_of_its_size():
    for quality in (30, 75, 95):
        buffer = io.BytesIO()
        image = scene(3, (200, 150)).filter(ImageFilter.SHARPEN)
        image.save(buffer, "WEBP", quality=quality)
        _, encoding = decode_with_encoding(buffer.getvalue())
        assert abs(encoding.options["quality"] - quality) <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_lie_in_their_file_as_their_source_does(orientation):
    buffer = io.BytesIO()
    scene(1).save(buffer, "PNG", exif=turned(orientation))
    upright, encoding = decode_with_encoding(buffer.getvalue())
    again = encoding.encode(np.asarray(upright).transpose(2, 0, 1))
    assert np.array_equal(np.asarray(decode(again)), np.asarray(upright))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(again))), np.asarray(scene(1)))


def test_a_picture_of_two_levels_is_judged_and_stored_in_two(tmp_path):
    root = photos(tmp_path / "in", sizes=((16, 16),))
    for file in root.rglob("*.png"):
        Image.open(file).convert("1").save(file)
    summary = export_dataset(open_format("folder", root), Rotation(40), tmp_path / "out", SETTINGS)
    assert summary.after == (6, 6)
    assert {Image.open(file).mode for file in (tmp_path / "out").rglob("*.png")} == {"1"}
    none = export_dataset(open_format("folder", root), Lighting(), tmp_path / "none", SETTINGS)  # the same two levels
    assert none.after == none.before


def test_a_profile_of_colours_is_kept():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    buffer = io.BytesIO()
    scene(1).save(buffer, "JPEG", icc_profile=profile)
    picture, encoding = decode_with_encoding(buffer.getvalue())
    again = Image.open(io.BytesIO(encoding.encode(np.asarray(picture).transpose(2, 0, 1))))
    assert again.info["icc_profile"] == profile


# ---- every format of set


def jpeg(number, size=(48, 32)):
    buffer = io.BytesIO()
    scene(number, size).save(buffer, "JPEG", quality=83, subsampling="4:2:2")
    return buffer.getvalue()


def labels():
    return [0] * 6 + [1] * 2


def as_table(root):
    root.mkdir()
    for number in range(len(labels())):
        (root / f"{number}.jpg").write_bytes(jpeg(number))
    frame = {"path": [f"{number}.jpg" for number in range(len(labels()))], "label": labels()}
    pd.DataFrame(frame).to_csv(root / "set.csv", index=False)
    return root / "set.csv"


def from_table(out):
    table = pd.read_csv(out / "set.csv")
    assert all(path.endswith(".jpg") for path in table["path"])
    return [(out / path).read_bytes() for path in table["path"]]


def as_shards(root):
    root.mkdir()
    with tarfile.open(root / "set-0.tar", "w") as tar:
        for number, label in enumerate(labels()):
            for name, content in ((f"{number}.jpg", jpeg(number)), (f"{number}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return root


def from_shards(out):
    found = []
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            names = tar.getnames()
            assert {name.rpartition(".")[2] for name in names} == {"jpg", "cls"}
            assert Counter(name.partition(".")[0] for name in names).most_common(1)[0][1] == 2
            found += [tar.extractfile(name).read() for name in names if name.endswith(".jpg")]
    return found


def as_hugging_face(root):
    root.mkdir()
    images = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in range(len(labels()))]
    pd.DataFrame({"image": images, "label": labels()}).to_parquet(root / "set.parquet")
    return root / "set.parquet"


def from_hugging_face(out):
    images = pd.read_parquet(out / "set.parquet")["image"]
    assert all(image["path"].endswith(".jpg") for image in images)
    return [image["bytes"] for image in images]


SETS = {
    "table": (as_table, from_table),
    "webdataset": (as_shards, from_shards),
    "huggingface": (as_hugging_face, from_hugging_face),
}


@pytest.mark.parametrize("name", SETS)
def test_files_in_sets_of_every_format_stay_of_one_kind(name, tmp_path, monkeypatch):
    if name == "huggingface":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make, read = SETS[name]
    data = open_format(name, make(tmp_path / "in"))
    settings = replace(SETTINGS, image_size=16)  # what the translator was fitted at plays no part
    assert export_dataset(data, NUISANCE, tmp_path / "out", settings).after == (6, 6)
    images = [Image.open(io.BytesIO(content)) for content in read(tmp_path / "out")]
    assert len(images) == 12
    assert {(image.format, image.mode, image.size) for image in images} == {("JPEG", "RGB", (48, 32))}
    assert len({str(image.quantization) for image in images}) == 1
    assert {JpegImagePlugin.get_sampling(image) for image in images} == {1}
    again = replace(SETTINGS, target=8)  # the output is an input, and nothing of it is lost
    assert export_dataset(open_format(name, again_path(tmp_path / "out")), NUISANCE, tmp_path / "b", again).after == (
        8,
        8,
    )
    assert len(read(tmp_path / "b")) == 16


def again_path(out):
    return next((path for path in (out / "set.csv", out / "set.parquet") if path.exists()), out)


# ---- sizes


class Fitted(torch.nn.Module):
    """A translator that knows pictures of 16 pixels: adds a smooth light, or turns them."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def sample(self, shape, *, generator):
        return {"light": torch.rand(shape[0], generator=generator) * 0.3}

    def apply(self, images, draw):
        assert min(images.shape[2:]) == 16
        if self.how == "turn":
            return images.flip(2)
        slope = torch.linspace(0, 1, images.shape[3])
        return (images + draw["light"].view(-1, 1, 1, 1) * slope).clamp(0, 1)


def photos(root, sizes=((64, 48), (40, 56))):
    for name, count in (("few", 2), ("many", 6)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            scene(number, sizes[number % len(sizes)]).save(root / name / f"{number}.png")
    return root


def test_a_translator_of_one_size_lends_its_light_to_the_sharp_picture(tmp_path):
    data = open_format("folder", photos(tmp_path / "in"))
    settings = replace(SETTINGS, image_size=16)
    assert export_dataset(data, Fitted("light"), tmp_path / "out", settings).after == (6, 6)
    for row in rows_of(tmp_path / "out", kind="generated", status="kept"):
        source = np.asarray(Image.open(tmp_path / "in" / row["source"])) / 255
        found = np.asarray(Image.open(tmp_path / "out" / row["file"])) / 255
        assert found.shape == source.shape
        light = float(torch.rand(1, generator=torch.Generator().manual_seed(int(row["draw_seed"], 16)))) * 0.3
        expected = (source + light * np.linspace(0, 1, source.shape[1])[None, :, None]).clip(0, 1)
        assert np.abs(found - expected).mean() < 0.01
        sharpness = [describe((pixels * 255).astype(np.uint8).transpose(2, 0, 1))[2] for pixels in (found, expected)]
        assert sharpness[0] == pytest.approx(sharpness[1], rel=0.1)


def test_a_translator_of_one_size_that_moves_things_is_not_taken(tmp_path):
    data = open_format("folder", photos(tmp_path / "in"))
    summary = export_dataset(data, Fitted("turn"), tmp_path / "out", replace(SETTINGS, image_size=16))
    assert summary.after == summary.before
    reasons = {row["reason"] for row in rows_of(tmp_path / "out", status="rejected")}
    assert reasons == {"moves or redraws shapes, which cannot be brought to its source's size"}


def test_edges_kept_of_known_changes():
    image = torch.from_numpy(np.asarray(scene(5)).copy()).permute(2, 0, 1)[None].float() / 255
    assert float(edges_kept(image, image * 0.5 + 0.2)) == pytest.approx(1, abs=1e-5)
    assert float(edges_kept(image, 1 - image)) == pytest.approx(1, abs=1e-5)
    assert float(edges_kept(image, image.flip(3))) < 0.5
    assert float(edges_kept(torch.full_like(image, 0.4), image)) == 1


def test_sizes_at_which_translators_work():
    fitted, pipeline = Fitted("light"), Fitted("light")
    pipeline.largest_side = 40
    assert working_size(Rotation(3), (533, 400), image_size=32) == (533, 400)
    assert working_size(fitted, (533, 400), image_size=32) == (43, 32)
    assert working_size(fitted, (533, 400), image_size=None) == (533, 400)
    assert working_size(pipeline, (30, 99), image_size=16) == (30, 99)
    assert working_size(pipeline, (533, 400), image_size=16) == (53, 40)


def test_squares_as_before(tmp_path):
    data = open_format("folder", photos(tmp_path / "in"))
    with pytest.warns(DeprecationWarning, match="use results=square"):
        old = replace(SETTINGS, image_size=16, restore_size=False)
    assert old == replace(SETTINGS, image_size=16, results="square")
    with pytest.warns(DeprecationWarning, match="use results=native"):
        assert replace(old, restore_size=True).results == "native"
    export_dataset(data, Rotation(20), tmp_path / "out", old)
    files = [Image.open(tmp_path / "out" / row["file"]) for row in rows_of(tmp_path / "out", kind="generated")]
    assert {(file.format, file.size) for file in files} == {("PNG", (16, 16))}


# ---- caps


def test_ten_results_from_one_source_and_no_more(tmp_path):
    root = photos(tmp_path / "in", sizes=((8, 8),))
    settings = replace(SETTINGS, target=40)
    summary = export_dataset(open_format("folder", root), NUISANCE, tmp_path / "out", settings)
    assert (summary.before, summary.after) == ((2, 6), (22, 40))
    assert (summary.short, summary.capped) == ((("few", 18),), ("few",))
    used = Counter(row["source"] for row in rows_of(tmp_path / "out", kind="generated", status="kept", label=0))
    assert used == {"few/0.png": 10, "few/1.png": 10}
    (row,) = rows_of(tmp_path / "out", kind="class")
    assert (row["class"], row["status"]) == ("few", "short")
    assert row["reason"] == "lacks 18 of 40 images: per_source=10, and it has 2"


def test_rejected_draws_do_not_count_against_the_cap(tmp_path):
    root = photos(tmp_path / "in", sizes=((8, 8),))

    class Half(Lighting):
        def apply(self, images, draw):
            moved = super().apply(images, draw)
            return torch.where((draw["gamma"].view(-1, 1, 1, 1) * 1e4).long() % 2 == 0, moved, images)

    settings = replace(SETTINGS, target=20, per_source=6, tries=30, near_copy=0.001)
    summary = export_dataset(open_format("folder", root), Half(), tmp_path / "out", settings)
    assert summary.rejected
    assert summary.after == (14, 20)
    used = Counter(row["source"] for row in rows_of(tmp_path / "out", kind="generated", status="kept", label=0))
    assert used == {"few/0.png": 6, "few/1.png": 6}
    draws = [(row["source"], row["copy"]) for row in rows_of(tmp_path / "out", kind="generated")]
    assert len(set(draws)) == len(draws)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6),
    st.integers(-2, 40),
    st.one_of(st.none(), st.integers(1, 6)),
)
def test_next_draws_against_a_slow_loop(state, missing, most):
    sources = [Source(None, drawn=drawn + kept, kept=kept) for drawn, kept in state]
    drawn, kept = [s.drawn for s in sources], [s.kept for s in sources]
    expected = []
    for _ in range(max(missing, 0)):
        free = [place for place in range(len(sources)) if most is None or kept[place] < most]
        if not free:
            break
        place = min(free, key=lambda place: (drawn[place], place))
        expected.append((place, drawn[place]))
        drawn[place] += 1
        kept[place] += 1
    found = next_draws(sources, missing, most)
    assert [(next(i for i, s in enumerate(sources) if s is source), copy) for source, copy in found] == expected


# ---- large pictures, workers, resuming


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 40))
def test_parts_of_so_many_pixels(pixels, most):
    bounds = [0, *units.cut_by_pixels(pixels, most=most), len(pixels)]
    parts = [pixels[start:end] for start, end in pairwise(bounds)]
    assert [number for part in parts for number in part] == pixels
    for part, following in pairwise(parts):
        assert part
        assert sum(part) <= most or len(part) == 1
        assert sum(part) + following[0] > most  # no part ends early


def test_large_pictures_in_small_pieces_end_in_the_same_images(tmp_path, monkeypatch):
    data = open_format("folder", photos(tmp_path / "in"))
    export_dataset(data, NUISANCE, tmp_path / "whole", SETTINGS)
    monkeypatch.setattr(units, "_PIECE_PIXELS", 64 * 48 + 1)
    export_dataset(data, NUISANCE, tmp_path / "pieces", SETTINGS)
    assert tree(tmp_path / "pieces") == tree(tmp_path / "whole")
    monkeypatch.setattr("gen_invariance.export.rounds.UNIT_PIXELS", 64 * 48 + 1)
    export_dataset(data, NUISANCE, tmp_path / "units", SETTINGS)
    assert tree(tmp_path / "units") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_write_the_same_native_files(mixed, tmp_path):
    for processes in (1, 2):
        workers = WorkerSettings(processes=processes)
        export_dataset(open_format("folder", mixed), NUISANCE, tmp_path / str(processes), SETTINGS, workers=workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def test_files_that_are_gone_are_made_again(mixed, tmp_path):
    data, out = open_format("folder", mixed), tmp_path / "out"
    first = export_dataset(data, NUISANCE, out, SETTINGS)
    whole = tree(out)
    new = next(name for name in whole if "__000" in name)
    for name in (new, "few/grey.png"):
        (out / name).unlink()
    assert export_dataset(data, NUISANCE, out, SETTINGS, resume=True) == first
    assert tree(out) == whole


@pytest.mark.parametrize("gone", ["__000", "few/grey.png"])
def test_files_that_are_gone_before_it_goes_on_are_made_again(gone, mixed, tmp_path, monkeypatch):
    data, out = open_format("folder", mixed), tmp_path / "out"
    export_dataset(data, NUISANCE, tmp_path / "whole", SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr("gen_invariance.export.runner.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_dataset(data, NUISANCE, out, SETTINGS)
    next(out / name for name in tree(out) if gone in name).unlink()
    export_dataset(data, NUISANCE, out, SETTINGS, resume=True)
    assert tree(out) == tree(tmp_path / "whole")


def test_an_export_of_other_results_is_not_gone_on_with(tmp_path):
    data = open_format("folder", photos(tmp_path / "in"))
    export_dataset(data, NUISANCE, tmp_path / "out", SETTINGS)
    with pytest.raises(SettingsError, match=r"restore_size.* changed"):
        export_dataset(data, NUISANCE, tmp_path / "out", replace(SETTINGS, results="square"), resume=True)
    about = json.loads((tmp_path / "out" / ".gen_invariance.json").read_text())["settings"]
    assert about["results"] == "native"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_dataset(data, Identity(), tmp_path / "same", replace(SETTINGS, near_copy=0.1))
