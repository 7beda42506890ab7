"""Reads a pickle without running it: a table says what stands for each name in it.

A pickle is a program that may name any function of any module. Here nothing is imported or called
but the stand-ins of the table; any other name is an error. What torch.save and
torch.distributed.checkpoint write takes few instructions, and only these are known.

Time and memory are bounded by the pickle's size: no memo is sized by an index, no bytes are
reserved before they are read, and no key is hashed that could hold others.
"""

import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, final

Atom = str | bytes | int | float | None
_MAX_NAME_LETTERS = 1000
_MAX_PROTOCOL = 5


class BrokenPickleError(Exception):
    """Not a pickle, or not one of plain values and the table's names."""


class UnknownNameError(Exception):
    """A pickle names a function or class that is not in the table."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Stands for a value of no interest, which is not made."""


SKIPPED = Skipped()


@final
@dataclass(eq=False, slots=True, repr=False)
class Record:
    """Stands for an object of a class that is not imported: the state it was saved with."""

    fields: dict[str, object] = field(default_factory=dict, init=False)
    values: tuple[object, ...] = field(default=(), init=False)
    """The state of a class that saves a tuple instead of its fields."""


_KEYS = (str, bytes, int, float, type(None), Record)
"""What may be a dict's key: it is hashed at once, whatever the pickle says."""


def skip(*arguments: object) -> Skipped:
    """Stands for a call whose result is of no interest."""
    return SKIPPED


def ordered_dict(*items: object) -> dict[object, object] | Skipped:
    """Stands for collections.OrderedDict, whose items are set after the call."""
    return SKIPPED if items else {}


@final
@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """What stands for a function, class or constant. Never the thing itself."""

    call: Callable[..., object] = skip
    """Takes the arguments of a call and gives what stands for the result."""
    value: object = None
    """What the name means where it is not called: a dtype, a kind of storage."""


def no_references(pid: object) -> NoReturn:
    """Refuse whatever lies outside of the pickle."""
    raise ValueError("a reference to something outside of the pickle")


def read(
    content: bytes,
    names: Mapping[str, Name],
    *,
    refer: Callable[[object], object] = no_references,
    max_steps: int,
) -> object:
    """The value of a pickle: dicts, lists, tuples, atoms and what the table's names stand for.

    Args:
        content: The pickle, of protocol 5 or earlier.
        names: "module.name" -> what stands for it.
        refer: What stands for a persistent id, such as a torch storage.
        max_steps: How many instructions are read at most; a step takes a byte or more.

    Raises:
        UnknownNameError: a name that is not in the table.
        BrokenPickleError: anything else.
    """
    try:
        return _Reader(content, names, refer).read(max_steps)
    except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        raise BrokenPickleError(f"{type(error).__name__} {error}") from error


