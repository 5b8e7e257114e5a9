"""The figures that docs/benchmarks.md quotes are those of its records."""

import itertools
import re
from pathlib import Path

import pandas as pd
import pytest

from gen_invariance.benchmark.records import Record, as_frame
from gen_invariance.benchmark.registry import benchmark_names
from gen_invariance.benchmark.size_effect import size_effects
from gen_invariance.cli_help import config_folder
from gen_invariance.measure.statistics import mean_interval

DOCS = Path(__file__).parent.parent.parent / "docs"
LETTERS = DOCS / "results" / "benchmark" / "letters16"
NUISANCES = {
    "rotation": "rot",
    "rotation within 45°": "rot45",
    "background": "bg",
    "thickness": "dil",
    "lighting": "light",
    "all at once": "mix",
}
ARMS = {
    "nothing": "ce_drs",
    "RandAugment": "ce_drs+randaugment",
    "true nuisance": "ce_drs+oracle",
    "true nuisance, RandAugment": "ce_drs+oracle+randaugment",
    "MUNIT, small": "ce_drs+munit_small",
    "spatial": "ce_drs+spatial",
    "redraw": "ce_drs+redraw",
    "redraw, RandAugment": "ce_drs+redraw+randaugment",
}


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", text.replace("−", "-"))]


def rows_after(start, page="benchmarks.md"):
    """Cells of the first table behind the text `start`."""
    lines = (DOCS / page).read_text().partition(start)[2].splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("|")) + 2
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[first:]):
        yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def expected():
    """The cells of the study's tables, worked out from the records beside the page, by benchmark and method."""
    totals = pd.read_csv(LETTERS / "records.csv")
    found = {}
    for benchmark, own in totals.groupby("benchmark"):
        values = own.pivot_table(index="order", columns=["metric", "method"], values="value", aggfunc="mean")
        for method in own["method"].unique():
            cells = [_study_cells(values[metric], method, metric) for metric in ("few_accuracy", "few_ekld")]
            repeats = int(values["few_accuracy", method].notna().sum())
            found[benchmark, method] = [str(repeats), *itertools.chain.from_iterable(cells)]
    return found


def _study_cells(values, method, metric):
    """Mean, difference to plain training, share of what the oracle gains over it, difference to RandAugment."""
    scale, digits = (100, 1) if metric == "few_accuracy" else (1, 3)
    values = scale * values.dropna(subset=[method, "ce_drs", "ce_drs+oracle"])

    def shown(numbers, sign=""):
        interval = mean_interval(numbers.dropna().to_numpy())
        return f"{interval.mean:{sign}.{digits}f} ± {interval.half_width:.{digits}f}".replace("-", "−")

    own, whole = values[method] - values["ce_drs"], values["ce_drs+oracle"] - values["ce_drs"]
    plain, generic = method == "ce_drs", "ce_drs+randaugment"
    after = method != generic and method.endswith("+randaugment")
    over = shown(values[method] - values[generic], "+") if after else "–"
    share = "–" if plain else f"{100 * own.mean() / whole.mean():.0f} %"
    return shown(values[method]), "–" if plain else shown(own, "+"), share, over


@pytest.mark.parametrize(
    ("start", "tail", "count"),
    [("Shares are of the oracle's gain", "lt", 54), ("The long tail in draws only", "theta_lt", 12)],
)
def test_the_study_of_letters(start, tail, count, expected):
    rows = list(rows_after(start))
    assert len(rows) == count
    for nuisance, given, *cells in rows:
        arm = (
            ARMS.get(given) or f"ce_drs+flow{'_stroke' * (nuisance == 'thickness')}{'+randaugment' * ('Rand' in given)}"
        )
        found = expected[f"letters16_{NUISANCES[nuisance]}_{tail}", arm]
        shown = [found[0], found[1], *found[3:6], *found[7:]]  # the page leaves out differences to the baseline
        assert [numbers(cell) for cell in cells] == [numbers(cell) for cell in shown], (nuisance, given)


def test_the_tables_of_other_pages_are_those_of_the_study(expected):
    names = {"rotation, any angle": "rot", "stroke width": "dil", "all of them at once": "mix", **NUISANCES}
    arms = ("ce_drs", "ce_drs+randaugment", "ce_drs+redraw", "ce_drs+redraw+randaugment", "ce_drs+oracle")
    rows = list(rows_after("Several nuisances, limited or not", page="../README.md"))
    assert len(rows) == 6
    for nuisance, *cells in rows:
        assert cells == [expected[f"letters16_{names[nuisance]}_lt", arm][1] for arm in arms]


def test_the_finding_of_the_study():
    """Rank correlation and slope of class size and eKLD are those of the classes beside the page."""
    classes = pd.read_csv(LETTERS / "classes.csv")
    records = [
        Record(benchmark=row.benchmark, method=row.method, order=row.order, seed=0, metric="ekld", value=row.ekld,
               class_index=row.class_index, class_count=row.class_count)
        for row in classes.itertuples()
    ]  # fmt: skip
    effects = size_effects(as_frame(records)).set_index(["benchmark", "method"])
    rows = list(rows_after("**The finding of Zhou et al."))
    assert len(rows) == 6
    for nuisance, spearman, *slopes in rows:
        benchmark = f"letters16_{NUISANCES[nuisance]}_lt"
        shown = [(spearman, "ce_drs", "spearman")]
        arms = ("ce_drs", "ce_drs+randaugment", "ce_drs+redraw", "ce_drs+oracle")
        shown += [(cell, arm, "slope") for cell, arm in zip(slopes, arms, strict=True)]
        for cell, arm, figure in shown:
            found = effects.loc[(benchmark, arm), [figure, f"{figure}_low", f"{figure}_high"]].tolist()
            assert numbers(cell)[0] == pytest.approx(found[0], abs=0.0051)
            assert numbers(cell)[1:] == pytest.approx(found[1:], abs=0.05)  # drawn from another stream


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
        "folder",
    ):
        assert name in names
        assert f"`{name}`" in page
