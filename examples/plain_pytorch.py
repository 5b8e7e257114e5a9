"""Plain PyTorch: three lines in a training loop, and the invariance by class before and after."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import long_tailed_digits, quick_translator, small_classifier
from torch.utils.data import DataLoader, TensorDataset

from gen_invariance import Rotation, TailAugment, measure_invariance


def main(folder: Path, *, epochs: int = 3) -> float:
    train, test = long_tailed_digits()
    loader = DataLoader(TensorDataset(train.images, train.labels), batch_size=32, shuffle=True)
    model = small_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    augment = TailAugment.from_pretrained(quick_translator(folder, train), class_counts=train.counts)
    for _ in range(epochs):
        for images, labels in loader:  # uint8 (B, 1, 16, 16)
            images, labels = augment(images, labels)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    scores = measure_invariance(model, test.images, test.labels, Rotation(30), draws=3)
    print("eKLD by class:", [round(value, 2) for value in scores.ekld.tolist()])
    return loss.item()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
