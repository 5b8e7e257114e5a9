"""A device that is not there: its values live in memory, and whatever mixes devices fails, as on a GPU.

Operations run on the CPU, so results equal the CPU's to the bit. What is caught: tensors of two devices in one
operation, a CPU generator that draws on the device, values read by numpy, pickled weights of the device. What is not:
kernels, their rounding, speed, memory.

`Count` counts what a GPU would be asked to do, and where the program would wait for it.

The backend is registered for the whole process; `tests/test_devices.py` starts one of its own for it.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter

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
    _note("copy_", 0, not non_blocking)
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
        _note("tolist", 0, True)
        return self.values_here.tolist()

    def numpy(self, *, force: bool = False) -> object:
        if not force:
            raise TypeError("can't convert a tensor of the pretended device to numpy; use Tensor.cpu() first")
        _note("numpy", 0, True)
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


class Count:
    """Counts, while the `with` block lasts, what the pretended device is asked for.

    Attributes:
        operations: kernels and copies that would be launched; views, which launch nothing, are left out.
        waits: operations that a GPU has to have finished before the program goes on: values or shapes that are read
            (`item`, `nonzero`, a mask as an index, `unique`, errors of linear algebra), and copies from one device to
            the other, except those to the device that were asked for without waiting.
        places: how many waits there were at each line of the package.
    """

    def __init__(self) -> None:
        self.operations, self.waits, self.places = 0, 0, Counter()

    def __enter__(self) -> Count:
        _COUNTS.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _COUNTS.remove(self)


_COUNTS: list[Count] = []
_READ = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "_unique",
    "equal", "bincount", "histc", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "is_nonzero",
}  # fmt: skip


def _note(name: str, operations: int, waits: bool) -> None:
    for count in _COUNTS:
        count.operations += operations
        if waits:
            count.waits += 1
            frame = sys._getframe(2)
            while frame is not None and "gen_invariance/" not in frame.f_code.co_filename.replace("\\", "/"):
                frame = frame.f_back
            if frame is not None:
                path = frame.f_code.co_filename.replace("\\", "/").rpartition("gen_invariance/")[2]
                count.places[f"{path}:{frame.f_lineno} {name}"] += 1


def _count(function, args: tuple, kwargs: dict) -> None:
    if not _COUNTS:
        return
    name = function.overloadpacket._qualified_op_name.partition("::")[2]
    returned = function._schema.returns
    is_view = bool(returned) and all(r.alias_info is not None and not r.alias_info.is_write for r in returned)
    _note(name, 0 if is_view or name in ("detach", "_linalg_check_errors") else 1, _waits(name, function, args, kwargs))


def _waits(name: str, function, args: tuple, kwargs: dict) -> bool:
    if name in _READ or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        return True
    if function in MOVES:
        return _copy_waits(name, args, kwargs)
    if function.overloadpacket in INDEXED:
        indices = [each for each in args[1] if each is not None]
        here = any(not isinstance(each, Elsewhere) for each in indices)  # moved by a copy that waits
        return here or any(each.dtype in (torch.bool, torch.uint8) for each in indices)
    return False


def _copy_waits(name: str, args: tuple, kwargs: dict) -> bool:
    """Copies on the device do not, nor those to it that need not be over when the call returns."""
    if name == "_to_copy":
        to_there = kwargs.get("device") is None or _asked_for(kwargs)
        from_there = isinstance(args[0], Elsewhere)
        blocking = not kwargs.get("non_blocking", False)
    elif name == "copy_":
        to_there, from_there = isinstance(args[0], Elsewhere), isinstance(args[1], Elsewhere)
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        to_there, from_there = (all(isinstance(each, Elsewhere) for each in args[place]) for place in (0, 1))
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if to_there == from_there:
        return False
    return True if from_there else blocking


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
    _count(function, args, kwargs)
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
