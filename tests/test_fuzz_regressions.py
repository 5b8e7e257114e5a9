"""What `scripts/fuzz.py` found, each as small as it gets: all of these once ended in a traceback, a hang or worse."""

import json
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from gen_invariance.augment.export import ExportSettings, export, open_form
from gen_invariance.benchmark.records import Record, RecordWriter, as_frame, finished_cells, load_records
from gen_invariance.nuisance import Rotation

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


def photos(root, names=("cat", "dog")):
    noise = np.random.default_rng(0)
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(4 - place):
            Image.fromarray(noise.integers(0, 256, (16, 16), np.uint8)).save(root / name / f"{number}.png")
    return root


# ---- names


def test_a_class_that_is_not_utf8_reaches_every_output_of_an_export(tmp_path):
    root = photos(tmp_path / "in", (NOT_UTF8, "dog"))
    (root / "dog" / f"{NOT_UTF8}.png").write_bytes((root / "dog" / "0.png").read_bytes())
    summary = export(
        open_form("folder", root), Rotation(30), tmp_path / "out", ExportSettings(target=6, off_distribution=None)
    )
    assert summary.after == (6, 6)
    rows = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert {row["class"] for row in rows} == {NOT_UTF8, "dog"}
    assert all((tmp_path / "out" / row["file"]).is_file() for row in rows)
    parquet = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert {row["class"] for row in parquet} == {"caf\\udce9", "dog"}
    assert "caf\\udce9" in (tmp_path / "out" / "preview.html").read_text(encoding="utf-8")


def test_records_of_a_class_that_is_not_utf8(tmp_path):
    record = Record(benchmark="b", method="m", seed=0, metric="accuracy", value=0.5, class_name=NOT_UTF8, class_index=0)
    assert as_frame([record])["class_name"].tolist() == ["caf\\udce9"]
    RecordWriter(tmp_path).write_cell([record])
    file = next(tmp_path.iterdir())
    file.write_text(file.read_text().replace("caf\\\\udce9", "caf\\udce9"))  # as another program may have written it
    assert "caf\\udce9" in load_records(tmp_path)["class_name"].tolist()


# ---- records


@pytest.mark.parametrize(
    "change",
    [
        {"class_count": " "}, {"class_index": 1.5}, {"seed": "x"}, {"seed": 10**30}, {"method": [1]}, {"group": {}},
        {"seconds": "long"}, {"written": "now"}, {"value": []}, {"versions": "1"}, {"metric": None}, {"order": "a"},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_of_the_wrong_kind_is_named_and_left_out(change, tmp_path):
    records = [Record(benchmark="b", method="m", seed=0, metric=name, value=0.5) for name in ("accuracy", "ekld")]
    RecordWriter(tmp_path).write_cell(records)
    file = next(tmp_path.iterdir())
    lines = file.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | change)
    file.write_text("\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match="line 1 is damaged"):
        frame = load_records(tmp_path)
    assert frame["metric"].tolist() == ["ekld", "finished"]
    assert finished_cells(frame) == set()
