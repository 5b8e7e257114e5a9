from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats

from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.order import bootstrap as bs
from gen_invariance.order.separability import pack_hits, pair_scores
from gen_invariance.order.sets import class_pairs


def drawn_hits(seeds=6, count=3, classes=3, per_class=40, seed=0, right=0.85):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    hits = torch.rand(seeds, count, len(labels), classes, generator=generator) < right
    hits[:, :, torch.arange(len(labels)), labels] = False
    packed = np.stack([[pack_hits(h) for h in row] for row in hits])
    return hits, packed, labels


def test_scores_equal_those_of_each_seed_and_draws_a_slow_loop():
    hits, packed, labels = drawn_hits()
    result = bs.crossed_bootstrap(
        packed, labels.numpy(), num_classes=3, resamples=100, generator=torch.Generator().manual_seed(3)
    )
    for r in range(6):
        for a in range(3):
            assert np.allclose(result.scores[r, a], pair_scores(hits[r, a], labels, 3))
    # the same picks, class by class, in a loop
    generator = torch.Generator().manual_seed(3)
    seed_picks = torch.randint(6, (100, 6), generator=generator)
    row_picks = [torch.randint(40, (100, 40), generator=generator) for _ in range(3)]
    for b in (0, 57):
        chosen = hits[seed_picks[b]].double()
        right = [chosen[:, :, 40 * c + row_picks[c][b]].mean(dim=(0, 2)) for c in range(3)]
        for p, (i, j) in enumerate(class_pairs(3).tolist()):
            expected = (right[i][:, j] + right[j][:, i]) / 2
            assert np.allclose(result.draws[b, :, p], expected.numpy(), atol=1e-5)


def test_blocks_do_not_change_the_result(monkeypatch):
    _, packed, labels = drawn_hits(count=5)
    run = lambda: bs.crossed_bootstrap(  # noqa: E731
        packed, labels.numpy(), num_classes=3, resamples=100, generator=torch.Generator().manual_seed(1)
    )
    whole = run()
    monkeypatch.setattr(bs, "_BLOCK_BYTES", 1)
    parts = run()
    assert np.allclose(whole.draws, parts.draws, atol=1e-6)
    assert np.allclose(whole.largest, parts.largest, atol=1e-3)


def test_moderated_variance_pools_equal_cells_and_leaves_unequal_ones():
    rng = np.random.default_rng(0)
    equal = rng.normal(0.8, 0.02, (5, 20, 20))
    variance, freedom = bs.moderated_variance(equal)
    assert np.allclose(variance, 0.02**2, rtol=0.25)
    assert freedom.min() > 30
    spread = np.where(np.arange(400).reshape(20, 20) % 2, 0.002, 0.05)
    unequal = 0.8 + rng.normal(0, 1, (5, 20, 20)) * spread
    variance, freedom = bs.moderated_variance(unequal)
    assert freedom.max() < 15
    assert variance[spread > 0.01].mean() > 2 * variance[spread < 0.01].mean()


def test_bounds_of_many_seeds_equal_a_plain_t_interval_when_nothing_is_pooled():
    scores = np.random.default_rng(0).normal(0.8, 0.03, (12, 1, 2))  # two cells: too few to share information
    bounds = bs.cell_bounds(bs.Resamples(scores), simultaneous="none", alpha=0.1)
    error = np.sqrt(np.maximum(scores.var(0, ddof=1), scores.var(0, ddof=1).mean()) / 12)
    assert np.allclose(bounds.upper - bounds.estimate, stats.t.isf(0.05, 11) * error)


def test_simultaneous_coverage_with_hits():
    """Every bound of a table at once, over repeated experiments with seeds and a shared test set."""
    wrong = 0
    for trial in range(60):
        rng = np.random.default_rng(trial)
        truth, labels = 0.85, np.arange(3).repeat(60)
        seed_effect = rng.normal(0, 0.03, (5, 4, 1, 1))
        hits = rng.random((5, 4, 180, 3)) < truth + seed_effect
        hits[:, :, np.arange(180), labels] = False
        packed = np.packbits(hits, axis=-1)
        drawn = bs.crossed_bootstrap(
            packed, labels, num_classes=3, resamples=300, generator=torch.Generator().manual_seed(trial)
        )
        bounds = bs.cell_bounds(drawn, simultaneous="bootstrap")
        wrong += bool(((bounds.lower > truth) | (bounds.upper < truth)).any())
    assert wrong <= 7  # binomial(60, 0.05) stays at or below 7 with probability 0.99


def test_bootstrap_level_is_never_stricter_than_bonferroni_and_none_is_widest():
    _, packed, labels = drawn_hits()
    drawn = bs.crossed_bootstrap(packed, labels.numpy(), num_classes=3, resamples=200, generator=torch.Generator())
    widths = {
        kind: (lambda b: b.upper - b.lower)(bs.cell_bounds(drawn, simultaneous=kind))
        for kind in get_args(bs.Simultaneous)
    }
    assert (widths["none"] <= widths["bootstrap"] + 1e-12).all()
    assert (widths["bootstrap"] <= widths["bonferroni"] + 1e-12).all()


def test_perfect_cells_and_one_seed_still_have_width():
    labels = torch.arange(2).repeat_interleave(30)
    hits = torch.ones(1, 1, 60, 2, dtype=torch.bool)
    packed = np.stack([[pack_hits(h) for h in row] for row in hits])
    drawn = bs.crossed_bootstrap(packed, labels.numpy(), num_classes=2, resamples=100, generator=torch.Generator())
    bounds = bs.cell_bounds(drawn)
    assert bounds.seeds == 1
    assert bounds.estimate.item() == 1
    assert 0.9 < bounds.lower.item() < 0.99


def test_bad_settings_are_refused():
    scores = np.full((3, 1, 1), 0.9)
    with pytest.raises(SettingsError, match="needs resampled hits"):
        bs.cell_bounds(bs.Resamples(scores), simultaneous="bootstrap")
    _, packed, labels = drawn_hits()
    with pytest.raises(ShapeError):
        bs.crossed_bootstrap(packed, labels.numpy()[1:], num_classes=3, generator=torch.Generator())
