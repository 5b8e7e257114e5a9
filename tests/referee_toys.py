"""Images whose only nuisance is their tone, so that `redraw` of a photo's tone is the oracle."""

import torch

from gen_invariance.data.images import ImageData
from gen_invariance.referee.settings import RefereeSettings
from gen_invariance.translator.redraw.model import RedrawTranslator

TOY = RefereeSettings(steps=60, batch_size=16, splits=2, score_images=20, learning_rate=0.1, mixed_precision="no")


def toned_patterns(counts=(60, 50, 45, 40, 4, 3, 3, 2), seed=0):
    """A fixed pattern a class with noise, under another brightness and contrast in each image."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(len(counts), 3, 8, 8, generator=generator) - 0.5
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    noise = 0.35 * torch.randn(len(labels), 3, 8, 8, generator=generator)
    gain = 0.15 + 0.5 * torch.rand(len(labels), 3, 1, 1, generator=generator)
    light = 0.2 + 0.6 * torch.rand(len(labels), 3, 1, 1, generator=generator)
    images = (light + gain * (patterns[labels] + noise)).clamp(0, 1)
    return ImageData(images.mul(255).round().byte(), labels, tuple(map(str, range(len(counts)))), "patterns")


def save_blank(folder):
    """A saved translator that makes every image one grey."""
    translator = RedrawTranslator(3, ("tone",), "photo", bank_size=4)
    for name in ("ground", "base", "ink"):
        getattr(translator, name).fill_(0.5)
    translator.save_pretrained(folder)
    return str(folder)
