"""The figures that the pages on methods and transfer quote are those of the records."""

import re
from pathlib import Path

import pandas as pd
import pytest

import gen_invariance.torchvision_guard  # noqa: F401

DOCS = Path(__file__).parent.parent / "docs"


def test_the_plan_that_is_shown_is_the_plan(capsys):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (DOCS / "transfer.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    exec(blocks[0][1], {})
    assert capsys.readouterr().out == blocks[1][1]


def quoted(page, first):
    """The table of `page` whose header starts with `first`: its columns and rows of numbers."""
    lines = (DOCS / page).read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" *") for cell in line.strip("|").split("|")])
    return rows[0][1:], rows[2:]


@pytest.mark.parametrize(
    ("first", "benchmark"),
    [
        ("target images a class", "Letters, 16 classes to 10 others, {} images a class"),
        ("images a class", "CIFAR-10, ImageNet features, {} images a class"),
    ],
)
def test_quoted_transfer_figures(first, benchmark):
    frame = pd.read_csv(DOCS / "results" / "transfer" / "records.csv")
    frame = frame[frame["metric"] == "balanced_accuracy"]
    columns, rows = quoted("transfer.md", first)
    names = {"partial (1)": "partial", "nearest mean": "nearest_mean", "k nearest": "knn"}
    assert len(rows) == 3
    for size, *values in rows:
        for column, value in zip(columns, values, strict=True):
            chosen = (frame["benchmark"] == benchmark.format(size)) & (frame["method"] == names.get(column, column))
            found = frame[chosen]["value"]
            assert len(found) == 3
            assert float(value) == pytest.approx(100 * found.mean(), abs=0.051)


@pytest.mark.parametrize("folder", ["methods", "methods/all_letters"])
def test_the_method_tables_are_those_of_the_records(folder):
    page = (DOCS / "long-tail-methods.md").read_text()
    table = (DOCS / "results" / folder / "table.md").read_text().partition("## Without → with the stage\n\n")[2].strip()
    assert table
    assert table in page
    frame = pd.read_csv(DOCS / "results" / folder / "records.csv")
    means = frame[frame["metric"] == "balanced_accuracy"].groupby("method")["value"].agg(["mean", "count"])
    assert (means["count"] == 3).all()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) >= 7
    for name, shown, *_ in rows:
        plain, staged = (means.loc[name.replace("\\", "") + ending, "mean"] for ending in ("", " + stage"))
        assert shown == f"{100 * plain:.1f} → {100 * staged:.1f}"
