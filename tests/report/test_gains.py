"""Gains over generic augmentation as shares of the oracle's, against figures worked out by hand."""

import pytest

from gen_invariance.records import Record, as_frame
from gen_invariance.report.gains import Scale, gain_tables
from gen_invariance.report.report_page import write_report
from gen_invariance.report.tables import to_markdown

GENERIC, RAND = "ce_drs+trivialaugment@every_row", "ce_drs+randaugment@every_row"
REDRAW, MORE = "ce_drs+redraw+trivialaugment@every_row", "ce_drs+more_real+trivialaugment@every_row"
# By arm, a list of orders; the training seeds of an order count as one draw.
FEW = {
    "ce_drs": [[0.20], [0.30, 0.40]],
    RAND: [[0.30], [0.35, 0.45]],
    GENERIC: [[0.40], [0.45, 0.55]],
    "ce_drs+oracle": [[0.55], [0.75, 0.75]],
    REDRAW: [[0.50], [0.60, 0.70]],
    MORE: [[0.60], [0.70, 0.72]],
}


def frame(arms, *, benchmark="letters"):
    about = {"benchmark": benchmark, "config_digest": "0"}
    return as_frame(
        Record(**about, method=method, seed=seed, order=order, metric=metric, value=value)
        for method, orders in arms.items()
        for order, values in enumerate(orders)
        for seed, share in enumerate(values)
        for metric, value in (("balanced_accuracy", share), ("few_accuracy", share), ("few_ekld", 1 - share))
    )


def shown(table):
    """Cells by arm and column: the share, and the difference without its p."""
    places = {column: place for place, column in enumerate(table.columns)}
    rows = {row.name: row for row in table.rows}

    def cell(arm, metric="Few-shot accuracy"):
        share = rows[arm].cells[places[f"share, {metric}"]].text
        unit = " (nats)" if "eKLD" in metric else " (%)"
        return share, rows[arm].cells[places[metric + unit]].difference.split(",")[0]

    return cell


def test_shares_are_of_what_more_real_images_gain_over_the_strongest_generic_augmentation():
    """By order: TrivialAugment 40 and 50, redraw 50 and 65, more real images 60 and 71: 12.5 of 20.5 points."""
    (table,) = gain_tables(frame(FEW))
    assert table.benchmark == f"letters: share of the gain of {MORE} over {GENERIC}"
    assert {row.name: row.remark for row in table.rows if row.remark} == {GENERIC: "0 %", MORE: "100 %"}
    cell = shown(table)
    assert cell(REDRAW) == ("61 %", "+12.5 ± 31.8")  # Student's quantile for one degree of freedom is 12.706
    assert cell(MORE) == ("100 %", "+20.5 ± 6.4")
    assert cell("ce_drs") == ("−85 %", "−17.5 ± 31.8")
    assert cell(GENERIC) == ("–", "")
    assert cell(REDRAW, "Few-shot eKLD") == ("61 %", "−0.125 ± 0.318")  # lower is better
    assert table.remark.startswith("Fewer than five draws: not a headline.")


def test_the_oracle_under_the_same_augmentation_is_taken_first():
    same = "ce_drs+oracle+trivialaugment@every_row"
    (table,) = gain_tables(frame({**FEW, same: FEW[MORE]}))
    assert f"gain of {same} over" in table.benchmark
    (table,) = gain_tables(frame({**FEW, RAND: FEW[MORE]}))  # now the strongest, and no oracle was measured under it
    assert table.benchmark == f"letters: share of the gain of {MORE} over {RAND}"
    (table,) = gain_tables(frame({name: FEW[name] for name in (GENERIC, RAND, REDRAW, "ce_drs+oracle")}))
    assert table.benchmark == f"letters: share of the gain of ce_drs+oracle over {GENERIC}"


@pytest.mark.parametrize("oracle", [[[0.39], [0.6]], [[0.3], [0.4]]])
def test_there_is_no_share_of_a_gain_within_its_interval_nor_of_a_loss(oracle):
    (table,) = gain_tables(frame({GENERIC: [[0.4], [0.5]], REDRAW: [[0.5], [0.5]], "ce_drs+oracle": oracle}))
    assert shown(table)(REDRAW)[0] == shown(table)("ce_drs+oracle")[0] == "no room"
    one = frame({GENERIC: [[0.4]], REDRAW: [[0.5]], "ce_drs+oracle": [[0.9]]})
    assert shown(gain_tables(one)[0])(REDRAW) == ("n/a", "+10.0")


def test_without_generic_augmentation_of_every_row_the_first_arm_is_the_reference_and_the_heading_says_so():
    arms = {"ce_drs": [[0.2], [0.3]], "ce_drs+randaugment": [[0.3], [0.4]], "ce_drs+oracle": [[0.6], [0.71]]}
    (table,) = gain_tables(frame(arms), baseline="ce_drs")
    first = "over ce_drs, the first arm (none with generic augmentation of every row was measured)"
    assert table.benchmark == f"letters: share of the gain of ce_drs+oracle {first}"
    assert shown(table)("ce_drs+randaugment")[0] == "25 %"  # 10 of 40.5
    assert gain_tables(frame({"ce": [[0.2]], "ce_drs+redraw": [[0.5]], "ce_drs": [[0.3]]})) == []


def test_long_tail_methods_are_kept_apart_and_images_that_differ_are_no_pairs():
    ldam = {name.replace("ce_drs", "ldam"): values for name, values in FEW.items()}
    tables = gain_tables(frame({**FEW, **ldam}))
    assert [table.rows[0].name for table in tables] == ["ce_drs", "ldam"]
    found = frame(FEW)
    found["data_digest"] = ["other" if method == REDRAW and order else "same"
                            for method, order in zip(found["method"], found["order"], strict=True)]  # fmt: skip
    assert shown(gain_tables(found)[0])(REDRAW) == ("50 %", "+10.0")  # of order 0 alone: 10 of 20


def test_the_scale_can_be_named_and_the_page_shows_the_table(tmp_path):
    arms = {"DRS": FEW["ce_drs"], "DRS + true": FEW[MORE], "x": FEW[REDRAW]}
    made = frame(arms)
    tables = gain_tables(made, scale=Scale("DRS", "DRS + true", generic=False), metrics=("few_accuracy",))
    assert tables[0].columns == ("Draws", "Few-shot accuracy (%)", "share, Few-shot accuracy")
    page = write_report(made, tmp_path / "page", gains=tables)
    assert (tmp_path / "page" / "gains.md").read_text() == to_markdown(tables)
    assert '<section id="gains">' in page.read_text()
    assert '<section id="gains">' not in write_report(made, tmp_path / "other").read_text()
    assert not (tmp_path / "other" / "gains.md").exists()
