"""An exported set: balanced, every image the draw that is named, and what is not worth keeping rejected or left out."""

import os

import numpy as np
import pandas as pd
import pytest
import torch
from export_inputs import SETTINGS, build_small, rows_of, tree
from PIL import Image

from gen_invariance import Identity, Rotation, SpatialTranslator
from gen_invariance.data.images import to_uint8
from gen_invariance.errors import SettingsError
from gen_invariance.export.formats.base import open_format
from gen_invariance.export.manifest import COLUMNS, read_manifest
from gen_invariance.export.pictures import describe
from gen_invariance.export.runner import export_dataset
from gen_invariance.export.settings import ExportSettings, target_size
from gen_invariance.export.units import draw_generator, outside


def test_balanced_folder_with_manifest_and_untouched_source(photos, tmp_path):
    before = tree(photos)
    summary = export_dataset(open_format("folder", photos), Rotation(30), tmp_path / "out", SETTINGS)
    assert tree(photos) == before
    assert summary.before == (9, 3, 20)  # one, two, zero
    assert summary.after == (20, 20, 20)
    written = tree(tmp_path / "out")
    assert {name: written[name] for name in before} == before
    rows = list(read_manifest(tmp_path / "out"))
    assert list(rows[0]) == list(COLUMNS)
    table = pd.read_parquet(tmp_path / "out" / "manifest.parquet")
    assert table["file"].tolist() == [row["file"] for row in rows]
    kept = {row["file"] for row in rows if row["status"] == "kept"}
    assert kept == {name for name in written if name.endswith(".png")}
    assert "preview.html" in written
    assert set(written) - kept == {"manifest.jsonl", "manifest.parquet", "preview.html", ".gen_invariance.json"}


def test_every_new_image_is_the_draw_that_the_manifest_names(photos, tmp_path):
    export_dataset(open_format("folder", photos), Rotation(30), tmp_path / "out", SETTINGS)
    rows = rows_of(tmp_path / "out", kind="generated")
    assert len(rows) == 28
    for row in rows:
        source = torch.from_numpy(np.array(Image.open(photos / row["source"])))[None, None].float() / 255
        generator = torch.Generator().manual_seed(int(row["draw_seed"], 16))
        expected = Rotation(30).apply(source, Rotation(30).sample(source.shape, generator=generator))
        found = np.array(Image.open(tmp_path / "out" / row["file"]))
        assert np.array_equal(found, to_uint8(expected)[0, 0].numpy())
        written = np.abs(found / 255 - source[0, 0].numpy()).mean()
        assert row["strength"] == pytest.approx(written, abs=1e-6)
        assert row["source"].split("/")[0] == row["class"] == row["file"].split("/")[0]
    pairs = [(row["source"], row["copy"]) for row in rows]
    assert len(set(pairs)) == len(pairs)
    most = max(copy for source, copy in pairs if source.startswith("two"))
    assert most == 5  # 17 new images from 3 sources, shared out evenly


def test_draws_of_other_sources_copies_and_seeds_differ():
    seeds = {draw_generator(*name).initial_seed() for name in [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0)]}
    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("target", "goal"), [("median", 9), ("max", 20), (12, 12), ("12", 12), (0.5, 10), ("1.0", 20), (1, 1), ("1e-1", 2)]
)
def test_targets(target, goal):
    assert target_size([20, 9, 3], target) == goal


@pytest.mark.parametrize("target", ["mean", 0, -3, 1.5, "0.0", "", ".", None, True, [3], "nan", 10**12])
def test_wrong_targets_are_named(target):
    with pytest.raises(SettingsError, match="target must be"):
        ExportSettings(target=target)


def test_at_most_so_many_from_one_source(photos, tmp_path):
    settings = ExportSettings(target="max", per_source=2, off_distribution=None)
    summary = export_dataset(open_format("folder", photos), Rotation(30), tmp_path / "out", settings)
    assert summary.after == (20, 9, 20)
    assert summary.short == (("two", 11),)


# ---- rejected


