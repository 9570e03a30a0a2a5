"""Seeded mutations of bytes and of JSON, for `fuzz.py`."""

import json
from typing import Any

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    16,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x7FFF,
    0xFFFF,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**9, 10**18, 10**40, -(10**18), 0.5, 1e308, "", "x", "../../outside/secret", "/etc/passwd",
    "features/00000.h5", "features/00001.h5", "reduced/00000.h5", "float64", "object", "é" * 50, [], [0], [[]], [1, 2, 3], {}, {"a": 1},
    [10**9, 10**9, 10**9], "\0", "added-00000", "features", "0" * 64,
)  # fmt: skip


def _span(rng, size: int, most: int = 64) -> tuple[int, int]:
    """Where and how long, within `size` bytes."""
    length = int(rng.integers(1, min(most, size) + 1))
    return int(rng.integers(0, size - length + 1)), length


def mutate(data: bytes, donor: bytes, rng) -> bytes:
    """`data` with one to three random changes; parts may come from `donor`."""
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        if len(data) < 4:
            break
        data = _CHANGES[int(rng.integers(len(_CHANGES)))](bytearray(data), donor, rng)
    return bytes(data)


def _bits(data, donor, rng):
    for place in rng.integers(0, len(data), int(rng.choice([1, 1, 1, 2, 8]))):
        data[place] ^= 1 << int(rng.integers(8))
    return data


def _byte(data, donor, rng):
    data[int(rng.integers(len(data)))] = int(rng.integers(256))
    return data


def _run(data, donor, rng):
    start, length = _span(rng, len(data), int(rng.choice([2, 8, 64, 4096])))
    data[start : start + length] = bytes([int(rng.choice([0, 255, int(rng.integers(256))]))]) * length
    return data


def _words(data, donor, rng):
    """Whole words of zeros or ones, which HDF5's checksum cannot tell apart."""
    start = int(rng.integers(len(data) // 2)) * 2
    length = 2 * int(rng.integers(1, 9))
    data[start : start + length] = bytes([int(rng.choice([0, 255]))]) * len(data[start : start + length])
    return data


def _noise(data, donor, rng):
    start, length = _span(rng, len(data))
    data[start : start + length] = rng.bytes(length)
    return data


def _truncate(data, donor, rng):
    return data[: int(rng.integers(len(data)))]


def _delete(data, donor, rng):
    start, length = _span(rng, len(data))
    del data[start : start + length]
    return data


def _insert(data, donor, rng):
    start, length = _span(rng, len(data))
    data[start:start] = rng.bytes(length) if rng.integers(2) else data[start : start + length]
    return data


def _splice(data, donor, rng):
    """The beginning of one file and the end of another, or a piece of the other laid over."""
    if rng.integers(2):
        cut = int(rng.integers(min(len(data), len(donor)) + 1))
        return data[:cut] + donor[cut:]
    start, length = _span(rng, min(len(data), len(donor)), 1024)
    data[start : start + length] = donor[start : start + length]
    return data


def _number(data, donor, rng):
    """A number where a length, count or address may be."""
    size = int(rng.choice([1, 2, 4, 8]))
    if len(data) < size:
        return data
    start = int(rng.integers(len(data) - size + 1))
    if rng.integers(2):
        start -= start % size
    order = ("little", "big")[int(rng.integers(2))]
    value = NUMBERS[int(rng.integers(len(NUMBERS)))] if rng.integers(2) else int.from_bytes(data[start : start + size], order) + int(
        rng.choice([-1, 1, 8, 256])
    )  # fmt: skip
    data[start : start + size] = (value % (1 << (8 * size))).to_bytes(size, order)
    return data


def _append(data, donor, rng):
    return data + rng.bytes(int(rng.integers(1, 200)))


_CHANGES = (_bits, _bits, _byte, _run, _words, _noise, _truncate, _delete, _insert, _splice, _number, _number, _append)


def edit_json(value: Any, rng) -> Any:
    """A copy of a JSON value with one part replaced, removed, added or repeated."""
    value = json.loads(json.dumps(value))
    holder = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return value
        key = keys[int(rng.integers(len(keys)))]
        if isinstance(holder[key], (dict, list)) and holder[key] and rng.integers(4):
            holder = holder[key]
            continue
        break
    action = int(rng.integers(6))
    odd = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, list):
        holder.insert(key, odd)
    elif action == 1:
        holder[str(odd)] = holder.pop(key)
    elif action == 2 and type(holder[key]) in (int, float):
        holder[key] = holder[key] + int(rng.choice([-1, 1])) if rng.integers(2) else -holder[key]
    elif action == 3:
        # another value of the same object
        holder[key] = holder[keys[int(rng.integers(len(keys)))]]
    else:
        holder[key] = odd
    return value


# -- HDF5 metadata with checksums made right again, so that the change reaches the library's parsers ----------------------------------
def lookup3(data: bytes) -> int:
    """Jenkins' hash with initial value 0 (http://burtleburtle.net/bob/c/lookup3.c), HDF5's checksum of metadata."""
    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(data)) & mask

    def rotate(x: int, k: int) -> int:
        return ((x << k) | (x >> (32 - k))) & mask

    place = 0
    while len(data) - place > 12:
        a, b, c = ((v + int.from_bytes(data[place + 4 * i : place + 4 * i + 4], "little")) & mask for i, v in enumerate((a, b, c)))
        for k in (4, 6, 8, 16, 19, 4):
            a = ((a - c) & mask) ^ rotate(c, k)
            c = (c + b) & mask
            a, b, c = b, c, a
        place += 12
    tail = data[place:].ljust(12, b"\0")
    if len(data) == place:
        return c
    a, b, c = ((v + int.from_bytes(tail[4 * i : 4 * i + 4], "little")) & mask for i, v in enumerate((a, b, c)))
    for k in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - rotate(b, k)) & mask
        a, b, c = b, c, a
    return b  # turned once more than the last result was written


def metadata_blocks(data: bytes) -> list[tuple[int, int]]:
    """(start, end) of the superblock and the first chunks of object headers; each is followed by its checksum."""
    blocks = [(0, 44)] if data[:8] == b"\x89HDF\r\n\x1a\n" and data[8] == 3 else []
    place = data.find(b"OHDR")
    while place >= 0:
        flags, at = data[place + 5], place + 6
        at += 16 * bool(flags & 32) + 4 * bool(flags & 16)
        width = 1 << (flags & 3)
        end = at + width + int.from_bytes(data[at : at + width], "little")
        if end + 4 <= len(data):
            blocks.append((place, end))
        place = data.find(b"OHDR", place + 4)
    return blocks


def mutate_metadata(data: bytes, rng) -> bytes:
    """An HDF5 file of version-3 superblock with one change in its metadata and the checksum to it."""
    changed = bytearray(data)
    blocks = metadata_blocks(data)
    start, end = blocks[int(rng.integers(len(blocks)))]
    block = _CHANGES_IN_PLACE[int(rng.integers(len(_CHANGES_IN_PLACE)))](bytearray(data[start:end]), data, rng)
    changed[start:end] = block
    changed[end : end + 4] = lookup3(bytes(block)).to_bytes(4, "little")
    return bytes(changed)


_CHANGES_IN_PLACE = (_bits, _byte, _noise, _words, _number, _number, _number)
