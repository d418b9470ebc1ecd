"""Reading a pickle without running it: the plain values, and where the tensors' bytes are.

Python's and torch's own readers build whatever a file asks for: a kilobyte can ask for gigabytes, or
for a dictionary inside itself. Here each instruction is looked at first. Only plain values and torch's
tensors exist, all that is built is counted, and no byte of a tensor is read.

Source:
    Python's ``pickletools`` for the instructions; ``torch/serialization.py`` and ``torch/_utils.py`` for
    what ``torch.save`` writes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

INSTRUCTIONS = 1_000_000
"""Far above any adapter: a tensor takes about forty."""

BYTES = 64_000_000
LARGEST_INTEGER = 2**63
MARK = object()

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "",
}  # fmt: skip
"""torch's storages to the dtypes of safetensors; an untyped one has that of its tensor."""

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


class Harmful(Exception):
    """The pickle asks for something that is no plain value and no tensor."""


class Excessive(Exception):
    """The pickle asks for more than any adapter file has."""


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file; ``dtype`` is empty where the tensor has it."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage; lengths and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """A class or function by its name; it is never looked up."""

    module: str
    name: str


class _Window:
    """A file from its place on, as far as a pickle may reach; declared lengths are not believed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, BYTES

    def _take(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left <= 0:
            raise Excessive
        return data

    def read(self, count: int | None = -1) -> bytes:
        if count is None or not 0 <= count <= self._left:
            raise Excessive
        return self._take(self._file.read(count) or b"")

    def readline(self, limit: int | None = -1) -> bytes:
        return self._take(self._file.readline(min(self._left, 100_000)))


def read_pickle(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """One pickle, from a buffered file at its place.

    Returns:
        What it holds: dictionaries, lists, tuples, texts, numbers, :class:`StoredTensor` and :class:`Name`;
        and the storages by key, in the order in which they are named.

    Raises:
        Harmful: It calls something else than torch's own constructors.
        Excessive: It exceeds our bounds.
        ValueError: It is damaged (so are IndexError, KeyError, TypeError and others of a broken pickle).
    """
    machine = _Machine()
    window: Any = _Window(file)
    for count, (code, argument, _) in enumerate(pickletools.genops(window)):
        if count > INSTRUCTIONS:
            raise Excessive
        if code.name == "STOP":
            return machine.stack.pop(), machine.storages
        machine.step(code.name, argument)
    raise ValueError("it does not end")


class _Machine:
    """The state of a pickle that is being read."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self._copied = 0

    def step(self, name: str, argument: Any) -> None:
        if name in _IGNORED:
            return
        if name in _VALUES:
            if isinstance(argument, int) and abs(argument) > LARGEST_INTEGER and name not in _MAGIC:
                raise Excessive
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _STEPS:
            _STEPS[name](self, argument)
        else:
            raise Harmful(name)

    def marked(self) -> list[Any]:
        """Everything above the last mark."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is MARK:
                above = self.stack[place + 1 :]
                del self.stack[place:]
                return above
        raise ValueError("a mark is missing")

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"the {kind.__name__} to be filled is missing")
        return self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise ValueError("a name is no text")
            target[key] = value

    def take(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise ValueError("a value is missing")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def put(self, place: Any) -> None:
        self.memo[int(place)] = self.stack[-1]

    def call(self) -> None:
        function, arguments = self.take(2)
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise Harmful("call")
        # The one thing that takes longer than its instruction is to copy what was built before.
        self._copied += len(arguments[0]) if arguments and isinstance(arguments[0], (list, tuple)) else 0
        if self._copied > INSTRUCTIONS:
            raise Excessive
        self.stack.append(_called(function, arguments))

    def load(self) -> None:
        """A storage, by what torch calls its persistent id."""
        reference = self.stack.pop()
        if not isinstance(reference, tuple) or len(reference) not in (5, 6):
            raise ValueError("it refers to something else than a storage")
        (kind, storage, key, _, count), view = reference[:5], reference[5:]
        known = isinstance(storage, Name) and isinstance(key, (str, int))
        if kind != "storage" or not known or any(part is not None for part in view):
            raise ValueError("it refers to something else than a storage")
        dtype = STORAGES.get(storage.name) if storage.module.startswith("torch") else None
        if dtype is None:
            raise Unread(f"a {storage.name[:40]}")
        stored = Storage(str(key), dtype, _natural(count))
        self.stack.append(self.storages.setdefault(stored.key, stored))


class Unread(Exception):
    """A kind of tensor that is not read."""


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < LARGEST_INTEGER:
        raise ValueError("a length is no natural number")
    return value


def _called(function: Name, arguments: tuple[Any, ...]) -> Any:
    where = f"{function.module}.{function.name}"
    if where == "collections.OrderedDict":
        machine = _Machine()
        machine.stack.append({})
        machine.set_items([part for pair in (arguments[0] if arguments else ()) for part in pair])
        return machine.stack[0]
    if where in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    if where in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        storage, offset, shape, strides = arguments[:4]
        return _tensor(storage, offset, shape, strides)
    if where == "torch._utils._rebuild_tensor_v3":
        storage, offset, shape, strides = arguments[:4]
        return _tensor(storage, offset, shape, strides, arguments[6])
    if where.startswith("torch._utils._rebuild") or where == "torch.serialization._get_layout":
        kind = function.name.removeprefix("_rebuild_").strip("_").replace("_", " ")[:40]
        raise Unread("a sparse tensor" if kind == "get layout" else f"a {kind}")
    if where in ("torch.Size", "torch.device"):
        return tuple(arguments[0]) if where == "torch.Size" else "device"
    if where == "_codecs.encode" and isinstance(arguments[0], str):
        return arguments[0].encode("latin-1")
    raise Harmful(where)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> StoredTensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor has no storage or no shape")
    kind = storage.dtype
    if isinstance(dtype, Name) or not kind:
        kind = DTYPES.get(dtype.name, "") if isinstance(dtype, Name) else "U8"
        if not kind:
            raise Unread(f"torch.{dtype.name[:40]}")
    if len(shape) != len(strides) or len(shape) > 16:
        raise ValueError("a tensor's shape and strides do not fit")
    sides, steps = (tuple(_natural(value) for value in values) for values in (shape, strides))
    return StoredTensor(storage, kind, _natural(offset), sides, steps)


def _build(machine: _Machine, _: Any) -> None:
    machine.take(1)  # Attributes, such as the versions of a model's parts; nothing reads them.
    if not isinstance(machine.stack[-1], (dict, StoredTensor)):
        raise Harmful("build")


def _extend(machine: _Machine, items: list[Any]) -> None:
    machine.top(list).extend(items)


def _global(machine: _Machine, name: str) -> None:
    machine.stack.append(Name(*name.split(" ", 1)))


def _stack_global(machine: _Machine, _: Any) -> None:
    module, name = machine.take(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a name is no text")
    machine.stack.append(Name(module, name))


_IGNORED = frozenset({"PROTO", "FRAME"})
_VALUES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8",
})  # fmt: skip
_MAGIC = frozenset({"LONG1"})  # An old file begins with a large number of these; it has 255 bytes at most.
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "MARK": lambda: MARK,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.marked(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "APPEND": lambda machine, _: _extend(machine, list(machine.take(1))),
    "APPENDS": lambda machine, _: _extend(machine, machine.marked()),
    "LIST": lambda machine, _: machine.stack.append(machine.marked()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.marked())),
    "TUPLE1": lambda machine, _: machine.stack.append(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.stack.append(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.stack.append(machine.take(3)),
    "SETITEM": lambda machine, _: machine.set_items(list(machine.take(2))),
    "SETITEMS": lambda machine, _: machine.set_items(machine.marked()),
    "GET": lambda machine, place: machine.stack.append(machine.memo[int(place)]),
    "BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "LONG_BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "PUT": lambda machine, place: machine.put(place),
    "BINPUT": lambda machine, place: machine.put(place),
    "LONG_BINPUT": lambda machine, place: machine.put(place),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": _build,
    "BINPERSID": lambda machine, _: machine.load(),
}
