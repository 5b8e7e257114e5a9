"""torchvision v2: the stage before CutMix or MixUp in the collate function, or behind them (soft labels)."""

import sys
from pathlib import Path

import torch.nn.functional as F
from digits import long_tailed_digits, quick_translator, small_classifier
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset, default_collate

from gen_invariance import TailAugment, declare_missing_operators

declare_missing_operators()  # only needed where torch is a CPU build and torchvision is not
from torchvision.transforms import v2  # noqa: E402


def main(folder: Path, *, epochs: int = 2) -> float:
    train, _ = long_tailed_digits()
    augment = TailAugment.from_pretrained(quick_translator(folder, train), class_counts=train.counts)
    mix = v2.RandomChoice([v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)])

    def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return mix(*augment(*default_collate(rows)))  # augment(*mix(...)) works, too

    loader = DataLoader(TensorDataset(train.images, train.labels), batch_size=32, shuffle=True, collate_fn=collate)
    model = small_classifier()
    optimizer = AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for images, labels in loader:  # labels are soft, (B, 10)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print("last loss:", loss.item())
    return loss.item()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
