import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier

from gen_invariance.errors import DataError, ShapeError
from gen_invariance.order.analysis import predictors as pr


def cloud(samples=40, width=6, classes=3, gap=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % classes
    return rng.normal(size=(classes, width))[labels] * gap + rng.normal(size=(samples, width)), labels


def direct_evidence(features, target, alpha, beta):
    covariance = features @ features.T / alpha + np.eye(len(target)) / beta
    return stats.multivariate_normal(np.zeros(len(target)), covariance).logpdf(target) / len(target)


@pytest.mark.parametrize(("samples", "width"), [(60, 10), (30, 30), (20, 50)])
def test_log_evidence_equals_the_gaussian_marginal(samples, width):
    features, labels = cloud(samples, width)
    target = (labels == 1).astype(float)
    (found,) = pr.Spectrum(features, target[:, None]).log_evidence(0.7, 3.0)
    assert found == pytest.approx(direct_evidence(features, target, 0.7, 3.0), abs=1e-8)


@pytest.mark.parametrize(("samples", "width", "gap"), [(80, 8, 1.0), (40, 60, 0.3), (24, 90, 0.0)])
def test_logme_is_the_largest_direct_evidence(samples, width, gap):
    features, labels = cloud(samples, width, gap=gap, seed=3)
    best = []
    for label in range(3):
        target = (labels == label).astype(float)
        lowest = min(
            optimize.minimize(
                lambda x, target=target: -direct_evidence(features, target, *np.exp(x)),
                start,
                method="Nelder-Mead",
                bounds=[(-8, 12), (-8, 8)],
            ).fun
            for start in ([0.0, 0.0], [4.0, 1.0])
        )
        best.append(-lowest)
    assert pr.logme(pr.Labelled(features, labels)) == pytest.approx(np.mean(best), abs=0.02)


def test_logme_does_not_see_scale_and_is_nan_for_dead_features():
    features, labels = cloud(40, 60)
    whole = pr.logme(pr.Labelled(features, labels))
    assert pr.logme(pr.Labelled(features * 10, labels)) == pytest.approx(whole, abs=1e-3)
    assert np.isnan(pr.logme(pr.Labelled(features * 0, labels)))


@pytest.mark.parametrize("name", sorted(pr.FEATURE_SCORES))
def test_gaps_in_the_labels_and_order_of_samples_change_nothing(name):
    score = pr.FEATURE_SCORES[name]
    features, labels = cloud()
    whole = score(pr.Labelled(features, labels))
    assert score(pr.Labelled(features, np.array([2, 5, 7])[labels])) == pytest.approx(whole, rel=1e-6)
    order = np.random.default_rng(1).permutation(len(labels))
    assert score(pr.Labelled(features[order], labels[order])) == pytest.approx(whole, rel=1e-6)
    assert score(pr.Labelled(features, np.array([2, 0, 1])[labels])) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", sorted(pr.FEATURE_SCORES))
def test_better_separated_classes_score_higher(name):
    score = pr.FEATURE_SCORES[name]
    values = [score(pr.Labelled(*cloud(60, 6, gap=gap))) for gap in (0.2, 1.0, 4.0)]
    assert values[0] < values[1] <= values[2]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_ncm_leave_one_out_against_a_loop(seed):
    features, labels = cloud(18, 4, gap=0.7, seed=seed)
    right = 0
    for n in range(18):
        keep = np.arange(18) != n
        means = np.stack([features[keep & (labels == c)].mean(0) for c in range(3)])
        right += np.square(features[n] - means).sum(1).argmin() == labels[n]
    assert pr.ncm_leave_one_out(pr.Labelled(features, labels)) == pytest.approx(right / 18)


def test_knn_leave_one_out_against_scikit_learn():
    features, labels = cloud(45, 5, gap=0.6)
    right = 0
    for n in range(45):
        keep = np.arange(45) != n
        model = KNeighborsClassifier(20, weights=lambda d: np.exp(-d / 0.07), metric="cosine")
        right += model.fit(features[keep], labels[keep]).predict(features[n : n + 1])[0] == labels[n]
    assert pr.knn_leave_one_out(pr.Labelled(features, labels)) == pytest.approx(right / 45)


def test_leep_and_nce_against_loops_and_zero_mass():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 30)
    probabilities[:, 3] = 0
    probabilities /= probabilities.sum(1, keepdims=True)
    labels = np.arange(30) % 3
    joint = np.zeros((3, 4))
    for theta, y in zip(probabilities, labels, strict=True):
        joint[y] += theta / 30
    total = 0.0
    for theta, y in zip(probabilities, labels, strict=True):
        total += np.log(sum(joint[y, z] / joint[:, z].sum() * theta[z] for z in range(3)))
    assert pr.leep(pr.Labelled(probabilities, labels)) == pytest.approx(total / 30)
    hard = probabilities.argmax(1)
    entropy = 0.0
    for z in set(hard):
        inside = labels[hard == z]
        for y in set(inside):
            share = (inside == y).mean()
            entropy -= len(inside) / 30 * share * np.log(share)
    assert pr.nce(pr.Labelled(probabilities, labels)) == pytest.approx(-entropy)


