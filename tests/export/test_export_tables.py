"""Tables: whatever their cells hold comes back as it was, and rows that a column keeps for testing do not grow."""

import csv
import json
from pathlib import Path

import pytest
from export_inputs import SETTINGS, as_folder, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance import Rotation
from gen_invariance.errors import DataError
from gen_invariance.export.formats.base import open_format
from gen_invariance.export.formats.table_file import read_table
from gen_invariance.export.runner import export_dataset


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures, and their paths below it with their classes."""
    root = as_folder(tmp_path_factory.mktemp("pictures"))
    return root, [(file.relative_to(root).as_posix(), file.parent.name) for file in sorted(root.rglob("*.png"))]


def csv_text(header, rows, separator=",", line_end="\n"):
    return line_end.join(separator.join(map(str, row)) for row in [header, *rows]) + line_end


def exported(table, out, **options):
    export_dataset(open_format("table", table, **options), Rotation(30), out, SETTINGS)
    return out / table.name


WRITINGS = {
    "comma": (",", "\n", "utf-8"),
    "semicolon": (";", "\r\n", "utf-8"),
    "with a mark": (",", "\r\n", "utf-8-sig"),
    "semicolon and a mark": (";", "\r\n", "utf-8-sig"),
    "Unicode text": ("\t", "\r\n", "utf-16"),
}


@pytest.mark.parametrize("kind", WRITINGS)
def test_tables_of_excel_are_read_and_come_back_as_they_were_written(pictures, tmp_path, kind):
    separator, line_end, encoding = WRITINGS[kind]
    root, rows = pictures
    table = root / f"{kind}.csv"
    text = csv_text(
        ["", "path", "label", "größe"], [(n, *row, f"{n}€") for n, row in enumerate(rows)], separator, line_end
    )
    table.write_bytes(text.encode(encoding))
    written = exported(table, tmp_path / "out")
    assert written.read_bytes()[:3] == table.read_bytes()[:3]  # the mark, if there is one
    found = written.read_bytes().decode(encoding)
    assert found.count(line_end) == found.count("\n")
    old, new = (list(csv.reader(part.splitlines(), delimiter=separator)) for part in (text, found))
    assert new[0] == old[0]
    assert [row[:1] + row[2:] for row in new[1 : len(old)]] == [row[:1] + row[2:] for row in old[1:]]
    assert len(new) == 61


BAD = {
    "Windows letters": (b"path,label\n" + "cat/1.png,bébé\n".encode("cp1252"), "is not UTF-8"),
    "a comma too many": (b"path,label\ncat/1.png,cat,\n", "Expected 2 fields"),
    "two columns of one name": (b"path,label,label\na.png,cat,x\n", "two columns 'label'"),
    "a name with a space": (b"path, label\na.png, cat\n", "it has 'path', ' label'"),
    "no label": (b"path,label\na.png,cat\nb.png,\n", "row 2 has no label"),
}


@pytest.mark.parametrize("kind", BAD)
def test_tables_that_cannot_be_read_right_are_refused(tmp_path, kind):
    content, words = BAD[kind]
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        open_format("table", tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


def test_paths_of_windows(pictures, tmp_path):
    root, rows = pictures
    (root / "windows.csv").write_text(
        csv_text(["path", "label"], [(path.replace("/", "\\"), name) for path, name in rows])
    )
    exported(root / "windows.csv", tmp_path / "out")
    kept = rows_of(tmp_path / "out", kind="original", status="kept")
    assert len(kept) == len(rows)
    assert (tmp_path / "out" / kept[0]["file"]).parent == tmp_path / "out" / "images" / rows[0][1]


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8),
    st.lists(st.integers(0, 9), max_size=2), st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=2),
)  # fmt: skip


@given(extra=st.lists(st.dictionaries(st.sampled_from(["x", "note", "box"]), VALUES), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_rows_of_json_come_back_as_they_were(tmp_path_factory, extra):
    root = tmp_path_factory.mktemp("json")
    rows = [{"path": f"{number}.png", "label": number % 2} | more for number, more in enumerate(extra)]
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    read_table(root / "a.jsonl").write(root / "b.jsonl", [0, 2, 1, 2], {"path": list("abcd")})
    found = [json.loads(line) for line in (root / "b.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert found == [rows[row] | {"path": name} for row, name in zip([0, 2, 1, 2], "abcd", strict=True)]


@given(
    cells=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8), min_size=3, max_size=3
    )
)
@settings(max_examples=60, deadline=None)
def test_cells_of_a_table_of_text_come_back_as_they_were(tmp_path_factory, cells):
    root = tmp_path_factory.mktemp("csv")
    with open(root / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [["path", "label", "note"], *([f"{n}.png", "0.10", cell] for n, cell in enumerate(cells))]
        )
    read_table(root / "a.csv").write(root / "b.csv", [2, 0, 1, 0], {"path": list("abcd")})
    with open(root / "b.csv", newline="", encoding="utf-8") as file:
        found = list(csv.reader(file))[1:]
    assert found == [[name, "0.10", cells[row]] for row, name in zip([2, 0, 1, 0], "abcd", strict=True)]


def test_columns_of_parquet_keep_their_types(pictures, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root, rows = pictures
    number = len(rows)
    table = pa.table(
        {
            "path": pa.array([path for path, _ in rows]).dictionary_encode(),
            "label": [name for _, name in rows],
            "large": pa.array([None, *range(2**53 + 1, 2**53 + number)], pa.int64()),
            "price": pa.array([1.1] * number, pa.float32()),
            "boxes": [[{"x": n}] for n in range(number)],
            "when": pa.array([10**18 + n for n in range(number)], pa.timestamp("ns", "UTC")),
        }
    ).replace_schema_metadata({"made": "by hand"})
    pq.write_table(table, root / "a.parquet")
    new = pq.read_table(exported(root / "a.parquet", tmp_path / "out"))
    assert new.drop(["path"]).slice(0, number).equals(table.drop(["path"]))
    assert new.schema.metadata == table.schema.metadata
    assert len(new) == 60


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("split", ["train", "test", "train"]),
        ("Split", ["Training", "PublicTest", "Training"]),
        ("subset", ["train", "", "train"]),
        ("whatever", ["train", "val", "train"]),
        ("is_test", ["0", "1", "0"]),
        ("is_training_image", ["True", "False", "True"]),
        ("is_valid", ["no", "yes", "no"]),
    ],
)
def test_rows_for_testing_do_not_grow(pictures, tmp_path, column, values):
    root, rows = pictures
    cells = [values[number % 3] for number in range(len(rows))]
    header = ["path", "label", column]
    (root / "parts.csv").write_text(csv_text(header, [(*row, cell) for row, cell in zip(rows, cells, strict=True)]))
    written = exported(root / "parts.csv", tmp_path / "out")
    training = {path for (path, _), cell in zip(rows, cells, strict=True) if cell == values[0]}
    grown = rows_of(tmp_path / "out", kind="generated", status="kept")
    assert grown
    assert {row["source"] for row in grown} <= training
    with open(written, newline="") as file:
        found = list(csv.DictReader(file))
    assert [row[column] for row in found[: len(rows)]] == cells
    assert {row[column] for row in found[len(rows) :]} == {values[0]}


UNCLEAR = {
    "no training": (["split"], [["test"], ["val"]], "names parts (test, val) and none for training"),
    "two that differ": (["split", "is_test"], [["train", "1"], ["test", "0"]], "say differently"),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_parts_that_are_not_clear_are_refused(tmp_path, kind):
    header, cells, words = UNCLEAR[kind]
    rows = [(f"{number}.png", number, *cell) for number, cell in enumerate(cells)]
    (tmp_path / "a.csv").write_text(csv_text(["path", "label", *header], rows))
    with pytest.raises(DataError) as caught:
        open_format("table", tmp_path / "a.csv")
    assert words in str(caught.value)


def test_a_column_that_says_one_thing_for_all_rows_says_nothing(tmp_path):
    for number, values in enumerate((["test", "test"], ["0", "1"], ["north", "south"])):
        rows = [(f"{row}.png", row, value) for row, value in enumerate(values)]
        (tmp_path / f"{number}.csv").write_text(csv_text(["path", "label", "split"], rows))
        assert {entry.part for entry in open_format("table", tmp_path / f"{number}.csv").entries()} == {"train"}


@pytest.mark.parametrize("label", ["x" * 300, "猫" * 100, "." * 100, "a/b" * 60])
def test_long_labels_and_names_make_names_that_fit(pictures, tmp_path, label):
    root, rows = pictures
    (root / "long.csv").write_text(
        csv_text(["path", "label"], [(path, label) for path, _ in rows[:3]]), encoding="utf-8"
    )
    written = exported(root / "long.csv", tmp_path / "out")
    with open(written, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            assert row["label"] == label
            assert (tmp_path / "out" / row["path"]).is_file()
            assert ".." not in Path(row["path"]).parts
