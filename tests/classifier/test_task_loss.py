"""`TaskLoss`: several heads side by side under one linear layer, against a loop over tasks."""

import pytest
import torch
import torch.nn.functional as F

from gen_invariance.classifier.joint import TaskLoss
from gen_invariance.errors import SettingsError

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
