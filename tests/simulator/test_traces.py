"""Traces are read exactly or refused in one line; profiles keep what they claim to keep of their traces."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from simulator import traces
from simulator.blockhashes import shared_blocks
from simulator.errors import TraceError
from simulator.traces import read_trace, summarize
from simulator.workload import MAX_TOKENS, Profile, Requests, load_profile, synthesize

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "traces"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs ../shared/reference/traces")

PROFILED = {
    "azure-conversation-2023": "azure2023_AzureLLMInferenceTrace_conv.csv",
    "azure-code-2023": "azure2023_AzureLLMInferenceTrace_code.csv",
    "mooncake-conversation": "mooncake_conversation_trace.jsonl.gz",
}

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 955, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 672, "output_length": 26, "hash_ids": [46, 2353]}
"""
PLAIN = "arrival_s,prompt_tokens,output_tokens\n0.5,10,20\n1.5,30,40\n"
CLASSES = "slo_class,arrival_s,prompt_tokens,output_tokens,note\nchat,0,1,2,x\ncode,1,3,4,y\nchat,2,5,6,\n"


@pytest.fixture
def read(tmp_path):
    """Read a trace given as text or bytes."""

    def read(content, **options):
        path = tmp_path / "trace"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_trace(path, **options)

    return read


@pytest.fixture(params=["fast", "line by line"])
def parser(request, monkeypatch):
    """Both parsers in turn: whatever the fast one finds is thrown away for the second."""
    if request.param == "line by line":
        monkeypatch.setattr(traces, "_sound", lambda *_: False)
    return request.param


def columns(requests):
    return [column.tolist() for column in (requests.arrival_s, requests.prompt_tokens, requests.output_tokens)]


def test_the_three_layouts_are_read(read, parser):
    assert columns(read(AZURE)) == [[0, 4.314579], [374, 396], [44, 109]]
    assert columns(read(MOONCAKE)) == [[0, 3.053], [955, 672], [52, 26]]
    assert columns(read(PLAIN)) == [[0.5, 1.5], [10, 30], [20, 40]]
    classes = read(CLASSES)
    assert columns(classes) == [[0, 1, 2], [1, 3, 5], [2, 4, 6]]
    assert (classes.class_names, classes.slo_class.tolist()) == (("chat", "code"), [0, 1, 0])


@pytest.mark.parametrize("text", [AZURE, MOONCAKE, PLAIN, CLASSES])
def test_line_ends_byte_order_mark_blank_lines_and_gzip_do_not_matter(read, parser, text):
    expected = columns(read(text))
    for same in (
        text.rstrip("\n"),
        text.replace("\n", "\r\n"),
        "\ufeff" + text,
        "\n\n" + text.replace("\n", "\n\n"),
        text.replace(",", " , ") if "{" not in text else text,
        gzip.compress(text.encode()),
    ):
        assert columns(read(same)) == expected


def test_azure_timestamps_may_carry_offsets_and_nine_decimals(read, parser):
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    offsets = head + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:00.017335+00:00,2399,6\n"
    assert read(offsets).arrival_s.tolist() == [0, 0.007405]
    assert read(head + "2024-05-10T00:00:00Z,1,1\n2024-05-10T02:00:00+02:00,1,1").arrival_s.tolist() == [0, 0]
    fine = head + "2024-05-10 00:00:00.000000001,1,1\n2024-05-10 00:00:01,1,1\n"
    assert read(fine).arrival_s.tolist() == [0, 0.999999999]
    short = head + "2024-05-10,1,1\n2024-05-10 01,1,1\n2024-05-10T01:01,1,1\n"
    assert read(short).arrival_s.tolist() == [0, 3600, 3660]
    late = head + "2290-01-01 00:00:00,1,1\n2290-01-01 00:00:02,1,1\n"  # beyond 64-bit nanoseconds
    assert read(late).arrival_s.tolist() == [0, 2]


def test_rows_out_of_order_are_sorted_and_ties_stay(read, parser):
    unsorted = "arrival_s,prompt_tokens,output_tokens\n2,1,1\n1,2,1\n1,3,1\n"
    assert columns(read(unsorted)) == [[1, 1, 2], [2, 3, 1], [1, 1, 1]]
    header, first, second, _ = AZURE.split("\n")
    assert columns(read("\n".join((header, second, first)))) == columns(read(AZURE))


