"""Does the engine compute the right thing? Against a plain float64 transformer without batches, cache or shards.

The reference takes only the weights from the engine. It recomputes every sequence whole and spells out every formula:
rotary embedding as complex turns, attention head by head, experts token by token.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from threading import Barrier
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import MappingError
from hwmodels.mapping import Mapping
from hwmodels.shape import Attention, FeedForward, Latent, Layer, ModelShape
from planner.errors import PlanError
from simulator.policies import Policy
from simulator.scheduler import SchedulerConfig

torch: Any = pytest.importorskip("torch")

from planner.execute.batch import Batch, Span  # noqa: E402
from planner.execute.kvcache import BlockTables  # noqa: E402
from planner.execute.lane import Lane  # noqa: E402
from planner.execute.laps import NoLaps  # noqa: E402
from planner.execute.transformer import Share, Transformer  # noqa: E402

BLOCK, BLOCKS, HIDDEN, VOCAB = 4, 48, 32, 104
GQA, DENSE = Attention(8, 2, 8, 8), FeedForward(48)
BIASED = replace(GQA, qkv_bias=True, out_bias=True, qk_norm=True)
MOE = FeedForward(24, experts=8, top_k=2)


def model(*layers: tuple[Attention, FeedForward], tied: bool = False) -> ModelShape:
    """A model of these blocks, its norms counted."""
    made = tuple(Layer(a, ff, 2 * HIDDEN + (2 * a.head_dim if a.qk_norm else 0)) for a, ff in layers)
    return ModelShape("tiny", HIDDEN, VOCAB, made, tied, 512, HIDDEN)


MODELS = {
    "gqa": model(*[(GQA, DENSE)] * 3),
    "mha": model(*[(Attention(4, 4, 8, 8), DENSE)] * 2),
    "mqa": model(*[(Attention(4, 1, 16, 16), DENSE)] * 2),
    "window": model((replace(GQA, window_tokens=7), DENSE), (GQA, DENSE), (replace(GQA, window_tokens=1), DENSE)),
    "biases, query and key norms": model(*[(BIASED, FeedForward(48, bias=True))] * 2),
    "not gated": model(*[(GQA, FeedForward(64, gated=False, bias=True))] * 2),
    "tied": model(*[(GQA, DENSE)] * 2, tied=True),
    "moe": model((GQA, DENSE), (GQA, MOE), (GQA, MOE)),
    "moe with biases": model(*[(GQA, replace(MOE, bias=True, router_bias=True))] * 2),
    "shared experts": model(*[(GQA, replace(MOE, shared_intermediate=40))] * 2),
    "gated shared experts": model(*[(GQA, replace(MOE, top_k=3, shared_intermediate=40, shared_gate=True))] * 2),
}
ALL = pytest.mark.parametrize("name", list(MODELS))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are computed fastest by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def engine(shape: ModelShape, share: Share | None = None, dtype: str = "fp32") -> Transformer:
    """The engine, its norms' scales drawn at random so that they matter."""
    share = share or Share(Mapping(), 0, 0, None, None)
    made = Transformer(shape, share, dtype=dtype, device="cpu", kv_blocks=BLOCKS, block_tokens=BLOCK, seed=3)
    begin = 0 if share.first else len(shape.layers) - len(made.layers)
    generator = torch.Generator()
    for number, (attention, block) in enumerate(made.layers, begin):
        generator.manual_seed(number)
        for scale in (attention.norm, block.norm, attention.q_norm, attention.k_norm):
            if scale is not None:
                scale.uniform_(0.5, 1.5, generator=generator)
    return made


# The reference


def normed(x: Any, scale: Any) -> Any:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale.double()


def product(x: Any, weight: Any, bias: Any = None) -> Any:
    return x @ weight.double().T + (0.0 if bias is None else bias.double())


