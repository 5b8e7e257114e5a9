"""The figures that docs/benchmarks.md quotes are those of its records."""

import re
from pathlib import Path

import pandas as pd
import pytest

from gen_invariance.benchmark.records import Record, as_frame
from gen_invariance.benchmark.registry import benchmark_names
from gen_invariance.benchmark.size_effect import size_effects
from gen_invariance.benchmark.summary import summarise
from gen_invariance.cli_help import config_folder

DOCS = Path(__file__).parent.parent.parent / "docs"
LETTERS = DOCS / "results" / "benchmark" / "letters16"
ARMS = {
    "nothing (`ce_drs`)": "ce_drs",
    "RandAugment": "ce_drs+randaugment",
    "spatial": "ce_drs+spatial",
    "pose": "ce_drs+pose",
    "MUNIT, small": "ce_drs+munit_small",
    "the true nuisance (oracle)": "ce_drs+oracle",
}


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", text.replace("−", "-"))]


def rows_after(heading):
    lines = (DOCS / "benchmarks.md").read_text().partition(heading)[2].splitlines()[4:]
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def frame():
    """Totals and figures by class of the study."""
    totals = pd.read_csv(LETTERS / "records.csv")
    classes = pd.read_csv(LETTERS / "classes.csv")
    records = [
        Record(benchmark=row.benchmark, method=row.method, order=row.order, seed=0, metric=row.metric, value=row.value)
        for row in totals.itertuples()
    ]
    records += [
        Record(benchmark=row.benchmark, method=row.method, order=row.order, seed=0, metric="ekld", value=row.ekld,
               class_index=row.class_index, class_count=row.class_count)
        for row in classes.itertuples()
    ]  # fmt: skip
    return as_frame(records)


@pytest.mark.parametrize("name", ["rot", "bg", "dil"])
def test_the_study_of_letters(name, frame):
    benchmark = f"letters16_{name}_lt"
    part = frame[frame["benchmark"] == benchmark]
    summary = summarise(part[part["class_index"].isna()], baseline="ce_drs").set_index(["method", "metric"])
    effects = size_effects(part).set_index("method")
    rows = list(rows_after(f"(`{benchmark}`):"))
    assert len(rows) == 5
    for arm, *cells in rows:
        method = ARMS[arm]
        for metric, cell in zip(("balanced_accuracy", "few_accuracy", "mean_ekld"), cells[:3], strict=True):
            scale = 1 if metric == "mean_ekld" else 100
            names = ["mean", "half_width"] + ["difference", "difference_half_width"] * (method != "ce_drs")
            expected = [summary.loc[(method, metric), column] * scale for column in names]
            assert numbers(cell) == pytest.approx(expected, abs=0.0051 if scale == 1 else 0.051)
        found = effects.loc[method, ["spearman", "spearman_low", "spearman_high"]].tolist()
        assert numbers(cells[3])[0] == pytest.approx(found[0], abs=0.0051)
        assert numbers(cells[3])[1:] == pytest.approx(found[1:], abs=0.05)  # drawn from another stream


def test_the_study_of_transformed_classes():
    table = (DOCS / "results" / "benchmark" / "transformed" / "table.md").read_text()
    page = (DOCS / "benchmarks.md").read_text()
    assert all(block.strip() in page for block in table.split("\n\n"))
    classes = pd.read_csv(DOCS / "results" / "benchmark" / "transformed" / "classes.csv")
    others = classes[(classes["variant"] == "number004") & ~classes["met"]]
    mean = others.groupby("order")["ekld"].mean().mean()
    assert numbers(next(rows for rows in table.splitlines() if rows.startswith("| 4 of 10")))[4] == round(mean, 2)


def test_names_that_the_page_gives_are_there():
    names = benchmark_names(config_folder())
    page = (DOCS / "benchmarks.md").read_text()
    for name in (
        "imagenet_lt",
        "places_lt",
        "inaturalist2018",
        "tiny_imagenet_lt",
        "gtsrb_lt",
        "letters16_rot_lt",
        "folder",
    ):
        assert name in names
        assert f"`{name}`" in page
