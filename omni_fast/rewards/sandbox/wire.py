"""The tagged encoding that crosses the jail's border, both ways: Python data as JSON, types kept.

Why not pickle or marshal: their readers run code or read out of bounds on hostile bytes; `json` builds data and nothing
else. Plain JSON stands for itself (None, bool, int, finite float, str, list, dict with string keys); what JSON lacks is
an object with one key that starts with "$": `{"$tuple": [1, 2]}`, `{"$dict": [[1, "a"]]}`, `{"$float": "nan"}`.

Limits: depth 100; sets and dictionaries with other than text keys of 2000 members; other types (functions, generators,
own classes) are refused; a subclass of a plain type becomes the plain type, so that an object that lies about equality
arrives as harmless data. This file also runs inside the jail on the system's Python: standard library only, no syntax
newer than Python 3.9.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Union

Data = Union[  # noqa: UP007 -- evaluated by the jail's interpreter, which may be older than 3.10
    None,
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    "list[Data]",
    "tuple[Data, ...]",
    "set[Data]",
    "frozenset[Data]",
    "dict[Data, Data]",
]
Json = Union[None, bool, int, float, str, "list[Json]", "dict[str, Json]"]  # noqa: UP007

MAX_DEPTH = 100
MAX_MEMBERS = 2000  # of a set, or of a dictionary with other than text keys: chosen hashes make building them quadratic
MAX_FRAME_BYTES = 4 << 20  # of one message from the host to the fork-server
# How a child ended, from the fork-server: exit status or -1, signal or 0, seconds of processor, "" or the limit it hit
# ("wall", "output").
REPORT = struct.Struct("<iid6s")
PLAIN_INT_BITS = 63  # longer integers travel as hexadecimal: decimal conversion is quadratic and limited to 4300 digits


class WireError(ValueError):
    """The value or the bytes are outside the encoding."""


def encode(value: Data, depth: int = 0) -> Json:
    """Data -> its JSON form. Raises WireError for a type or a depth outside the encoding."""
    if depth > MAX_DEPTH:
        raise WireError("nested too deeply")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        plain = int.__index__(value)
        return plain if int.bit_length(plain) <= PLAIN_INT_BITS else {"$int": hex(plain)}
    if isinstance(value, float):
        number = float.__pos__(value)
        return number if math.isfinite(number) else {"$float": repr(number)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, depth + 1) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"$tuple": [encode(item, depth + 1) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        pairs = list(dict.items(value))
        if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
            return {str(key): encode(item, depth + 1) for key, item in pairs}
        return {"$dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in pairs]}
    if isinstance(value, frozenset):
        return {"$frozenset": [encode(item, depth + 1) for item in frozenset.__iter__(value)]}
    if isinstance(value, set):
        return {"$set": [encode(item, depth + 1) for item in set.__iter__(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(bytes(value)).decode("ascii")}
    if isinstance(value, complex):
        return {"$complex": [repr(value.real), repr(value.imag)]}
    raise WireError(f"cannot carry a value of type {type(value).__name__[:80]}")


def decode(form: Json, depth: int = 0) -> Data:
    """The JSON form -> data. Raises WireError for anything `encode` could not have written."""
    if depth > MAX_DEPTH:
        raise WireError("nested too deeply")
    if form is None or isinstance(form, (bool, int, float, str)):
        return form
    if isinstance(form, list):
        return [decode(item, depth + 1) for item in form]
    if not any(key.startswith("$") for key in form):
        return {key: decode(item, depth + 1) for key, item in form.items()}
    if len(form) != 1:
        raise WireError("a tagged object has exactly one key")
    ((tag, body),) = form.items()
    try:
        return _decode_tagged(tag, body, depth)
    except (TypeError, ValueError) as error:  # unhashable set member, bad base64, bad number: all from hostile input
        raise WireError(f"bad {tag[:20]}: {str(error)[:80]}") from None


def _decode_tagged(tag: str, body: Json, depth: int) -> Data:
    if tag in ("$int", "$float", "$bytes"):
        if not isinstance(body, str):
            raise WireError("expected a string")
        if tag == "$int":
            return int(body, 16)
        return float(body) if tag == "$float" else base64.b64decode(body, validate=True)
    if not isinstance(body, list):
        raise WireError("expected a list")
    if len(body) > MAX_MEMBERS and tag in ("$dict", "$set", "$frozenset"):
        raise WireError(f"more than {MAX_MEMBERS} members")
    if tag == "$complex":
        real, imag = body
        return complex(float(real), float(imag))  # type: ignore[arg-type]
    if tag == "$dict":
        return {decode(key, depth + 1): decode(item, depth + 1) for key, item in body}  # type: ignore[misc,str-unpack]
    items = [decode(item, depth + 1) for item in body]
    if tag == "$tuple":
        return tuple(items)
    if tag == "$set":
        return set(items)
    if tag == "$frozenset":
        return frozenset(items)
    raise WireError("unknown tag")


def _refuse_constant(name: str) -> float:
    raise WireError(f"{name} is not in the encoding")


# Made once: `json.dumps` with options builds a new encoder at every call.
to_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_from_json = json.JSONDecoder(parse_constant=_refuse_constant).decode


def dumps(value: Data) -> bytes:
    """Data -> one line of ASCII bytes without a newline."""
    return to_json(encode(value)).encode("ascii")


def loads(line: bytes) -> Data:
    """One line -> data: the only door for hostile bytes. Raises WireError for any that are not the encoding."""
    try:
        return decode(_from_json(line.decode("ascii")))
    except WireError:
        raise
    except (ValueError, RecursionError) as error:  # bad JSON, not ASCII, 5000-digit integers; 60,000 nested brackets
        raise WireError(f"{type(error).__name__}: {str(error)[:80]}") from None
