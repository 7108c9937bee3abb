"""How values cross between the process of the program and that of its tests: as data, never as code.

Plain values are copied, by exact type: what arrives is a real `int` or `dict`, whatever the sender
made of its `__eq__`. Anything else stays where it is, and the other side gets a stub that knows
its number. Messages are JSON after an eight-byte length. Runs inside the sandbox: standard library
only, and slow imports (decimal, datetime) wait until a value needs them.
"""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

ENDED = "the program ended the process"
MESSAGE_BYTES = 64 * 2**20
ITERATOR_ITEMS = 2**20  # the longest iterator that the tests can hand over

# --- plain data ----------------------------------------------------------------------------------


def _pairs(value: Any) -> list[Any]:
    return [[key, item] for key, item in value.items()]


def _whole(cls: Any, part: Any) -> Any:
    return cls(part)


def _spread(cls: Any, parts: Any) -> Any:
    return cls(*parts)


def _default_dict(cls: Any, parts: Any) -> Any:
    factory, pairs = parts
    return cls(factory if isinstance(factory, type) else None, dict(pairs))


# type: (its one plain part, the value from its class and that part). Only these names are imported.
KINDS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "builtins.tuple": (list, _whole),
    "builtins.set": (list, _whole),
    "builtins.frozenset": (list, _whole),
    "builtins.dict": (_pairs, _whole),
    "builtins.complex": (lambda value: [value.real, value.imag], _spread),
    "builtins.bytes": (bytes.hex, lambda cls, part: cls.fromhex(part)),
    "builtins.bytearray": (bytearray.hex, lambda cls, part: cls.fromhex(part)),
    "builtins.range": (lambda value: [value.start, value.stop, value.step], _spread),
    "builtins.slice": (lambda value: [value.start, value.stop, value.step], _spread),
    "builtins.dict_keys": (list, lambda cls, part: dict.fromkeys(part).keys()),
    "builtins.dict_values": (list, lambda cls, part: dict(enumerate(part)).values()),
    "builtins.dict_items": (
        lambda value: [*map(list, value)],
        lambda cls, part: dict(part).items(),
    ),
    "collections.OrderedDict": (_pairs, lambda cls, part: cls(dict(part))),
    "collections.Counter": (_pairs, lambda cls, part: cls(dict(part))),
    "collections.defaultdict": (lambda v: [v.default_factory, _pairs(v)], _default_dict),
    "collections.deque": (lambda value: [list(value), value.maxlen], _spread),
    "decimal.Decimal": (str, _whole),
    "fractions.Fraction": (lambda value: [value.numerator, value.denominator], _spread),
    "datetime.date": (lambda value: value.isoformat(), lambda cls, part: cls.fromisoformat(part)),
    "datetime.time": (lambda value: value.isoformat(), lambda cls, part: cls.fromisoformat(part)),
    "datetime.datetime": (
        lambda value: value.isoformat(),
        lambda cls, part: cls.fromisoformat(part),
    ),
    "datetime.timedelta": (lambda v: [v.days, v.seconds, v.microseconds], _spread),
    "array.array": (lambda value: [value.typecode, value.tolist()], _spread),
}
BUILTIN_TYPES = {id(kind): name for name, kind in vars(builtins).items() if isinstance(kind, type)}
AS_THEY_ARE = frozenset({type(None), bool, str, float})
SAFE_INTEGER = 2**63  # longer ones as hexadecimal: decimal text of any length is refused by Python
CHANGEABLE = (list, dict, set, bytearray)  # and what derives from them
# A value of a class derived from one of these is sent as one of these, in this order.
BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, int.__int__),
    (float, float.__float__),
    (str, str.__str__),
    (bytes, bytes),
    (tuple, tuple),
    (list, list),
    (dict, dict),
    (set, set),
    (frozenset, frozenset),
)
CONTAINERS = (tuple, list, dict, set, frozenset)


class NotPlain(TypeError):
    """The tests hand the program something that is neither plain data nor a function."""