def turned(x: Any) -> Any:
    """Each (tokens, width) head's pairs (i, i + width/2) as complex numbers, turned by position * 10000^(-2i/width)."""
    tokens, width = x.shape
    speed = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * speed
    pairs = torch.complex(x[:, : width // 2], x[:, width // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], dim=1)


def attended(block: Any, x: Any) -> Any:
    shape, tokens = block.shape, len(x)
    qkv = product(x, block.qkv, block.qkv_bias)
    heads = [qkv[:, i : i + shape.head_dim] for i in range(0, qkv.shape[1], shape.head_dim)]
    queries, rest = heads[: shape.heads], heads[shape.heads :]
    keys, values = rest[: shape.kv_heads], rest[shape.kv_heads :]
    if shape.qk_norm:
        queries = [normed(query, block.q_norm) for query in queries]
        keys = [normed(key, block.k_norm) for key in keys]
    away = torch.arange(tokens)[:, None] - torch.arange(tokens)
    hidden = (away < 0) | (away >= (shape.window_tokens or tokens))
    found = []
    for head, query in enumerate(queries):
        shared = head * shape.kv_heads // shape.heads
        scores = turned(query) @ turned(keys[shared]).T / shape.head_dim**0.5
        found.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values[shared])
    return product(torch.cat(found, 1), block.out, block.out_bias)


def fed(two: Any, x: Any) -> Any:
    raised = product(x, two.up, two.up_bias)
    if two.gated:
        gate, up = raised[..., : raised.shape[-1] // 2], raised[..., raised.shape[-1] // 2 :]
        raised = gate / (1 + (-gate).exp()) * up
    else:
        raised = raised * (1 + torch.erf(raised / 2**0.5)) / 2
    return product(raised, two.down, two.down_bias)


def mixed(block: Any, x: Any) -> Any:
    rows = []
    for token in x:
        scores = product(token, block.router, block.router_bias)
        best = sorted(range(len(scores)), key=lambda expert: -float(scores[expert]))[: block.shape.top_k]
        shares = torch.stack([scores[expert].exp() for expert in best])
        row = sum(
            share * fed(block.experts[expert], token) for share, expert in zip(shares / shares.sum(), best, strict=True)
        )
        if block.shape.shared_intermediate:
            weight = 1 / (1 + (-product(token, block.gate)).exp()) if block.shape.shared_gate else 1.0
            row = row + weight * fed(block.shared, token)
        rows.append(row)
    return torch.stack(rows)


def reference(made: Transformer, ids: Sequence[int]) -> Any:
    """(tokens, vocabulary) logits behind every token of one sequence."""
    x = made.embedding.double()[list(ids)]
    for attention, block in made.layers:
        x = x + attended(attention, normed(x, attention.norm))
        at_rest = normed(x, block.norm)
        x = x + (mixed(block, at_rest) if hasattr(block, "experts") else fed(block.two, at_rest))
    return product(normed(x, made.norm), made.head)


# One run of steps by hand: chunks, decodes and both, over scattered blocks


def ids(sequence: int, tokens: int) -> list[int]:
    return torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(50 + sequence)).tolist()


@cache
def steps() -> list[tuple[Batch, list[list[int]]]]:
    """Batches, and the tokens of every span's sequence up to its end."""
    scattered = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [scattered[12 * sequence : 12 * sequence + 12] for sequence in range(3)]  # longer than they need be
    plan = [  # (sequence, tokens before, new) of decodes and of chunks
        ([], [(0, 0, 9), (1, 0, 5)]),
        ([(0, 9, 1)], [(1, 5, 6), (2, 0, 21)]),
        ([(0, 10, 1), (1, 11, 1), (2, 21, 1)], []),
        ([(2, 22, 1), (0, 11, 1)], [(1, 12, 16)]),
        ([(1, 28, 1), (2, 23, 1), (0, 12, 1)], []),
    ]
    found = []
    for decodes, chunks in plan:
        spans = [[Span(ids(s, 40)[b : b + n], b, tables[s]) for s, b, n in part] for part in (decodes, chunks)]
        found.append((Batch(spans[0], spans[1], BLOCK), [ids(s, 40)[: b + n] for s, b, n in (*decodes, *chunks)]))
    return found


def logits_of_steps(made: Transformer) -> list[Any]:
    with torch.inference_mode():
        return [made.logits(made.inputs(batch), None, NoLaps()) for batch, _ in steps()]


def near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


@ALL
@pytest.mark.parametrize("padded", [False, True])
def test_logits_are_those_of_a_plain_recomputation(name: str, padded: bool) -> None:
    made = engine(MODELS[name])
    made.padded = padded
    for (_, prefixes), found in zip(steps(), logits_of_steps(made), strict=True):
        expected = torch.stack([reference(made, prefix)[-1] for prefix in prefixes])
        assert expected.std() > 0.3  # far above what is tolerated
        near(found, expected)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "bf16") for name in MODELS), ("moe", "fp16")])