def test_near_copies_and_other_classes_are_rejected_and_made_up_for(photos, tmp_path):
    data = open_format("folder", photos)
    none = export_dataset(data, Identity(), tmp_path / "same", SETTINGS)
    assert none.after == none.before
    assert none.short == (("one", 11), ("two", 17))
    assert {row["reason"] for row in rows_of(tmp_path / "same", status="rejected")} == {"near copy of its source"}

    def fussy(images):  # takes about half of all images for class 1
        odd = (images.sum((1, 2, 3)) * 1e4).long() % 2
        return torch.nn.functional.one_hot(odd, 3).float()

    judged = export_dataset(data, Rotation(30), tmp_path / "judged", SETTINGS, predict=fussy)
    assert judged.after[0] == 20  # class "one" is number 0
    assert judged.rejected
    reasons = {row["reason"] for row in rows_of(tmp_path / "judged", status="rejected", label=0)}
    assert reasons == {"the classifier takes it for 'two'"}


def test_results_unlike_any_original_are_rejected(photos, tmp_path):
    class White(Identity):
        def apply(self, images, draw):
            return torch.ones_like(images)

    summary = export_dataset(open_format("folder", photos), White(), tmp_path / "out", ExportSettings(target="max"))
    assert summary.after == summary.before
    assert all("unlike any original" in row["reason"] for row in rows_of(tmp_path / "out", status="rejected"))
    ranges = np.array([[0.2, 0.1, 0.1], [0.4, 0.2, 0.2]])
    assert outside((0.3, 0.15, 0.15), ranges) == 0
    assert outside((0.5, 0.15, 0.15), ranges) == pytest.approx(0.5)
    assert outside((0.1, 0.15, 0.15), ranges) == pytest.approx(0.5)
    assert describe(np.full((3, 4, 4), 51, np.uint8)) == pytest.approx((0.2, 0, 0))


@pytest.mark.parametrize("level", [0.0, 0.45, 1.0])
def test_pictures_without_content_are_rejected_however_much_the_originals_differ(level, tmp_path):
    """Photographs from dark to bright: half a range below the darkest lies below black."""
    base = np.random.default_rng(0).integers(0, 256, (60, 8, 8)) / 255
    for number, (pixels, light) in enumerate(zip(base, np.linspace(0.15, 0.75, 60), strict=True)):
        folder = tmp_path / "in" / ("many" if number < 50 else "few")
        folder.mkdir(parents=True, exist_ok=True)
        spread = 0.2 + number % 4 * 0.2
        Image.fromarray(((light + spread * (pixels - 0.5)).clip(0, 1) * 255).astype(np.uint8)).save(
            folder / f"{number}.png"
        )

    class Flat(Identity):
        def apply(self, images, draw):
            return torch.full_like(images, level)

    summary = export_dataset(
        open_format("folder", tmp_path / "in"), Flat(), tmp_path / "out", ExportSettings(target="max")
    )
    assert summary.after == summary.before == (10, 50)


# ---- left out


def test_unusable_files_are_named_and_do_not_count(photos, tmp_path):
    (photos / "two" / "bad.png").write_bytes(b"not a picture")
    (photos / "two" / "empty.png").write_bytes(b"")
    (photos / "two" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(photos / "two" / "pipe.png")
    (photos / "two" / "notes.txt").write_text("hello")
    (photos / "two" / "more").mkdir()
    (photos / "stray.png").write_bytes(b"x")
    summary = export_dataset(open_format("folder", photos), Rotation(30), tmp_path / "out", SETTINGS)
    assert summary.after == (20, 20, 20)
    assert [key for key, _ in summary.problems] == ["two/bad.png", "two/empty.png", "two/gone.png", "two/pipe.png"]
    assert [key for key, _ in summary.ignored] == ["stray.png", "two/notes.txt"]
    assert not (tmp_path / "out" / "two" / "bad.png").exists()
    assert len(rows_of(tmp_path / "out", status="unusable")) == 4


def test_colour_pictures_for_a_grey_translator_are_named(photos, tmp_path):
    Image.new("RGB", (8, 8), (250, 0, 0)).save(photos / "two" / "red.png")
    summary = export_dataset(open_format("folder", photos), SpatialTranslator(1, start=0.5), tmp_path / "out", SETTINGS)
    assert summary.problems == (("two/red.png", "colour picture, but the translator takes grey ones"),)


def test_a_failing_picture_does_not_take_others_along(photos, tmp_path):
    Image.new("L", (2, 2), 99).save(photos / "two" / "tiny.png")  # smaller than the network's reflected border
    summary = export_dataset(open_format("folder", photos), build_small(), tmp_path / "out", SETTINGS)
    assert summary.after == (20, 20, 20)
    assert any("cannot be translated" in row["reason"] for row in rows_of(tmp_path / "out", status="rejected"))