class Stubs:
    """Turns values into JSON and back, and numbers what cannot be copied.

    `make_stub(number, form, name, bases)` makes what stands for an object of the other side;
    `exportable` says which of our own objects the other side may hold.
    """

    def __init__(self, exportable: Callable[[object], bool]) -> None:
        self.exportable = exportable
        self.make_stub: Callable[[int, str, str, list[str]], object]  # set once there is a line
        self.mine: list[Any] = []  # what the other side may name, by number
        self._number_of_mine: dict[int, int] = {}  # id(object) -> number
        self._theirs: dict[int, object] = {}  # number -> stub: the same object, the same stub
        self._number_of_theirs: dict[int, int] = {}  # id(stub) -> number

    def encode(self, value: Any) -> Any:
        """What json can write. A one-entry dict is a tagged value, everything else is itself."""
        kind = type(value)
        if kind in AS_THEY_ARE:
            return value
        if kind is int:
            return value if -SAFE_INTEGER < value < SAFE_INTEGER else {"int": hex(value)}
        if kind is list:
            return [self.encode(item) for item in value]
        if id(value) in self._number_of_theirs:
            return {"yours": self._number_of_theirs[id(value)]}
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in KINDS:
            return {name: self.encode(KINDS[name][0](value))}
        if id(value) in BUILTIN_TYPES:
            return {"type": BUILTIN_TYPES[id(value)]}
        fields = getattr(kind, "_fields", None)
        if isinstance(value, tuple) and isinstance(fields, tuple) and not _own_methods(kind, tuple):
            return {"named": [kind.__name__, list(fields), [self.encode(item) for item in value]]}
        for base, plain in BASES:
            if isinstance(value, base) and not (base in CONTAINERS and _own_methods(kind, base)):
                return self.encode(plain(value))
        if not self.exportable(value):
            return {"iterator": self.encode(_bounded(value))}
        return {"mine": self._export(value)}

    def decode(self, value: Any) -> Any:
        """The inverse; builds only the types above. Raises anything at all if the JSON is hostile."""
        kind = type(value)
        if kind is list:
            return [self.decode(item) for item in value]
        if kind is not dict:
            return value
        ((tag, part),) = value.items()
        if tag in KINDS:
            module, _, name = tag.partition(".")
            return KINDS[tag][1](getattr(import_module(module), name, None), self.decode(part))
        if tag == "int":
            return int(part, 16)
        if tag == "iterator":
            return iter(self.decode(part))
        if tag == "type":
            found = getattr(builtins, part)
            if not isinstance(found, type):
                raise ValueError(f"{part} is not a type")
            return found
        if tag == "named":
            name, fields, items = part
            return import_module("collections").namedtuple(name, fields)(*map(self.decode, items))
        if tag == "yours":
            return self.mine[part]
        if tag == "mine":
            return self._stub(*part)
        raise ValueError(f"unknown tag {tag!r}")

    def _export(self, value: Any) -> list[Any]:
        number = self._number_of_mine.setdefault(id(value), len(self.mine))
        if number == len(self.mine):
            self.mine.append(value)  # and stays alive, so its id is never another's
        if isinstance(value, type) and issubclass(value, BaseException):
            return [number, "exception", value.__name__, lineage(value)]
        form = "iterator" if hasattr(type(value), "__next__") else "object"
        kind = value if isinstance(value, type) else type(value)
        return [number, form, kind.__name__, []]

    def _stub(self, number: int, form: str, name: str, bases: list[str]) -> object:
        if number not in self._theirs:
            stub = self.make_stub(number, form, name, bases)
            self._theirs[number] = stub
            self._number_of_theirs[id(stub)] = number
        return self._theirs[number]


def _own_methods(kind: type, base: type) -> bool:
    """Whether a class adds public methods to `base`: then tests want the object, not the data."""
    added = {name for cls in kind.__mro__ if not issubclass(base, cls) for name in vars(cls)}
    return any(not name.startswith("_") and callable(getattr(kind, name)) for name in added)


def _bounded(value: Any) -> list[Any]:
    if not hasattr(type(value), "__next__"):
        raise NotPlain(
            f"the tests hand over a value that is not plain data ({type(value).__name__})"
        )
    items = []
    for item in value:
        items.append(item)
        if len(items) > ITERATOR_ITEMS:
            raise NotPlain(f"the tests hand over an iterator of more than {ITERATOR_ITEMS} items")
    return items


def lineage(kind: type) -> list[str]:
    """Names of an exception class and of those it derives from, nearest first."""
    return [cls.__name__ for cls in kind.__mro__ if issubclass(cls, BaseException)]


# --- exceptions ----------------------------------------------------------------------------------


def builtin_exception(names: list[str]) -> type[BaseException]:
    """The first of these names that is an exception of the language."""
    for name in names:
        found = getattr(builtins, name, None)
        if isinstance(found, type) and issubclass(found, BaseException):
            return found
    return Exception


class Twins:
    """Exceptions of the other side, made again here: the builtin one, or a twin that derives so."""

    def __init__(self) -> None:
        self.made: dict[str, type[BaseException]] = {}

    def kind(self, names: list[str]) -> type[BaseException]:
        """The class of an exception from the names of its lineage. Always the same for a name."""
        builtin = builtin_exception(names)
        if builtin.__name__ == names[0]:
            return builtin
        if names[0] not in self.made:
            above = self.kind(names[1:]) if len(names) > 1 else builtin
            self.made[names[0]] = type(names[0], (above,), {})
        return self.made[names[0]]

    def rebuild(self, names: list[str], arguments: list[Any], text: str) -> BaseException:
        try:
            return self.kind([str(name) for name in names])(*arguments)
        except Exception:  # noqa: BLE001 - UnicodeDecodeError and the like want certain arguments
            return RuntimeError(f"{names[0]}: {text}")


# --- messages ------------------------------------------------------------------------------------


class Gone(BaseException):
    """The other side closed the line or talks nonsense; no `except Exception` of a test gets it."""