def test_sixteen_bit_is_kept_throughout(name: str, dtype: str) -> None:
    made = engine(MODELS[name], dtype=dtype)
    found = logits_of_steps(made)
    assert {logits.dtype for logits in found} == {made.dtype} == {made.layers[0][0].cache.dtype}
    expected = torch.cat([torch.stack([reference(made, prefix)[-1] for prefix in prefixes]) for _, prefixes in steps()])
    # Rounding sends single tokens to other experts; the rest is as near as 8 and 11 bits of mantissa allow.
    error = (torch.cat(found).double() - expected).square().mean(1).sqrt() / expected.std()
    assert error.median() < (0.1 if dtype == "bf16" else 0.01)


@ALL
def test_weights_are_those_the_shape_counts(name: str) -> None:
    made, seen = engine(MODELS[name]), {}

    def count(thing: Any) -> None:
        for key, value in vars(thing).items():
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, torch.Tensor):
                    if key not in ("cache", "cos", "sin", "_pages"):
                        seen[part.data_ptr()] = part.numel()
                elif type(part).__module__ == Transformer.__module__ and hasattr(part, "__dict__"):
                    count(part)

    count(made)
    for attention, block in made.layers:
        count(attention)
        count(block)
    assert sum(seen.values()) == MODELS[name].parameters


def test_answers_are_the_greedy_ones_token_by_token() -> None:
    made = engine(MODELS["gqa"])
    answers, _ = serve(made, SchedulerConfig("chunked", 3, 16, BLOCK), BLOCKS, [(11, 9), (5, 12), (20, 6)])
    for request, length in ((0, 11), (1, 5), (2, 20)):
        tokens = ids(request, length)
        for token in answers[request]:
            assert int(reference(made, tokens)[-1].argmax()) == token
            tokens.append(token)


# Whole runs under the scheduler


def serve(
    made: Transformer, config: SchedulerConfig, kv_blocks: int, lengths: list[tuple[int, int]]
) -> tuple[dict[int, list[int]], int]:
    """Answers to requests of (prompt, output) tokens, and how often one was preempted."""
    prompts, outputs = [list(column) for column in zip(*lengths, strict=True)]
    tables = BlockTables(kv_blocks, BLOCK)
    lane = Lane(config, kv_blocks, prompts, outputs, lambda r: ids(r, prompts[r]), tables)
    assert all(lane.offer(request) for request in range(len(lengths)))
    preemptions = 0
    with torch.inference_mode():
        while (batch := lane.form()) is not None:
            preemptions += len(lane.scheduler.preempted)
            lane.advance(made.forward(made.inputs(batch), None, NoLaps()).tolist())
    assert [len(lane.answers[request]) for request in range(len(lengths))] == outputs
    return lane.answers, preemptions


def check_greedy(made: Transformer, lengths: list[tuple[int, int]], answers: dict[int, list[int]]) -> None:
    """Every token has the largest logit behind those before it, but for rounding where two are as good as equal."""
    for request, (length, outputs) in enumerate(lengths):
        behind = reference(made, ids(request, length) + answers[request][:-1])[-outputs:]
        chosen = behind[torch.arange(outputs), answers[request]]
        assert bool((chosen >= behind.max(dim=1).values - 1e-4).all())


