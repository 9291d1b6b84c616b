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
"""Thrift's compact protocol, in which Parquet writes its metadata."""

import struct

from typing import Any

__all__ = ["Struct", "read_struct"]

Struct = dict[int, Any]
"""Values by the number of their field; integers, bytes, lists and structs."""

_TRUE, _FALSE, _BYTE, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = (
    *(1, 2, 3),
    *range(6, 14),
)


def read_struct(data: bytes) -> Struct:
    """Read the struct that *data* begins with.

    Raises
    ------
    IndexError, ValueError
        If *data* end before the struct does, or hold an unknown type.
    """
    return _read_struct(data, 0)[0]


def _read_struct(data: bytes, place: int) -> tuple[Struct, int]:
    fields: Struct = {}
    number = 0
    while head := data[place]:
        place += 1
        if head >> 4:
            number += head >> 4
        else:
            number, place = _read_integer(data, place)
        kind = head & 15
        if _BYTE < kind <= _I64 and (byte := data[place]) < 128:  # most values, so a short way
            fields[number] = (byte >> 1) ^ -(byte & 1)
            place += 1
        elif kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], place = _read_value(data, place, kind)
    return fields, place + 1


def _read_value(data: bytes, place: int, kind: int) -> tuple[Any, int]:
    if _BYTE < kind <= _I64:
        return _read_integer(data, place)
    if kind == _BINARY:
        length, place = _read_varint(data, place)
        if place + length > len(data):
            raise IndexError("a string ends after the footer")
        return data[place : place + length], place + length
    if kind == _STRUCT:
        return _read_struct(data, place)
    if kind in (_LIST, _SET):
        return _read_list(data, place)
    if kind == _MAP:
        return _read_map(data, place)
    if kind in (_TRUE, _FALSE, _BYTE):
        return data[place], place + 1
    if kind == _DOUBLE:
        return struct.unpack_from("<d", data, place)[0], place + 8
    if kind == _UUID:
        return data[place : place + 16], place + 16
    raise ValueError(f"no type has number {kind}")


def _read_list(data: bytes, place: int) -> tuple[list, int]:
    head = data[place]
    size, place = head >> 4, place + 1
    if size == 15:
        size, place = _read_varint(data, place)
    values = []
    for _ in range(size):
        value, place = _read_value(data, place, head & 15)
        values.append(value)
    return values, place


def _read_map(data: bytes, place: int) -> tuple[list, int]:
    size, place = _read_varint(data, place)
    kinds, pairs = 0, []
    if size:
        kinds, place = data[place], place + 1
    for _ in range(size):
        key, place = _read_value(data, place, kinds >> 4)
        value, place = _read_value(data, place, kinds & 15)
        pairs.append((key, value))
    return pairs, place


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    byte = data[place]
    place += 1
    if byte < 128:
        return byte, place
    value, shift = byte & 127, 7
    while byte > 127:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
    return value, place


def _read_integer(data: bytes, place: int) -> tuple[int, int]:
    value, place = _read_varint(data, place)
    return (value >> 1) ^ -(value & 1), place
