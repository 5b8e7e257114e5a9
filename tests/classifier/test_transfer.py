"""Transfer plans: what stays bit-equal, what the optimiser holds, schedules, rates after schedulers, and `auto`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.model import Backbone, Classifier, cache_features
from gen_invariance.classifier.objective import L2SP
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.run import named_generator

BLOCKS = ("stem", "stage1", "stage2", "stage3")


def images(count=8, seed=0):
    return torch.rand(count, 1, 8, 8, generator=named_generator(seed, "images"))


def build(head="linear"):
    return build_classifier("resnet20", num_classes=3, channels=1, head=head, generator=named_generator(1, "model"))


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(before, model):
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


def optimiser_of(plan, model):
    return torch.optim.SGD(plan.parameter_groups(model), momentum=0.9)


def step(model, optimiser, *, set_to_none=True, extra=lambda: 0.0):
    model.train()
    loss = F.cross_entropy(model(images()), torch.arange(8) % 3) + extra()
    optimiser.zero_grad(set_to_none=set_to_none)
    loss.backward()
    optimiser.step()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", ["resnet20", "small_conv"])
def test_frozen_leaves_every_backbone_tensor_bit_equal(name, set_to_none):
    model = build_classifier(name, num_classes=3, channels=1)
    plan = TransferPlan("frozen", lr=0.5)
    optimiser = optimiser_of(plan, model)
    plan.apply(model)
    before = state_of(model)
    for _ in range(3):
        step(model, optimiser, set_to_none=set_to_none)
    assert changed(before, model) == {"head.weight", "head.bias"}
    assert all(not module.training for module in model.backbone.modules())


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "convnext_tiny"])
def test_frozen_holds_for_torchvision_families(name):
    model = build_classifier(name, num_classes=3, channels=1)
    plan = TransferPlan("frozen")
    plan.apply(model)
    before = state_of(model)
    model.train()
    batch = torch.rand(2, 1, 32, 32, generator=named_generator(0, "i"))
    assert torch.equal(model.features(batch), model.features(batch))  # neither dropout nor stochastic depth
    F.cross_entropy(model(batch), torch.tensor([0, 1])).backward()
    optimiser_of(plan, model).step()
    assert changed(before, model) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("last", [0, 1, 2, 4])
def test_partial_trains_the_last_blocks_and_their_statistics_only(last):
    model = build()
    plan = TransferPlan("partial", last_stages=last, lr=0.5)
    optimiser = optimiser_of(plan, model)
    plan.apply(model)
    before = state_of(model)
    step(model, optimiser)
    trained = BLOCKS[len(BLOCKS) - last :] if last else ()
    touched = {key.split(".")[1] for key in changed(before, model) if key.startswith("backbone.")}
    assert touched == set(trained)
    assert plan.trained_blocks(model) == trained
    statistics = {key.split(".")[1] for key in changed(before, model) if "running_mean" in key}
    assert statistics == set(trained)


def test_batch_norm_eval_keeps_statistics_but_trains_weights():
    model = build()
    plan = TransferPlan("full", batch_norm="eval")
    plan.apply(model)
    before = state_of(model)
    step(model, optimiser_of(plan, model))
    moved = changed(before, model)
    assert not any("running" in key or "tracked" in key for key in moved)
    assert {"backbone.stem.1.weight", "backbone.stem.0.weight", "head.weight"} <= moved


def test_rates_are_in_the_groups_and_survive_schedulers():
    model = build()
    plan = TransferPlan("full", lr=0.2, backbone_lr_scale=0.5, layer_decay=0.8)
    expected = [0.1 * 0.8**4, 0.1 * 0.8**3, 0.1 * 0.8**2, 0.1 * 0.8, 0.2]
    for build_scheduler in (
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
    ):
        optimiser = optimiser_of(plan, model)
        assert [group["name"] for group in optimiser.param_groups] == [*BLOCKS, "head"]
        assert [group["lr"] for group in optimiser.param_groups] == pytest.approx(expected)
        scheduler = build_scheduler(optimiser)
        plan.apply(model)
        step(model, optimiser)
        scheduler.step()
        assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([rate / 2 for rate in expected])
    in_groups = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert in_groups == {id(p) for p in model.parameters()}


def test_a_step_moves_each_block_by_its_own_rate():
    """Plain SGD without decay: the weight change divided by the gradient is the rate."""
    model = build()
    plan = TransferPlan("full", lr=0.2, layer_decay=0.5, weight_decay=0.0)
    plan.apply(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, torch.optim.SGD(plan.parameter_groups(model)))
    for block, rate in zip(BLOCKS, (0.2 / 16, 0.2 / 8, 0.2 / 4, 0.2 / 2), strict=True):
        for name, parameter in model.block_parameters(block).items():
            torch.testing.assert_close(before[name] - parameter, rate * parameter.grad, atol=1e-6, rtol=1e-3)


def test_gradual_unfreezing_from_the_output_backwards():
    model = build()
    plan = TransferPlan("full", head_epochs=1, epochs_per_stage=2)
    optimiser = optimiser_of(plan, model)
    expected = [0, 1, 1, 2, 2, 3, 3, 4, 4, 4]
    for epoch, number in enumerate(expected):
        plan.apply(model, epoch=epoch)
        trained = BLOCKS[len(BLOCKS) - number :] if number else ()
        assert plan.trained_blocks(model, epoch=epoch) == trained
        before = state_of(model)
        step(model, optimiser)
        touched = {key.split(".")[1] for key in changed(before, model) if key.startswith("backbone.")}
        assert touched == set(trained)
    assert plan.describe(model).splitlines()[2:6] == [
        line for line in plan.describe(model).splitlines() if line.startswith("st")
    ]
    assert ["epoch 7" in line for line in plan.describe(model).splitlines()[2:4]] == [True, False]


def test_blocks_frozen_again_do_not_drift():
    """Momentum and decay must not move a stage after it is frozen, whatever zero_grad leaves behind."""
    model = build()
    optimiser = optimiser_of(TransferPlan("full"), model)
    TransferPlan("full").apply(model)
    step(model, optimiser)
    TransferPlan("frozen").apply(model)
    before = state_of(model)
    for _ in range(2):
        step(model, optimiser, set_to_none=False)
    assert changed(before, model) == {"head.weight", "head.bias"}


def test_resume_needs_only_the_epoch():
    plan = TransferPlan("full", head_epochs=1, epochs_per_stage=1, lr=0.05)

    def run(model, optimiser, epochs):
        for epoch in epochs:
            plan.apply(model, epoch=epoch)
            step(model, optimiser)

    whole = build()
    run(whole, optimiser_of(plan, whole), range(4))
    first = build()
    optimiser = optimiser_of(plan, first)
    run(first, optimiser, range(2))
    second = build_classifier("resnet20", num_classes=3, channels=1)
    second.load_state_dict(first.state_dict())
    resumed = optimiser_of(plan, second)
    resumed.load_state_dict(optimiser.state_dict())
    run(second, resumed, range(2, 4))
    assert not changed(state_of(whole), second)


def test_l2sp_is_the_loop_and_zero_at_the_start():
    model = build()
    TransferPlan("full").apply(model)
    penalty = L2SP(model, strength=0.3)
    assert penalty() == 0
    start = [p.detach().clone() for p in model.backbone.parameters()]
    step(model, optimiser_of(TransferPlan("full"), model))
    expected = 0.0
    for old, new in zip(start, model.backbone.parameters(), strict=True):
        expected += 0.15 * ((old - new).detach().numpy().astype(float) ** 2).sum()
    assert penalty().item() == pytest.approx(expected, rel=1e-4)
    assert not list(penalty.parameters())
    again = L2SP(model, strength=0.3)
    again.load_state_dict(penalty.state_dict())
    torch.testing.assert_close(again(), penalty())
    TransferPlan("frozen").apply(model)
    assert penalty() == 0


def test_pull_replaces_weight_decay_of_the_backbone():
    plan = TransferPlan("full", pull_to_start=0.1, weight_decay=0.01)
    groups = {group["name"]: group["weight_decay"] for group in plan.parameter_groups(build())}
    assert groups == {**dict.fromkeys(BLOCKS, 0.0), "head": 0.01}
    assert "pulled to their start with 0.1" in plan.describe(build())


def test_cached_features_are_the_models_own():
    model = build()
    model.set_normalisation(0.3, 0.4)
    stored = (images(20) * 255).round().to(torch.uint8)
    with pytest.raises(SettingsError, match="apply TransferPlan"):
        cache_features(model, stored)
    TransferPlan("frozen").apply(model)
    model.train()
    features = cache_features(model, stored, batch_size=7)
    torch.testing.assert_close(features, model.features(stored / 255))
    torch.testing.assert_close(features, cache_features(model, stored / 255, batch_size=20))
    F.cross_entropy(model.head(features), torch.arange(20) % 3).backward()  # usable for training a head
    assert model.head.weight.grad is not None
    assert cache_features(model, stored[:0]).shape == (0, 64)
    with pytest.raises(ShapeError):
        cache_features(model, stored[:, 0])


def test_describe_names_everything():
    plan = TransferPlan("partial", last_stages=2, lr=0.1, backbone_lr_scale=0.1)
    lines = plan.describe(build()).splitlines()
    assert lines[0] == "transfer: partial, last 2 of 4 blocks"
    assert lines[2].split() == ["stem", "176", "never", "0", "-", "eval"]
    assert lines[5].split() == ["stage3", "203,520", "from", "epoch", "0", "0.01", "0.0002", "train"]
    assert lines[6].split()[:2] == ["head", "195"]
    total = sum(int(line.split()[1].replace(",", "")) for line in lines[2:])
    assert total == sum(p.numel() for p in build().parameters())


@pytest.mark.parametrize(
    ("num_images", "similarity", "mode", "last", "words"),
    [
        (30, 0.9, "partial", 1, "10 images a class, similarity 0.90; a small and similar target"),
        (149, 0.5, "partial", 1, "the last block trains"),
        (150, 0.9, "partial", 2, "similar target of medium size, the last half trains"),
        (30, 0.1, "partial", 2, "a distant target, early blocks kept"),
        (1499, 0.49, "partial", 2, "early blocks kept"),
        (1500, 0.1, "full", None, "a large target, all blocks train"),
        (9000, 0.9, "full", None, "500|3000 images a class"),
    ],
)
def test_auto_chooses_by_size_and_similarity_and_says_why(num_images, similarity, mode, last, words):
    model = build()
    plan = TransferPlan("auto", lr=0.3).resolve(model, num_images=num_images, similarity=similarity)
    assert (plan.mode, plan.last_stages, plan.lr) == (mode, last, 0.3)
    assert any(word in plan.reason for word in words.split("|"))
    assert plan.reason in plan.describe(model)
    plan.apply(model)
    fixed = TransferPlan("frozen")
    assert fixed.resolve(model, num_images=1, similarity=0.0) is fixed


def test_bad_plans_are_named():
    model = build()
    with pytest.raises(SettingsError, match=r"transfer\.mode must be one of none, frozen, partial, .*, got 'froze'"):
        TransferPlan("froze")
    with pytest.raises(SettingsError, match="last_stages belongs to partial"):
        TransferPlan("full", last_stages=2)
    with pytest.raises(SettingsError, match="last_stages belongs to partial"):
        TransferPlan("partial")
    with pytest.raises(SettingsError, match=r"the last 5 blocks, the backbone has 4 \(stem, stage1, stage2, stage3\)"):
        TransferPlan("partial", last_stages=5).apply(model)
    with pytest.raises(SettingsError, match="last_stages must be at least 0"):
        TransferPlan("partial", last_stages=-1)
    with pytest.raises(SettingsError, match="still says auto"):
        TransferPlan("auto").apply(model)
    with pytest.raises(SettingsError, match="similarity in"):
        TransferPlan("auto").resolve(model, num_images=3, similarity=1.5)
    for options in ({"lr": 0.0}, {"lr": float("nan")}, {"layer_decay": 1.5}, {"head_epochs": -1}, {"batch_norm": "on"}):
        with pytest.raises(SettingsError):
            TransferPlan("full", **options)
    bare = Classifier(Backbone(nn.Flatten(), 64, 1, {}), nn.Linear(64, 3))
    with pytest.raises(SettingsError, match="declares no blocks; wrap it"):
        TransferPlan("full").apply(bare)
