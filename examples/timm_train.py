"""timm: a model, optimiser and Mixup of timm; the stage goes in front of Mixup."""

import sys
from pathlib import Path

import torch
from digits import long_tailed_digits, quick_translator

from gen_invariance import TailAugment, measure_accuracy
from gen_invariance.torchvision_guard import declare_missing_operators

declare_missing_operators()
import timm  # noqa: E402
from timm.data import Mixup  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402


def main(folder: Path, *, steps: int = 4) -> float:
    train, test = long_tailed_digits()
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    mixup, loss_of = Mixup(mixup_alpha=0.2, num_classes=10), SoftTargetCrossEntropy()

    augment = TailAugment.from_pretrained(quick_translator(folder, train), class_counts=train.counts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(train), (32,), generator=generator)
        images, labels = augment(train.images[rows], train.labels[rows])
        images, labels = mixup(images, labels)
        loss = loss_of(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("accuracy:", measure_accuracy(model.eval(), test.subset(torch.arange(64))).balanced)
    return loss.item()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
