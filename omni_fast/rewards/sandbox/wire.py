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
from collections.abc import Callable
from typing import Union

Data = Union[  # noqa: UP007 -- evaluated by the jail's interpreter, which may be older than 3.10
    None, bool, int, float, complex, str, bytes,
    "list[Data]", "tuple[Data, ...]", "set[Data]", "frozenset[Data]", "dict[Data, Data]",
]  # fmt: skip
Json = Union[None, bool, int, float, str, "list[Json]", "dict[str, Json]"]  # noqa: UP007

MAX_DEPTH = 100
MAX_MEMBERS = 2000  # of a set, or of a dictionary with other than text keys: chosen hashes make building them quadratic
MAX_FRAME_BYTES = 4 << 20  # of one message from the host to the fork-server
# How a child ended, from the fork-server: exit status or -1, signal or 0, seconds of processor, "" or the limit it hit
# ("wall", "output").
REPORT = struct.Struct("<iid6s")
PLAIN_INT = 2**63  # larger integers travel as hexadecimal: decimal conversion is quadratic and limited to 4300 digits


class WireError(ValueError):
    """The value or the bytes are outside the encoding."""


def encode(value: Data, depth: int = 0) -> Json:
    """Data -> its JSON form. Raises WireError for a type or a depth outside the encoding.

    Its source also runs in the interpreter of `monty`: no method of a type called through the type.
    """
    if depth > MAX_DEPTH:
        raise WireError("nested too deeply")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return int(value) if abs(int(value)) < PLAIN_INT else {"$int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list):
        return [encode(item, depth + 1) for item in value]
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {str(key): encode(item, depth + 1) for key, item in value.items()}
        return {"$dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]}
    for kind, tag in ((tuple, "$tuple"), (frozenset, "$frozenset"), (set, "$set")):
        if isinstance(value, kind):
            return {tag: [encode(item, depth + 1) for item in value]}
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(bytes(value)).decode("ascii")}
    if isinstance(value, complex):
        return {"$complex": [repr(value.real), repr(value.imag)]}
    raise WireError(f"cannot carry a value of type {type(value).__name__[:80]}")


def decode(form: Json, depth: int = 0) -> Data:
    """The JSON form -> data. Raises WireError for what is no such form."""
    if depth > MAX_DEPTH:
        raise WireError("nested too deeply")
    if isinstance(form, list):
        return [decode(item, depth + 1) for item in form]
    if not isinstance(form, dict):
        return form
    if not any(key.startswith("$") for key in form):
        return {key: decode(item, depth + 1) for key, item in form.items()}
    try:
        ((tag, body),) = form.items()
        return _decode_tagged(tag, body, depth)
    except (TypeError, ValueError, KeyError) as error:  # unhashable member, bad base64 or number, unknown tag
        raise WireError(f"bad tagged object: {str(error)[:80]}") from None


_PLAIN: dict[str, Callable[..., Data]] = {
    "$int": lambda body: int(body, 16),
    "$float": float,
    "$bytes": lambda body: base64.b64decode(body, validate=True),
    "$complex": lambda body: complex(*map(float, body)),
}


def _decode_tagged(tag: str, body, depth: int) -> Data:  # noqa: ANN001
    if tag in _PLAIN:
        return _PLAIN[tag](body)
    if not isinstance(body, list) or (len(body) > MAX_MEMBERS and tag != "$tuple"):
        raise WireError(f"no list, or more than {MAX_MEMBERS} members")
    if tag == "$dict":
        return {decode(key, depth + 1): decode(item, depth + 1) for key, item in body}
    kind = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}[tag]
    return kind(decode(item, depth + 1) for item in body)


# Made once: `json.dumps` with options builds a new encoder at every call.
to_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def dumps(value: Data) -> bytes:
    """Data -> one line of ASCII bytes without a newline."""
    return to_json(encode(value)).encode("ascii")


def loads(line: bytes) -> Data:
    """One line -> data: the only door for hostile bytes. Raises WireError for any that are not the encoding."""
    try:
        return decode(json.loads(line.decode("ascii")))
    except (ValueError, RecursionError) as error:  # bad JSON, not ASCII, 5000-digit integers; 60,000 nested brackets
        raise WireError(f"{type(error).__name__}: {str(error)[:80]}") from None
