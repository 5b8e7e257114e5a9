"""Accelerate: build the stage on every process; each rank draws from its own stream."""

import sys
from pathlib import Path

import torch.nn.functional as F
from accelerate import Accelerator
from digits import long_tailed_digits, quick_translator, small_classifier
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from gen_invariance import TailAugment


def main(folder: Path, *, epochs: int = 2) -> float:
    accelerator = Accelerator(cpu=True)
    train, _ = long_tailed_digits()
    model = small_classifier()
    loader = DataLoader(TensorDataset(train.images, train.labels), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, AdamW(model.parameters(), lr=3e-3), loader)

    augment = TailAugment.from_pretrained(quick_translator(folder, train), class_counts=train.counts)
    augment.to(accelerator.device)  # not prepared: it has nothing to train and nothing to save
    for _ in range(epochs):
        for images, labels in loader:
            images, labels = augment(images, labels)
            with accelerator.autocast():
                loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    print("last loss:", loss.item())
    return loss.item()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
