"""Measured: what checking a store takes, against reading its bytes."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn.errors import StreamCNNError
from streamcnn.shards import shard_rows
from streamcnn.store import FeatureStore
from streamcnn.timing import medians

STORE_BYTES, WIDTH = 1 << 30, 3136
_PIECE = 1 << 20


def verify_speed(folder: Path, repeats: int, shrink: int) -> dict[str, Any]:
    """Seconds of `FeatureStore.verify` on a new store of float16 rows below `folder`, and of reading all its files in pieces of 1 MiB.

    Returns
    -------
    dict
        - `bytes` : of the store
        - `cold`, `warm` : `read`, `verify` in seconds and `speed`, that of verify as a fraction of that of reading, with files not in the
          system's cache (null where it cannot be told to drop them) and in it
    """
    path, n = folder / "checked", shard_rows(WIDTH, 2)
    rows = np.random.default_rng(0).standard_normal((n, WIDTH), np.float32).astype(np.float16)
    with FeatureStore.create(path) as store:
        for shard in range(max(2, STORE_BYTES // shrink // rows.nbytes)):
            with store.writing("features", shard, shard * n, n, WIDTH, rows.dtype, "") as writer:
                writer.write(rows, None)
        n_bytes = store.nbytes
    works: dict[str, Callable[[], object]] = {"read": partial(_read, path), "verify": partial(_verify, path)}
    try:
        result: dict[str, Any] = {"bytes": n_bytes, "cold": None}
        if hasattr(os, "posix_fadvise"):
            _forget(path)
            result["cold"] = medians(works, repeats, after=partial(_forget, path))
        result["warm"] = medians(works, repeats)
        for seconds in filter(None, (result["cold"], result["warm"])):
            seconds["speed"] = seconds["read"] / seconds["verify"]
        return result
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def _read(path: Path) -> None:
    piece = bytearray(_PIECE)
    for name in _files(path):
        with name.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def _verify(path: Path) -> None:
    if problems := FeatureStore(path).verify():
        raise StreamCNNError(f"a store just written must be all well, got {problems}: check the disk")


def _forget(path: Path) -> None:
    """Have the system drop the files from its cache; dirty pages, which it would keep, are written first."""
    for name in _files(path):
        with name.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rows_of_table(result: dict[str, Any]) -> list[str]:
    """Rows of Markdown for the table of `bench io`."""
    size = f"a store of {result['bytes'] / 1e9:.2f} GB"
    named = {"not in the system's cache": result["cold"], "in the system's cache": result["warm"]}
    return [
        f"| {what} {size}, {where} | {seconds[key]:.2f} |"
        for where, seconds in named.items()
        if seconds
        for key, what in (("read", "read the files of"), ("verify", "`verify`"))
    ]


def summary(result: dict[str, Any]) -> str:
    """One line: the speed of `verify` in those of reading."""
    cold = "" if result["cold"] is None else f"{100 * result['cold']['speed']:.0f} % of the speed of reading its files from disk, "
    return f"`verify` runs at {cold}{100 * result['warm']['speed']:.0f} % of that of reading them from the system's cache"
