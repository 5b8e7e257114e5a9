"""A device that is not there: its values live in memory, and whatever mixes devices fails, as on a GPU.

Operations run on the CPU, so results equal the CPU's to the bit. What is caught: tensors of two devices in one
operation, a CPU generator that draws on the device, values read by numpy, pickled weights of the device. What is not:
kernels, their rounding, speed, memory.

The backend is registered for the whole process; `tests/test_devices.py` starts one of its own for it.
"""

from __future__ import annotations

import functools

import torch
import torch.utils.backend_registration as registration
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

ATEN = torch.ops.aten
MOVES = (ATEN._to_copy.default, ATEN.copy_.default, ATEN._foreach_copy_.default)
INDEXED = (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._unsafe_index, ATEN._index_put_impl_)


class _Backend(registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_KERNELS: list[torch.library.Library] = []


def register() -> torch.device:
    """Register the backend, once a process; its only device."""
    if not _KERNELS:
        registration._setup_privateuseone_for_python_backend("pretended", backend_module=_Backend())
        # `torch.tensor(..., device=...)` makes its result below the level where modes and subclasses are asked.
        library = torch.library.Library("aten", "IMPL")
        library.impl("empty_strided", _empty, "PrivateUse1")
        library.impl("_copy_from", _copied, "PrivateUse1")
        _KERNELS.append(library)
    return torch.device("pretended", 0)


def _empty(size: list[int], stride: list[int], *, dtype: torch.dtype | None = None, **_: object) -> Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    target.values_here.copy_(source.values_here if isinstance(source, Elsewhere) else source)
    return target


class Elsewhere(Tensor):
    """A tensor of the pretended device, around the one that has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=register(),
        )  # fmt: skip

    def __init__(self, values: Tensor) -> None:
        self.values_here = values

    def __repr__(self) -> str:
        return f"Elsewhere({self.values_here})"

    def tolist(self) -> object:
        return self.values_here.tolist()

    def numpy(self, *, force: bool = False) -> object:
        if not force:
            raise TypeError("can't convert a tensor of the pretended device to numpy; use Tensor.cpu() first")
        return self.values_here.numpy(force=True)

    def __reduce_ex__(self, protocol: int) -> object:
        return self.values_here.__reduce_ex__(protocol)  # files hold the values; who reads them says where to

    def __deepcopy__(self, memo: dict) -> Tensor:
        copy = Elsewhere(self.values_here.clone())
        return nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _carry_out(function, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """While it is on, tensors may be made on and moved to the pretended device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _asked_for(kwargs) or any(isinstance(each, Elsewhere) for each in _given(args, kwargs)):
            return _carry_out(function, args, kwargs)
        return function(*args, **kwargs)


def _asked_for(kwargs: dict) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "pretended"


def _given(args: tuple, kwargs: dict) -> list:
    """All arguments, those in lists, too; lists of operations hold no further lists."""
    given: list = []
    for each in (*args, *kwargs.values()):
        given.extend(each) if isinstance(each, list | tuple) else given.append(each)
    return given


def _each(change, value: object) -> object:
    """`change` carried out on a value, or on each of a list of values."""
    return type(value)(map(change, value)) if type(value) in (list, tuple) else change(value)


def _inside(value: object) -> object:
    return value.values_here if isinstance(value, Elsewhere) else value


def _outside(value: object) -> object:
    return Elsewhere(value) if isinstance(value, Tensor) else value


@functools.cache
def _makes_new(function) -> bool:
    """Does the result share no memory with what was given?"""
    schema = function._schema
    return not any(each.alias_info for each in (*schema.arguments, *schema.returns))


@functools.cache
def _writes_first(function) -> bool:
    """Is the result the first argument, whose values were changed, but not its shape?"""
    given, made = function._schema.arguments, function._schema.returns
    return (
        torch.Tag.inplace_view not in function.tags
        and len(made) == 1
        and all(each.alias_info is not None and each.alias_info.is_write for each in (given[0], made[0]))
    )


def _carry_out(function, args: tuple, kwargs: dict) -> object:
    given = _given(args, kwargs)
    _refuse_mixed(function, args, given)
    if any(isinstance(each, torch.Generator) for each in given):
        raise RuntimeError(f"{function}: a CPU generator draws on the device")

    inside = [_each(_inside, each) for each in args]
    options = {name: _each(_inside, each) for name, each in kwargs.items()}
    if kwargs.get("device") is not None:
        options["device"] = torch.device("cpu")
    out = function(*inside, **options)

    if function is ATEN.copy_.default:
        stays = isinstance(args[0], Elsewhere)
    else:
        stays = _asked_for(kwargs) if kwargs.get("device") is not None else True
    if not stays:
        return args[0] if function is ATEN.copy_.default else out
    if _writes_first(function) and isinstance(args[0], Elsewhere):
        return args[0]
    wrapped = _each(_outside, out)
    if _makes_new(function) or not any(isinstance(each, Elsewhere) for each in given):
        return wrapped
    return return_and_correct_aliasing(function, args, kwargs, wrapped)


def _refuse_mixed(function, args: tuple, given: list) -> None:
    """Raise as CUDA does: single numbers of the CPU may take part, and indices may lie there."""
    if function in MOVES:
        return
    if function.overloadpacket in INDEXED:
        given = [args[0], *(each for each in args[2:] if isinstance(each, Tensor))]
    tensors = [each for each in given if isinstance(each, Tensor) and each.dim()]
    if len({isinstance(each, Elsewhere) for each in tensors}) > 1:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device")
