"""Heads for few samples against scikit-learn and loops; episodes; gappy labels."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler

from gen_invariance.classifier.heads import (
    HEADS,
    few_shot,
    fit_head,
    measure_similarity,
    neighbour_votes,
    predict,
)
from gen_invariance.errors import DataError, RangeError, SettingsError, ShapeError
from gen_invariance.run import named_generator

GAPPY = torch.tensor([2, 5, 7, 40])


def blobs(per_class=(12, 9, 7, 20), spread=1.2, width=6, seed=0):
    generator = named_generator(seed, "blobs")
    numbers = torch.repeat_interleave(torch.arange(len(per_class)), torch.tensor(per_class))
    centres = 2 * torch.randn(len(per_class), width, generator=named_generator(7, "centres"))
    features = centres[numbers] + spread * torch.randn(len(numbers), width, generator=generator)
    order = torch.randperm(len(numbers), generator=generator)
    return features[order], numbers[order]


def test_nearest_mean_is_scikit_learns():
    features, labels = blobs()
    queries, _ = blobs(seed=1)
    oracle = NearestCentroid().fit(features.numpy(), labels.numpy()).predict(queries.numpy())
    assert predict(fit_head("nearest_mean", features, labels), queries).tolist() == oracle.tolist()


def test_cosine_is_a_loop_over_classes():
    features, labels = blobs()
    queries, _ = blobs(seed=1)
    head = fit_head("cosine", features, labels)
    for column in range(4):
        mean = torch.stack([f / f.norm() for f in features[labels == column]]).mean(0)
        expected = torch.stack([torch.dot(q / q.norm(), mean / mean.norm()) for q in queries])
        torch.testing.assert_close(head.scores(queries)[:, column], expected)
    torch.testing.assert_close(head.scores(3 * queries), head.scores(queries))


@pytest.mark.parametrize("temperature", [0.1, 0.001])
def test_knn_is_scikit_learns_with_the_same_votes(temperature):
    features, labels = blobs()
    queries, _ = blobs(seed=1)
    oracle = KNeighborsClassifier(
        5, metric="cosine", algorithm="brute", weights=lambda d: torch.exp((1 - torch.from_numpy(d)) / 0.1).numpy()
    ).fit(features.double().numpy(), labels.numpy())
    head = fit_head("knn", features.double(), labels, temperature=temperature)
    ours = head.scores(queries.double())
    torch.testing.assert_close(ours.sum(1), torch.ones(len(queries), dtype=torch.float64))
    if temperature == 0.1:
        torch.testing.assert_close(ours, torch.from_numpy(oracle.predict_proba(queries.double().numpy())))
    few = fit_head("knn", features[:2], labels[:2], neighbours=9)
    assert few.scores(queries).isfinite().all()


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("balanced", [True, False])
def test_logistic_is_scikit_learns_probability(classes, balanced):
    features, labels = blobs()
    features, labels = features[labels < classes], labels[labels < classes]
    features[:, 3] = 1.0  # a dead feature
    queries, _ = blobs(seed=1)
    scaler = StandardScaler().fit(features.double().numpy())
    model = LogisticRegression(class_weight="balanced" if balanced else None, max_iter=2000)
    model.fit(scaler.transform(features.double().numpy()), labels.numpy())
    queries[:, 3] = 1.0
    expected = torch.from_numpy(model.predict_proba(scaler.transform(queries.double().numpy()))).float()
    ours = fit_head("logistic", features, labels, balanced=balanced).scores(queries).softmax(1)
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", HEADS)
def test_labels_with_gaps_answer_in_their_own_numbers(name):
    features, labels = blobs()
    plain = predict(fit_head(name, features, labels), features)
    gappy = predict(fit_head(name, features, GAPPY[labels]), features)
    assert torch.equal(gappy, GAPPY[plain])
    assert (plain == labels).double().mean() > 0.8


@pytest.mark.parametrize("name", HEADS)
def test_order_of_samples_does_not_matter(name):
    features, labels = blobs()
    order = torch.randperm(len(labels), generator=named_generator(3, "order"))
    one = fit_head(name, features, labels).scores(features)
    torch.testing.assert_close(
        fit_head(name, features[order], labels[order]).scores(features), one, atol=2e-2, rtol=1e-3
    )


# ---- few-shot episodes


def episodes(gap, *, ways=3, shots=2, episodes=300, seed=0, per_class=20, queries=15):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(6, 8, generator=generator) * gap
    labels = torch.arange(6).repeat_interleave(per_class)
    train, test = (means[labels] + torch.randn(len(labels), 8, generator=generator) for _ in range(2))
    return few_shot(
        (train, labels), (test, labels), ways=ways, shots=shots, queries=queries, episodes=episodes, generator=generator
    )


def test_no_signal_is_chance_and_strong_signal_is_perfect():
    chance = episodes(0.0, ways=5, episodes=400)
    assert abs(chance.accuracy - 0.2) < 0.04
    assert episodes(20.0, ways=5, shots=1, episodes=50).accuracy == 1


def test_more_shots_help_and_the_generator_decides():
    state = torch.random.get_rng_state()
    one, five, again = (episodes(0.7, shots=shots) for shots in (1, 5, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert five.accuracy > one.accuracy + 0.05
    assert again == one
    assert one.episodes == 300


def test_one_episode_of_all_samples_by_loop():
    """With all samples of all classes drawn, an episode is nearest class mean on centred features of length one."""
    features, labels = blobs((6, 6, 6), spread=3)
    queries, _ = blobs((6, 6, 6), spread=3, seed=1)
    found = few_shot(
        (features, labels), (queries, labels), ways=3, shots=6, queries=6, episodes=2, generator=named_generator(0)
    )
    train, test = (torch.nn.functional.normalize(each - features.mean(0), dim=1) for each in (features, queries))
    means = torch.stack([train[labels == label].mean(0) for label in range(3)])
    right = [int((means - row).norm(dim=1).argmin()) == label for row, label in zip(test, labels.tolist(), strict=True)]
    assert found.accuracy == pytest.approx(sum(right) / len(right))
    assert found.half_width == pytest.approx(0, abs=1e-6)


def test_small_classes_repeat_samples_and_bad_episodes_are_refused():
    episodes(1.0, ways=6, shots=10, episodes=4, per_class=3)
    for ways, shots, number in ((1, 1, 5), (7, 1, 5), (3, 0, 5), (3, 1, 1)):
        with pytest.raises(SettingsError, match="few-shot with"):
            episodes(1.0, ways=ways, shots=shots, episodes=number)


# ---- leaving samples out


def test_votes_leave_out_who_may_not_vote(generator):
    features, labels = blobs((5, 4, 3))
    unit = torch.nn.functional.normalize(features, dim=1)
    cosine = unit @ unit.T
    cosine.fill_diagonal_(-torch.inf)
    votes = neighbour_votes(cosine, labels, num_classes=3, neighbours=4, temperature=0.2)
    for row in range(len(labels)):
        others = [other for other in range(len(labels)) if other != row]
        nearest = sorted(others, key=lambda other: -float(cosine[row, other]))[:4]
        expected = torch.zeros(3)
        for other in nearest:
            expected[labels[other]] += torch.exp(cosine[row, other] / 0.2)
        torch.testing.assert_close(votes[row], expected / expected.sum())


def test_similarity_is_leave_one_out_by_loop():
    features, labels = blobs((6, 4, 9, 2), spread=3)
    hits = {c: [] for c in range(4)}
    for row in range(len(labels)):
        keep = torch.arange(len(labels)) != row
        means = torch.stack([features[keep & (labels == c)].mean(0) for c in range(4)])
        hits[labels[row].item()].append(((features[row] - means).norm(dim=1).argmin() == labels[row]).item())
    balanced = sum(sum(h) / len(h) for h in hits.values()) / 4
    assert 0.25 < balanced < 0.99
    assert measure_similarity(features, GAPPY[labels]) == pytest.approx((balanced - 0.25) / 0.75)


def test_similarity_leaves_whole_groups_out():
    generator = torch.Generator().manual_seed(3)
    labels, groups = torch.arange(30) % 3, torch.randint(0, 4, (30,), generator=generator)
    groups[labels == 2] = 9  # serves as a mean only
    features = torch.randn(30, 2, generator=generator) + torch.eye(3)[labels, :2]
    right = torch.zeros(3)
    for row in range(30):
        left = (labels != labels[row]) | (groups != groups[row])
        if labels[row] == 2:
            continue
        means = torch.stack([features[left & (labels == label)].mean(0) for label in range(3)])
        right[labels[row]] += ((features[row] - means).square().sum(1).argmin() == labels[row]).float()
    found = measure_similarity(features, labels, groups=groups)
    assert found == pytest.approx(max(0, (float(right[:2].mean()) / 10 - 1 / 3) / (2 / 3)))
    alone = measure_similarity(features, labels, groups=torch.arange(30))
    assert alone == pytest.approx(measure_similarity(features, labels))
    with pytest.raises(DataError, match="similarity needs two classes"):
        measure_similarity(features, labels, groups=labels)


def test_similarity_ends():
    features = torch.eye(3)[torch.arange(12) % 3] + 0.01 * torch.randn(12, 3, generator=named_generator(0, "n"))
    labels = torch.arange(12) % 3
    assert measure_similarity(features, labels) == 1
    assert measure_similarity(torch.ones(12, 3), labels) == pytest.approx(0, abs=1e-6)
    lonely = torch.tensor([0, 0, 1])
    assert measure_similarity(torch.tensor([[0.0], [0.1], [5.0]]), lonely) == 1


def test_misuse_is_named():
    features, labels = blobs()
    with pytest.raises(SettingsError, match="no head 'ncm'; choose nearest_mean, cosine, knn, logistic"):
        fit_head("ncm", features, labels)
    with pytest.raises(SettingsError, match="head knn has no option 'k'"):
        fit_head("knn", features, labels, k=3)
    with pytest.raises(SettingsError, match="head knn: neighbours must be at least 1"):
        fit_head("knn", features, labels, neighbours=0)
    with pytest.raises(SettingsError, match="head logistic: strength must be positive"):
        fit_head("logistic", features, labels, strength=0)
    with pytest.raises(DataError, match="at least two classes"):
        fit_head("logistic", features, torch.zeros_like(labels))
    with pytest.raises(ShapeError, match="flatten them"):
        fit_head("cosine", features[None], labels)
    with pytest.raises(ShapeError, match="one for each row"):
        fit_head("cosine", features, labels[:4])
    with pytest.raises(DataError, match="got no samples"):
        fit_head("cosine", features[:0], labels[:0])
    with pytest.raises(RangeError, match="did the backbone's training diverge"):
        fit_head("cosine", features * math.nan, labels)
    with pytest.raises(DataError, match="similarity needs two classes"):
        measure_similarity(features, torch.zeros_like(labels))
