"""A translator whose draw depends on the image: estimate the image's own pose, remove it, give it another image's pose.

A distribution that is drawn independently of the image cannot be right for a limited nuisance, because the image
already carries a draw of its own. Here head classes are aligned (`congeal`), which gives the pose of each of their
images - the nuisance's own draws, as a bank. A small network learns to read the pose off an image, on all classes, and

    T(x) = turn(x, bank[k] - pose(x)),   k uniform

has the poses of the head images, whatever pose x had. The family (rotation, scale, slant) is given by hand, its joint
distribution is learned.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import gen_invariance.torchvision_guard  # noqa: F401  (diffusers may lead to torchvision)

# isort: split
# diffusers reloads a model only if its module holds these very names.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from gen_invariance.data.images import ImageData, check_images
from gen_invariance.errors import RunError, SettingsError
from gen_invariance.nuisance.protocol import Draw, draw_to
from gen_invariance.run import Run
from gen_invariance.translator.fit_settings import checked_classes, chosen_classes
from gen_invariance.translator.redraw.congeal import Congealed, PoseGrid, congeal, move_by, pose_matrix

SLOPES = (-0.5, -0.25, 0.0, 0.25, 0.5)
"""Slopes that are tried where the slant is read."""

_SIDE = 16  # poses are estimated at this size: cheaper, and no pose needs more


class PoseEstimator(nn.Module):
    """Images (B, C, H, W) to rotation, as a direction (B, 2), log scale (B,), and slope (B,), 0 if it is not read."""

    def __init__(self, channels: int, width: int, *, slant: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 4 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * width * (_SIDE // 4) ** 2, 128),
            nn.ReLU(),
            nn.Linear(128, 4 if slant else 3),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Direction of unit norm, log scale, slope."""
        shrunk = small(images)
        out = self.layers(shrunk - shrunk.mean((1, 2, 3), keepdim=True))
        slope = out[:, 3] if out.shape[1] > 3 else torch.zeros_like(out[:, 2])
        return F.normalize(out[:, :2], dim=1), out[:, 2], slope


