"""The program that prints shares of the oracle's gain, against figures worked out by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from gen_invariance.benchmark.records import Record, RecordWriter

PROGRAM = Path(__file__).parents[2] / "scripts" / "gains.py"
FEW = {  # by arm: orders 0 and 1; the second training seed of order 1 counts within the order
    "ce_drs": ([0.20], [0.30, 0.40]),
    "ce_drs+oracle": ([0.60], [0.75, 0.75]),
    "ce_drs+randaugment": ([0.40], [0.45, 0.55]),
    "ce_drs+redraw+randaugment": ([0.50], [0.60, 0.80]),
}


@pytest.fixture
def folder(tmp_path):
    about = {"benchmark": "letters", "config_digest": "0", "command": "c", "versions": {}, "commit": "0"}
    records = [
        Record(**about, method=method, seed=seed, order=order, metric=metric, value=value)
        for method, orders in FEW.items()
        for order, values in enumerate(orders)
        for seed, accuracy in enumerate(values)
        for metric, value in (("few_accuracy", accuracy), ("few_ekld", 1 - accuracy))
    ]
    RecordWriter(tmp_path / "records").write(records)
    return tmp_path


def run(*words):
    return subprocess.run([sys.executable, str(PROGRAM), *words], capture_output=True, text=True, check=False)


def test_shares_and_differences_are_of_means_over_orders(folder):
    lines = run(f"out={folder}").stdout.splitlines()
    rows = {line.split(" | ")[1]: [cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]}
    assert list(rows) == ["ce_drs", "ce_drs+randaugment", "ce_drs+oracle", "ce_drs+redraw+randaugment"]
    # By order: 20 and 35 to 60 and 75; RandAugment 40 and 50; redraw 50 and 70.
    assert rows["ce_drs"][:7] == ["letters", "ce_drs", "2", "27.5 ± 95.3", "–", "–", "–"]
    assert rows["ce_drs+oracle"][3:7] == ["67.5 ± 95.3", "+40.0 ± 0.0", "100 %", "–"]
    assert rows["ce_drs+randaugment"][4:7] == ["+17.5 ± 31.8", "44 %", "–"]
    assert rows["ce_drs+redraw+randaugment"][4:7] == ["+32.5 ± 31.8", "81 %", "+15.0 ± 63.5"]
    assert rows["ce_drs+redraw+randaugment"][8:] == ["−0.325 ± 0.318", "81 %", "−0.150 ± 0.635"]


def test_orders_can_be_chosen_and_unknown_words_are_refused(folder):
    assert "| letters | ce_drs | 1 | 20.0 ± " in run(f"out={folder}", "orders=0").stdout
    refused = run(f"out={folder}", "order=0")
    assert refused.returncode
    assert "unknown: order" in refused.stderr
