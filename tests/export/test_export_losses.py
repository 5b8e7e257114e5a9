"""Nothing of an image set may be lost or changed on its way through an export: siblings of what once was."""

import numpy as np
import pytest
from export_inputs import SETTINGS, as_npz, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance import Rotation
from gen_invariance.errors import DataError
from gen_invariance.export.formats.base import open_format, row_number
from gen_invariance.export.runner import export_dataset


@given(
    names=st.sets(
        st.sampled_from(["val_images", "val_labels", "test_labels", "test_images", "mean", "meta", "train_age"])
    ),
    column=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_no_array_of_an_npz_file_is_lost(tmp_path_factory, names, column):
    root = tmp_path_factory.mktemp("npz")
    old = dict(np.load(as_npz(root)))
    number = len(old["train_labels"])
    labels = old["train_labels"][:, None] if column else old["train_labels"]
    shown = old["train_images"].dtype.type, old["train_images"].shape[1:]
    more = {"mean": np.float32(3), "meta": np.array(["made", "by hand"]), "train_age": np.arange(number) / 7}
    for part in ("val", "test"):
        if {f"{part}_images", f"{part}_labels"} & names:
            names = names | {f"{part}_images", f"{part}_labels"}
            more |= {f"{part}_images": np.full((5, *shown[1]), 7, shown[0]), f"{part}_labels": np.arange(5) % 3}
    arrays = old | {name: more[name] for name in names} | {"train_labels": labels, "patient": np.arange(number)}
    np.savez(root / "set.npz", **arrays)
    summary = export_dataset(open_format("npz", root / "set.npz"), Rotation(30), root / "out", SETTINGS)
    new = dict(np.load(root / "out" / "set.npz"))
    assert new.keys() == arrays.keys()
    sources = [row_number(row["source"]) for row in rows_of(root / "out", kind="generated", status="kept")]
    assert len(new["train_images"]) == sum(summary.after)
    for name in arrays:
        grows = name in ("train_labels", "patient", "train_age")
        expected = np.concatenate([arrays[name], arrays[name][sources]]) if grows else arrays[name]
        if name != "train_images":
            assert np.array_equal(new[name], expected), name


def test_arrays_that_may_belong_to_two_parts_are_refused(tmp_path):
    old = dict(np.load(as_npz(tmp_path)))
    number = len(old["train_labels"])
    test = {"test_images": old["train_images"], "test_labels": old["train_labels"]}
    np.savez(tmp_path / "set.npz", **old, **test, patient=np.arange(number))
    with pytest.raises(DataError, match="call it train_patient or test_patient"):
        open_format("npz", tmp_path / "set.npz")
    np.savez(tmp_path / "set.npz", **old, other=np.array([object()]))
    with pytest.raises(DataError, match="other holds pickled objects"):
        open_format("npz", tmp_path / "set.npz")
