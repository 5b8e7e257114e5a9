"""The content view: what the flow translator may see of an image.

A translator that sees what the nuisance changes copies it instead of drawing it. So the view leaves out whatever the
nuisance may change; what that is, is named by hand (`removes`), and how the rest of the image goes with the nuisance is
learned. Brightness and contrast always go: every view is standardised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Draw
from gen_invariance.nuisance.thickness import dilate, erode

REMOVABLE = {
    "tone": "any monotone change of pixel values: pixels are replaced by their ranks in the image",
    "sign": "light on dark or dark on light: the view is negated at random",
    "colour": "channels: they are mixed to one grey in random shares",
    "thickness": "stroke width: the view is dilated or eroded at random",
}
"""What a view can leave out, beyond brightness and contrast."""

_LARGEST_SIDE = 3  # pixels of the square that dilates or erodes


def check_removes(removes: Sequence[str]) -> None:
    """Raise `SettingsError` unless `removes` are some of `REMOVABLE`, each once."""
    if set(removes) - set(REMOVABLE) or len(set(removes)) < len(removes):
        raise SettingsError(
            f"flow translator: removes must be some of {', '.join(REMOVABLE)}, each once, got {tuple(removes)}"
        )


def sample_view(shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
    """The random part of the views of `shape` = (B, C, H, W), whatever they remove.

    `shares`, float32 (B, C), sum 1; `side`, int64 (B,), pixels, positive dilates and negative erodes; `sign`, float32
    (B,), -1 or 1.
    """
    count, channels = shape[:2]
    weights = -torch.rand(count, channels, generator=generator).clamp_min(1e-6).log()  # uniform on the simplex
    return {
        "shares": weights / weights.sum(1, keepdim=True),
        "side": torch.randint(-_LARGEST_SIDE, _LARGEST_SIDE + 1, (count,), generator=generator),
        "sign": torch.randint(2, (count,), generator=generator).float() * 2 - 1,
    }


def content_view(images: Tensor, *, removes: Sequence[str], draw: Draw | None = None) -> Tensor:
    """`images` (B, C, H, W) without brightness, contrast and what `removes` names; mean 0 and deviation 1 each.

    `draw` is of `sample_view`, while fitting; None takes equal shares of the channels, no change of stroke width and
    the positive sign, one of the cases that fitting saw.
    """
    view = images
    if "colour" in removes:
        shares = torch.full_like(images[:, :, 0, 0], 1 / images.shape[1]) if draw is None else draw["shares"]
        view = torch.einsum("bchw,bc->bhw", view, shares.to(view)).unsqueeze(1).expand_as(images)
    if "tone" in removes:
        view = ranks(view)
    if draw is not None and "sign" in removes:
        view = view * draw["sign"].to(view).view(-1, 1, 1, 1)
    if draw is not None and "thickness" in removes:
        view = _thickened(view, draw["side"])
    return standardised(view)


def standardised(images: Tensor) -> Tensor:
    """Each image (C, H, W) with mean 0 and standard deviation 1; a constant image becomes 0."""
    centred = images - images.mean((1, 2, 3), keepdim=True)
    deviation = centred.square().mean((1, 2, 3), keepdim=True).sqrt()
    return centred / deviation.clamp_min(1e-3)


def ranks(images: Tensor) -> Tensor:
    """Each pixel's mean rank among the pixels of its image, in (0, 1); equal pixels get equal ranks."""
    flat = images.flatten(1).contiguous()
    ordered = flat.sort(1).values
    low = torch.searchsorted(ordered, flat, right=False)
    high = torch.searchsorted(ordered, flat, right=True)
    return ((low + high) / (2 * flat.shape[1])).to(images.dtype).view_as(images)


def _thickened(view: Tensor, sides: Tensor) -> Tensor:
    """Rows dilated (positive side) or eroded (negative side); rows of one side go together."""
    result = view.clone()
    for side in range(2, _LARGEST_SIDE + 1):
        for signed, operation in ((side, dilate), (-side, erode)):
            if view.device.type != "cpu":  # every row: a GPU would have to be asked which ones
                result = torch.where((sides == signed)[:, None, None, None], operation(view, side), result)
                continue
            rows = (sides == signed).nonzero().squeeze(1).to(view.device)
            result[rows] = operation(view[rows], side)
    return result
