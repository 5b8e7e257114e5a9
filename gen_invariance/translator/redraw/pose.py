"""A translator whose draw depends on the image: estimate the image's own pose, remove it, give it another image's pose.

A distribution that is drawn independently of the image cannot be right for a limited nuisance, because the image
already carries a draw of its own. Here head classes are aligned (`congeal`), which gives the pose of each of their
images - the nuisance's own draws, as a bank. A small network learns to read the pose off an image, on all classes, and

    T(x) = turn(x, bank[k] - pose(x)),   k uniform

has the poses of the head images, whatever pose x had. The family (rotation, scale, slant) is given by hand, its joint
distribution is learned.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gen_invariance.torchvision_guard  # noqa: F401  (diffusers may lead to torchvision)

# isort: split
# diffusers reloads a model only if its module holds these very names.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from gen_invariance.data.images import check_images
from gen_invariance.nuisance.protocol import Draw, draw_to, whole
from gen_invariance.nuisance.warp import inverse_2x2
from gen_invariance.settings import Rows, Width
from gen_invariance.translator.redraw.congeal import move_by, pose_matrix

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
        shrunk = shrink(images)
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
        self,
        channels: int = 1,
        width: Width = 32,
        bank_size: Rows = 1024,
        scale: bool = True,
        slant: bool = False,
    ) -> None:
        super().__init__()
        self.estimator = PoseEstimator(channels, width, slant=slant)
        self.register_buffer("bank", torch.zeros(bank_size, 3))

    any_size = True
    """Poses are read at a size of their own, so images may have any."""

    def pose(self, images: Tensor) -> Tensor:
        """Estimated poses (B, 3), relative to the class's upright: rotation in degrees, log scale, slope."""
        direction, log_scale, slope = self.estimator(images)
        degrees = torch.rad2deg(torch.atan2(direction[:, 1], direction[:, 0]))
        return torch.stack([degrees, log_scale if self.config.scale else torch.zeros_like(log_scale), slope], dim=1)

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`pose`: int64 (B,), rows of the bank."""
        return {"pose": whole(self.config.bank_size, (shape[0],), generator=generator)}

    def read_parameters(self, draw: Draw) -> dict[str, Tensor]:
        """The poses that a draw gives, in readable units: degrees, factor, pixels a pixel, each (B,)."""
        degrees, log_scale, slope = self.bank[draw["pose"].to(self.bank.device)].unbind(1)
        parameters = {"rotation": degrees, "scale": log_scale.exp()}
        if self.config.slant:
            parameters["slant"] = slope
        return parameters

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
        matrix = pose_matrix(reached) @ inverse_2x2(pose_matrix(own))
        # The image has been turned once already; bilinear blur on top of that costs a tenth of the identity kept.
        return move_by(images, matrix, source=source, target=end, mode="bicubic")

    def describe(self) -> str:
        """The learned distribution in words, a line for each parameter."""
        units = {"rotation": "rotation in degrees", "scale": "scale as a factor", "slant": "slant in pixels a pixel"}
        everything = self.read_parameters({"pose": torch.arange(self.config.bank_size)})
        return describe_quantiles({units[name]: values for name, values in everything.items()})


def shrink(images: Tensor) -> Tensor:
    """Images at the size at which poses are estimated."""
    return F.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", antialias=True)


def describe_quantiles(parameters: Mapping[str, Tensor]) -> str:
    """Quantiles of each parameter's values in the bank, a line each."""
    lines = []
    for name, values in parameters.items():
        levels = torch.tensor([0.025, 0.25, 0.5, 0.75, 0.975], device=values.device)
        shown = ", ".join(f"{value:.3g}" for value in values.float().quantile(levels).tolist())
        lines.append(f"{name}: quantiles .025 .25 .5 .75 .975 are {shown}")
    return "\n".join(lines)
