"""The study of transfer modes on few images: every mode is measured, learns, and is told apart from the baselines."""

import numpy as np
import pytest
import torch

from gen_invariance.data.readers.registry import load_source
from studies.transfer_modes import SCRATCH, UNTOUCHED, TransferComparison, effects, run_transfer


@pytest.mark.slow
def test_transfer_modes_on_digits(tmp_path):
    data = load_source("digits", None, image_size=None).train
    half = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).chunk(2)
    comparison = TransferComparison(
        "digits",
        source_classes=6,
        source_images=40,
        target_images=(5,),
        test_images=20,
        source_epochs=6,
        steps=30,
        seeds=2,
    )
    frame = run_transfer(comparison, data.subset(half[0]), data.subset(half[1]), tmp_path)
    totals = frame[frame["metric"] == "balanced_accuracy"]
    assert set(totals["method"]) == {SCRATCH, UNTOUCHED, "frozen", "partial", "full", "joint", "auto"}
    assert totals.groupby("method")["value"].mean().drop(SCRATCH).min() > 0.4  # four classes: 0.25 by chance
    by_class = frame[(frame["metric"] == "accuracy") & (frame["method"] == "full")]
    for seed, part in by_class.groupby("seed"):
        whole = totals[(totals["method"] == "full") & (totals["seed"] == seed)]["value"].item()
        assert np.mean(part["value"]) == pytest.approx(whole)
    table = effects(frame, [SCRATCH, UNTOUCHED])
    assert set(table["against"]) == {SCRATCH, UNTOUCHED, "better of both"}
    assert (table[["helps", "harms", "undecided"]].sum(axis=1) == 4).all()
    said = []
    again = run_transfer(comparison, data.subset(half[0]), data.subset(half[1]), tmp_path, say=said.append)
    assert (said, len(again)) == ([], len(frame))
