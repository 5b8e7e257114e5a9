import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance.errors import ShapeError
from gen_invariance.order.analysis import scoring
from gen_invariance.order.preorder import Preorder
from gen_invariance.order.relation import inclusion


def order_of(separated):
    separated = np.asarray(separated, dtype=bool)
    return Preorder(inclusion(separated, separated), height=separated.sum(1))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 7), st.integers(0, 9999))
def test_concordance_of_linear_extensions_is_one_and_of_reversed_ones_zero(count, seed):
    rng = np.random.default_rng(seed)
    order = order_of(rng.random((count, 4)) < 0.5)
    place = np.argsort(order.linear_extension()).astype(float)
    pairs = np.argwhere(order.strict)
    if not len(pairs):
        assert np.isnan(scoring.concordance(place, order))
        return
    assert scoring.concordance(place, order) == 1
    assert scoring.concordance(-place, order) == 0
    assert scoring.concordance(place * 0, order) == 0.5
    noisy = rng.integers(0, 3, count).astype(float)
    expected = np.mean([(noisy[b] > noisy[a]) + 0.5 * (noisy[a] == noisy[b]) for a, b in pairs])
    assert scoring.concordance(noisy, order) == pytest.approx(expected)


def test_size_alone_gets_no_credit_within_size():
    rng = np.random.default_rng(0)
    sizes = np.repeat([2, 4, 6], 6)
    truth = sizes / 10 + rng.normal(0, 0.01, (3, 18))
    size = np.broadcast_to(sizes, (3, 18)).astype(float)
    options = {"sizes": sizes, "relation": order_of(np.eye(18)), "generator": torch.Generator(), "resamples": 50}
    by_size = scoring.score_predictor(size, truth, **options)
    assert by_size["tau"] > 0.75
    assert np.isnan(by_size["tau_within_size"])
    perfect = scoring.score_predictor(truth, truth, **options)
    assert perfect["tau"] == pytest.approx(1)
    assert perfect["tau_within_size"] == pytest.approx(1)
    assert (perfect["regret@1"], perfect["regret@3"]) == (0, 0)
    assert perfect["tau_low"] > 0.8
    worst = scoring.score_predictor(-truth, truth, **options)
    best, low = truth.mean(0).max(), truth.mean(0).min()
    assert worst["regret@1"] == pytest.approx(best - low)
    assert worst["normalised_regret@1"] == pytest.approx((best - low) / (best - np.median(truth.mean(0))))
    constant = scoring.score_predictor(truth * 0, truth, **options)
    assert np.isnan(constant["tau"])


def test_bootstrap_taus_equal_scipy_draw_by_draw():
    rng = np.random.default_rng(0)
    predicted, truth = rng.integers(0, 5, (3, 9)).astype(float), rng.normal(size=(3, 9))
    sizes = np.repeat([2, 3, 4], 3)
    taus, withins = scoring._bootstrap(
        predicted, truth, sizes, generator=torch.Generator().manual_seed(2), resamples=30
    )
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(3, (30, 3, 1), generator=generator).numpy()[:, :, 0]
    columns = torch.randint(9, (30, 1, 9), generator=generator).numpy()[:, 0]
    for b in range(30):
        guess, real = (t[rows[b]][:, columns[b]].mean(0) for t in (predicted, truth))
        assert taus[b] == pytest.approx(scoring.kendall(guess, real))
        within = scoring.mean_within(scoring.kendall, guess, real, sizes[columns[b]])
        assert withins[b] == pytest.approx(within, nan_ok=True)


def test_missing_values_are_left_out():
    truth = np.array([[0.1, 0.2, 0.3, 0.4]])
    predicted = np.array([[1.0, np.nan, 2.0, 3.0]])
    found = scoring.score_predictor(
        predicted, truth, sizes=np.full(4, 2), relation=order_of(np.tri(4)), generator=torch.Generator(), resamples=20
    )
    assert found["tau"] == found["concordance"] == 1
    assert found["regret@1"] == 0
    with pytest.raises(ShapeError):
        scoring.score_predictor(
            predicted[:, 1:], truth, sizes=np.full(4, 2), relation=order_of(np.eye(4)), generator=torch.Generator()
        )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(0, 9999))
def test_edge_scores_against_sets(count, seed):
    rng = np.random.default_rng(seed)
    one, two = order_of(rng.random((count, 3)) < 0.5), order_of(rng.random((count, 3)) < 0.5)
    a, b = (set(map(tuple, np.argwhere(o.strict).tolist())) for o in (one, two))
    found = scoring.compare_edges(one, two)
    assert found.hamming == len(a ^ b)
    assert found.f1 == pytest.approx(1.0 if not a and not b else 2 * len(a & b) / (len(a) + len(b)))
    if a and b:
        assert found.precision == pytest.approx(len(a & b) / len(a))
        assert found.recall == pytest.approx(len(a & b) / len(b))
    covers = [
        {(x, y) for x, y in edges if not any((x, z) in edges and (z, y) in edges for z in range(count))}
        for edges in (a, b)
    ]
    shared = len(covers[0] & covers[1])
    assert found.cover_f1 == pytest.approx(1.0 if not any(covers) else 2 * shared / (len(covers[0]) + len(covers[1])))
    same = scoring.compare_edges(one, one)
    assert (same.f1, same.cover_f1, same.hamming) == (1, 1, 0)


def test_within_size_is_weighted_by_pairs():
    truth = np.array([1.0, 2, 3, 1, 2])
    predicted = np.array([1.0, 2, 3, 2, 1])
    within = scoring.mean_within(scoring.kendall, predicted, truth, np.array([2, 2, 2, 3, 3]))
    assert within == pytest.approx((3 * 1 + 1 * -1) / 4)
    assert np.isnan(scoring.kendall(truth[:1], truth[:1]))