class PoseTranslator(ModelMixin, ConfigMixin):
    """The translator; also a nuisance.

    Args:
        channels: 1 or 3.
        width: channels of the estimator's first layer.
        bank_size: poses kept.
        scale: whether size is part of the pose.
        slant: whether the slope of a shear is part of it.
    """

    @register_to_config
    def __init__(
        self, channels: int = 1, width: int = 32, bank_size: int = 1024, scale: bool = True, slant: bool = False
    ) -> None:
        super().__init__()
        self.estimator = PoseEstimator(channels, width, slant=slant)
        self.register_buffer("bank", torch.zeros(bank_size, 3))

    def pose(self, images: Tensor) -> Tensor:
        """Estimated poses (B, 3), relative to the class's upright: rotation in degrees, log scale, slope."""
        direction, log_scale, slope = self.estimator(images)
        degrees = torch.rad2deg(torch.atan2(direction[:, 1], direction[:, 0]))
        return torch.stack([degrees, log_scale if self.config.scale else torch.zeros_like(log_scale), slope], dim=1)

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`pose`: int64 (B,), rows of the bank."""
        return {"pose": torch.randint(self.config.bank_size, (shape[0],), generator=generator)}

    def parameters_of(self, draw: Draw) -> dict[str, Tensor]:
        """The poses that a draw gives, in readable units: degrees, factor, pixels a pixel, each (B,)."""
        degrees, log_scale, slope = self.bank[draw["pose"].to(self.bank.device)].unbind(1)
        return {"rotation": degrees, "scale": log_scale.exp(), **({"slant": slope} if self.config.slant else {})}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Each image in the drawn pose; same shape, dtype, device and range."""
        check_images(images, channels=self.config.channels, where="pose translator")
        if not len(images):
            return images.clone()
        turned = self.bring_to(images.float(), self.bank[draw_to(draw, images)["pose"]])
        return turned.clamp(0, 1).to(images.dtype)

    def bring_to(
        self,
        images: Tensor,
        target: Tensor,
        *,
        strength: float = 1.0,
        seen: Tensor | None = None,
        points: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Images brought from their own pose to `target` (B, 3), as in the bank; part of the way if asked.

        The pose is read off `seen` (B, channels, H, W) where it is given; then the images may have any channels. Of
        `points` the first is brought to the second, see `move_by`; None leaves the centre where it is. Values may
        overshoot their range a little.
        """
        own = self.pose(images if seen is None else seen)
        way = target - own
        # The shorter way round, so that half the strength is half a turn at most.
        turn = (way[:, :1] + 180) % 360 - 180
        growth = way[:, 1:2] if self.config.scale else torch.zeros_like(turn)
        reached = own + strength * torch.cat([turn, growth, way[:, 2:]], dim=1)
        source, end = (None, None) if points is None else points
        matrix = pose_matrix(reached) @ torch.linalg.inv(pose_matrix(own))
        # The image has been turned once already; bilinear blur on top of that costs a tenth of the identity kept.
        return move_by(images, matrix, source=source, target=end, mode="bicubic")

    def describe(self) -> str:
        """The learned distribution in words, a line for each parameter."""
        degrees, log_scale, slope = self.bank.unbind(1)
        quantiles = torch.tensor([0.025, 0.25, 0.5, 0.75, 0.975], device=self.bank.device)
        shown = [("rotation in degrees", degrees), ("scale as a factor", log_scale.exp())]
        lines = []
        for name, values in [*shown, *([("slant in pixels a pixel", slope)] if self.config.slant else [])]:
            shown = ", ".join(f"{value:.3g}" for value in values.quantile(quantiles).tolist())
            lines.append(f"{name}: quantiles .025 .25 .5 .75 .975 are {shown}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PoseSettings:
    """How a pose translator is fitted.

    Attributes:
        steps, batch_size, learning_rate: of the estimator (Adam).
        classes: whose poses enter the bank: "head", "all", or a list of names.
        head_from: the smallest training count of a head class.
        images_per_class: at most so many are aligned; bounds time and memory.
        uniform_below: a density of smaller concentration (mean resultant length) is taken for uniform. Of a limited
            rotation of +-45 degrees it is .90, of +-120 degrees .41.

    Raises:
        SettingsError: a value out of its range.
    """

    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 2e-3
    classes: str | tuple[str | int, ...] = "head"
    head_from: int = 20
    images_per_class: int = 200
    uniform_below: float = 0.3

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", checked_classes(self.classes, "pose.classes"))
        for name, value in asdict(self).items():
            if name != "classes" and not value > 0:
                raise SettingsError(f"pose.{name} must be positive, got {value}")


def fit_pose(
    translator: PoseTranslator, data: ImageData, settings: PoseSettings, *, run: Run, progress: bool | None = None
) -> PoseTranslator:
    """Align, fill the bank, train the estimator; returns the translator in eval mode. Not saved.

    Takes seconds, so a stopped fit starts again and ends in the same weights.
    See `fit_pose_and_rows` for which images the bank's poses are of.

    Args:
        translator: untrained.
        data: the training set; classes that are not chosen are aligned under the density of the others.
        settings: see `PoseSettings`.
        run: for its generators and metrics.
        progress: show a progress bar; None shows one on a terminal only.

    Raises:
        SettingsError: no class is large enough.
        RunError: the loss became NaN or infinite.
    """
    return fit_pose_and_rows(translator, data, settings, run=run, progress=progress)[0]


def fit_pose_and_rows(
    translator: PoseTranslator, data: ImageData, settings: PoseSettings, *, run: Run, progress: bool | None = None
) -> tuple[PoseTranslator, Tensor]:
    """`fit_pose`, and the rows of `data` whose poses the bank holds, int64 (bank_size,)."""
    run.load_latest()  # drops metrics of a stopped fit
    grid = PoseGrid(slopes=SLOPES) if translator.config.slant else PoseGrid()
    if translator.config.slant:  # poses to try are as many times more, so images are fewer
        settings = replace(settings, images_per_class=-(-settings.images_per_class // len(SLOPES)))
    head, tail = _members(data, settings, run)
    found = congeal(
        [small(data.float_images(rows).cpu()) for rows in head], generator=run.generator("congeal", "head"), grid=grid
    )
    run.log(step=0, concentration=found.concentration)
    banked = _fill_bank(translator, found, head, settings, run)
    poses = list(zip(head, found.poses, strict=True))
    if tail:
        images, generator = [small(data.float_images(rows).cpu()) for rows in tail], run.generator("congeal", "tail")
        poses += zip(tail, congeal(images, generator=generator, grid=grid, density=found.density).poses, strict=True)
    _train_estimator(translator, data, poses, settings, run, progress=progress)
    return translator.eval(), banked


def _members(data: ImageData, settings: PoseSettings, run: Run) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of the chosen classes and of the others, each class cut to `images_per_class`."""
    head, tail = [], []
    chosen = set(head_labels(data, settings))
    labels = data.labels.cpu()
    for label, count in enumerate(data.counts.tolist()):
        rows = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(count, generator=run.generator("congeal", label))
        rows = rows[order[: settings.images_per_class]]
        if count:
            (head if label in chosen else tail).append(rows)
    return head, tail


def head_labels(data: ImageData, settings: PoseSettings) -> list[int]:
    """Labels of the classes whose images enter a bank."""
    advice = "lower the bound of head classes"
    return chosen_classes(data, settings.classes, head_from=settings.head_from, advice=advice)


def small(images: Tensor) -> Tensor:
    """Images at the size at which poses are estimated."""
    return F.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", antialias=True)


def _fill_bank(
    translator: PoseTranslator, found: Congealed, head: list[Tensor], settings: PoseSettings, run: Run
) -> Tensor:
    """Poses of head images, every class with the same weight, spread over the step of the grid; returns the rows."""
    size, generator, step = translator.config.bank_size, run.generator("bank"), PoseGrid().step
    classes = torch.randint(len(found.poses), (size,), generator=generator)
    rows = [int(torch.randint(len(found.poses[label]), (1,), generator=generator)) for label in classes.tolist()]
    picked = list(zip(classes.tolist(), rows, strict=True))
    poses = torch.stack([found.poses[label][row] for label, row in picked])
    poses[:, 0] += step * (torch.rand(size, generator=generator) - 0.5)
    if found.concentration < settings.uniform_below:
        poses[:, 0] = 360 * (torch.rand(size, generator=generator) - 0.5)
    translator.bank.copy_(poses)
    return torch.stack([head[label][row] for label, row in picked])


def _train_estimator(
    translator: PoseTranslator,
    data: ImageData,
    poses: list[tuple[Tensor, Tensor]],
    settings: PoseSettings,
    run: Run,
    *,
    progress: bool | None,
) -> None:
    """Teach the network the aligned poses; half of the images are brought to another pose first."""
    device = data.device
    translator.to(device).train()
    optimizer = torch.optim.Adam(translator.estimator.parameters(), lr=settings.learning_rate)
    sizes = torch.tensor([len(rows) for rows, _ in poses])
    starts = sizes.cumsum(0) - sizes
    rows, own = (torch.cat([entry[part] for entry in poses]) for part in range(2))
    bank = translator.bank.cpu()
    bar = tqdm(range(settings.steps), desc="pose", disable=None if progress is None else not progress)
    for step in bar:
        generator = run.generator("pose", step)
        classes = torch.randint(len(sizes), (settings.batch_size,), generator=generator)
        chosen = starts[classes] + (torch.rand(settings.batch_size, generator=generator) * sizes[classes]).long()
        # Half of the images get another pose of the bank: poses that no image has need not be told apart.
        other = bank[torch.randint(len(bank), (settings.batch_size,), generator=generator)]
        moved = torch.rand(settings.batch_size, generator=generator) < 0.5
        target = torch.where(moved[:, None], other, own[chosen])
        matrix = pose_matrix(target) @ torch.linalg.inv(pose_matrix(own[chosen]))
        images = move_by(data.float_images(rows[chosen]), matrix.to(device))
        angle, log_scale, slope = torch.deg2rad(target[:, 0]).to(device), *target[:, 1:].to(device).unbind(1)
        direction, size, lean = translator.estimator(images)
        agreement = (direction * torch.stack([angle.cos(), angle.sin()], dim=1)).sum(1)
        loss = (1 - agreement).mean() + F.smooth_l1_loss(size, log_scale) + F.smooth_l1_loss(lean, slope)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 25 == 0 or step + 1 == settings.steps:
            value = float(loss.detach())
            if not value < float("inf"):
                raise RunError(f"fitting stopped at step {step + 1}: loss term 'pose' is {value}; check the images")
            run.log(step=step + 1, pose=value)
