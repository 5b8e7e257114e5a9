"""What `train` does with a pretrained classifier where nobody says otherwise: further words for the command line.

The settings themselves lie in `configs/` (classifier/pretrained, training/photographs, transfer/frozen); here stands
when they are taken. Whoever names a training says how it is done, and gets nothing added.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gen_invariance.configs import choice_names, read_choice

IMAGE_SIZE = 128
"""Side that the images of a folder are scaled to; smaller ones lose what a pretrained backbone knows."""

_RECIPE = {"training": "photographs", "transfer": "frozen", "augmentation": "crop_flip+randaugment"}
_LIBRARY_MODEL = r"(?:timm:)?[A-Za-z][\w.]*"
_PUBLISHED = r"DEFAULT|IMAGENET\w*"


def name_library_model(words: Sequence[str]) -> list[str]:
    """`words`, where classifier=NAME names no file of `configs/` but maybe a model of torchvision or timm.

    >>> name_library_model(["classifier=resnet50", "seed=1"])
    ['classifier=pretrained', 'classifier.backbone=resnet50', 'seed=1']
    """
    found: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "classifier" and value not in choice_names("classifier") and re.fullmatch(_LIBRARY_MODEL, value):
            found += ["classifier=pretrained", f"classifier.backbone={value}"]
        else:
            found.append(word)
    return found


def pretrained_words(words: Sequence[str]) -> list[str]:
    """Words that a pretrained classifier brings along; none for another one, or where a training is named.

    >>> pretrained_words(["classifier=efficientnet_lite0", "augmentation=randaugment"])
    ['training=photographs', 'transfer=frozen']
    >>> pretrained_words(["classifier=efficientnet_lite0", "training=cifar"])
    []
    """
    typed = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in words}
    if "training" in typed or not _is_pretrained(typed):
        return []
    added = [f"{key}={value}" for key, value in _RECIPE.items() if key not in typed]
    if typed.get("transfer", "frozen") != "frozen" or typed.get("transfer.mode", "frozen") != "frozen":
        # Features of a backbone that trains cannot be stored.
        added += [f"training.{key}=0" for key in ("views", "spread") if f"training.{key}" not in typed]
    if typed.get("data") == "folder" and "data.image_size" not in typed:
        added.append(f"data.image_size={IMAGE_SIZE}")
    return added


def _is_pretrained(typed: Mapping[str, str]) -> bool:
    """Whether the classifier starts from weights that a library publishes, or stands in for them."""
    weights = typed.get("classifier.weights")
    if weights is not None and weights in ("null", "''", '""'):
        return False
    choice = typed.get("classifier")
    if choice in choice_names("classifier") and read_choice("classifier", choice).get("weights"):
        return True
    return weights is not None and re.fullmatch(_PUBLISHED, weights) is not None
