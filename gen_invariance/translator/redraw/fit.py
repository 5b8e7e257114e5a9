"""Fit a redraw or a pose translator, in one go: align images, fill the bank with readings, learn to read poses.

Takes seconds, so a stopped fit starts again and ends in the same weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor
from tqdm.auto import tqdm

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.data.storage import check_batch
from gen_invariance.devices import send
from gen_invariance.errors import RunError
from gen_invariance.run import Run
from gen_invariance.settings import Count, settings_class
from gen_invariance.translator.redraw.congeal import Congealed, PoseGrid, congeal, move_by, pose_matrix
from gen_invariance.translator.redraw.fit_photo import fit_photo
from gen_invariance.translator.redraw.model import RedrawTranslator
from gen_invariance.translator.redraw.pose import SLOPES, PoseTranslator, shrink
from gen_invariance.translator.redraw.shape import move_to_centre, read_place, read_width
from gen_invariance.translator.redraw.tone import Tone, extract_figure, read_tone, take_out
from gen_invariance.translator.samples import draw_balanced_rows, find_class_members, find_class_rows
from gen_invariance.translator.settings import FitSettings

_LOG_EVERY = 25


@settings_class("translator.objective")
class PoseSettings:
    """How poses are aligned and learned."""

    learning_rate: PositiveFloat = 2e-3
    """Of the network that reads poses (Adam)."""
    images_per_class: Count = 200
    """At most so many are aligned; bounds time and memory."""
    uniform_below: PositiveFloat = 0.3
    """A density of angles of smaller concentration counts as uniform; rotations of +-45 degrees have .90, +-120 .41."""


def fit_redraw(
    translator: RedrawTranslator,
    data: ImageData,
    settings: FitSettings,
    options: PoseSettings | None = None,
    *,
    run: Run,
    progress: bool | None = None,
) -> RedrawTranslator:
    """Fill the bank with the readings of head images and learn to read poses; in eval mode. Not saved.

    Args:
        translator: new.
        data: the training set.
        settings: steps and batch size of the network that reads poses; classes whose readings enter the bank.
        options: see `PoseSettings`; None for the defaults.
        run: for its generators and metrics.
        progress: show a progress bar; None shows one on a terminal only.

    Raises:
        SettingsError: no class is large enough.
        RunError: the loss became NaN or infinite.
    """
    if translator.config.kind == "photo":
        return fit_photo(translator, data, settings, run=run)
    tones, figures = _read_tones(translator, data)
    if translator.pose is not None:
        centred = move_to_centre(figures, read_place(figures)) if "place" in translator.config.parts else figures
        canonical = replace(data, images=to_uint8(centred))
        rows = _fit_poses(translator.pose, canonical, settings, options or PoseSettings(), run, progress=progress)
    else:
        run.load_latest()  # drops metrics of a stopped fit
        members = find_class_members(data, settings)
        rows = draw_balanced_rows(members, translator.config.bank_size, generator=run.generator("bank"))
    rows = rows.to(tones.ground.device)
    translator.to(data.device)
    for name in ("ground", "base", "ink"):
        getattr(translator, name).copy_(getattr(tones, name)[rows])
    translator.log_width.copy_(read_width(figures[rows]))
    translator.place.copy_(read_place(figures[rows]))
    return translator.eval()


def fit_pose(
    translator: PoseTranslator,
    data: ImageData,
    settings: FitSettings,
    options: PoseSettings | None = None,
    *,
    run: Run,
    progress: bool | None = None,
) -> PoseTranslator:
    """Align, fill the bank with poses, learn to read them; in eval mode. Arguments and errors of `fit_redraw`.

    Classes that are not chosen are aligned under the density of the others.
    """
    _fit_poses(translator, data, settings, options or PoseSettings(), run, progress=progress)
    return translator


def _read_tones(translator: RedrawTranslator, data: ImageData, *, chunk: int = 4096) -> tuple[Tone, Tensor]:
    """Tone and figure (N, 1, H, W) of all images."""
    kind, tones, figures = translator.config.kind, [], []
    for rows in torch.arange(len(data)).split(chunk):
        images = data.float_images(rows)
        tones.append(read_tone(images, kind=kind))
        figures.append(extract_figure(take_out(images, tones[-1], kind=kind), kind=kind))
    levels = (torch.cat([getattr(tone, name) for tone in tones]) for name in ("ground", "base", "ink"))
    return Tone(*levels), torch.cat(figures)


def _fit_poses(
    translator: PoseTranslator,
    data: ImageData,
    settings: FitSettings,
    options: PoseSettings,
    run: Run,
    *,
    progress: bool | None,
) -> Tensor:
    """Fit `translator`; returns the rows of `data` whose poses the bank holds, int64 (bank_size,)."""
    run.load_latest()  # drops metrics of a stopped fit
    grid, most = PoseGrid(), options.images_per_class
    if translator.config.slant:  # poses to try are as many times more, so images are fewer
        grid, most = PoseGrid(slopes=SLOPES), -(-most // len(SLOPES))
    head, tail = pick_aligned_rows(data, settings, run, most=most)
    aligned = congeal(_shrunk(data, head), generator=run.generator("congeal", "head"), grid=grid)
    run.log(step=0, concentration=aligned.concentration)
    uniform = aligned.concentration < options.uniform_below
    banked = _fill_bank(translator, aligned, head, run, uniform=uniform)
    rows, poses = list(head), list(aligned.poses)
    if tail:
        generator = run.generator("congeal", "tail")
        rows += tail
        poses += congeal(_shrunk(data, tail), generator=generator, grid=grid, density=aligned.density).poses
    _train_estimator(translator, data, rows, poses, settings, options.learning_rate, run, progress=progress)
    translator.eval()
    return banked


def _shrunk(data: ImageData, classes: list[Tensor]) -> list[Tensor]:
    """The images of each class at the size at which poses are estimated, on the CPU."""
    return [shrink(data.float_images(rows).cpu()) for rows in classes]


def pick_aligned_rows(
    data: ImageData, settings: FitSettings, run: Run, *, most: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of the chosen classes and of the others that have images, at most `most` of each class."""
    chosen = {int(data.labels[rows[0]]) for rows in find_class_members(data, settings)}
    head, tail = [], []
    for label, rows in enumerate(find_class_rows(data, range(data.num_classes))):
        shuffled = rows[torch.randperm(len(rows), generator=run.generator("congeal", label))]
        if len(rows):
            (head if label in chosen else tail).append(shuffled[:most])
    return head, tail


