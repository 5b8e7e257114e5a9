"""The study of long-tail methods: its arms, and its table of each method without and with the stage."""

import numpy as np

from gen_invariance.records import Record, as_frame
from studies import methods as study


def letters(path):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = (rng.random((60, 14, 14)) * 99 + labels[:, None, None] * 60).astype(np.uint8)
    arrays = {f"{part}_{kind}": value for part in ("train", "test") for kind, value in
              (("images", images), ("labels", labels))}  # fmt: skip
    np.savez(path, class_names=np.array(["A", "B", "E"]), **arrays)
    return path


def test_arms_are_measured_without_and_with_the_stage(tmp_path, monkeypatch):
    monkeypatch.setitem(study.SETS, "ten", study.SETS["ten"] | {"largest": 20, "imbalance": 2, "many": 19})
    monkeypatch.setattr(study, "FIT", {"steps": 2, "batch_size": 8})
    benchmark = study.make_benchmark(letters(tmp_path / "letters.npz"), "ten", epochs=2, work=tmp_path)
    arms = study.make_arms(["ce", "ce_drs"], benchmark)
    assert [arm.name for arm in arms] == ["ce", "ce+spatial", "ce_drs", "ce_drs+spatial", "ce_drs+oracle"]
    assert [arm.fit is not None for arm in arms] == [False, True, False, True, False]
    assert {arm.method.augmentation for arm in arms} == {"crop_flip"}
    frame = study.measure(benchmark, ["ce_drs"], tmp_path / "work", seeds=1)
    assert list(dict.fromkeys(frame["method"])) == ["ce_drs", "ce_drs + stage", "ce_drs + true nuisance"]
    assert len(study.stage_table(frame).splitlines()) == 3


def test_the_table_shows_both_and_their_difference():
    values = {"lws": (0.25, 0.75), "lws + stage": (0.5, 1.0)}
    records = [
        Record(benchmark="b", method=method, seed=seed, metric="balanced_accuracy", value=value)
        for method, pair in values.items()
        for seed, value in enumerate(pair)
    ]
    seconds = [Record(benchmark="b", method=method, seed=0, metric="train_seconds", value=1) for method in values]
    lines = study.stage_table(as_frame([*records, *seconds])).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["lws"]
    assert [cell.strip() for cell in lines[2].split("|")[2:4]] == ["50.0 → 75.0", "+25.0 ± 0.0"]
