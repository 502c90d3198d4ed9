"""What is kept on disk is what was made, or it is made again."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels.kernels import cache


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDWISE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


ARRAYS = {
    "numbers": np.arange(12.0).reshape(3, 4),
    "counts": np.array([1, 2, 3], dtype=np.int64),
    "names": np.array(["bf16", "fp8_block"]),
    "nothing": np.zeros((0, 5)),
    "one": np.array(7.0),
}


def counted():
    """A builder that counts how often it is asked."""
    calls = []

    def build():
        calls.append(1)
        return ARRAYS

    return build, calls


def same(found):
    assert set(found) == set(ARRAYS)
    for name, values in ARRAYS.items():
        assert found[name].dtype == values.dtype
        assert found[name].shape == values.shape
        assert np.array_equal(found[name], values)


def test_the_second_run_reads_what_the_first_made():
    build, calls = counted()
    same(cache.cached("key", build))
    same(cache.cached("key", build))
    assert len(calls) == 1


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], lambda b: b""])
def test_a_damaged_entry_is_made_again(folder, damage):
    build, calls = counted()
    cache.cached("key", build)
    path = folder / "key.bin"
    path.write_bytes(damage(path.read_bytes()))
    same(cache.cached("key", build))
    assert len(calls) == 2
    same(cache.cached("key", build))
    assert len(calls) == 2


def test_where_nothing_can_be_kept_it_is_made_every_time(folder, tmp_path, monkeypatch):
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    monkeypatch.setenv("SHARDWISE_CACHE", str(blocked / "below"))
    build, calls = counted()
    same(cache.cached("key", build))
    same(cache.cached("key", build))
    assert len(calls) == 2


def test_objects_are_never_kept():
    with pytest.raises(TypeError, match="mixed"):
        cache.cached("key", lambda: {"mixed": np.array([1, "a", None], dtype=object)})


def test_a_fingerprint_follows_contents_and_words(tmp_path):
    path = tmp_path / "table"
    path.write_text("one")
    first = cache.fingerprint([path], "gemm")
    assert cache.fingerprint([path], "gemm") == first
    assert cache.fingerprint([path], "moe") != first
    path.write_text("two")
    assert cache.fingerprint([path], "gemm") != first
