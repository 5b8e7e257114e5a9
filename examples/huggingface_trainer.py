"""Hugging Face Trainer: a data set with an image column; the stage in the collate function, in front of normalising."""

import sys
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Image
from digits import long_tailed_digits, quick_translator
from torch import Tensor

from gen_invariance import ImageData, TailAugment, declare_missing_operators

declare_missing_operators()  # only needed where torch is a CPU build and torchvision is not
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image  # noqa: E402
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification  # noqa: E402


def main(folder: Path, *, epochs: int = 1) -> float:
    train, test = long_tailed_digits()
    augment = TailAugment.from_pretrained(quick_translator(folder, train), class_counts=train.counts)

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        images = torch.stack([pil_to_tensor(row["image"]) for row in rows])  # uint8 (B, C, H, W), of one size
        images, labels = augment(images, torch.tensor([row["label"] for row in rows]))
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
    trainer = Trainer(model=model, args=arguments, train_dataset=as_dataset(train), data_collator=collate)
    loss = trainer.train().training_loss
    with torch.no_grad():
        right = model.eval()(normalized(test.images / 255)).logits.argmax(1) == test.labels
    print("loss:", loss, "accuracy:", right.float().mean().item())
    return loss


def as_dataset(part: ImageData) -> Dataset:
    """Like `load_dataset("imagefolder", data_dir="photos")["train"]`: rows of a picture and a class."""
    features = Features({"image": Image(), "label": ClassLabel(names=list(part.class_names))})
    pictures = [to_pil_image(image) for image in part.images]
    return Dataset.from_dict({"image": pictures, "label": part.labels.tolist()}, features=features)


def normalized(images: Tensor) -> Tensor:
    """What an image processor would do; it comes after the stage."""
    return (images - 0.5) / 0.5


if __name__ == "__main__":
    main(Path(sys.argv[1]))
