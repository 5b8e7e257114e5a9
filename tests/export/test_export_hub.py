"""Which files of a folder are one Hugging Face data set, and whether the library reads what an export wrote."""

import pytest
from export_inputs import SETTINGS, digits, rows_of

from gen_invariance import Rotation
from gen_invariance.errors import DataError
from gen_invariance.export.formats.base import open_format
from gen_invariance.export.runner import export_dataset

datasets = pytest.importorskip("datasets")


def data_set(*, split=None):
    pixels, labels = digits()
    from PIL import Image

    columns = {"image": [Image.fromarray(image) for image in pixels], "label": labels.tolist()}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zero", "one", "two"])}
    if split is not None:
        columns["split"], features["split"] = (
            [split[n % len(split)] for n in range(len(labels))],
            datasets.Value("string"),
        )
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("name", ["photos.parquet", "train.parquet", "a[1] b.parquet"])
def test_load_dataset_reads_what_one_parquet_file_became(tmp_path, name):
    data_set().to_parquet(tmp_path / name)
    export_dataset(open_format("huggingface", tmp_path / name), Rotation(30), tmp_path / "out", SETTINGS)
    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: rows.column_names for split, rows in found.items()} == {"train": ["image", "label"]}
    assert len(found["train"]) == 60
    again = open_format("huggingface", tmp_path / "out")  # and so does an export of the folder
    assert len(again.entries()) == 60


SEVERAL = {
    "folders": (["en/train-00000-of-00001.parquet", "fr/train-00000-of-00001.parquet"], None, "in 2 folders (en, fr)"),
    "an old copy": (["train.parquet", "old/train.parquet"], None, "in 2 folders"),
    "configs": (["data/a.parquet", "data/b.parquet"], ["a", "b"], "2 data sets (configs a, b)"),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_data_sets_in_a_folder_are_not_added_up(tmp_path, kind):
    names, configs, words = SEVERAL[kind]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data_set().to_parquet(tmp_path / name)
    if configs:
        lines = "".join(f"- config_name: {name}\n  data_files: data/{name}.parquet\n" for name in configs)
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{lines}---\n# Two sets\n")
    with pytest.raises(DataError) as caught:
        open_format("huggingface", tmp_path)
    assert words in str(caught.value)


def test_one_config_and_folders_of_parts_are_read(tmp_path):
    for name in ("data/a.parquet", "data/old.parquet"):
        (tmp_path / "one" / name).parent.mkdir(exist_ok=True, parents=True)
        data_set().to_parquet(tmp_path / "one" / name)
    files = "data_files:\n  - split: train\n    path: data/a.parquet\n"
    (tmp_path / "one" / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  {files}---\n")
    assert len(open_format("huggingface", tmp_path / "one").entries()) == 32
    for part in ("train", "test"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        data_set().to_parquet(tmp_path / "parts" / part / "0.parquet")
    entries = open_format("huggingface", tmp_path / "parts").entries()
    assert sorted(entry.part for entry in entries) == ["test"] * 32 + ["train"] * 32


def test_rows_that_a_column_keeps_for_testing_do_not_grow(tmp_path):
    data_set(split=["train", "train", "test"]).to_parquet(tmp_path / "a.parquet")
    export_dataset(open_format("huggingface", tmp_path / "a.parquet"), Rotation(30), tmp_path / "out", SETTINGS)
    grown = rows_of(tmp_path / "out", kind="generated", status="kept")
    assert grown
    assert all(int(row["source"].partition("/")[2]) % 3 < 2 for row in grown)
