"""Hugging Face Trainer: the stage in the collate function of a small vision transformer, in front of normalising."""

import sys
from pathlib import Path

import torch
from digits import long_tailed_digits, quick_translator
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from gen_invariance import TailAugment
from gen_invariance.torchvision_guard import declare_missing_operators

declare_missing_operators()  # only needed where torch is a CPU build and torchvision is not
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification  # noqa: E402


def main(folder: Path, *, epochs: int = 1) -> float:
    train, test = long_tailed_digits()
    augment = TailAugment.from_pretrained(quick_translator(folder, train), class_counts=train.counts)

    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        images, labels = augment(*default_collate(rows))
        return {"pixel_values": normalized(images), "labels": labels}

    model = ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=1,
                  num_attention_heads=2, intermediate_size=64, num_labels=10)
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        remove_unused_columns=False,  # columns that the model does not know are for the collate function
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = TensorDataset(train.images, train.labels)
    loss = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate).train().training_loss
    with torch.no_grad():
        right = model.eval()(normalized(test.images / 255)).logits.argmax(1) == test.labels
    print("loss:", loss, "accuracy:", right.float().mean().item())
    return loss


def normalized(images: Tensor) -> Tensor:
    """What an image processor would do; it comes after the stage."""
    return (images - 0.5) / 0.5


if __name__ == "__main__":
    main(Path(sys.argv[1]))
