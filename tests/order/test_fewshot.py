import pytest
import torch

from gen_invariance.errors import SettingsError
from gen_invariance.order.fewshot import few_shot_accuracy
from gen_invariance.order.separability import Features


def features(gap, seed=0, per_class=20):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(6, 8, generator=generator) * gap
    labels = torch.arange(6).repeat_interleave(per_class)
    draw = lambda: means[labels] + torch.randn(len(labels), 8, generator=generator)  # noqa: E731
    return Features(draw(), labels, draw(), labels, num_classes=6)


def test_no_signal_is_chance_and_strong_signal_is_perfect():
    chance = few_shot_accuracy(features(0.0), ways=5, shots=2, episodes=400, generator=torch.Generator().manual_seed(0))
    assert abs(chance.accuracy - 0.2) < 0.04
    clear = few_shot_accuracy(features(20.0), ways=5, shots=1, episodes=50, generator=torch.Generator())
    assert clear.accuracy == 1


def test_more_shots_help_and_the_generator_decides():
    data = features(0.7)
    one, five, again = (
        few_shot_accuracy(data, ways=3, shots=s, episodes=300, generator=torch.Generator().manual_seed(1))
        for s in (1, 5, 1)
    )
    assert five.accuracy > one.accuracy + 0.05
    assert again == one


def test_small_classes_repeat_samples_and_bad_settings_are_refused():
    few_shot_accuracy(features(1.0, per_class=3), ways=6, shots=10, episodes=4, generator=torch.Generator())
    for ways, shots, episodes in ((1, 1, 5), (7, 1, 5), (3, 0, 5), (3, 1, 1)):
        with pytest.raises(SettingsError, match="few-shot with"):
            few_shot_accuracy(features(1.0), ways=ways, shots=shots, episodes=episodes, generator=torch.Generator())
