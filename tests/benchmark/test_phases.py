"""Every phase that a benchmark and a method promise comes: asked epoch by epoch, at the file's length and at others."""

import pytest

from gen_invariance import configs
from gen_invariance.benchmark.arms import read_arm
from gen_invariance.benchmark.registry import benchmark_names, read_benchmark
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.data.settings import rule_name
from gen_invariance.errors import SettingsError

METHODS = [name for name in configs.choice_names("method") if name != "none"]


def phases(arm):
    """What is on in each epoch of an arm: sampling rule, whether the stage works, whether the second loss counts."""
    training = arm.method.training
    return [
        (rule_name(training.rule(), epoch), training.stage_is_on(epoch), training.in_second_phase(epoch))
        for epoch in range(training.epochs)
    ]


@pytest.mark.parametrize("epochs", [None, 2, 5, 33])
@pytest.mark.parametrize("name", benchmark_names())
def test_every_phase_that_the_name_promises_has_an_epoch(name, epochs):
    changes = {} if epochs is None else {"training": {"epochs": epochs}}
    benchmark = read_benchmark(name, changes=changes)
    for method in METHODS:
        arm = read_arm(f"{method}+identity", benchmark)
        rules, stage, second = zip(*phases(arm), strict=True)
        assert any(stage), f"{method}: the stage never works"
        if arm.method.training.sampling == "delayed":
            assert (rules[0], rules[-1]) == ("instance", "class_balanced"), f"{method}: re-sampling never starts"
        if arm.method.classifier.second_loss_options is not None:
            assert (second[0], second[-1]) == (False, True), f"{method}: re-weighting never starts"
        assert arm.method.training.warmup_epochs < len(rules), f"{method}: nothing but warm-up"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"milestones": (160, 180)}, "never start: the second phase begins after epoch 160 of 5"),
        ({"second_phase": 5}, "never start: the second phase begins after epoch 5 of 5"),
        ({"second_phase": 0}, "would have no first phase"),
        ({"warmup": 4, "second_phase": 3}, "after epoch 3, before the warm-up of 4 epochs ends"),
        ({"epochs": 1}, "never start: the second phase begins after epoch 1 of 1"),
    ],
)
def test_a_second_phase_that_cannot_be_is_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        TrainSettings(**{"epochs": 5, "sampling": "delayed", **changes})
    idle = TrainSettings(**{"epochs": 5, "stage_from": "second_phase", **changes})  # as long as nothing waits for it
    with pytest.raises(SettingsError, match=message):
        idle.check_phases(stage=True)
    with pytest.raises(SettingsError, match=message):
        idle.check_phases(second_loss=True)
    idle.check_phases()


def test_shares_of_training_move_with_its_length_and_epochs_do_not():
    def points(**changes):
        how = TrainSettings(**{"milestones": (0.6, 0.9), "warmup": 0.05, **changes})
        return how.warmup_epochs, how.milestone_epochs, how.second_phase_start

    assert points(epochs=200) == (10, (120, 180), 120)
    assert points(epochs=40) == (2, (24, 36), 24)
    assert points(epochs=3) == (0, (2, 2), 2)
    assert points(epochs=2) == (0, (1, 1), 1)
    assert points(epochs=40, second_phase=0.25) == (2, (24, 36), 10)
    assert points(epochs=40, warmup=3, milestones=(30, 35)) == (3, (30, 35), 30)


@pytest.mark.parametrize("point", [-0.1, 1.5, float("nan"), float("inf")])
def test_points_that_are_none_are_refused(point):
    for changes in ({"warmup": point}, {"second_phase": point}, {"milestones": (0.5, point)}):
        with pytest.raises(SettingsError, match=r"share|finite|2 values"):
            TrainSettings(epochs=10, **changes)


def test_a_method_with_a_phase_that_never_comes_is_refused_by_name():
    late = read_benchmark("cifar10_lt_if100", changes={"training": {"epochs": 5, "milestones": [160, 180]}})
    assert read_arm("ce", late).method.training.epochs == 5
    for name in ("ce_drs", "ce_drw", "ce+identity", "ldam_drw"):
        with pytest.raises(SettingsError, match="160 of 5"):
            read_arm(name, late)
