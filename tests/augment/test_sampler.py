import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("imblearn")

from imblearn.pipeline import make_pipeline
from imblearn.utils.estimator_checks import parametrize_with_checks
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from gen_invariance import Identity, Rotation
from gen_invariance.augment.sampler import NuisanceSampler
from gen_invariance.errors import RangeError, SettingsError, ShapeError


@pytest.fixture(scope="module")
def digits():
    data, target = load_digits(return_X_y=True)
    rows = np.concatenate([np.flatnonzero(target == label)[: 40 - 12 * label] for label in range(4)])
    return data[rows], target[rows]


@parametrize_with_checks([NuisanceSampler(random_state=0)])
def test_estimator_checks_of_imblearn(estimator, check):
    check(estimator)


def test_balanced_rows_that_are_moved_copies_of_their_own_class(digits):
    data, target = digits
    sampler = NuisanceSampler(Rotation(30), image_shape=(1, 8, 8), random_state=0)
    more, labels = sampler.fit_resample(data, target)
    assert np.bincount(labels).tolist() == [40] * 4
    assert np.array_equal(more[: len(data)], data)
    assert more.min() >= 0
    assert more.max() <= 16
    assert not any((row == data).all(1).any() for row in more[len(data) :])
    again, _ = clone(sampler).fit_resample(data, target)
    assert np.array_equal(again, more)


def test_the_identity_gives_back_rows_of_the_class(digits):
    data, target = digits
    more, labels = NuisanceSampler(Identity(), pixel_range=(0, 16), random_state=1).fit_resample(data, target)
    for row, label in zip(more[len(data) :], labels[len(data) :], strict=True):
        assert np.abs(data[target == label] - row).max(1).min() < 1e-5


def test_in_a_pipeline(digits):
    data, target = digits
    pipeline = make_pipeline(
        NuisanceSampler(Rotation(20), image_shape=(1, 8, 8), random_state=0), LogisticRegression(max_iter=500)
    )
    assert pipeline.fit(data, target).score(data, target) > 0.9


def test_rows_that_are_no_images_of_the_shape(digits):
    with pytest.raises(ShapeError, match="are no images"):
        NuisanceSampler(image_shape=(1, 8, 9)).fit_resample(*digits)


def test_rows_that_lie_channels_last():
    with pytest.raises(ShapeError, match="seems to lie channels last"):
        NuisanceSampler(image_shape=(16, 16, 1)).fit_resample(
            np.random.default_rng(0).random((12, 256)), [0] * 9 + [1] * 3
        )


class Dim:
    """Takes the same part off every value, so that hardly one stays whole."""

    def sample(self, shape, *, generator):
        return {}

    def apply(self, images, draw):
        return images * 0.737


@given(
    dtype=st.sampled_from(["bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "uint32", "float32"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_whole_numbers_are_rounded(dtype, seed):
    """The same in float64, rounded half to even and kept within the type."""
    kind = np.dtype(dtype)
    most = {"b": 2, "f": 256}.get(kind.kind) or min(int(np.iinfo(kind).max), 2**20)
    rows = np.random.default_rng(seed).integers(0, most, (12, 16), endpoint=kind.kind not in "bf").astype(kind)
    labels, pixel_range = np.array([0] * 9 + [1] * 3), (0, most)
    found, _ = NuisanceSampler(Dim(), pixel_range=pixel_range, random_state=seed).fit_resample(rows, labels)
    exact, _ = NuisanceSampler(Dim(), pixel_range=pixel_range, random_state=seed).fit_resample(
        rows.astype(np.float64), labels
    )
    assert found.dtype == kind
    wanted = exact[12:] if kind.kind == "f" else np.rint(exact[12:])
    assert np.abs(found[12:].astype(np.float64) - wanted).max() <= (1e-4 if kind.kind == "f" else 0)


@pytest.mark.parametrize(
    ("pixel_range", "kind"), [((0, 1), RangeError), ((5, 5), SettingsError), ((9, 2), SettingsError)]
)
def test_a_pixel_range_that_cannot_be(digits, pixel_range, kind):
    with pytest.raises(kind, match="pixel_range"):
        NuisanceSampler(pixel_range=pixel_range).fit_resample(*digits)