def test_lda_agrees_with_scikit_learn_and_predicts_pair_accuracy():
    features, labels = cloud(3000, 4, gap=0.8)
    d = pr.lda_pair_scores(pr.Labelled(features, labels))
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features, labels)
    for p, (i, j) in enumerate(itertools.combinations(range(3), 2)):
        keep = (labels == i) | (labels == j)
        scores = model.decision_function(features[keep])
        right = np.where(scores[:, j] > scores[:, i], j, i) == labels[keep]
        assert d[p] == pytest.approx(right.mean(), abs=0.03)


def test_few_samples_in_many_dimensions_do_not_look_separated():
    rng = np.random.default_rng(0)
    scores = pr.lda_pair_scores(pr.Labelled(rng.normal(size=(60, 120)), np.arange(60) % 3))
    assert scores.max() < 0.75


def test_h_score_is_bounded_by_classes_and_cdnv_guards_equal_means():
    features, labels = cloud(30, 60, gap=5)
    assert 0 < pr.h_score(pr.Labelled(features, labels)) < 2
    doubled = np.concatenate([features[:10], features[:10]])
    value = pr.negative_cdnv(pr.Labelled(doubled, np.repeat([0, 1], 10)))
    assert np.isfinite(value)
    assert value < -1e6


def test_gbc_of_known_gaussians():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(0, 1, (20000, 1)), rng.normal(2, 1, (20000, 1))])
    assert pr.gbc(pr.Labelled(features, np.repeat([0, 1], 20000))) == pytest.approx(-2 * np.exp(-4 / 8), abs=0.02)


def test_bad_inputs_are_refused():
    features, labels = cloud()
    with pytest.raises(DataError, match="two classes"):
        pr.logme(pr.Labelled(features, labels * 0))
    with pytest.raises(DataError, match="NaN"):
        pr.lda(pr.Labelled(features * np.nan, labels))
    with pytest.raises(ShapeError):
        pr.gbc(pr.Labelled(features, labels[1:]))
    with pytest.raises(DataError, match="two samples"):
        pr.ncm_leave_one_out(pr.Labelled(features[:3], labels[:3]))


def test_before_training_scores():
    means = np.array([[0.0], [1.0], [5.0], [9.0]])
    scores = np.array([0.9, 0.8, 1.0, 0.6, 1.0, 1.0])  # pairs 01 02 03 12 13 23
    found = pr.before_training((0, 1), target=(0, 1, 2, 3), start_means=means, start_scores=scores, images=20)
    assert found["size"] == 2
    assert found["start_separability"] == pytest.approx(0.9)
    assert found["start_hard_pairs"] == pytest.approx(0.1 / 0.7)
    assert found["centroid_min"] == pytest.approx(-(4 + 8) / 2)
    assert found["centroid_mean"] == pytest.approx(-(5 + 4 + 9 + 8) / 4)
    assert (
        pr.before_training((0, 1), target=(0, 1), start_means=means, start_scores=scores, images=1)["centroid_min"] == 0
    )
    guess = pr.predicted_before((0, 2), start_scores=scores, num_classes=4)
    assert guess.tolist() == [0.9, 1.0, 1.0, 0.6, 1.0, 1.0]


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e9, 1e15])
@pytest.mark.parametrize("name", sorted(pr.FEATURE_SCORES))
def test_scores_do_not_depend_on_the_scale_of_features(name, scale):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [18, 4, 2])
    features = rng.normal(size=(24, 8)) + labels[:, None]
    expected = pr.FEATURE_SCORES[name](pr.Labelled(features, labels))
    assert pr.FEATURE_SCORES[name](pr.Labelled(features * scale, labels)) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0, 6e4])
def test_constant_features_are_no_good_score(value):
    """They tell classes apart as little as anything can; scores are compared with features that tell a little."""
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], [18, 4, 2])
    constant = pr.Labelled(np.full((24, 8), value), labels)
    telling = pr.Labelled(rng.normal(size=(24, 8)) + labels[:, None], labels)
    for name in ("h_score", "lda", "cdnv", "gbc"):
        assert pr.FEATURE_SCORES[name](constant) < pr.FEATURE_SCORES[name](telling)