@final
class _Reader:
    """A stack machine, as pickle's own; see pickletools for the instructions."""

    def __init__(
        self, content: bytes, names: Mapping[str, Name], refer: Callable[[object], object]
    ) -> None:
        self._content, self._names, self._refer = content, names, refer
        self._offset = 0
        self._stack: list[object] = []
        self._marks: list[int] = []
        # A dict, not a list: a pickle may store its first value under index 2^32 - 1.
        self._memo: dict[int, object] = {}

    def read(self, max_steps: int) -> object:
        for _ in range(max_steps):
            code = self._content[self._offset : self._offset + 1]
            self._offset += 1
            if code == pickle.STOP:
                return self._stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise ValueError(f"instruction {code!r} at byte {self._offset - 1}")
            step(self)
        raise ValueError(f"more than {max_steps} instructions")

    def take(self, n: int) -> bytes:
        taken = self._content[self._offset : self._offset + n]
        if len(taken) < n:
            raise ValueError("it ends early")
        self._offset += n
        return taken

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def push(self, value: object) -> None:
        self._stack.append(value)

    def skip_frame(self) -> None:
        self.take(8)  # frames only help to read ahead

    def check_protocol(self) -> None:
        version = self.take(1)[0]
        if version > _MAX_PROTOCOL:
            raise ValueError(f"protocol {version}")

    # The stack and the memo.

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def pop_to_mark(self) -> list[object]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def put(self, index: int | None = None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    # Tuples, lists, dicts.

    def make_tuple(self, n: int) -> None:
        if len(self._stack) < n:
            raise IndexError("nothing to make a tuple of")
        self._stack[-n:] = [tuple(self._stack[-n:])]

    def extend(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError(f"{type(target).__name__} where a list is expected")
        target += items

    def append(self) -> None:
        self.extend([self._stack.pop()])

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self.update([key, value])

    def update(self, items: list[object]) -> None:
        target = self._stack[-1]
        if isinstance(target, Skipped):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError(f"{type(target).__name__} where a dict is expected")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple that holds itself many times takes forever to hash, and no reader needs one.
            target[key if isinstance(key, _KEYS) else object()] = value

    # Names, and what is done with them.

    def push_name(self) -> None:
        self._push_name(self._line(), self._line())

    def push_stacked_name(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is not text")
        self._push_name(module, name)

    def _push_name(self, module: str, name: str) -> None:
        text = f"{'builtins' if module == '__builtin__' else module}.{name}"
        known = self._names.get(text)
        if known is None:
            raise UnknownNameError(text)
        self._stack.append(known)

    def _line(self) -> str:
        end = self._content.index(b"\n", self._offset, self._offset + _MAX_NAME_LETTERS)
        line = self._content[self._offset : end].decode()
        self._offset = end + 1
        return line

    def call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple) or not isinstance(function, Name):
            raise TypeError(f"a call of {type(function).__name__}")
        self._stack.append(function.call(*arguments))

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Record):
            if isinstance(state, dict):
                target.fields.update((k, v) for k, v in state.items() if isinstance(k, str))
            elif isinstance(state, tuple):
                target.values = state
        elif isinstance(target, Name | Atom):
            raise TypeError("state for what has none")

    def refer(self) -> None:
        self._stack.append(self._refer(self._stack.pop()))


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


def _long(content: bytes) -> int:
    return int.from_bytes(content, "little", signed=True)


def _sized(form: str, make: Callable[[bytes], object]) -> Callable[[_Reader], None]:
    """A step that reads a length in `form`, and as many bytes."""
    return lambda reader: reader.push(make(reader.take(reader.number(form))))


_STEPS: Mapping[bytes, Callable[[_Reader], None]] = {
    pickle.PROTO: _Reader.check_protocol,
    pickle.FRAME: _Reader.skip_frame,
    pickle.NONE: lambda reader: reader.push(None),
    pickle.NEWTRUE: lambda reader: reader.push(True),
    pickle.NEWFALSE: lambda reader: reader.push(False),
    pickle.BININT1: lambda reader: reader.push(reader.number("<B")),
    pickle.BININT2: lambda reader: reader.push(reader.number("<H")),
    pickle.BININT: lambda reader: reader.push(reader.number("<i")),
    pickle.BINFLOAT: lambda reader: reader.push(struct.unpack(">d", reader.take(8))[0]),
    pickle.LONG1: _sized("<B", _long),
    pickle.BINUNICODE: _sized("<I", _text),
    pickle.SHORT_BINUNICODE: _sized("<B", _text),
    pickle.SHORT_BINSTRING: _sized("<B", bytes),  # of Python 2, which had no other strings
    pickle.BINBYTES: _sized("<I", bytes),
    pickle.SHORT_BINBYTES: _sized("<B", bytes),
    pickle.MARK: _Reader.mark,
    pickle.BINPUT: lambda reader: reader.put(reader.number("<B")),
    pickle.LONG_BINPUT: lambda reader: reader.put(reader.number("<I")),
    pickle.MEMOIZE: _Reader.put,
    pickle.BINGET: lambda reader: reader.get(reader.number("<B")),
    pickle.LONG_BINGET: lambda reader: reader.get(reader.number("<I")),
    pickle.EMPTY_TUPLE: lambda reader: reader.push(()),
    pickle.EMPTY_LIST: lambda reader: reader.push([]),
    pickle.EMPTY_DICT: lambda reader: reader.push({}),
    pickle.TUPLE: lambda reader: reader.push(tuple(reader.pop_to_mark())),
    pickle.TUPLE1: lambda reader: reader.make_tuple(1),
    pickle.TUPLE2: lambda reader: reader.make_tuple(2),
    pickle.TUPLE3: lambda reader: reader.make_tuple(3),
    pickle.APPEND: _Reader.append,
    pickle.APPENDS: lambda reader: reader.extend(reader.pop_to_mark()),
    pickle.SETITEM: _Reader.set_item,
    pickle.SETITEMS: lambda reader: reader.update(reader.pop_to_mark()),
    pickle.GLOBAL: _Reader.push_name,
    pickle.STACK_GLOBAL: _Reader.push_stacked_name,
    pickle.REDUCE: _Reader.call,
    pickle.NEWOBJ: _Reader.call,
    pickle.BUILD: _Reader.build,
    pickle.BINPERSID: _Reader.refer,
}