def test_requests_without_tokens_are_refused_unless_dropped(read, parser, caplog):
    text = PLAIN + "2,0,5\n3,5,0\n4,7,8\n"
    with pytest.raises(TraceError, match=r"line 4: prompt_tokens = '0': expected a whole number .* drop_empty"):
        read(text)
    assert read(text, drop_empty=True).arrival_s.tolist() == [0.5, 1.5, 4]
    assert "left out 2 of 5 requests" in caplog.text
    with pytest.raises(TraceError, match="every request lacks"):
        read("arrival_s,prompt_tokens,output_tokens\n0,0,1\n", drop_empty=True)


def plain(row):
    return PLAIN + row + "\n"


def azure(row):
    return AZURE + row + "\n"


def mooncake(row):
    return MOONCAKE + row + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; expected TIMESTAMP,ContextTokens,GeneratedTokens"),
        (" \n\r\n", "is empty"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no rows below its header"),
        ("a;b;c\n1;2;3\n", "line 1: header 'a;b;c': expected TIMESTAMP,"),
        ("\narrival_s,prompt_tokens\n1,2\n", "line 2: header .*: output_tokens missing; expected arrival_s,"),
        ("TIMESTAMP,ContextTokens\n1,2\n", "line 1: .*: GeneratedTokens missing"),
        ("arrival_s,arrival_s,prompt_tokens,output_tokens\n", "column arrival_s appears 2 times"),
        (plain("abc,1,2"), r"line 4: arrival_s = 'abc': expected seconds in \[0, 1e\+09\]"),
        (plain("nan,1,2"), "line 4: arrival_s = 'nan'"),
        (plain("inf,1,2"), "line 4: arrival_s = 'inf'"),
        (plain("-1,1,2"), "line 4: arrival_s = '-1'"),
        (plain(",1,2"), "line 4: arrival_s = ''"),
        (plain("1700000000,1,2"), "line 4: arrival_s = '1700000000'"),
        (plain("2,1.5,2"), r"line 4: prompt_tokens = '1.5': expected a whole number in \[1, 2\^31\)"),
        (plain("2,-1,2"), "line 4: prompt_tokens = '-1'"),
        (plain("2,1,1e99"), "line 4: output_tokens = '1e99'"),
        (plain("2,1,1_0"), "line 4: output_tokens = '1_0'"),
        (plain("2,1,٣"), "line 4: output_tokens = "),
        (plain("2,1"), "line 4: 2 fields: expected 3, as in line 1"),
        (plain("2,1,2,3"), "line 4: 4 fields: expected 3"),
        (plain("2,1,\n\n3,x,1"), "line 4: output_tokens = ''"),
        (CLASSES + ",3,1,1,\n", "line 5: slo_class is empty"),
        (azure("2023-11,1,2"), "line 4: TIMESTAMP = '2023-11': expected a date and time"),
        (azure("2023-13-16 00:00:00,1,2"), "line 4: TIMESTAMP = '2023-13-16 00:00:00'"),
        (azure("12.5,1,2"), "line 4: TIMESTAMP = '12.5'"),
        (azure("1900-01-01 00:00:00,1,2"), "arrival_s.* = 3.9.*e.09: expected in .0, 1e9. seconds"),
        (mooncake('{"timestamp": 1, "input_length": 2'), "line 3: .*: expected one JSON object"),
        (mooncake("[1, 2]"), r"line 3: '\[1, 2\]': expected one JSON object"),
        (mooncake('{"timestamp": 1, "input_length": 2}'), "line 3: .*: output_length missing"),
        (mooncake('{"timestamp": 1, "input_length": "x", "output_length": 3}'), "line 3: input_length = 'x'"),
        (mooncake('{"timestamp": 1, "input_length": true, "output_length": 3}'), "line 3: input_length = True"),
        (mooncake('{"timestamp": NaN, "input_length": 1, "output_length": 3}'), "line 3: timestamp = nan: .*millisec"),
        (mooncake('{"timestamp": -5, "input_length": 1, "output_length": 3}'), "line 3: timestamp = -5"),
        (mooncake('{"timestamp": 1, "input_length": 1, "output_length": null}'), "line 3: output_length = None"),
        (mooncake('{"timestamp": 1, "input_length": 1, "output_length": %s}' % ("9" * 400)), "line 3: output_length ="),
        (mooncake('{"timestamp": 1, "input_length": 1, "output_length": %s}' % ("[" * 9999)), "line 3: "),
        (PLAIN.encode() + b"\xe9,1,2\n", "line 4: byte 0xe9: expected UTF-8 text"),
        (PLAIN.encode("utf-16"), "is UTF-16 text"),
        (PLAIN.encode() + b"\0\n", "line 4: byte 0x00"),
        (b"PAR1\x15\x04\x15\xff\x00", "line 1: byte 0xff"),
        (gzip.compress(PLAIN.encode())[:-9], "gzip data is truncated or damaged"),
        (gzip.compress(PLAIN.encode())[:12] + b"xxxx", "gzip data is truncated or damaged"),
        (b"\x1f\x8b", "gzip data is truncated or damaged"),
    ],
)
def test_faults_are_told_in_one_line_with_their_place(read, content, message):
    with pytest.raises(TraceError, match=message) as error:
        read(content)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_missing_files_and_directories_are_told(tmp_path):
    with pytest.raises(TraceError, match="no such file"):
        read_trace(tmp_path / "nothing.csv")
    with pytest.raises(TraceError, match="is a directory"):
        read_trace(tmp_path)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace("a\0b")


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
pieces = st.sampled_from(
    [
        "0",
        "1",
        "2.5",
        "nan",
        "-1",
        "",
        '"',
        ",",
        "\n",
        "\r",
        "é",
        "2023-11-16 18:15:46.1",
        "{",
        "}",
        "[",
        "1e400",
        "chat",
    ]
)
headers = st.sampled_from([AZURE, MOONCAKE, PLAIN, CLASSES, ""])