@cache
def shared_engine(name: str) -> Transformer:
    return engine(MODELS[name])


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["gqa", "window", "moe", "gated shared experts"]),
    policy=st.sampled_from(["chunked", "prefill-first", "orca", "static"]),
    padded=st.booleans(),
    max_seqs=st.integers(1, 5),
    budget=st.integers(26, 40),
    small_budget=st.integers(5, 25),
    kv_blocks=st.integers(10, 20),
    lengths=st.lists(st.tuples(st.integers(1, 16), st.integers(1, 10)), min_size=1, max_size=5),
)
def test_any_schedule_generates_greedily(
    name: str, policy: Policy, padded: bool, max_seqs: int, budget: int, small_budget: int, kv_blocks: int,
    lengths: list[tuple[int, int]],
) -> None:  # fmt: skip
    made = shared_engine(name)
    made.padded = padded
    config = SchedulerConfig(policy, max_seqs, small_budget if policy == "chunked" else budget, BLOCK, 28)
    answers, _ = serve(made, config, kv_blocks, lengths)
    check_greedy(made, lengths, answers)


@pytest.mark.parametrize("policy", ["chunked", "prefill-first", "orca"])
@pytest.mark.parametrize("name", ["gqa", "moe"])
def test_preempted_requests_generate_the_same(name: str, policy: Policy) -> None:
    made = shared_engine(name)
    made.padded = False
    lengths = [(9 + r, 12) for r in range(6)]
    scarce, preemptions = serve(made, SchedulerConfig(policy, 6, 30, BLOCK), 12, lengths)
    plenty, none = serve(made, SchedulerConfig(policy, 6, 30, BLOCK), BLOCKS, lengths)
    assert preemptions >= 2 and none == 0
    check_greedy(made, lengths, scarce)
    assert scarce == plenty


# Several ranks


@dataclass(slots=True)
class Meeting:
    """Ranks that are threads of one process: each brings a tensor and takes all."""

    barrier: Barrier
    brought: list[Any]

    def exchange(self, shard: int, tensor: Any) -> list[Any]:
        self.brought[shard] = tensor.clone()
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found

    def share(self, mapping: Mapping, stage: int, shard: int) -> Share:
        def reduce(tensor: Any) -> None:
            tensor.copy_(torch.stack(self.exchange(shard, tensor)).sum(0))

        def gather(tensor: Any) -> Any:
            return torch.cat(self.exchange(shard, tensor), dim=-1)

        return Share(mapping, stage, shard, reduce, gather)


def together(ranks: int, work: Callable[[int], Any], meeting: Meeting) -> list[Any]:
    """What every rank's work returns; if one fails, the others do not wait for it."""

    def guarded(shard: int) -> Any:
        try:
            return work(shard)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(guarded, range(ranks)))


@pytest.mark.parametrize(
    ("name", "mapping"),
    [
        *((name, Mapping(tp=2)) for name in MODELS if MODELS[name].is_moe is False and name != "mqa"),
        ("mqa", Mapping(tp=4)),  # one KV head on all
        ("gqa", Mapping(tp=4)),  # two KV heads, each on two
        ("biases, query and key norms", Mapping(tp=8)),
        ("mha", Mapping(tp=4)),
        *((name, Mapping(tp=2, ep=2)) for name in MODELS if MODELS[name].is_moe),
        *((name, Mapping(tp=2, expert_tp=2)) for name in MODELS if MODELS[name].is_moe),
        ("moe with biases", Mapping(tp=4, ep=2, expert_tp=2)),
        ("gated shared experts", Mapping(tp=4, ep=4)),
        ("gqa", Mapping(tp=2, pp=2, stages=(1, 2))),
    ],
)
def test_shards_add_up_to_the_whole(name: str, mapping: Mapping) -> None:
    whole = logits_of_steps(engine(MODELS[name]))
    meeting = Meeting(Barrier(mapping.tp, timeout=60), [None] * mapping.tp)

    def rank(shard: int) -> list[Any]:
        stages = [engine(MODELS[name], meeting.share(mapping, stage, shard)) for stage in range(mapping.pp)]
        found = []
        with torch.inference_mode():  # of this thread
            for batch, _ in steps():
                hidden = None
                for stage in stages[:-1]:
                    hidden = stage.forward(stage.inputs(batch), hidden, NoLaps())
                found.append(stages[-1].logits(stages[-1].inputs(batch), hidden, NoLaps()))
        return found

    for found in together(mapping.tp, rank, meeting):
        for one, expected in zip(found, whole, strict=True):
            near(one, expected)


