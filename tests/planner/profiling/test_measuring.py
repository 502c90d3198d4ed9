"""Measuring for real on this CPU: tables of the schema, resumed, refused, and the reasons why points are left out."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

pytest.importorskip("torch", reason="torch (extra 'profile') is not installed")

from hwmodels.errors import MeasurementError
from hwmodels.kernels.table import checked, read_table
from planner.profiling import Machine, Point, kernels, measure, open_machine, profile, read_tables, run
from planner.profiling.collectives import run_collectives
from planner.profiling.timing import timed

SMALL = [
    Point.of("gemm", "fp32", m=4, n=64, k=32),
    Point.of("gemm", "int8", m=32, n=64, k=32),
    Point.of("batched_gemm", "fp32", groups=2, m=4, n=16, k=8),
    Point.of(
        "moe", "fp32",
        tokens=8, hidden=32, intermediate=32, experts=4, top_k=2, tp=2, ep=1, gated=1, distribution="balanced",
    ),
    Point.of("elementwise", "fp32", bytes=1 << 16),
    Point.of("copy", "fp32", kind="d2d", bytes=1 << 16),
]  # fmt: skip


def attention(family: str, **lengths: int) -> Point:
    heads = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "window": 0, "kv_dtype": "fp32"}
    return Point.of(family, "fp32", **heads, **lengths)


SMALL += [
    attention("attention_prefill", new=16, before=0),
    attention("attention_prefill", new=16, before=32),
    attention("attention_decode", context=48),
]


@pytest.fixture(scope="module")
def cpu() -> Machine:
    return replace(open_machine("cpu", "test-cpu", threads=1), cycle_bytes=1 << 22)


def test_every_family_is_measured_in_its_schema(cpu):
    tables = measure(SMALL, cpu)
    assert {(name, len(table)) for name, table in tables.items()} == {
        ("gemm", 2), ("batched_gemm", 1), ("moe", 1), ("elementwise", 1), ("copy", 1),
        ("attention_prefill", 2), ("attention_decode", 1),
    }  # fmt: skip
    for name, table in tables.items():
        table = checked(table, name, name)
        assert set(table["device"]) == {"test-cpu"}
        assert set(table["software"]) == {f"torch {cpu.torch.__version__}"}
        assert (table["spread"] >= 0).all()
    assert set(tables["moe"]["kernel"]) == {"torch_expert_loop"}


def launched(point: Point, machine: Machine) -> object:
    (make,) = kernels.makers(point, machine).values()
    machine.arena.rewind()
    return make()()


def test_attention_behind_cached_tokens_is_the_end_of_attention_over_all(cpu):
    whole = attention("attention_prefill", new=48, before=0)
    part = attention("attention_prefill", new=16, before=32)
    torch, filled = cpu.torch, {}

    def same(self, dtype, *shape):
        # Queries of the part are the last of the whole; keys and values are the same.
        generator = torch.Generator().manual_seed(shape[2])
        kind = (shape[2], sum(1 for key in filled if key[0] == shape[2]))
        if shape[2] == 4:
            return torch.randn(2, 48, 4, 64, generator=generator)[:, -shape[1] :]
        filled[kind] = None
        return torch.randn(shape, generator=generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cpu.arena), "take", same)
        full, end = launched(whole, cpu), launched(part, cpu)
    torch.testing.assert_close(end, full[:, :, -16:])


@pytest.mark.parametrize("ep", [1, 2])
def test_experts_compute_what_their_definition_says(cpu, ep):
    """Against a loop over tokens, with the operands that the arena hands out."""
    torch = cpu.torch
    point = Point.of(
        "moe", "fp32", tokens=6, hidden=16, intermediate=8, experts=4, top_k=2, tp=1, ep=ep, gated=1,
        distribution="balanced",
    )  # fmt: skip
    taken, drawn = [], []
    take, ids = cpu.arena.take, cpu.arena.ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cpu.arena), "take", lambda _, *a: taken.append(take(*a)) or taken[-1])
        patch.setattr(type(cpu.arena), "ids", lambda _, *a: drawn.append(ids(*a)) or drawn[-1])
        found = launched(point, cpu)
    tokens, up, down, share = taken
    flat = drawn[0].flatten()
    order = [i for expert in range(4 // ep) for i in range(len(flat)) if flat[i] == expert]
    expected = torch.zeros_like(tokens)
    for position, i in enumerate(order):
        gate, value = (up[flat[i]] @ tokens[i // 2]).chunk(2)
        expected[i // 2] += share[position] * (down[flat[i]] @ (torch.nn.functional.silu(gate) * value))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_successive_operands_lie_in_different_memory_until_all_of_it_was_handed_out(cpu):
    arena = cpu.arena
    arena.rewind()
    arena.take("fp32", 1)
    held = arena.held["fp32"].numel()
    assert held * 4 >= cpu.cycle_bytes
    arena.rewind()
    places = [arena.take("fp32", 65536).data_ptr() for _ in range(held // 65536)]
    assert len(set(places)) == len(places)
    assert arena.take("fp32", 65536).data_ptr() == places[0]
    assert float(arena.held["fp32"][: arena.filled["fp32"]].std()) == pytest.approx(1.0, abs=0.01)


def test_launches_cycle_through_operands_beyond_the_cache(cpu):
    made = []

    def make():
        made.append(0)
        mine = len(made) - 1

        def launch():
            made[mine] += 1

        return launch

    timing = timed(make, cpu.cycle_bytes / 8, cpu, 1.0)
    assert len(made) == 8
    assert min(made) > 0
    assert timing is not None
    assert timing.samples >= 5


def test_a_launch_over_the_limit_is_given_up(cpu):
    import time

    assert timed(lambda: lambda: time.sleep(0.02), 1e3, cpu, 0.001) is None


class Device:
    """A stand-in for torch.cuda whose clock only launches move on, 10 us each; capturing may be refused."""

    def __init__(self, capturable: bool) -> None:
        self.us, self.capturing, self.captured, self.capturable = 0.0, False, [], capturable
        self.cuda = SimpleNamespace(
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: [launch() for launch in list(self.captured)]),
            graph=self.graph, Event=lambda enable_timing: Event(self), synchronize=lambda: None,
        )  # fmt: skip

    @contextmanager
    def graph(self, graph):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def launch(self):
        if not self.capturing:
            self.us += 10.0
        elif self.capturable:
            self.captured.append(self.launch)
        else:
            raise RuntimeError("not permitted when stream is capturing")


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.us = self.device.us

    def elapsed_time(self, later: Event) -> float:
        return (later.us - self.us) * 1e-3


@pytest.mark.parametrize(("capturable", "how"), [(True, "CUDA graph"), (False, "launched one by one")])
def test_devices_are_timed_by_events_around_replays(cpu, capturable, how):
    device = Device(capturable)
    gpu = replace(cpu, torch=device, kind="cuda")
    gpu.__dict__["arena"] = cpu.arena
    timing = timed(lambda: device.launch, gpu.cycle_bytes / 8, gpu, 1.0)
    assert timing is not None
    assert timing.how == how
    assert timing.seconds == pytest.approx(10e-6)
    assert timing.spread == pytest.approx(0.0, abs=1e-9)


# --- what cannot be measured ------------------------------------------------------------------------------------------


def reasons(points: list[Point], machine: Machine) -> list[str | None]:
    return [outcome.reason for outcome in run.outcomes(points, machine, 60.0, 10.0)]


def test_points_are_left_out_with_the_reason(cpu, monkeypatch):
    window = Point.of(
        "attention_decode", "fp32", batch=1, context=64, heads=2, kv_heads=1, head_dim=64, window=16, kv_dtype="fp32"
    )
    assert reasons([window], cpu) == ["no kernel for it is installed"]
    latent = Point.of("mla_decode", "bf16", batch=1, context=64, heads=2, kv_dtype="bf16")
    assert "no kernel" in str(reasons([latent], cpu))
    assert measure([latent], cpu) == {}
    assert "no arithmetic in fp8" in str(reasons([Point.of("gemm", "fp8", m=16, n=16, k=16)], cpu))
    assert "host" in str(reasons([Point.of("copy", "fp32", kind="h2d", bytes=64)], cpu))
    assert "multiple of 64" in str(reasons([Point.of("elementwise", "fp32", bytes=12)], cpu))
    assert "more than 10 s" in str(reasons([Point.of("gemm", "fp32", m=1 << 20, n=1 << 14, k=1 << 14)], cpu))
    monkeypatch.setattr(Machine, "free_bytes", lambda self: 1 << 10)
    assert "larger than free memory" in str(reasons(SMALL[:1], cpu))


def test_a_kernel_that_keeps_failing_is_dropped(cpu, monkeypatch):
    def broken(point, machine):
        def make():
            raise RuntimeError("no such kernel\nand a stack")

        return {"broken": make}

    monkeypatch.setitem(kernels.BUILDERS, "copy", broken)
    points = [Point.of("copy", "fp32", kind="d2d", bytes=64 * i) for i in range(1, 9)]
    found = reasons(points, cpu)
    assert found[0] == "broken: no such kernel and a stack"
    assert found[-1] == f"broken failed {run.PATIENCE} times in a row"


def test_families_take_turns_by_their_shares_of_the_time(cpu, monkeypatch):
    """Whatever a point of a family takes: here 1 s of a clock that only measuring moves on, or 3 s for GEMMs."""
    clock, spent = [0.0], Counter()

    def here(point, *_):
        took = 3.0 if point.family == "gemm" else 1.0
        clock[0] += took
        spent[point.family] += took
        yield run.Outcome(point, "any", 1.0)

    monkeypatch.setattr(run, "_here", here)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    points = [
        replace(point, shape=(i, *point.shape[1:])) for point in (SMALL[0], SMALL[3], SMALL[4]) for i in range(900)
    ]
    first = [outcome for outcome, _ in zip(run.outcomes(points, cpu, 1e6, 10.0), range(500), strict=False)]
    assert len(first) == 500
    rates = {family: time_s / run.SHARES[family] for family, time_s in spent.items()}
    assert max(rates.values()) < 1.1 * min(rates.values())


def test_no_point_is_begun_when_the_time_is_over(cpu):
    assert {outcome.reason for outcome in run.outcomes(SMALL, cpu, 0.0, 10.0)} == {"no time left"}


def test_without_torch_there_is_one_line_with_a_way_out(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("planner.profiling.machine.import_module", missing)
    with pytest.raises(MeasurementError, match=r"pip install 'shardwise\[profile\]'"):
        open_machine("cpu")


def test_without_cuda_the_cpu_is_offered(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MeasurementError, match="--device cpu"):
        open_machine("cuda")
    with pytest.raises(MeasurementError, match="expected cuda or cpu"):
        open_machine("tpu")


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Only the small points, so that a run is over when they are measured."""
    monkeypatch.setattr(run, "points_for", lambda minutes, machine, families: list(SMALL))


