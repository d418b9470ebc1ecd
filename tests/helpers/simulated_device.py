"""An accelerator for machines that have none: computed on the CPU, with the rules of a real one.

Tensors of ``torch.device("sim")`` live apart from those of the CPU: an operation that mixes the two fails, as
does NumPy's look at one. What it cannot show is how a real card rounds.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# torch would make these of the strides that it believes in, or give an empty result its shape afterwards.
_OWN = (
    "abs", "eye", "eye.m", "kthvalue",
    "alias", "detach", "diagonal", "expand", "permute", "select.int", "slice.Tensor", "squeeze",
    "squeeze.dim", "squeeze.dims", "transpose.int", "unsqueeze", "_unsafe_view", "_reshape_alias",
)  # fmt: skip
_library: list[torch.library.Library] = []  # What is registered stays so only as long as this lives.


class _Simulated(torch.Tensor):
    """A tensor of the device: its shape and dtype, and the CPU tensor that holds its numbers.

    torch takes it as contiguous. ``copied`` says that it is a view of a copy of numbers that are not, where
    what is written would be lost.
    """

    raw: torch.Tensor
    copied: bool

    __torch_function__ = torch._C._disabled_torch_function_impl


def simulated_device() -> torch.device:
    """The device; torch is told of it at the first call and knows it until the process ends."""
    if not _library:
        _setup_privateuseone_for_python_backend("sim")
        everything = torch.library.Library("_", "IMPL")
        everything.fallback(_run, "PrivateUse1")
        some = torch.library.Library("aten", "IMPL")
        for name, function in {
            "_copy_from": _copy_from,
            "empty.memory_format": _empty,
            "empty_strided": _empty_strided,
            "_local_scalar_dense": lambda tensor: tensor.raw.item(),
        }.items():
            some.impl(name, function, "PrivateUse1")
        for name in _OWN:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            some.impl(name, partial(_run, op), "PrivateUse1")
        _library.extend([everything, some])
    return torch.device("sim")


def _wrapped(raw: torch.Tensor, copied: bool = False) -> _Simulated:
    tensor = torch._C._acc.create_empty_tensor(raw.shape, raw.dtype)
    tensor.__class__ = _Simulated
    tensor.raw, tensor.copied = raw, copied
    return tensor


def _raw(value: object) -> object:
    return value.raw if isinstance(value, _Simulated) else value


def _run(op, *args, **kwargs):
    """Any operation of the device, done on the CPU."""
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    if any(not isinstance(value, _Simulated) and value.dim() for value in given):
        raise RuntimeError(f"{op} mixes tensors of the device with tensors of the CPU")
    writes = [
        value
        for value, argument in zip(args, op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if any(isinstance(value, _Simulated) and value.copied for value in writes):
        raise NotImplementedError(f"{op} writes into a view of a view, which the simulation would lose")
    known = {id(value.raw): value for value in given if isinstance(value, _Simulated)}
    plain_args, plain_kwargs = tree_map(_raw, (args, kwargs))
    if "device" in plain_kwargs:
        plain_kwargs["device"] = torch.device("cpu")
    copied = False
    if op.name() in ("aten::as_strided", "aten::view", "aten::_unsafe_view", "aten::_reshape_alias"):
        # These were computed for a contiguous tensor.
        copied = not plain_args[0].is_contiguous() or plain_args[0].storage_offset() != 0
        plain_args = (plain_args[0].contiguous().clone() if copied else plain_args[0], *plain_args[1:])
    result = op(*plain_args, **plain_kwargs)
    for value in given:
        if isinstance(value, _Simulated) and value.raw.shape != value.shape:
            raise NotImplementedError(f"{op} changes a shape that torch has noted already")

    def back(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else _wrapped(value, copied)

    return tree_map(back, result)


def _copy_from(source, target, non_blocking=False):
    if isinstance(target, _Simulated) and target.copied:
        raise NotImplementedError("a copy into a view of a view, which the simulation would lose")
    _raw(target).copy_(_raw(source))
    return target


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return _wrapped(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return _wrapped(torch.empty(size, dtype=dtype))