def requests_or_trace_error(read, content):
    try:
        assert len(read(content)) >= 1
    except TraceError as error:
        assert "\n" not in str(error)


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_are_requests_or_a_trace_error(read, content):
    requests_or_trace_error(read, content)
    requests_or_trace_error(read, b"\x1f\x8b" + content)


@FUZZ
@given(headers, st.lists(pieces, max_size=25).map("".join))
def test_any_rows_are_requests_or_a_trace_error(read, header, rows):
    requests_or_trace_error(read, header + rows)


@FUZZ
@given(headers, st.binary(max_size=8), st.integers(0, 200))
def test_any_damage_to_a_trace_is_requests_or_a_trace_error(read, header, damage, at):
    content = header.encode()
    requests_or_trace_error(read, content[:at] + damage + content[at + len(damage) :])


numbers = st.integers(1, 2**31 - 1)


@FUZZ
@given(st.lists(st.tuples(st.floats(0, 1e9), numbers, numbers), min_size=1, max_size=8))
def test_both_parsers_read_the_same(read, rows):
    rows.sort()
    text = "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{a!r},{p},{o}\n" for a, p, o in rows)
    assert columns(read(text)) == [list(column) for column in zip(*rows, strict=True)]
    jsonl = "".join(
        json.dumps({"timestamp": a, "input_length": p, "output_length": o, "hash_ids": [p]}) + "\n" for a, p, o in rows
    )

    def both():
        return [columns(read(text)), columns(read(jsonl, hash_block_tokens=MAX_TOKENS))]

    fast = both()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "_sound", lambda *_: False)
        assert both() == fast


HASHED = (
    (30, 1025, 5, [0, 1, 4]),
    (10, 1000, 5, [0, 1]),
    (20, 512, 5, [0]),
    (40, 513, 0, [0, 9]),
    (50, 1, 5, [7]),
)


def jsonl(rows):
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    return "".join(json.dumps(dict(zip(names, row, strict=False))) + "\n" for row in rows)


