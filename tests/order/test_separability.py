import itertools

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from gen_invariance.errors import RangeError, SettingsError, ShapeError
from gen_invariance.order import separability as sep
from gen_invariance.order.sets import class_pairs


def cloud(classes=4, train=12, test=15, width=5, gap=1.2, seed=0, **extra):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, width, generator=generator) * gap
    parts = []
    for count in (train, test):
        labels = torch.arange(classes).repeat_interleave(count)
        parts += [means[labels] + torch.randn(len(labels), width, generator=generator), labels]
    return sep.Features(*parts, num_classes=classes, **extra)


def test_ncm_pairs_equal_scikit_learn_pair_by_pair():
    data = cloud()
    hits = sep.pair_hits(data, "ncm")
    scores = sep.pair_scores(hits, data.test_labels, 4)
    for column, (i, j) in enumerate(class_pairs(4).tolist()):
        keep, seen = (
            torch.isin(data.train_labels, torch.tensor([i, j])),
            torch.isin(data.test_labels, torch.tensor([i, j])),
        )
        model = NearestCentroid().fit(data.train[keep].numpy(), data.train_labels[keep].numpy())
        right = model.predict(data.test[seen].numpy()) == data.test_labels[seen].numpy()
        truth = data.test_labels[seen].numpy()
        assert scores[column] == pytest.approx((right[truth == i].mean() + right[truth == j].mean()) / 2)


def slow_knn(data, classes):
    keep = [n for n, label in enumerate(data.train_labels.tolist()) if label in classes]
    predicted = {}
    for x, label in enumerate(data.test_labels.tolist()):
        if label not in classes:
            continue
        similar = torch.nn.functional.cosine_similarity(data.train[keep], data.test[x][None])
        top = similar.argsort(descending=True)[: min(20, len(data.train) - 1)]
        votes = dict.fromkeys(classes, 0.0)
        for n in top.tolist():
            votes[int(data.train_labels[keep[n]])] += float(torch.exp((similar[n] - 1) / 0.07))
        predicted[x] = max(votes, key=votes.get)
    return predicted


def test_knn_pairs_equal_a_slow_loop():
    data = cloud(classes=3, train=14, test=6, gap=0.6)
    hits = sep.pair_hits(data, "knn")
    for i, j in itertools.combinations(range(3), 2):
        for x, guess in slow_knn(data, (i, j)).items():
            label = int(data.test_labels[x])
            assert bool(hits[x, j if label == i else i]) == (guess == label)


@pytest.mark.parametrize("head", ["ncm", "knn", "logistic"])
def test_target_accuracy_of_a_pair_is_its_separability(head):
    data = cloud(classes=4, train=14, gap=0.7)
    scores = sep.pair_scores(sep.pair_hits(data, head), data.test_labels, 4)
    for column, pair in enumerate(class_pairs(4).tolist()):
        assert sep.target_accuracy(data, tuple(pair), head) == pytest.approx(scores[column], abs=1e-9)


def test_logistic_separates_what_a_mean_cannot_and_maps_labels_back():
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([2, 5]).repeat_interleave(60)
    wide = torch.randn(120, 2, generator=generator) * torch.tensor([30.0, 0.3])
    wide[:, 1] += (labels == 5) * 3.0
    filler = torch.arange(6)
    data = sep.Features(torch.cat([wide, torch.zeros(6, 2)]), torch.cat([labels, filler]), wide, labels, num_classes=6)
    predicted, rows = sep.logistic_predictions(data, (2, 5))
    assert set(predicted.tolist()) <= {2, 5}
    assert (predicted == labels[rows]).float().mean() > 0.97


def test_own_cut_reads_its_sides_from_train_samples():
    # the source puts class 0 and half of class 2 on side 0, class 1 on side 1
    train_labels = torch.arange(3).repeat_interleave(4)
    side = torch.tensor([0.0] * 4 + [1.0] * 4 + [0, 0, 1, 1])
    data = sep.Features(
        torch.randn(12, 2), train_labels, torch.randn(12, 2), train_labels, 3, train_side=side, test_side=side
    )
    scores = sep.pair_scores(sep.pair_hits(data, "own"), train_labels, 3)
    assert scores.tolist() == [1.0, 0.75, 0.75]
    with pytest.raises(SettingsError, match="own two-class decision"):
        sep.pair_hits(cloud(), "own")


def test_equal_features_are_a_diverged_run_and_never_a_hit():
    data = cloud()
    flat = sep.Features(data.train * 0 + 3, data.train_labels, data.test * 0 + 3, data.test_labels, 4)
    assert not flat.usable
    assert not sep.pair_hits(flat, "ncm").any()
    broken = sep.Features(data.train * float("nan"), data.train_labels, data.test, data.test_labels, 4)
    assert not broken.usable
    assert data.usable


def test_renaming_classes_renames_pairs():
    data = cloud()
    new = torch.tensor([2, 0, 3, 1])
    moved = sep.Features(data.train, new[data.train_labels], data.test, new[data.test_labels], 4)
    before = sep.pair_scores(sep.pair_hits(data), data.test_labels, 4)
    after = sep.pair_scores(sep.pair_hits(moved), moved.test_labels, 4)
    place = {tuple(p): n for n, p in enumerate(class_pairs(4).tolist())}
    for n, (i, j) in enumerate(class_pairs(4).tolist()):
        assert after[place[tuple(sorted((int(new[i]), int(new[j]))))]] == pytest.approx(before[n])


def test_packing_round_trip_and_missing_test_class():
    hits = torch.rand(7, 11, generator=torch.Generator().manual_seed(0)) > 0.5
    assert np.array_equal(sep.unpack_hits(sep.pack_hits(hits), 11), hits.numpy())
    scores = sep.pair_scores(hits[:, :3], torch.tensor([0, 0, 1, 1, 0, 1, 0]), 3)
    assert np.isfinite(scores).tolist() == [True, False, False]


def test_bad_features_are_refused():
    data = cloud()
    with pytest.raises(ShapeError, match="train features"):
        sep.Features(data.train[:-1], data.train_labels, data.test, data.test_labels, 4)
    with pytest.raises(RangeError, match="renumber"):
        sep.Features(data.train, data.train_labels, data.test, data.test_labels, 3)
    with pytest.raises(RangeError, match="class 4 has no train sample"):
        sep.Features(data.train, data.train_labels, data.test, data.test_labels, 5)


def test_the_strength_of_a_logistic_head_is_chosen_on_groups_it_has_not_seen(monkeypatch):
    groups = torch.arange(72) // 4
    data = cloud(classes=3, train=24, gap=0.7, train_groups=groups)
    rows_of = {tuple(row): group for row, group in zip(data.train.tolist(), groups.tolist(), strict=True)}
    seen = []
    fit, ask = sep.fit_logistic, sep.predict

    def fit_spy(inputs, labels, **options):
        seen.append(inputs)
        return fit(inputs, labels, **options)

    def predict_spy(head, inputs):
        seen.append(inputs)
        return ask(head, inputs)

    monkeypatch.setattr(sep, "fit_logistic", fit_spy)
    monkeypatch.setattr(sep, "predict", predict_spy)
    sep.logistic_predictions(data, (0, 1))
    kept, held_out = ({rows_of[tuple(row)] for row in inputs.tolist()} for inputs in seen[:2])
    assert not kept & held_out
    assert len(held_out) == 2  # one group of each class
