"""Where things are computed: a loop on the device of its data, and new tensors whatever the process prefers.

accelerate keeps one state for a whole process, made by whoever asks first. A notebook that trains on the CPU and then
on a GPU would stay on the CPU, another GPU than the first could not be had, and a second loop at another precision
would be refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.backends import cuda, cudnn
from torch.optim.swa_utils import AveragedModel

from gen_invariance.errors import SettingsError

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Inside, tensors are made on the CPU and in float32 unless somebody says otherwise; also a decorator.

    `torch.set_default_device`, `with torch.device(...)` and `torch.set_default_dtype` would have random numbers of CPU
    generators drawn elsewhere, or others of another precision.
    """
    dtype = torch.get_default_dtype()
    if dtype is not torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        if torch.get_default_device().type == "cpu":
            yield
        else:
            with torch.device("cpu"):
                yield
    finally:
        if dtype is not torch.float32:
            torch.set_default_dtype(dtype)


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, a GPU multiplies and convolves float32 as such, without TF32, which keeps three digits of them."""
    settings = (cuda.matmul, cudnn.conv)
    before = [each.fp32_precision for each in settings]
    try:
        for each in settings:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, precision in zip(settings, before, strict=True):
            each.fp32_precision = precision


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number in any of `tensors` is NaN or infinite; a GPU is asked once."""
    flags: dict[torch.device, list[Tensor]] = {}
    for each in tensors:
        flags.setdefault(each.device, []).append(each.isfinite().all())
    return all(bool(torch.stack(found).all()) for found in flags.values())


def with_index(device: torch.device) -> torch.device:
    """`device` as tensors there name it: "cuda" is the current one of them, "cuda:0" for instance."""
    if device.index is not None or device.type in ("cpu", "meta"):
        return device
    return torch.empty(0, device=device).device


def send(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`; the program goes on while a GPU fetches them.

    A copy from ordinary memory would wait until all work before it is done. From a GPU to the CPU it has to.
    """
    if values.device == device or values.device.type != "cpu":
        return values.to(device)
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def doubled(values: Tensor) -> Tensor:
    """`values` in float64, where they are; on the CPU if their device has no float64, as Apple's."""
    try:
        return values.double()
    except TypeError:
        return values.cpu().double()


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether `device` multiplies bfloat16 in hardware, so that it is quicker there than float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


_TRAINING_BYTES = 16  # of a weight: itself, its gradient and two averages of Adam's, in float32
_CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")


def memory_of(device: torch.device | str) -> float:
    """Bytes of memory that a device has, in use or not; infinite where that cannot be found out."""
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    memory = math.inf
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max" is no number
        memory = min(memory, int(_CONTROL_GROUP.read_text()))
    return memory


def check_memory(size: float, what: str, advice: str, *, device: torch.device | str = "cpu") -> None:
    """Raise where `size` bytes are more than a device has at all, before a system that lends them ends the process.

    Raises:
        SettingsError: says `what` needs them, and `advice`.
    """
    memory = memory_of(device)
    if size > memory:
        raise SettingsError(
            f"{what} would take {size / 1e9:,.0f} GB, and the device {torch.device(device).type} has "
            f"{memory / 1e9:,.0f} GB; {advice}"
        )


def check_network(build: Callable[[], nn.Module], where: str) -> None:
    """Raise where a network that `build` makes could not be trained for want of memory; it is made without any.

    Raises:
        SettingsError: more weights than the memory of the machine suffices for.
    """
    try:
        with torch.device("meta"):
            count = sum(weight.numel() for weight in build().parameters())
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        count = 2**63
    check_weights(count, where)


def check_weights(count: int, where: str) -> None:
    """As `check_network`, from the number of its weights."""
    check_memory(count * _TRAINING_BYTES, f"training {where} of these sizes", "choose fewer channels or layers")


@contextmanager
def use_accelerator(device: torch.device | str, *, mixed_precision: str = "no") -> Iterator[Accelerator]:
    """An `Accelerator` on `device`; one that was launched with others keeps the device it was given.

    A state of accelerate's that was there before and differs, a user's own for instance, is put back at the end. Its
    classes offer no way to do that, so their private `_shared_state` is read and written here and nowhere else.
    """
    from accelerate import Accelerator, PartialState  # slow to import, and only loops need it
    from accelerate.state import AcceleratorState

    device = torch.device(device)
    shared = PartialState._shared_state, AcceleratorState._shared_state
    device_state, whole_state = shared
    before = dict(device_state), dict(whole_state)
    is_alone = not device_state or PartialState().num_processes == 1
    is_elsewhere = is_alone and bool(device_state) and not _is_same(PartialState().device, device)
    is_changed = is_elsewhere or (bool(whole_state) and whole_state.get("_mixed_precision") != mixed_precision)
    try:
        if is_elsewhere:
            device_state.clear()
        if is_changed:
            whole_state.clear()
        state = PartialState(cpu=device.type == "cpu")
        if state.num_processes == 1:
            state.device = device
        yield Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")
    finally:
        if is_changed:
            for values, former in zip(shared, before, strict=True):
                values.clear()
                values.update(former)


def _is_same(one: torch.device, other: torch.device) -> bool:
    """Whether two names are of one device; a type without a number is its first."""
    return one.type == other.type and (one.index or 0) == (other.index or 0)


class MovingAverage(AveragedModel):
    """An average of a model's weights that is brought forward without asking a GPU how many there were.

    As `AveragedModel` with a decay that may depend on the number of updates, which is counted on the CPU.

    Args:
        model: whose weights; the average is `module`, and takes the first ones as they are.
        decay: number of updates so far, 1 or more, to what is kept of the average.
        use_buffers: average buffers, too; they are copied otherwise.
    """

    def __init__(self, model: nn.Module, decay: Callable[[int], float], *, use_buffers: bool = False) -> None:
        super().__init__(model, use_buffers=use_buffers)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the weights of `model`."""
        updates = int(self.n_averaged)
        kept, current = [*self.module.parameters()], [*model.parameters()]
        buffers = [*zip(self.module.buffers(), model.buffers(), strict=True)]
        averaged_buffers = [pair for pair in buffers if self.use_buffers and updates and pair[0].is_floating_point()]
        if updates:
            share = 1 - self.decay(updates)
            kept += [pair[0] for pair in averaged_buffers]
            current += [pair[1] for pair in averaged_buffers]
            torch._foreach_lerp_(kept, current, share)
        else:
            torch._foreach_copy_(kept, current)
        for average, value in buffers:
            if not (updates and self.use_buffers):
                average.copy_(value)
            elif not average.is_floating_point():
                average.copy_(average * self.decay(updates) + value * (1 - self.decay(updates)))
        self.n_averaged += 1
