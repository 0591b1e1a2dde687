"""Plain values as text: what crosses the pipes between the sandbox and the programs it runs.

A program under test may send any bytes. They are read here as JSON, within bounds, and rebuilt as
objects of Python's own classes; no class, method or pickle of the program's takes part:

    None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset,
    Ellipsis, range, Fraction, Decimal, deque, the views of a dict, and iterators, used up

Subclasses become their plain base, read by the base's own methods: an IntEnum an int, a namedtuple
a tuple, a Counter a dict. So `f(x) == 3` never runs an `__eq__` of the program's. What they add to
their base is lost: the order of an OrderedDict, the default of a defaultdict.

Not covered: other classes, functions, modules; references of a value to itself.
"""
import json
import math
from collections import deque
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import islice

LONGEST = 2**22  # bytes of a message from a program
DEEPEST = 100  # values inside each other
MOST_ITEMS = 100_000  # that an iterator may give
MOST_DIGITS = 10_000  # hexadecimal ones of a Fraction, whose parts are divided by what they share
MOST_COLLISIONS = 20  # of hashes: building a set of n such keys takes n² steps
VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}


class NotPlain(ValueError):
    """A value that has no plain form, or text that is not one.

    foreign: the object whose class is not plain; None if something else is wrong.
    """

    def __init__(self, message, foreign=None):
        super().__init__(message)
        self.foreign = foreign


# --- from values ----------------------------------------------------------------------------------

