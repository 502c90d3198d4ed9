"""Where interpolated tables wait for the next run: arrays on disk, keyed by what they were made of, never trusted."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def cache_folder() -> Path:
    """$SHARDWISE_CACHE, or shardwise in the user's cache folder."""
    named = os.environ.get("SHARDWISE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwise"


def fingerprint(files: Iterable[Path], *words: str) -> str:
    """A name for the contents of the files, the words, and the code that interpolates."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_code())
    for word in words:
        digest.update(word.encode() + b"\0")
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _code() -> bytes:
    """What the sources that turn tables into models say: a new release makes its own cache entries."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def cached(key: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays kept under `key`, or those that `build` makes, kept for the next time where the disk allows it.

    An entry whose checksum does not match what it holds is built again.
    """
    path = cache_folder() / f"{key}.bin"
    kept = _load(path)
    if kept is not None:
        return kept
    made = build()
    _store(path, made)
    return made


def _load(path: Path) -> dict[str, NDArray[Any]] | None:
    try:
        with path.open("rb") as handle:
            expected, body = handle.read(16), handle.read()
    except OSError:
        return None
    if hashlib.blake2b(body, digest_size=16).digest() != expected:
        return None
    try:
        return dict(_unpacked(body))
    except (ValueError, IndexError, UnicodeDecodeError, TypeError):
        return None


def _unpacked(body: bytes) -> Iterable[tuple[str, NDArray[Any]]]:
    count = int.from_bytes(body[:8], "little")
    at = 8
    for _ in range(count):
        size = int.from_bytes(body[at : at + 8], "little")
        name, dtype, *shape = body[at + 8 : at + 8 + size].decode().split("\t")
        at += 8 + size
        shaped = tuple(int(n) for n in shape)
        kind = np.dtype(dtype)
        length = kind.itemsize * int(np.prod(shaped, dtype=np.int64))
        yield name, np.frombuffer(body, kind, offset=at, count=int(np.prod(shaped, dtype=np.int64))).reshape(shaped)
        at += length


def _store(path: Path, arrays: Arrays) -> None:
    parts = [len(arrays).to_bytes(8, "little")]
    for name, values in arrays.items():
        if values.dtype.hasobject:
            raise TypeError(f"{name}: expected plain numbers or text, found objects")
        head = "\t".join((name, values.dtype.str, *map(str, values.shape))).encode()
        parts += [len(head).to_bytes(8, "little"), head, values.tobytes()]
    body = b"".join(parts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as handle:
            handle.write(hashlib.blake2b(body, digest_size=16).digest() + body)
        os.replace(handle.name, path)
    except OSError:
        return  # nowhere to keep it: the next run builds it again