def test_block_ids_stay_with_their_requests(read, parser):
    """Sorted by arrival, the request without an answer left out."""
    requests = read(jsonl(HASHED), drop_empty=True)
    hashes = requests.block_hashes
    assert hashes.block_tokens == 512
    assert [hashes.row(index) for index in range(4)] == [[0, 1], [0], [0, 1, 4], [7]]
    assert requests.prompt_tokens.tolist() == [1000, 512, 1025, 1]
    small = read(jsonl([(0, 40, 1, [1, 2, 3]), (1, 33, 1, [1, 2, 5])]), hash_block_tokens=16)
    assert (small.block_hashes.block_tokens, small.block_hashes.row(1)) == (16, [1, 2, 5])
    assert read(jsonl(HASHED), drop_empty=True, hash_block_tokens=None).block_hashes is None
    assert read(jsonl(row[:3] for row in HASHED), drop_empty=True).block_hashes is None
    assert read(PLAIN).block_hashes is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((1, 1025, 5, [0, 1]), r"line 3: 2 hash_ids for 1025 prompt tokens: expected 3, one for every 512 tokens"),
        (
            (1, 1025, 5, [0, 1]),
            "line 3: .* from Python, read_trace takes other block sizes as hash_block_tokens, or None",
        ),
        ((1, 1025, 5), "line 3: .*: hash_ids missing; expected in all lines or in none"),
        ((1, 512, 5, None), "line 3: .*: hash_ids missing; expected in all lines or in none"),
        ((1, 1024, 5, [0, -1]), r"line 3: hash_ids = \[0, -1\]: expected a list of whole numbers in \[0, 2\^63\)"),
        ((1, 512, 5, [1.5]), r"line 3: hash_ids = \[1.5\]: expected a list of whole numbers"),
        ((1, 512, 5, [True]), r"line 3: hash_ids = \[True\]: expected a list"),
        ((1, 512, 5, [None]), r"line 3: hash_ids = \[None\]: expected a list"),
        ((1, 512, 5, [10**30]), r"line 3: hash_ids = \[1000000"),
        ((1, 512, 5, "0"), "line 3: hash_ids = '0': expected a list"),
        ((1, 1024, 5, [7, 7]), "hash_ids: request 2: block 7 follows block 7, no block where it was first; expected"),
        ((1, 1024, 5, [7, 1]), "hash_ids: request 2: block 1 follows block 7, block 0 in an earlier request"),
    ],
)
def test_block_ids_that_do_not_fit_their_prompts_are_refused(read, parser, row, message):
    with pytest.raises(TraceError, match=message):
        read(jsonl([(0, 600, 5, [0, 1]), (0, 500, 5, [6]), row]))
    assert len(read(jsonl([(0, 600, 5, [0, 1]), (0, 500, 5, [6]), row]), hash_block_tokens=None)) == 3


def test_block_ids_that_are_null_everywhere_are_none(read, parser):
    assert read(jsonl([(0, 600, 5, None), (1, 512, 5, None)])).block_hashes is None
    assert read(jsonl([(0, "600", 5, None), (1, 512, 5)])).block_hashes is None  # Arrow does not take "600"


SESSIONS = """arrival_s,prompt_tokens,output_tokens,session,turn
0,40,20,a,0
1,40,20,b,0
2,90,30,a,1
3,150,10,a,2
"""


def test_turns_of_sessions_share_what_was_said(read, parser):
    """60 and 120 tokens were said before a's second and third turn: 3 and 7 whole blocks of 16."""
    turns = read(SESSIONS)
    assert turns.block_hashes.block_tokens == 16
    assert shared_blocks(turns.block_hashes).tolist() == [0, 0, 3, 7]
    head, *rows = SESSIONS.splitlines()
    backwards = read("\n".join([head, "", *reversed(rows)]))
    assert columns(backwards) == columns(turns)
    assert shared_blocks(backwards.block_hashes).tolist() == [0, 0, 3, 7]
    assert shared_blocks(read(SESSIONS, session_block_tokens=8).block_hashes).tolist() == [0, 0, 7, 15]
    assert read(SESSIONS, session_block_tokens=None).block_hashes is None
    classed = read("turn,slo_class,session,arrival_s,prompt_tokens,output_tokens\n0,x, 1 ,0,40,20\n1,y,1,2,90,30\n")
    assert classed.class_names == ("x", "y")
    assert shared_blocks(classed.block_hashes).tolist() == [0, 3]
    alone = read(SESSIONS.replace("turn", "note"))  # one of the two columns says nothing
    assert alone.block_hashes is None


def test_a_turn_left_out_for_lack_of_an_answer_was_said_nevertheless(read, parser):
    failed = SESSIONS.replace("2,90,30,a,1", "2,90,0,a,1")
    assert shared_blocks(read(failed, drop_empty=True).block_hashes).tolist() == [0, 0, 3]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2,90,30,a,1\n", "", r"line 4: session 'a', turn 2: expected turn 1; give every turn of a session"),
        ("a,1", "a,0", r"line 4: session 'a', turn 0: expected turn 1"),
        ("b,0", "b,1", "line 3: session 'b', turn 1: expected turn 0"),
        ("2,90", "2,59", "line 4: session 'a', turn 1: prompt of 59 tokens; expected at least the 60"),
        ("2,90", "9,150", "line 5: session 'a', turn 2: expected turn 1"),
        ("b,0", "b,", "line 3: turn = '': expected a whole number"),
        ("b,0", "b,-1", "line 3: turn = '-1': expected a whole number"),
        ("b,0", "b,0.5", "line 3: turn = '0.5': expected a whole number"),
        ("b,0", "b,x", "line 3: turn = 'x': expected a whole number"),
        ("b,0", " ,0", "line 3: session is empty: expected a name"),
        ("session,turn", "session,turn,turn", "column turn appears 2 times"),
        ("1,40,20,b", "1,2147483647,20,b", "sessions of 134217752 blocks of 16 tokens: expected at most 134217728"),
    ],
)
def test_turns_that_cannot_be_are_refused_with_their_line(read, parser, old, new, message):
    with pytest.raises(TraceError, match=message) as caught:
        read(SESSIONS.replace(old, new))
    assert "\n" not in str(caught.value)


