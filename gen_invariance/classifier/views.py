"""Features of augmented views, computed once: with a frozen backbone the head then trains in seconds.

Each training image passes the backbone `views` times, each time augmented anew, and steps draw among these views. They
are kept in the cache folder under a digest of all that decides them (images, weights, augmentation, seed), so that
another head, loss or sampling rule on the same images starts at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.batches import Batch, Choose
from gen_invariance.classifier.model import Classifier, cache_features
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.data.images import ImageData
from gen_invariance.data.loader import ResidentLoader
from gen_invariance.data.storage import cache_folder
from gen_invariance.devices import send
from gen_invariance.errors import OutputError, SettingsError
from gen_invariance.files import atomic_write
from gen_invariance.nuisance.protocol import Nuisance, draw_to
from gen_invariance.run import Run, first_process_first

_CHUNK = 128  # images that are augmented together; a part of what decides the views
_KEPT_FILES = 20


class HeadOfViews(nn.Module):
    """A classifier's head alone, for batches of stored features, (B, D, 1, 1) as if they were images."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.head = model.head

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.head(features.flatten(1))


class ViewBatches:
    """Batches of stored features, addressed by step as those of `batches.Batches`.

    Args:
        model: its backbone frozen, on the device of `data`.
        data: training images.
        settings: of the training; `views` says how often each image is augmented.
        run: names the generators.
        stage: gives tail classes the nuisance, drawn anew in each view.
        stage_source: what the stage acts on, row for row `data`; None takes `data` itself.
        augmentation: of every row, after the stage.
        process, processes: which share of each batch is wanted.
    """

    def __init__(
        self,
        model: Classifier,
        data: ImageData,
        settings: TrainSettings,
        run: Run,
        *,
        stage: TailAugment | None = None,
        stage_source: ImageData | None = None,
        augmentation: Nuisance | None = None,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.model, self.data, self.settings, self.run = model, data, settings, run
        self.stage, self.augmentation = stage, augmentation
        self.source = None if stage_source is None else stage_source.to(data.device)
        self.share = slice(process, None, processes)
        self.spread = FeatureSpread(data, settings.spread) if settings.spread else None
        self.staged = 0
        self.rows = ResidentLoader(
            data,
            rule=settings.rule(),
            batch_size=settings.batch_size,
            seed=run.seed,
            num_epochs=settings.epochs,
            num_samples=settings.epoch_images or None,
        )
        self.per_epoch = self.rows.steps_per_epoch
        self._features: Tensor | None = None

    @property
    def features(self) -> Tensor:
        """Float16 (V, N, D), on the device of the images; computed, or read from the cache folder, when first asked."""
        if self._features is None:
            with first_process_first():
                self._features = self._load_or_compute()
        return self._features

    def at(self, step: int, *, choose: Choose | None = None) -> Batch:
        """This process's rows of `step`, each in one of its views; there is nothing to `choose` between."""
        rows, generator = self.rows.indices(step), self.run.generator("view", step)
        view = send(torch.randint(self.settings.views, rows.shape, generator=generator), rows.device)
        moves = None if self.spread is None else self.spread.sample(len(rows), generator=generator)
        spare = len(rows) <= self.share.start
        share = slice(0, 1) if spare else self.share
        features, labels = self.features[view[share], rows[share]].float(), self.data.labels[rows[share]]
        if moves is not None:
            features = self.spread.apply(features, labels, moves[:, share], self.features)
        return Batch(features[:, :, None, None], labels, whole=len(rows), spare=spare)

    def _load_or_compute(self) -> Tensor:
        path = cache_folder() / "features" / f"{self._digest()}.safetensors"
        expected = (self.settings.views, len(self.data), self.model.num_features)
        try:
            found = load_file(path)["features"]
            if tuple(found.shape) == expected:
                return found.to(self.data.device)
        except (OSError, SafetensorError, KeyError, ValueError):
            pass  # not there, or damaged
        features = torch.stack([torch.cat(list(self._view(number))) for number in range(self.settings.views)])
        try:
            with atomic_write(path) as temporary:
                save_file({"features": features.cpu()}, temporary)
            _remove_oldest(path.parent)
        except (OutputError, SafetensorError):
            pass  # they are only computed again the next time
        return features

    def _view(self, number: int) -> Iterator[Tensor]:
        """Features of all images in view `number`, chunk by chunk."""
        for chunk, rows in enumerate(torch.arange(len(self.data), device=self.data.device).split(_CHUNK)):
            images, labels = self.data.float_images(rows), self.data.labels[rows]
            generator = self.run.generator("views", number, chunk)
            if self.stage is not None:
                source = None if self.source is None else (self.source.float_images(rows), labels)
                images, _ = self.stage(images, labels, source=source, generator=generator)
            if self.augmentation is not None:
                draw = self.augmentation.sample(images.shape, generator=generator)
                images = self.augmentation.apply(images, draw_to(draw, images))
            yield cache_features(self.model, images, batch_size=32).half()

    def _digest(self) -> str:
        """Of what decides the views. A stage may hold learned weights, so with one they are those of this run alone."""
        digest = hashlib.sha256(f"views 2 {self.run.seed} {self.settings.views} {torch.__version__}".encode())
        digest.update(f"{self.model.input_size} ".encode())  # decides what the backbone sees, and is no weight
        digest.update(f"{describe_nuisance(self.augmentation)} {self.data.device.type} {self.data.digest}".encode())
        if self.stage is not None:
            digest.update(f"{self.run.path and Path(self.run.path).resolve()} {self.run.config}".encode())
        for name, value in self.model.state_dict().items():
            if not name.startswith("head."):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]


