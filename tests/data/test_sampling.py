import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance.data.sampling import epoch_indices, sampling_probabilities
from gen_invariance.data.settings import RULES, DelayedRule, second_phase
from gen_invariance.errors import DataError, RangeError, SettingsError, ShapeError

counts_lists = st.lists(st.integers(0, 5000), min_size=1, max_size=12).filter(any)
PINNED_DRAWS = [12, 24, 26, 22, 22, 20, 5, 12, 22, 25]


def probabilities_by_hand(counts, rule, progress, beta):
    """The published formulas, one class and one image at a time."""
    present = sum(n > 0 for n in counts)
    weights = []
    for n in counts:
        instance, balanced = n / sum(counts), (n > 0) / present
        image_weight = (1 - beta) / (1 - beta**n) if n else 0.0
        weights.append(
            {
                "instance": instance,
                "class_balanced": balanced,
                "square_root": math.sqrt(n),
                "progressive": (1 - progress) * instance + progress * balanced,
                "effective_number": sum(image_weight for _ in range(n)),
            }[rule]
        )
    return [weight / sum(weights) for weight in weights]


@given(counts_lists, st.sampled_from(RULES), st.floats(0, 1), st.sampled_from([0.0, 0.9, 0.999, 0.9999]))
@settings(max_examples=60, deadline=None)
def test_probabilities_are_the_published_formulas(counts, rule, progress, beta):
    found = sampling_probabilities(torch.tensor(counts), rule=rule, progress=progress, beta=beta)
    assert found.dtype == torch.float64
    expected = torch.tensor(probabilities_by_hand(counts, rule, progress, beta), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_effective_number_runs_from_instance_to_class_balanced():
    counts = torch.tensor([5000, 300, 7])

    def probabilities(rule, beta=0.0):
        return sampling_probabilities(counts, rule=rule, beta=beta)

    torch.testing.assert_close(probabilities("effective_number", 0.0), probabilities("instance"))


def test_effective_number_keeps_its_digits_for_beta_near_1():
    counts, beta = [5000, 300, 7], 1 - 1e-9
    exact = [n / (1 - Fraction(beta) ** n) for n in counts]
    expected = torch.tensor([float(weight / sum(exact)) for weight in exact], dtype=torch.float64)
    found = sampling_probabilities(torch.tensor(counts), rule="effective_number", beta=beta)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert found.max() - found.min() < 1e-5


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"rule": "balanced"}, SettingsError),
        ({"rule": "progressive", "progress": 1.1}, SettingsError),
        ({"rule": "effective_number", "beta": 1.0}, SettingsError),
        ({"rule": "effective_number", "beta": math.nan}, SettingsError),
    ],
)
def test_bad_rules_are_refused(arguments, error):
    with pytest.raises(error) as caught:
        sampling_probabilities(torch.tensor([1, 2]), **arguments)
    assert "\n" not in str(caught.value)


def test_nothing_to_sample_is_an_error():
    with pytest.raises(DataError, match="no class"):
        sampling_probabilities(torch.tensor([0, 0]), rule="instance")
    with pytest.raises(DataError, match="no label"):
        epoch_indices(torch.tensor([], dtype=torch.int64), rule="instance", epoch=0, seed=0)


@given(st.integers(1, 50), st.integers(1, 160), st.integers(0, 3))
def test_instance_takes_no_image_twice_before_each_came_once(num_images, num_samples, epoch):
    labels = torch.arange(num_images) % 3
    drawn = epoch_indices(labels, rule="instance", epoch=epoch, seed=0, num_samples=num_samples)
    times = torch.bincount(drawn, minlength=num_images)
    assert len(drawn) == num_samples
    assert int(times.max()) - int(times.min()) <= 1


@given(st.lists(st.sampled_from([0, 1, 3, 4]), min_size=1, max_size=60), st.sampled_from(RULES), st.integers(0, 4))
def test_draws_are_a_function_of_seed_epoch_and_stream(values, rule, epoch):
    labels = torch.tensor(values)

    def draw(**changes):
        return epoch_indices(labels, **{"rule": rule, "epoch": epoch, "seed": 1, "num_epochs": 5, **changes}).tolist()

    state = torch.get_rng_state()
    first = draw()
    assert first == draw() == draw(num_classes=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(0 <= row < len(values) for row in first)
    if len(set(values)) > 1 and len(values) > 30:
        assert len({tuple(draw(**change)) for change in ({}, {"seed": 2}, {"stream": "second"})}) == 3


@pytest.mark.parametrize("rule", RULES)
def test_images_are_drawn_as_often_as_the_rule_says(rule):
    counts = torch.tensor([400, 60, 0, 8])
    labels = torch.repeat_interleave(torch.arange(4), counts)[torch.randperm(468, generator=torch.Generator())]
    draws, epoch, num_epochs = 200_000, 2, 5
    drawn = epoch_indices(labels, rule=rule, epoch=epoch, seed=3, num_epochs=num_epochs, num_samples=draws)
    by_class = sampling_probabilities(counts, rule=rule, progress=epoch / (num_epochs - 1))
    by_image = (by_class / counts.clamp(min=1))[labels]
    for found, expected in (
        (torch.bincount(labels[drawn], minlength=4) / draws, by_class),
        (torch.bincount(drawn, minlength=len(labels)) / draws, by_image),
    ):
        sigma = (expected * (1 - expected) / draws).sqrt()
        assert ((found - expected).abs() <= 5 * sigma).all()
    assert not (labels[drawn] == 2).any()


def test_draws_are_the_same_on_every_machine():
    labels = torch.tensor([0] * 20 + [1] * 5 + [2] * 2)
    drawn = epoch_indices(labels, rule="class_balanced", epoch=3, seed=0, num_samples=10)
    assert drawn.tolist() == PINNED_DRAWS


def test_progressive_begins_as_instance_and_ends_balanced():
    labels = torch.tensor([0] * 990 + [1] * 10)
    shares = [
        (labels[epoch_indices(labels, rule="progressive", epoch=e, seed=0, num_epochs=11)] == 1).double().mean().item()
        for e in (0, 5, 10)
    ]
    assert shares == pytest.approx([0.01, 0.255, 0.5], abs=0.08)


def test_delayed_rule_changes_at_its_epoch():
    rule = DelayedRule(start=2)
    assert [rule(epoch) for epoch in range(4)] == ["instance", "instance", "class_balanced", "class_balanced"]
    assert [second_phase(epoch, start=2) for epoch in range(4)] == [False, False, True, True]
    for bad in ({"start": -1}, {"start": 1, "after": "balanced"}, {"start": 1, "before": ""}):
        with pytest.raises(SettingsError):
            DelayedRule(**bad)


@pytest.mark.parametrize(
    ("labels", "arguments", "error"),
    [
        (torch.tensor([0, 1]), {"epoch": -1}, SettingsError),
        (torch.tensor([0, 1]), {"num_epochs": 0}, SettingsError),
        (torch.tensor([0, 1]), {"num_samples": 0}, SettingsError),
        (torch.tensor([0, -1]), {}, RangeError),
        (torch.tensor([0, 2]), {"num_classes": 2}, RangeError),
        (torch.tensor([0.0, 1.0]), {}, ShapeError),
        (torch.tensor([[0, 1]]), {}, ShapeError),
    ],
)
def test_bad_epochs_and_labels_are_refused(labels, arguments, error):
    with pytest.raises(error) as caught:
        epoch_indices(labels, **{"rule": "instance", "epoch": 0, "seed": 0, **arguments})
    assert "\n" not in str(caught.value)