class Line:
    """Questions and answers over two pipes; while one waits for an answer, it answers questions."""

    def __init__(
        self,
        inward: int,
        outward: int,
        stubs: Stubs,
        serve: Callable[[str, Any, list[Any], dict[str, Any]], Any],
    ) -> None:
        self.inward, self.outward, self.stubs, self.serve = inward, outward, stubs, serve
        self.twins = Twins()
        self.gone: str | None = None  # why nothing can be asked any more: it stays so
        self.drain: Callable[[], list[str]] = lambda: ["", ""]  # what was printed since the last
        self.printed: Callable[[list[str]], None] = lambda texts: None

    def ask(self, what: str, on: Any, /, *args: Any, **kwargs: Any) -> Any:
        """The other side's answer, or its exception. Arguments it changed in place are changed here.

        Raises Gone, now and ever after, if there is no answer or it is not in the right form.
        """
        if self.gone:
            raise Gone(self.gone)
        question = {
            "ask": what,
            "on": on,
            "args": [self.stubs.encode(value) for value in args],
            "kwargs": {name: self.stubs.encode(value) for name, value in kwargs.items()},
        }
        try:
            self._send(json.dumps(question).encode("ascii"))
            message = self._receive()
            while "ask" in message:
                self.answer(message)
                message = self._receive()
            self.printed([str(text) for text in message["printed"]])
            for place, part in message["changed"]:
                value = args[place] if type(place) is int else kwargs[place]
                change(value, self.stubs.decode(part))
            if "error" in message:
                names, arguments, text = message["error"]
                result = self.twins.rebuild(names, self.stubs.decode(arguments), str(text))
            else:
                result = self.stubs.decode(message["value"])
        except Gone as error:
            self.gone = str(error)
            raise
        except (EOFError, OSError):
            self.gone = ENDED
            raise Gone(self.gone) from None
        except MemoryError:
            self.gone = "out of memory"
            raise Gone(self.gone) from None
        except Exception as error:  # noqa: BLE001 - hostile bytes can raise anything at all
            self.gone = f"the program broke the line to its tests ({type(error).__name__})"
            raise Gone(self.gone) from None
        if "error" in message:
            raise result
        return result

    def answer(self, message: dict[str, Any]) -> None:
        """Do what was asked, send the result or the exception, and what changed in the arguments."""
        reply: dict[str, Any] = {"changed": []}
        places: list[tuple[Any, Any, Any]] = []
        try:
            decode = self.stubs.decode
            args = [decode(part) for part in message["args"]]
            kwargs = {name: decode(part) for name, part in message["kwargs"].items()}
            places = [*zip(range(len(args)), message["args"], args, strict=True)]
            places += [(name, message["kwargs"][name], kwargs[name]) for name in kwargs]
            on = None if message["on"] is None else self.stubs.mine[message["on"]]
            value = self.serve(message["ask"], on, args, kwargs)
            reply["value"] = self.stubs.encode(value)
        except Gone:
            raise
        except BaseException as error:  # noqa: BLE001 - whoever asked decides what it means
            reply["error"] = self._as_parts(error)
        for place, before, value in places:
            if isinstance(value, CHANGEABLE):
                after = self.stubs.encode(value)
                if after != before:
                    reply["changed"].append([place, after])
        reply["printed"] = self.drain()
        data = json.dumps(reply).encode("ascii")
        if len(data) > MESSAGE_BYTES:
            too_long = ValueError(f"the result is longer than {MESSAGE_BYTES >> 20} MiB")
            reply = {"error": self._as_parts(too_long), "changed": [], "printed": ["", ""]}
            data = json.dumps(reply).encode("ascii")
        self._send(data)

    def listen(self) -> None:
        """Answer until the other side is gone."""
        while True:
            try:
                message = self._receive()
            except EOFError:
                return
            self.answer(message)

    def _as_parts(self, error: BaseException) -> list[Any]:
        try:
            arguments = self.stubs.encode(list(error.args))
        except Exception:  # noqa: BLE001 - arguments that cannot cross are not worth a second error
            arguments = [str(error)]
        return [lineage(type(error)), arguments, str(error)]

    def _send(self, data: bytes) -> None:
        view = memoryview(len(data).to_bytes(8, "big") + data)
        while view:
            view = view[os.write(self.outward, view) :]

    def _receive(self) -> dict[str, Any]:
        size = int.from_bytes(self._read(8), "big")
        if size > MESSAGE_BYTES:
            raise ValueError(f"a message of {size} bytes")
        message = json.loads(self._read(size))
        if type(message) is not dict:
            raise ValueError("a message that is no mapping")
        return message

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = os.read(self.inward, min(size - len(data), 2**20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def change(old: Any, new: Any) -> None:
    """Give a mutable argument the content it has on the other side."""
    if isinstance(old, (list, bytearray)):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)
    else:
        raise TypeError(f"{type(old).__name__} cannot be changed")
