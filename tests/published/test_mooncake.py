"""What Mooncake publishes of its trace, found again in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator.blockhashes import infinite_cache_hit_rate, shared_blocks
from simulator.traces import read_trace

TRACE = Path(__file__).resolve().parents[3] / "shared/reference/traces/mooncake_conversation_trace.jsonl.gz"
needs_trace = pytest.mark.skipif(not TRACE.is_file(), reason="needs ../shared/reference/traces")


@needs_trace
def test_the_conversation_trace_has_the_published_size_and_reuse() -> None:
    """12,031 requests with 12,035 prompt and 343 output tokens on average, and 36.6 % of their blocks seen before.

    Of github.com/kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl (Apache-2.0).
    """
    requests = read_trace(TRACE)
    assert len(requests) == 12_031
    assert requests.prompt_tokens.mean() == pytest.approx(12_035, rel=1e-3)
    assert requests.output_tokens.mean() == pytest.approx(343, rel=2e-3)
    hashes = requests.block_hashes
    assert hashes is not None and hashes.block_tokens == 512
    assert infinite_cache_hit_rate(hashes) == pytest.approx(0.366, abs=5e-4)
    # What is shared is shared from the start: an id seen before is never behind one that was not.
    assert len(hashes.ids) - len(set(hashes.ids.tolist())) == shared_blocks(hashes).sum()
