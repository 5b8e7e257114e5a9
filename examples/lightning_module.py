"""Lightning: the stage is an attribute of the module; eKLD by class is logged as a torchmetrics metric."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import long_tailed_digits, quick_translator, small_classifier
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gen_invariance import ExpectedKL, Rotation, TailAugment

import lightning  # isort: skip  (after the package's guard for torchvision)


class Digits(lightning.LightningModule):
    def __init__(self, augment: TailAugment) -> None:
        super().__init__()
        self.augment, self.model = augment, small_classifier()
        self.nuisance, self.ekld = Rotation(30), ExpectedKL(num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = self.augment(*batch)
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch[0].float() / 255, batch[1]
        draw = self.nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
        self.ekld.update(self.model(images), self.model(self.nuisance.apply(images, draw)), labels)
        self.log("val/ekld", self.ekld)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)


def main(folder: Path) -> float:
    train, test = long_tailed_digits()
    augment = TailAugment.from_pretrained(quick_translator(folder / "fit", train), class_counts=train.counts)
    loaders = [DataLoader(TensorDataset(part.images, part.labels), batch_size=32) for part in (train, test)]
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False
    )
    trainer.fit(Digits(augment), *loaders)
    return float(trainer.callback_metrics["val/ekld"])


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