def encode(value, iterators=False, depth=0):
    """A value as lists and scalars that json.dumps takes. Raises NotPlain.

    iterators: use them up, as at most MOST_ITEMS values; otherwise they are not plain.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int and -2**53 < value < 2**53:
        return value
    if kind is float and math.isfinite(value):
        return value
    if depth > DEEPEST:
        raise NotPlain(f"values inside each other, more than {DEEPEST} deep")
    def inner(values):
        values = list(values)
        return values if as_they_are(values) else [encode(v, iterators, depth + 1) for v in values]

    for base, write in KINDS.items():
        if isinstance(value, base):
            return write(value, inner)
    if kind in VIEWS:
        return [VIEWS[kind], *inner(value)]
    if iterators and isinstance(value, Iterator):
        items = list(islice(value, MOST_ITEMS + 1))
        if len(items) > MOST_ITEMS:
            raise NotPlain(f"an iterator of more than {MOST_ITEMS:,} values")
        return ["iterator", *inner(items)]
    raise NotPlain(f"a value of class {kind.__name__}", value)


def as_they_are(values):
    """Whether JSON has all of a list as it is: long lists mostly hold one kind of number."""
    kinds = set(map(type, values))
    if kinds == {int}:
        return -2**53 < min(values) and max(values) < 2**53
    if kinds == {float}:
        return all(map(math.isfinite, values))
    return kinds <= {str, bool, type(None)}


def write_dict(value, inner):
    keys, values = inner(dict.keys(value)), inner(dict.values(value))
    return ["dict", *[part for pair in zip(keys, values) for part in pair]]


def write_complex(value, _):
    number = complex.__pos__(value)
    return ["complex", repr(number.real), repr(number.imag)]


KINDS = {  # by the methods of the base, never by the object's own
    int: lambda value, _: ["int", hex(int.__int__(value))],
    float: lambda value, _: ["float", float.__repr__(value)],
    str: lambda value, _: str.__str__(value),
    list: lambda value, inner: ["list", *inner(list.__iter__(value))],
    tuple: lambda value, inner: ["tuple", *inner(tuple.__iter__(value))],
    dict: write_dict,
    set: lambda value, inner: ["set", *inner(set.__iter__(value))],
    frozenset: lambda value, inner: ["frozenset", *inner(frozenset.__iter__(value))],
    bytes: lambda value, _: ["bytes", bytes.hex(value)],
    bytearray: lambda value, _: ["bytearray", bytearray.hex(value)],
    complex: write_complex,
    deque: lambda value, inner: ["deque", *inner(deque.__iter__(value))],
    range: lambda value, _: ["range", hex(value.start), hex(value.stop), hex(value.step)],
    Fraction: lambda value, _: ["Fraction", hex(value.numerator), hex(value.denominator)],
    Decimal: lambda value, _: ["Decimal", Decimal.__str__(value)],
    type(...): lambda value, _: ["Ellipsis"],
}


# --- and back -------------------------------------------------------------------------------------

def decode(coded, depth=0):
    """The value of what `encode` gave, from whoever says so. Raises NotPlain for anything else."""
    if coded is None or type(coded) in (bool, int, float, str):
        return coded
    if depth > DEEPEST or type(coded) is not list or not coded:
        raise NotPlain("text that no plain value has")
    if type(coded[0]) is not str or coded[0] not in MAKERS:
        raise NotPlain("text that no plain value has")
    name, *rest = coded
    if name not in SCALARS and not set(map(type, rest)) <= {int, float, str, bool, type(None)}:
        rest = [decode(inner, depth + 1) for inner in rest]
    try:
        return MAKERS[name](rest)
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        raise NotPlain(f"text that no {name} has") from error


def spread(keys):
    """The keys, if they can be hashed and few collide. Raises TypeError or NotPlain."""
    if len(keys) - len({hash(key) for key in keys}) > MOST_COLLISIONS:
        raise NotPlain(f"more than {MOST_COLLISIONS:,} keys of the same hash")
    return keys


def read_dict(rest):
    if len(rest) % 2:
        raise NotPlain("a key without a value")
    return dict(zip(spread(rest[::2]), rest[1::2]))


def one(rest):
    """The only entry of a list."""
    if len(rest) != 1:
        raise NotPlain("more than one text, or none, for a value that has one")
    return rest[0]


def read_fraction(rest):
    if max(map(len, rest)) > MOST_DIGITS:
        raise NotPlain("a fraction of many digits")
    return Fraction(*[int(part, 16) for part in rest])


SCALARS = {"int", "float", "bytes", "bytearray", "complex", "range", "Fraction", "Decimal"}
MAKERS = {
    "int": lambda rest: int(one(rest), 16),
    "float": lambda rest: float(one(rest)),
    "bytes": lambda rest: bytes.fromhex(one(rest)),
    "bytearray": lambda rest: bytearray.fromhex(one(rest)),
    "complex": lambda rest: complex(*[float(part) for part in rest]),
    "range": lambda rest: range(*[int(part, 16) for part in rest]),
    "Fraction": read_fraction,
    "Decimal": lambda rest: Decimal(one(rest)),
    "list": list,
    "tuple": tuple,
    "dict": read_dict,
    "set": lambda rest: set(spread(rest)),
    "frozenset": lambda rest: frozenset(spread(rest)),
    "deque": deque,
    "keys": lambda rest: dict.fromkeys(spread(rest)).keys(),
    "values": lambda rest: dict(enumerate(rest)).values(),
    "items": lambda rest: dict(zip(spread([key for key, _ in rest]), [v for _, v in rest])).items(),
    "iterator": iter,
    "Ellipsis": lambda rest: ...,
}


# --- messages -------------------------------------------------------------------------------------

def short_int(text):
    """An int of a few digits: many would take quadratic time, and `encode` writes them as hex."""
    if len(text) > 20:
        raise NotPlain("an int of many digits")
    return int(text)


def reject(text):
    raise NotPlain(f"{text} in JSON")


WRITER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False)
READER = json.JSONDecoder(parse_int=short_int, parse_constant=reject)


def to_bytes(message):
    """A JSON object, its values encoded where they need it, as bytes with their length before."""
    text = WRITER.encode(message).encode()
    return len(text).to_bytes(4, "big") + text


def from_bytes(text):
    """The object in the bytes of a message, from whoever sent it. Raises NotPlain."""
    try:
        message = READER.decode(text.decode())
    except (ValueError, RecursionError) as error:
        raise NotPlain("a message that is not JSON") from error
    if type(message) is not dict:
        raise NotPlain("a message that is not an object")
    return message
