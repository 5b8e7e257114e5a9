"""Which weights the loop trains and hands over: averages, transfer plans, correction of the head."""

import copy

import pytest
import torch
from test_train import Interrupted, interrupt_at, network, same_weights, settings, train
from test_train_options import plain, stage

from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.run import Run

# ---- averages


def test_the_average_is_that_of_the_weights_after_each_step(tmp_path):
    model, seen = plain(), []
    model.register_forward_pre_hook(lambda *_: seen.append(model.head.weight.detach().clone()))
    how = settings(epochs=1, average_decay=0.9)
    folder = tmp_path / "run"
    returned = train(folder, how, model=model)
    state = Run(folder, kind="train", resume=True).load_latest()
    steps = [*seen[1:], state["trained"]["head.weight"]]
    average = steps[0]
    for weight in steps[1:]:
        average = 0.9 * average + 0.1 * weight
    torch.testing.assert_close(returned.head.weight, average)
    assert torch.equal(state["model"]["head.weight"], returned.head.weight)


# ---- transfer plans


def test_frozen_training_leaves_the_backbone_bit_equal(tmp_path):
    model = network()
    before = copy.deepcopy(model.state_dict())
    plan = TransferPlan("frozen", lr=0.05, weight_decay=0.1)
    train(tmp_path / "run", settings(weight_decay=0.1), model=model, plan=plan, stage=stage())
    backbone = [name for name in before if name.startswith("backbone.")]
    assert any("running_mean" in name for name in backbone)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in backbone)
    assert not torch.equal(before["head.weight"], model.state_dict()["head.weight"])


RATES = (0.00625, 0.0125, 0.025, 0.05, 0.2)
"""Half of the head's rate for the last convolution, and half again for each before it."""


def test_group_rates_follow_the_schedule(tmp_path):
    model, how = network(), settings(epochs=4, schedule="cosine")
    plan = TransferPlan("full", lr=0.2, backbone_lr_scale=0.5, layer_decay=0.5)
    train(tmp_path / "run", how, model=model, plan=plan)
    groups = Run(tmp_path / "run", kind="train", resume=True).load_latest()["optimizer"]["param_groups"]
    factor = how.schedule_at(19 / 5)  # the last of 20 steps, 5 an epoch
    assert 0 < factor < 0.1
    assert [group["name"] for group in groups] == ["conv1", "conv2", "conv3", "conv4", "head"]
    assert [group["lr"] for group in groups] == pytest.approx([r * factor for r in RATES])
    assert [group["initial_lr"] for group in groups] == pytest.approx(RATES)


PLANS = {
    "thawing": TransferPlan("full", lr=0.02, head_epochs=1, epochs_per_stage=1),
    "pulled": TransferPlan("full", lr=0.02, pull_to_start=0.1),
    "partial": TransferPlan("partial", last_stages=1, lr=0.02, batch_norm="eval"),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_resume_to_the_bit(name, tmp_path):
    straight = train(tmp_path / "straight", plan=PLANS[name])
    with pytest.raises(Interrupted):
        train(tmp_path / "halted", plan=PLANS[name], evaluate=interrupt_at(3))
    model = network()
    assert same_weights(straight, train(tmp_path / "halted", plan=PLANS[name], model=model, resume=True))


def test_thawing_trains_the_stages_one_after_the_other(tmp_path):
    model, changed = network(), []
    last = {"weights": copy.deepcopy(model.state_dict())}

    def look(current):
        now = copy.deepcopy(current.state_dict())
        moved = {name.split(".")[1] for name in now if name.startswith("backbone") and "weight" in name
                 and not torch.equal(now[name], last["weights"][name])}  # fmt: skip
        changed.append(moved)
        last["weights"] = now
        return {}

    train(tmp_path / "run", model=model, plan=PLANS["thawing"], evaluate=look)
    assert changed == [set(), {"conv4"}, {"conv3", "conv4"}, {"conv2", "conv3", "conv4"}]


def test_the_pull_keeps_weights_near_their_start(tmp_path):
    def distance(strength):
        plan = TransferPlan("full", lr=0.02, pull_to_start=strength)
        model = train(tmp_path / str(strength), plan=plan, model=network())
        pairs = zip(model.backbone.parameters(), network().backbone.parameters(), strict=True)
        return sum(float((one - other).detach().square().sum()) for one, other in pairs)

    assert distance(5.0) < 0.5 * distance(0.0)
