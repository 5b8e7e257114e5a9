"""Long-tailed real digits and a quickly fitted translator, shared by the examples."""

from pathlib import Path

import torch

from gen_invariance import FitSettings, ImageData, fit_translator, load_source, make_long_tailed


def long_tailed_digits() -> tuple[ImageData, ImageData]:
    """Training and test images, 16 x 16, grey, 60 down to 3 images a class."""
    split = make_long_tailed(load_source("digits"), largest=60, imbalance=20, rest_is_test=True)
    return split.train, split.test


def quick_translator(folder: Path, train: ImageData, *, steps: int = 20) -> Path:
    """Fit a small translator on the classes with enough images; returns its folder."""
    settings = FitSettings(steps=steps, batch_size=32, sample_every=steps, checkpoint_every=steps)
    fit_translator("spatial", train, settings, out=folder, progress=False)
    return folder / "translator"


def small_classifier(num_classes: int = 10) -> torch.nn.Module:
    """Enough for digits."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 7 * 7, num_classes),
    )
