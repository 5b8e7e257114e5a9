"""Nuisances and batches that tests of the stage share."""

import torch

from gen_invariance.nuisance.compose import Compose
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Lighting
from gen_invariance.run import named_generator
from gen_invariance.translator.munit.model import MunitTranslator

CLASSES = 4


class Spy:
    """A nuisance that notes how many rows it was asked for and shown."""

    def __init__(self, inner):
        self.inner, self.drawn, self.shown = inner, [], []

    def sample(self, shape, *, generator):
        self.drawn.append(shape[0])
        return self.inner.sample(shape, generator=generator)

    def apply(self, images, draw):
        self.shown.append(len(images))
        return self.inner.apply(images, draw)


def munit():
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(named_generator(0, "munit").get_state())
        return MunitTranslator(width=4, residual_blocks=1, mlp_width=8)


def batch(count=64, channels=1, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, channels, size, size, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


NUISANCES = {"rotation": Rotation, "composed": lambda: Compose([munit(), Lighting()]), "munit": munit}


def moved(before, after):
    return (before != after).flatten(1).any(1)
