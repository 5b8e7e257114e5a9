"""The study of the default for photographs: its table from lines, and the arms it names."""

import json

import pytest

from gen_invariance.cli.main import compose
from studies.photo_default import OURS, write_table


def test_the_table_is_paired_over_draws_that_both_arms_have(tmp_path):
    figures = {"plain_full": {0: 40.0, 1: 50.0, 2: 90.0}, "default": {0: 44.0, 1: 56.0}}
    lines = [
        {"arm": arm, "draw": draw, "balanced": value, "many": value, "few": value / 2, "seconds": 10}
        for arm, found in figures.items()
        for draw, value in found.items()
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = write_table(tmp_path)
    row = next(line for line in table.splitlines() if line.startswith("| default"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["2", "50.0 ± 76.2"]
    assert cells[5].startswith("+5.0 ± ")
    assert cells[6].startswith("+2.5 ± ")
    assert (tmp_path / "table.md").read_text() == table


@pytest.mark.parametrize("arm", OURS)
def test_every_arm_composes(arm):
    composed = compose("train", ["classifier=efficientnet_lite0", *OURS[arm], "data=folder", "data.path=photos"])
    assert composed["transfer"]["mode"] == "frozen"
