"""timm: its loader, model, optimiser and Mixup in a train step; the stage goes between the loader and Mixup."""

import sys
from pathlib import Path

import torch
from digits import long_tailed_digits, quick_translator
from torch.utils.data import Dataset

from gen_invariance import ImageData, TailAugment, declare_missing_operators

declare_missing_operators()  # only needed where torch is a CPU build and torchvision is not
import timm  # noqa: E402
from timm.data import Mixup, create_loader  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from torchvision.transforms.functional import to_pil_image  # noqa: E402


def main(folder: Path, *, epochs: int = 2) -> float:
    train, _ = long_tailed_digits()
    loader = create_loader(
        Pictures(train),
        input_size=(1, 16, 16),
        batch_size=32,
        is_training=True,
        no_aug=True,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
        mean=(0.0,),  # the loader shall not normalise: the stage takes images in [0, 1] and comes first
        std=(1.0,),
    )
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    mixup, loss_of = Mixup(mixup_alpha=0.2, num_classes=10), SoftTargetCrossEntropy()

    augment = TailAugment.from_pretrained(quick_translator(folder, train), class_counts=train.counts)
    for _ in range(epochs):
        for images, labels in loader:
            images, labels = augment(images, labels)
            images, labels = mixup(images, labels)
            loss = loss_of(model((images - 0.5) / 0.5), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print("last loss:", loss.item())
    return loss.item()


class Pictures(Dataset):
    """What timm's loader takes: PIL images and labels, and a place for its own transform."""

    transform = None

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(to_pil_image(self.data.images[row])), int(self.data.labels[row])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