def test_a_summary_is_the_body_of_a_profile():
    trace = Requests(np.arange(100) ** 2 / 10, np.arange(1, 101), np.arange(100, 0, -1))
    profile = Profile(name="made", source="this test", **summarize(trace, groups=5))
    drawn = synthesize(profile, 50_000)
    assert drawn.prompt_tokens.mean() == pytest.approx(50.5, rel=0.02)
    assert spearmanr(drawn.prompt_tokens, drawn.output_tokens).statistic == pytest.approx(-0.96, abs=0.01)
    assert summarize(Requests([0, 1, 2], [1, 1, 1], [1, 1, 1]))["arrivals"] == {"process": "deterministic"}
    with pytest.raises(TraceError, match="within 0 s"):
        summarize(Requests([0], [1], [1]))


def test_batched_stamps_do_not_look_bursty():
    rng = np.random.default_rng(2)
    poisson_s = np.cumsum(rng.exponential(0.2, 20_000))
    stamped = Requests(np.floor(poisson_s / 3) * 3, np.ones(20_000), np.ones(20_000))
    assert np.diff(stamped.arrival_s).std() / np.diff(stamped.arrival_s).mean() > 3
    assert summarize(stamped)["arrivals"]["cv"] == pytest.approx(1, abs=0.1)


@needs_reference
@pytest.mark.parametrize(("name", "file"), PROFILED.items())
def test_shipped_profiles_are_the_summary_of_their_trace(name, file):
    summary = summarize(read_trace(REFERENCE / file))
    profile = load_profile(name)
    assert Profile(name=name, source=profile.source, **summary) == profile


@needs_reference
@pytest.mark.parametrize(("name", "file"), PROFILED.items())
def test_drawn_requests_have_the_statistics_of_their_trace(name, file):
    """Mean within 2 %, p50 within 2 % or a token, p90 within 4 % and p99 within 10 %, rank correlation within 0.02."""
    trace, drawn = read_trace(REFERENCE / file), synthesize(load_profile(name), 200_000, seed=1)
    for column in ("prompt_tokens", "output_tokens"):
        ours, theirs = getattr(drawn, column), getattr(trace, column)
        assert ours.mean() == pytest.approx(theirs.mean(), rel=0.02)
        for quantile, rel in ((0.5, 0.02), (0.9, 0.04), (0.99, 0.1)):
            assert np.quantile(ours, quantile) == pytest.approx(np.quantile(theirs, quantile), rel=rel, abs=1)
    correlation = [spearmanr(r.prompt_tokens, r.output_tokens).statistic for r in (drawn, trace)]
    assert correlation[0] == pytest.approx(correlation[1], abs=0.02)
    assert drawn.rate_per_s == pytest.approx(trace.rate_per_s, rel=0.05)


@needs_reference
@pytest.mark.parametrize(("name", "file"), list(PROFILED.items())[:2])
def test_drawn_gaps_vary_as_in_their_trace(name, file):
    trace, drawn = read_trace(REFERENCE / file), synthesize(load_profile(name), 400_000, seed=1)
    ours, theirs = np.diff(drawn.arrival_s), np.diff(trace.arrival_s)
    assert ours.std() / ours.mean() == pytest.approx(theirs.std() / theirs.mean(), rel=0.1)
    assert np.median(ours) == pytest.approx(np.median(theirs), rel=0.2)


@needs_reference
def test_reference_traces_are_read_whole():
    rows = {name: len(read_trace(REFERENCE / file)) for name, file in PROFILED.items()}
    assert rows == {"azure-conversation-2023": 19_366, "azure-code-2023": 8_819, "mooncake-conversation": 12_031}
    conversation = read_trace(REFERENCE / PROFILED["azure-conversation-2023"])
    # Rows 1 and 19,366 of the file: 18:15:46.6805900 and 19:14:08.4025270.
    assert conversation.span_s == pytest.approx(3501.721937, abs=1e-9)
    assert (conversation.total_prompt_tokens, conversation.total_output_tokens) == (22_361_870, 4_088_665)