class FeatureSpread:
    """Within-class spread of larger classes, given to smaller ones in feature space.

    A row of class c moves, with probability 1 - n_c / n_max, by `strength` times the difference between an image of a
    larger class, in one of its views, and the mean of that class: how images of one class differ is taken to be alike
    in all of them. The larger classes are those of at least the median size, each as likely as the others.

    Args:
        data: training images.
        strength: factor on the differences.
    """

    def __init__(self, data: ImageData, strength: float) -> None:
        counts, labels = data.counts.cpu(), data.labels.cpu()
        self.strength, self.device, self.labels = strength, data.device, data.labels
        self.probability = (1 - counts / counts.max()).to(data.device)
        known = counts > 0
        self.givers = (known & (counts >= counts[known].float().median())).nonzero().flatten()
        self.counts, self.order = counts, labels.argsort(stable=True)
        self.starts = counts.cumsum(0) - counts
        self._means: Tensor | None = None

    def sample(self, size: int, *, generator: torch.Generator) -> Tensor:
        """Draws for `size` rows, float64 (3, size): gate, row of the image that gives, and its view in [0, 1)."""
        gate, image, view = torch.rand(3, size, generator=generator, dtype=torch.float64)
        giver = self.givers[torch.randint(len(self.givers), (size,), generator=generator)]
        row = self.order[self.starts[giver] + (image * self.counts[giver]).long()]
        return torch.stack([gate, row.double(), view])

    def apply(self, features: Tensor, labels: Tensor, draws: Tensor, views: Tensor) -> Tensor:
        """`features` (B, D) of images of `labels` (B,), moved by `draws`; `views` are all features, (V, N, D)."""
        gate, row, view = draws.to(self.device)
        row = row.long()
        difference = views[(view * len(views)).long(), row].float() - self._means_of(views)[self.labels[row]]
        moves = gate < self.probability[labels]
        return features + self.strength * moves[:, None] * difference

    def _means_of(self, views: Tensor) -> Tensor:
        """Mean feature of each class over all its views, float32 (K, D)."""
        if self._means is None:
            sums = torch.zeros(len(self.counts), views.shape[2], device=self.device)
            for view in views:
                sums.index_add_(0, self.labels, view.float())
            self._means = sums / (len(views) * self.counts.clamp_min(1).to(self.device))[:, None]
        return self._means


def describe_nuisance(nuisance: object) -> str:
    """Class and settings of a hand-written nuisance and of its parts; equal words mean equal draws."""
    if nuisance is None or isinstance(nuisance, str | int | float | bool | tuple):
        return repr(nuisance)
    values = vars(nuisance).items() if hasattr(nuisance, "__dict__") else ()
    inner = ", ".join(f"{name}={_describe_value(value)}" for name, value in sorted(values))
    return f"{type(nuisance).__module__}.{type(nuisance).__qualname__}({inner})"


def _describe_value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_describe_value, value))}]"
    if isinstance(value, Tensor):
        return str(value.tolist())
    return describe_nuisance(value) if hasattr(value, "apply") else repr(value)


def _remove_oldest(folder: Path) -> None:
    """Keep the newest `_KEPT_FILES` files of features."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    for file in files[:-_KEPT_FILES]:
        file.unlink(missing_ok=True)


def check_views(settings: TrainSettings, *, mode: str, mix: object) -> None:
    """Raise `SettingsError` where stored features cannot do what the settings ask for.

    Args:
        settings: of the training.
        mode: of the transfer plan.
        mix: a mixing of the caller's.
    """
    if not settings.views:
        raise SettingsError("training.spread moves stored features; set training.views, such as 8")
    if mode != "frozen":
        raise SettingsError(f"training.views stores what a frozen backbone gives; use transfer=frozen, got {mode}")
    asked = {
        "training.mixing": settings.mixing != "none" or mix is not None,
        "training.worst_of": settings.worst_of > 1,
        "training.consistency": settings.consistency > 0,
        "training.stage_source=balanced": settings.stage_source == "balanced",
        "training.stage_from=second_phase": settings.stage_from == "second_phase",
        "training.stage_bank": settings.stage_bank > 0,
    }
    for name, given in asked.items():
        if given:
            raise SettingsError(f"{name} acts on images at each step, which training.views passes by; use views=0")


@torch.no_grad()
def start_at_class_means(model: Classifier, data: ImageData) -> None:
    """Set the weights of a cosine head, in place, to the mean directions of the classes under the backbone as it is.

    Raises:
        SettingsError: a head of another kind.
    """
    from gen_invariance.classifier.model import CosineHead

    if not isinstance(model.head, CosineHead):
        raise SettingsError("training.head_start=class_means needs a cosine head; use classifier.head=cosine")
    trains, training = [parameter.requires_grad for parameter in model.backbone.parameters()], model.training
    model.eval().backbone.requires_grad_(False)
    features = nn.functional.normalize(cache_features(model, data.images), dim=1)
    sums = torch.zeros_like(model.head.weight).index_add(0, data.labels.to(features.device), features)
    norms = sums.norm(dim=1, keepdim=True)
    model.head.weight.copy_(torch.where(norms > 0, sums / norms.clamp_min(1e-12), model.head.weight))
    for parameter, train in zip(model.backbone.parameters(), trains, strict=True):
        parameter.requires_grad_(train)
    model.train(training)
