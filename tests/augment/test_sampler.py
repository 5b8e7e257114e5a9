import numpy as np
import pytest

pytest.importorskip("imblearn")

from imblearn.pipeline import make_pipeline
from imblearn.utils.estimator_checks import parametrize_with_checks
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from gen_invariance import Identity, Rotation
from gen_invariance.augment.sampler import NuisanceSampler
from gen_invariance.errors import ShapeError


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
