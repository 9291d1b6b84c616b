#   Copyright 2026 - present The PyMC Developers
#
#   Licensed under the Apache License, Version 2.0 (the "License");
#   you may not use this file except in compliance with the License.
#   You may obtain a copy of the License at
#
#       http://www.apache.org/licenses/LICENSE-2.0
#
#   Unless required by applicable law or agreed to in writing, software
#   distributed under the License is distributed on an "AS IS" BASIS,
#   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
#   See the License for the specific language governing permissions and
#   limitations under the License.
"""Describe options and graphs so that the next process gives the same words.

Names of variables and addresses in memory differ between processes, and are left out.
"""

import hashlib

from collections.abc import Callable, Sequence
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import Any

import numpy as np

from pytensor.graph.basic import Constant, Variable
from pytensor.graph.op import HasInnerGraph, Op
from pytensor.graph.traversal import toposort
from pytensor.graph.type import Type

__all__ = ["describe", "digest"]

_LEVELS = 8
"""Functions can hold themselves."""
_LIBRARIES = "pymc", "pytensor", "numpy"
"""What is inside their functions belongs to the version."""


def describe(value: Any, levels: int = _LEVELS) -> str:
    """Describe an option by what can be told from one process to the next."""
    inner = partial(describe, levels=levels - 1)
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            return repr(value)
        case np.generic() | np.dtype():
            return repr(value)
        case Type():
            return str(value)
        case _ if not levels:
            return _name(value)
        case np.ndarray() if not value.dtype.hasobject:
            return f"{value.dtype} {value.shape} {_hash(value.tobytes())}"
        case dict():
            items = (f"{key!r}: {inner(item)}" for key, item in value.items())
            return f"{{{', '.join(items)}}}"
        case tuple() | list():
            return f"[{', '.join(map(inner, value))}]"
        case set() | frozenset():
            return inner(sorted(map(inner, value)))
        case slice():
            return f"slice{inner([value.start, value.stop, value.step])}"
        case partial():
            arguments = [inner(item) for item in value.args]
            arguments += [f"{key}={inner(item)}" for key, item in value.keywords.items()]
            return f"{inner(value.func)}({', '.join(arguments)})"
        case Constant():
            return f"{value.type} {inner(value.data)}"
        case Variable():
            return f"{value.type} {digest([value])}"
        case Op():
            return f"{_name(value)}{_properties(value, inner)}"
        case FunctionType():
            return f"{_name(value)}{_contents(value, inner)}"
        case CodeType():
            return inner([value.co_names, value.co_consts])
    return _name(value)


def digest(outputs: Sequence[Variable]) -> str:
    """Digest the operations and constants of a graph."""
    place: dict[Variable, str] = {}
    parts = []
    for k, node in enumerate(toposort(outputs)):
        parts.append(f"{describe(node.op)} {[str(out.type) for out in node.outputs]}")
        if isinstance(node.op, HasInnerGraph):
            parts.append(digest(node.op.inner_outputs))
        for variable in node.inputs:
            if isinstance(variable, Constant):
                parts.append(describe(variable))
            else:
                parts.append(place.setdefault(variable, f"{variable.type} {len(place)}"))
        place |= {out: f"{k}.{j}" for j, out in enumerate(node.outputs)}
    return _hash("\n".join(parts).encode())


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", type(value).__name__)


def _properties(op: Op, inner: Callable[[Any], str]) -> str:
    """Describe what tells operations of one type apart."""
    names = getattr(op, "__props__", None) or ()
    return inner({name: getattr(op, name) for name in names}) if names else ""


def _contents(function: FunctionType, inner: Callable[[Any], str]) -> str:
    """Describe the values that a function uses besides its arguments."""
    code = function.__code__
    held: dict[str, Any] = dict(zip(code.co_freevars, map(_held, function.__closure__ or ())))
    if function.__module__.partition(".")[0] not in _LIBRARIES:
        used = {name: function.__globals__.get(name) for name in code.co_names}
        held |= {k: v for k, v in used.items() if isinstance(v, int | float | np.generic)}
        held["names"] = code.co_names
        held["constants"] = [c for c in code.co_consts if c != function.__doc__]
        held["defaults"] = function.__defaults__, function.__kwdefaults__
    return inner(held) if held else ""


def _held(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None
