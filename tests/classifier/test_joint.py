"""Several tasks on one backbone: side by side under one head, and with heads of their own."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.joint import Task, TaskLoss, train_tasks
from gen_invariance.classifier.model import build_head
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.run import named_generator

TASKS = torch.tensor([0, 0, 0, 1, 1])


def test_rows_compete_within_their_task(generator):
    logits = torch.randn(12, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (12,), generator=generator)
    found = TaskLoss(torch.ones(5), task_of=TASKS)(logits, labels, reduction="none")
    for row, label in enumerate(labels.tolist()):
        own, shift = (slice(0, 3), 0) if label < 3 else (slice(3, 5), 3)
        expected = F.cross_entropy(logits[row, own][None], torch.tensor([label - shift]))
        torch.testing.assert_close(found[row], expected)
    gradient = torch.autograd.grad(found.sum(), logits)[0]
    assert torch.isfinite(gradient).all()
    assert (gradient[labels < 3, 3:] == 0).all()
    assert (gradient[labels >= 3, :3] == 0).all()
    assert (gradient != 0).any()


def test_one_task_is_cross_entropy(generator):
    logits, labels = torch.randn(6, 5, generator=generator), torch.randint(5, (6,), generator=generator)
    loss = TaskLoss(torch.ones(5), task_of=torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels))


def test_tasks_must_fit():
    with pytest.raises(SettingsError, match="task of 5 classes"):
        TaskLoss(torch.ones(5), task_of=torch.zeros(4, dtype=torch.int64))


# ---- heads of their own


def bars():
    """48 images of four classes: a bright row or column at one of two places."""
    images = torch.zeros(48, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(48) % 4
    for row, label in enumerate(labels.tolist()):
        index = 2 + 3 * (label % 2)
        if label < 2:
            images[row, 0, index] = 255 - row
        else:
            images[row, 0, :, index] = 255 - row
    return ImageData(images, labels, tuple("abcd"))


def tasks_of(data, model):
    """Rows against columns, and all four classes."""
    heads = [build_head("linear", model.num_features, k, generator=named_generator(k, "head")) for k in (2, 4)]
    return [
        Task(torch.arange(40), (data.labels[:40] >= 2).long(), heads[0]),
        Task(torch.arange(10, 48), data.labels[10:48], heads[1]),
    ]


def train(data, *, steps=40, plan=None, **changes):
    model = build_classifier("small_conv", num_classes=2, channels=1)
    if plan is not None:
        plan.apply(model)
    tasks = tasks_of(data, model)
    how = {"batch_size": 16, "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "flip": False, **changes}
    finite = train_tasks(
        model, data, tasks, steps=steps, settings=SimpleNamespace(**how), generator=named_generator(0, "tasks")
    )
    return model.eval(), tasks, finite


def test_every_task_is_learned_and_the_generator_decides():
    data = bars()
    model, tasks, finite = train(data)
    again = train(data)[0]
    assert finite
    for task in tasks:
        predicted = task.head(model.features(data.float_images(task.rows))).argmax(1)
        assert (predicted == task.labels).float().mean() > 0.9
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_one_step_of_two_tasks_is_sgd_on_the_mean_of_their_losses():
    data, how = bars(), {"batch_size": 60, "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 0.1}
    trained, tasks, _ = train(data, steps=1, **how)
    twin = build_classifier("small_conv", num_classes=2, channels=1).train()
    others = tasks_of(data, twin)
    loss = sum(
        F.cross_entropy(task.head(twin.features(data.float_images(task.rows))), task.labels) / 2 for task in others
    )
    loss.backward()
    for one, other in zip(
        [*trained.backbone.parameters(), *tasks[1].head.parameters()],
        [*twin.backbone.parameters(), *others[1].head.parameters()],
        strict=True,
    ):
        torch.testing.assert_close(one, other - 0.1 * other.grad, atol=1e-5, rtol=1e-4)


def test_frozen_blocks_stay_and_divergence_is_told():
    data = bars()
    start = build_classifier("small_conv", num_classes=2, channels=1)
    model, _, _ = train(data, steps=5, plan=TransferPlan("partial", last_stages=1))
    before, after = start.backbone.state_dict(), model.backbone.state_dict()
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert same == {key for key in before if not key.startswith("conv4")}
    assert not train(data, steps=20, learning_rate=1e30)[2]
