"""How does a file appear whole or not at all, also beside other writers of the same path?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, suffix: str = "") -> Iterator[Path]:
    """A temporary file beside `path` to write to, which takes its place at the end of the block.

    Where the block raises, the temporary file goes and `path` stays as it was. Raises OSError where the folder cannot
    be written.

    suffix   of the temporary file's name, for readers that go by it
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=suffix, dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        # A temporary file is private (0600); the path gets what open() would have given it.
        mask = os.umask(0)
        os.umask(mask)
        unfinished.chmod(0o666 & ~mask)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
