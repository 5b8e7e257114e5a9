"""The figures that docs/benchmarks.md and README quote are those of the records beside them."""

import re
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.program import read_lines
from gen_invariance.benchmark.registry import benchmark_names
from gen_invariance.records import Record, as_frame
from gen_invariance.report.gains import gain_tables
from gen_invariance.report.size_effect import size_effect_table, size_effects
from gen_invariance.report.tables import to_markdown
from studies import simulated_tails, tables

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
RESULTS = DOCS / "results" / "benchmark"
PHOTOGRAPHS = DOCS / "results" / "photographs" / "tails"
README_ARMS = [
    "ce_drs", "ce_drs+identity", "ce_drs+randaugment@every_row", "ce_drs+trivialaugment@every_row", "ce_drs+redraw",
    "ce_drs+redraw+randaugment@every_row", "ce_drs+oracle",
]  # fmt: skip


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", text.replace("−", "-"))]


@pytest.mark.parametrize(("study", "rows"), [("letters16", 54), ("signs", 6)])
def test_the_tables_of_the_studies_are_worked_out_from_their_records(study, rows):
    frame = tables.from_csv(RESULTS / study / "records.csv")
    page = (DOCS / "benchmarks.md").read_text()
    lines = tables.short_table(frame).splitlines()
    assert len(lines) - 2 >= rows
    assert all(line in page for line in lines)
    assert to_markdown(gain_tables(frame, metrics=tables.METRICS)) == (RESULTS / study / "gains.md").read_text()
    assert frame.groupby(["benchmark", "method"])["order"].nunique().max() == 5


def test_the_table_of_the_first_page_is_that_of_the_study():
    lines = tables.side_by_side(tables.from_csv(RESULTS / "letters16" / "records.csv"), README_ARMS).splitlines()[2:]
    shown = (ROOT / "README.md").read_text()
    assert len(lines) == 6
    for line in lines:
        _, cells = line.strip("| ").split(" | ", 1)
        assert cells in shown, "the page says the set in words, and the same figures"


def photo_rows(path):
    real = {}
    for line in read_lines(path):
        real.setdefault(line["candidate"], {})[line["order"]] = line
    return simulated_tails.table_of(real, {}).splitlines()[2:]


@pytest.mark.parametrize("path", sorted(PHOTOGRAPHS.glob("real-*.jsonl")), ids=lambda path: path.stem)
def test_the_tables_of_photographs_are_worked_out_from_their_lines(path):
    page, rows = (DOCS / "photographs.md").read_text(), photo_rows(path)
    assert len(rows) >= 3
    assert all(row.rsplit("|", 2)[0] in page for row in rows)


def test_the_signs_of_the_first_page_are_those_of_the_study():
    readme = (ROOT / "README.md").read_text()
    for row in photo_rows(PHOTOGRAPHS / "real-gtsrb200_lt.jsonl"):
        name, draws, balanced, many, few, *_ = row.strip("| ").split(" | ")
        if draws == "5":
            ends = [f"{numbers(cell)[0]:.0f}" for cell in (many, few)]
            assert f"{balanced} ({ends[0]} / {ends[1]})" in readme, name


def test_the_finding_of_the_study():
    """Rank correlation and slope of class size and eKLD are those of the classes beside the page."""
    classes = pd.read_csv(RESULTS / "letters16" / "classes.csv")
    kept = (RESULTS / "letters16" / "class_size.md").read_text()
    page = (DOCS / "benchmarks.md").read_text()
    quoted = [line for line in kept.splitlines() if line in page and line.startswith("| letters16")]
    assert len(quoted) >= 12
    own = classes[classes["benchmark"] == "letters16_light_lt"]
    records = [
        Record(benchmark=row.benchmark, method=row.method, order=row.order, seed=0, metric="ekld", value=row.ekld,
               class_index=row.class_index, class_count=row.class_count)
        for row in own.itertuples()
    ]  # fmt: skip
    for line in size_effect_table(size_effects(as_frame(records))).splitlines()[2:]:
        name = " | ".join(line.split(" | ")[:2])
        known = next(row for row in kept.splitlines() if row.startswith(name + " |"))
        assert numbers(line) == pytest.approx(numbers(known), abs=0.02)  # eKLD is kept with five digits


def test_the_study_of_transformed_classes():
    table = (DOCS / "results" / "benchmark" / "transformed" / "table.md").read_text()
    page = (DOCS / "benchmarks.md").read_text()
    assert all(block.strip() in page for block in table.split("\n\n"))
    classes = pd.read_csv(DOCS / "results" / "benchmark" / "transformed" / "classes.csv")
    others = classes[(classes["variant"] == "number004") & ~classes["met"]]
    mean = others.groupby("order")["ekld"].mean().mean()
    assert numbers(next(rows for rows in table.splitlines() if rows.startswith("| 4 of 10")))[4] == round(mean, 2)


def test_names_that_the_page_gives_are_there():
    names = benchmark_names()
    page = (DOCS / "benchmarks.md").read_text()
    for name in (
        "imagenet_lt",
        "places_lt",
        "inaturalist2018",
        "tiny_imagenet_lt",
        "gtsrb_lt",
        "folder",
    ):
        assert name in names
        assert f"`{name}`" in page