@pytest.mark.parametrize("mapping", [Mapping(pp=2), Mapping(pp=2, stages=(1, 2)), Mapping(pp=3)])
@pytest.mark.parametrize("tied", [False, True])
def test_stages_hand_over_what_the_whole_computes(mapping: Mapping, tied: bool) -> None:
    shape = replace(MODELS["gqa"], tied_embeddings=tied)
    whole = engine(shape)
    seeds = []
    stages = [engine(shape, Share(mapping, stage, 0, None, None)) for stage in range(mapping.pp)]
    for stage in stages:
        for attention, block in stage.layers:
            attention.norm.copy_(whole.layers[len(seeds)][0].norm)
            block.norm.copy_(whole.layers[len(seeds)][1].norm)
            seeds.append(attention)
    for (batch, _), expected in zip(steps(), logits_of_steps(whole), strict=True):
        hidden = None
        with torch.inference_mode():
            for stage in stages:
                inputs = stage.inputs(batch)
                found = stage.logits(inputs, hidden, NoLaps()) if stage.share.last else None
                hidden = stage.forward(inputs, hidden, NoLaps())
        near(found, expected)
        assert hidden.tolist() == expected.argmax(dim=-1).tolist()


# What it refuses


@pytest.mark.parametrize(
    ("shape", "mapping", "told"),
    [
        (model((Attention(4, 4, 24, 16, latent=Latent(None, 16, 8)), DENSE)), Mapping(), "latent attention"),
        (model((replace(GQA, sinks=True), DENSE)), Mapping(), "attention sinks"),
        (model((Attention(4, 4, 8, 16), DENSE)), Mapping(), "values of another width than keys"),
        (model((GQA, DENSE), (Attention(4, 4, 16, 16), DENSE)), Mapping(), "heads of several widths"),
        (MODELS["moe"], Mapping(tp=1, attention_dp=2, ep=2), "attention-DP"),
        (replace(MODELS["gqa"], vocab=101), Mapping(tp=2), "a vocabulary of 101 to be cut over 2 ranks"),
        (MODELS["mha"], Mapping(tp=8), "tp divides the attention heads"),
        (MODELS["moe"], Mapping(tp=2), "ep x expert_tp = tp"),
        (MODELS["gqa"], Mapping(pp=4), "every stage has a layer"),
        (MODELS["gqa"], Mapping(pp=2, stages=(1, 1)), "positive layer counts that add up to the 3 layers"),
    ],
)
def test_what_it_cannot_execute_is_named(shape: ModelShape, mapping: Mapping, told: str) -> None:
    with pytest.raises(MappingError, match=told):
        engine(shape, Share(mapping, 0, 0, None, None))


def test_a_sequence_beyond_the_cache_is_refused() -> None:
    made = engine(MODELS["gqa"])
    with pytest.raises(PlanError, match=f"{BLOCK * BLOCKS + 1} tokens: expected at most {BLOCK * BLOCKS}"):
        made.inputs(Batch([Span([1], BLOCK * BLOCKS, list(range(BLOCKS + 1)))], [], BLOCK))
