"""kornia: a translator as one augmentation among others; the pipeline can be replayed."""

import sys
from pathlib import Path

import kornia.augmentation as K
import torch
from digits import long_tailed_digits, quick_translator

from gen_invariance import KorniaNuisance, load_translator


def main(folder: Path) -> float:
    train, _ = long_tailed_digits()
    translator = load_translator(quick_translator(folder, train))
    pipeline = K.AugmentationSequential(K.RandomAffine(5.0, p=0.5), KorniaNuisance(translator, p=0.5))
    images = train.float_images(torch.arange(32))
    once = pipeline(images)
    again = pipeline(images, params=pipeline._params)
    difference = float((once - again).abs().max())
    print("changed pixels:", int((once != images).sum()), " replayed with difference:", difference)
    return difference


if __name__ == "__main__":
    main(Path(sys.argv[1]))