def _fill_bank(
    translator: PoseTranslator, aligned: Congealed, head: list[Tensor], run: Run, *, uniform: bool
) -> Tensor:
    """Poses of head images, every class with the same weight, spread over the step of the grid; returns the rows."""
    size, generator, step = translator.config.bank_size, run.generator("bank"), PoseGrid().step
    # Not `draw_balanced_rows`: banks of earlier versions were drawn in this order.
    classes = torch.randint(len(head), (size,), generator=generator).tolist()
    within = [int(torch.randint(len(head[label]), (1,), generator=generator)) for label in classes]
    poses = torch.stack([aligned.poses[label][row] for label, row in zip(classes, within, strict=True)])
    poses[:, 0] += step * (torch.rand(size, generator=generator) - 0.5)
    if uniform:
        poses[:, 0] = 360 * (torch.rand(size, generator=generator) - 0.5)
    translator.bank.copy_(poses)
    return torch.stack([head[label][row] for label, row in zip(classes, within, strict=True)])


def _train_estimator(
    translator: PoseTranslator,
    data: ImageData,
    members: list[Tensor],
    poses: list[Tensor],
    settings: FitSettings,
    learning_rate: float,
    run: Run,
    *,
    progress: bool | None,
) -> None:
    """Teach the network the aligned `poses` of the images `members`, both class by class."""
    device, batch_size = data.device, settings.batch_size
    check_batch(data.images, batch_size, where="fit", pixel_bytes=8)  # as they are and moved; the rest is at small size
    check_batch(shrink(data.float_images(torch.arange(1))), batch_size, where="fit")
    translator.to(device).train()
    optimizer = torch.optim.Adam(translator.estimator.parameters(), lr=learning_rate)
    rows, aligned = torch.cat(members), torch.cat(poses)
    sizes = [len(each) for each in members]
    indices = torch.arange(len(rows)).split(sizes)
    bank = translator.bank.cpu()
    for step in tqdm(range(settings.steps), desc="pose", disable=None if progress is None else not progress):
        generator = run.generator("pose", step)
        chosen = draw_balanced_rows(indices, batch_size, generator=generator)
        # Half of the images get another pose of the bank: poses that no image has need not be told apart.
        other = bank[torch.randint(len(bank), (batch_size,), generator=generator)]
        moved = torch.rand(batch_size, generator=generator) < 0.5
        target = torch.where(moved[:, None], other, aligned[chosen])
        matrix = pose_matrix(target) @ torch.linalg.inv(pose_matrix(aligned[chosen]))
        images = move_by(data.float_images(send(rows[chosen], device)), send(matrix, device))
        target = send(target, device)
        angle, log_scale, slope = torch.deg2rad(target[:, 0]), *target[:, 1:].unbind(1)
        direction, size, lean = translator.estimator(images)
        agreement = (direction * torch.stack([angle.cos(), angle.sin()], dim=1)).sum(1)
        loss = (1 - agreement).mean() + F.smooth_l1_loss(size, log_scale) + F.smooth_l1_loss(lean, slope)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % _LOG_EVERY == 0 or step + 1 == settings.steps:
            value = float(loss.detach())
            if not value < float("inf"):
                raise RunError(f"fitting stopped at step {step + 1}: loss term 'pose' is {value}; check the images")
            run.log(step=step + 1, pose=value)