def test_a_run_keeps_tables_and_says_what_it_is(cpu, few, tmp_path):
    found = profile(tmp_path, cpu, 1.0)
    assert found.new == len(SMALL)
    for name in found.tables:
        pd.testing.assert_frame_equal(read_tables(tmp_path)[name], found.tables[name])
    about = yaml.safe_load((tmp_path / "about.yaml").read_text())
    assert about["device"] == "test-cpu"
    assert about["threads"] == 1
    assert about["rows"]["gemm"] == 2
    assert {"mla_decode", "expert_exchange"} <= set(about["left_out"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".parquet", ".yaml"}


def test_an_interrupted_run_is_taken_up_where_it_ended(cpu, few, tmp_path, monkeypatch):
    seen = []

    def interrupting(text, share):
        seen.append(text)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(tmp_path, cpu, 1.0, progress=interrupting)
    kept = {path.stem: read_table(path, path.stem) for path in tmp_path.glob("*.parquet")}
    assert sum(map(len, kept.values())) == 4
    again = profile(tmp_path, cpu, 1.0)
    assert again.new == len(SMALL) - 4
    for name, table in kept.items():
        pd.testing.assert_frame_equal(again.tables[name].head(len(table)), table)
    assert profile(tmp_path, cpu, 1.0).new == 0


@pytest.mark.parametrize("change", [{"name": "other"}, {"reported": "other"}, {"threads": 64}, {"memory_bytes": 1}])
def test_a_folder_of_another_machine_is_refused(cpu, few, tmp_path, change):
    profile(tmp_path, cpu, 1.0)
    with pytest.raises(MeasurementError, match="choose another folder"):
        profile(tmp_path, replace(cpu, **change), 1.0)


def test_a_folder_of_other_software_is_refused(cpu, few, tmp_path):
    profile(tmp_path, cpu, 1.0)
    path = tmp_path / "about.yaml"
    path.write_text(path.read_text().replace(cpu.software, "torch 1.0"))
    with pytest.raises(MeasurementError, match=r"software = 'torch 1\.0'"):
        profile(tmp_path, cpu, 1.0)
    path.unlink()
    with pytest.raises(MeasurementError, match=r"no about\.yaml"):
        profile(tmp_path, cpu, 1.0)


@pytest.mark.parametrize("file", ["about.yaml", "gemm.parquet"])
def test_a_folder_with_a_broken_file_is_refused(cpu, few, tmp_path, file):
    profile(tmp_path, cpu, 1.0)
    (tmp_path / file).write_bytes(b"\x00 broken")
    with pytest.raises(MeasurementError, match=file):
        profile(tmp_path, cpu, 1.0)


# --- several ranks ----------------------------------------------------------------------------------------------------


def test_two_processes_measure_collectives(cpu):
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
    points = [Point.of("collective", "fp32", kind=kind, gpus=2, nodes=1, bytes=4096) for kind in kinds]
    points.append(Point.of("collective", "fp32", kind="all-to-all", gpus=2, nodes=1, bytes=4))
    found = list(run_collectives(points, cpu, 60.0, 10.0))
    assert [entry[0] for entry in found] == points
    assert all(seconds > 0 and np.isfinite(spread) and reason is None for _, seconds, spread, _, reason in found[:4])
    assert "multiple of 2 numbers" in str(found[4][4])


def test_groups_that_are_not_there_are_left_out_with_the_reason(cpu):
    point = Point.of("collective", "fp32", kind="all-reduce", gpus=8, nodes=1, bytes=4096)
    assert reasons([point], cpu) == ["1 device(s) visible"]
