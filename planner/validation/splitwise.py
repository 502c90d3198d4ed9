"""What remains of Splitwise's advantage when decode steps take what its own table says they take?

Splitwise (ISCA 2024, arXiv:2311.18677) splits prompts and tokens over machines of different kinds. Its abstract
promises 1.4 times the throughput at 20 % lower cost, and 2.35 times the throughput at equal cost and power. Here the
same clusters serve the same traffic under the same nine limits, on step times read from the published table in the
published way and as measured (planner/validation/splitwisetable.py); for both, pools are also sized by planner.pools,
and the best of its points is simulated.

Costs and power of machines, and the counts called published, are those of splitwise-sim @8f99e7d (notebooks/utils.py,
scripts/run_throughput_isopower.sh and run_throughput_isocost.sh).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor
from typing import Literal, TypeVar

import pandas as pd

from hwmodels.errors import MeasurementError
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from planner.errors import NoFeasiblePlanError
from planner.options import Budget
from planner.validation.splitwisemachines import Machine, Role, TableModel
from planner.validation.splitwisesizing import Choice, best_of, capacity, choices, pools_of
from planner.validation.splitwiseslo import Throughput, Traffic, throughput
from planner.validation.splitwisetable import LOOKUPS, HeldOut, Lookup, cap_ratios, held_out, phase_times
from planner.workers import Workers, available_cpus

Progress = Callable[[str, float | None], None]
Task = TypeVar("Task")
Answer = TypeVar("Answer")
Money = Literal["power", "cost"]
Counts = Mapping[tuple[str, Role], int]

#: By name: hardware of the table, device profile, USD/h and kW of a machine with eight of them.
MACHINES = {
    "A100": ("a100-80gb", "a100-80-sxm", 2.21, 24.8),
    "H100": ("h100-80gb", "h100-sxm", 4.76, 44.0),
    "H100cap": ("h100-80gb-pcap", "h100-sxm", 4.76, 0.7 * 44.0),
}
#: Models of the table, and their profiles. The published figures are those of BLOOM.
MODELS = {"bloom-176b": "bloom-176b", "llama2-70b": "llama-2-70b"}
GPUS = 8
#: What 40 H100 machines take.
BUDGETS: Mapping[Money, float] = {"power": 40 * 44.0, "cost": 40 * 4.76}
DESIGNS: Mapping[str, tuple[str, str]] = {
    "AA": ("A100", "A100"),
    "HH": ("H100", "H100"),
    "HA": ("H100", "A100"),
    "HHcap": ("H100", "H100cap"),
}
ANY = "any split"
#: Machines for prompts and for tokens of the conversation traffic, as published.
PUBLISHED: Mapping[Money, Mapping[str, tuple[int, int]]] = {
    "power": {"AA": (45, 25), "HH": (25, 15), "HA": (25, 26), "HHcap": (25, 21)},
    "cost": {"AA": (51, 35), "HH": (25, 15), "HA": (30, 21), "HHcap": (30, 10)},
}
CONVERSATION = "conversation"
#: Points of the integer program that are simulated.
KEEP = 3


@dataclass(frozen=True, slots=True)
class Row:
    """A cluster and the highest rate it serves.

    sized           who chose the counts: published, sized (by the integer program), or budget (as many as it pays for)
    counts          machines by (kind, task)
    expected_per_s  rate the capacities of its pools add up to; None for machines that do both
    """

    lookup: Lookup
    traffic: str
    money: Money
    design: str
    sized: str
    counts: Counts
    usd_per_h: float
    kw: float
    rate_per_s: float
    expected_per_s: float | None
    limited_by: str
    peak_seqs: int

    @property
    def split(self) -> bool:
        """Whether prompts and tokens have machines of their own."""
        return all(role != "aggregated" for _, role in self.counts)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A throughput over another one, by look-up; `published` is what the paper has there, None where nothing."""

    what: str
    published: float | None
    ours: Mapping[Lookup, float]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the command says.

    decode_ms       (sequences, by look-up) of an A100 machine: the fault of the published look-up
    measured_seqs   most sequences that were measured together; larger batches lie on the last line
    """

    model: str
    seconds: float
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    held_out: tuple[HeldOut, ...]
    cap_ratios: tuple[float, float]
    decode_ms: tuple[tuple[int, Mapping[Lookup, float]], ...]
    measured_seqs: int


@dataclass(frozen=True, slots=True)
class _Cell:
    """One row to come: counts to simulate, the best of which is taken."""

    lookup: Lookup
    traffic: str
    money: Money
    design: str
    sized: str
    candidates: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class _Study:
    """What all rows share."""

    machines: Mapping[Lookup, Mapping[str, Machine]]
    traffic: Mapping[str, Traffic]
    known: dict[tuple[Lookup, str], dict[tuple[str, Role], float]] = field(default_factory=dict)

    def alone(self, lookup: Lookup) -> TableModel:
        return self.machines[lookup]["A100"].model

    def measure(self, task: tuple[Lookup, str, str, Role]) -> float:
        """Capacity of one machine."""
        lookup, traffic, name, role = task
        return capacity(self.machines[lookup][name], role, self.traffic[traffic], self.alone(lookup))

    def serve(self, cell: _Cell) -> tuple[Choice, Throughput]:
        """Highest rate of the cell's best counts."""
        machines, traffic, alone = self.machines[cell.lookup], self.traffic[cell.traffic], self.alone(cell.lookup)
        if len(cell.candidates) > 1:
            return best_of(cell.candidates, machines, traffic, alone)
        (only,) = cell.candidates
        return only, throughput(pools_of(only.counts, machines), traffic, alone, only.expected_per_s)


def machines_of(table: pd.DataFrame, model: str, lookup: Lookup) -> dict[str, Machine]:
    """The machines with one copy of the model each, in 16 bits; all memory beside the weights holds KV."""
    if model not in MODELS:
        raise MeasurementError(f"model {model!r}: expected one of {', '.join(MODELS)}")
    shape = load_model(MODELS[model])
    kv_bytes = shape.kv_bytes_per_token("bf16")
    found = {}
    for name, (hardware, device, usd_per_h, kw) in MACHINES.items():
        free_bytes = GPUS * load_cluster(device, GPUS).device.memory_bytes - 2 * shape.parameters
        times = TableModel(phase_times(table, model, hardware, GPUS), lookup)
        found[name] = Machine(name, times, int(free_bytes / kv_bytes), kv_bytes, len(shape.layers), usd_per_h, kw)
    return found


def study(
    table: pd.DataFrame,
    model: str,
    traffic: Mapping[str, Traffic],
    *,
    quick: bool = False,
    jobs: int | None = None,
    progress: Progress = lambda what, share: None,
) -> Report:
    """Serve all traffic on all clusters; `quick` takes equal power and the conversation only.

    Raises MeasurementError for a model that the table does not have.
    """
    machines = {lookup: machines_of(table, model, lookup) for lookup in LOOKUPS}
    what = _Study(machines, {name: traffic[name] for name in traffic if not quick or name == CONVERSATION})
    jobs = jobs or available_cpus()
    asked = _capacities_wanted(what)
    measured = _in_rounds(what.measure, asked, jobs, progress, "capacities")
    for per_s, (lookup, name, machine, role) in zip(measured, asked, strict=True):
        for one, other in _same(machines, lookup, machine, role):
            what.known.setdefault((one, name), {})[other, role] = per_s
    cells = _cells(what, quick)
    served = _in_rounds(what.serve, cells, jobs, progress, "clusters")
    rows = [
        _row(cell, choice, reached, machines[cell.lookup])
        for cell, (choice, reached) in zip(cells, served, strict=True)
    ]
    a100 = {lookup: machines[lookup]["A100"].model.decode_s for lookup in LOOKUPS}
    return Report(
        model,
        next(iter(what.traffic.values())).seconds,
        tuple(rows),
        tuple(ratios(rows)),
        tuple(held_out(table)),
        cap_ratios(table, MACHINES["H100cap"][0], MACHINES["H100"][0]),
        tuple((n, {lookup: 1e3 * a100[lookup][n] for lookup in LOOKUPS}) for n in (1, 16, 64)),
        int(phase_times(table, model, MACHINES["A100"][0], GPUS).sequences[-1]),
    )


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """The abstract's two figures, AA at equal cost and with other counts, and the best split over the best baseline."""
    found = [
        _ratio(rows, "power", "Splitwise-AA", "Baseline-A100", 2.35),
        _ratio(rows, "power", "Splitwise-AA", "Baseline-H100", 1.4),
        _ratio(rows, "cost", "Splitwise-AA", "Baseline-H100", None),
        _ratio(rows, "power", "Splitwise-AA", "Baseline-A100", None, "sized"),
        _ratio(rows, "power", "Splitwise-AA", "Baseline-H100", None, "sized"),
    ]
    for traffic in dict.fromkeys(row.traffic for row in rows):
        for money in BUDGETS:
            ours: dict[Lookup, float] = {}
            for lookup in LOOKUPS:
                mine = [r for r in rows if (r.lookup, r.traffic, r.money) == (lookup, traffic, money)]
                split = max((row.rate_per_s for row in mine if row.split), default=0.0)
                whole = max((row.rate_per_s for row in mine if not row.split), default=0.0)
                if whole:
                    ours[lookup] = split / whole
            if ours:
                found.append(Ratio(f"best split over best baseline, {traffic}, equal {money}", None, ours))
    return [ratio for ratio in found if ratio.ours]


def _ratio(
    rows: Sequence[Row], money: Money, split: str, baseline: str, published: float | None, sized: str = "published"
) -> Ratio:
    """Of a split with the published counts, or those the program chose, and a baseline, under conversation traffic."""
    of = {(row.lookup, row.design, row.sized): row for row in rows if (row.traffic, row.money) == (CONVERSATION, money)}
    what, ours = "", {}
    for lookup in LOOKUPS:
        one, other = of.get((lookup, split, sized)), of.get((lookup, baseline, "budget"))
        if one and other and other.rate_per_s:
            cost, power = one.usd_per_h / other.usd_per_h, one.kw / other.kw
            name = f"{split}, sized," if sized == "sized" else split
            what = f"{name} over {baseline}, {CONVERSATION}, cost x{cost:.2f}, power x{power:.2f}"
            ours[lookup] = one.rate_per_s / other.rate_per_s
    return Ratio(what, published, ours)


def _capacities_wanted(what: _Study) -> list[tuple[Lookup, str, str, Role]]:
    """Capacities to measure: those that do not follow from another one's."""
    wanted: list[tuple[Lookup, str, str, Role]] = []
    for lookup in LOOKUPS:
        for traffic in what.traffic:
            for name in MACHINES:
                for role in ("prefill", "decode"):
                    first = _same(what.machines, lookup, name, role)[0]
                    if first == (lookup, name):
                        wanted.append((lookup, traffic, name, role))
    return wanted


def _same(
    machines: Mapping[Lookup, Mapping[str, Machine]], lookup: Lookup, name: str, role: Role
) -> list[tuple[Lookup, str]]:
    """(look-up, machine) with the same times for the task and the same machine to compare with, itself included."""

    def times(one: Lookup, other: str) -> object:
        machine, alone = machines[one][other], machines[one]["A100"].model
        if role == "prefill":
            return machine.model.prompt_s, alone.prompt_s, machine.kv_tokens
        return machine.model.decode_s, alone.decode_s, machine.kv_tokens

    mine = times(lookup, name)
    return [(one, other) for one in LOOKUPS for other in machines[one] if times(one, other) == mine]


def _cells(what: _Study, quick: bool) -> list[_Cell]:
    """All rows to come."""
    found = []
    for lookup in LOOKUPS:
        machines = what.machines[lookup]
        for traffic in what.traffic:
            known = what.known[lookup, traffic]
            for money, limit in BUDGETS.items():
                if quick and money != "power":
                    continue
                for name in MACHINES:
                    count = floor(limit / _price(machines[name], money) + 1e-9)
                    lone_s = machines[name].model.prompt_s[int(what.traffic[traffic].trace.prompt_tokens.mean())]
                    guess = Choice({(name, "aggregated"): count}, 0.3 * count / lone_s, 0.0)
                    found.append(_Cell(lookup, traffic, money, f"Baseline-{name}", "budget", (guess,)))
                if traffic == CONVERSATION:
                    for design, (prompts, tokens) in PUBLISHED[money].items():
                        first, second = DESIGNS[design]
                        counts: Counts = {(first, "prefill"): prompts, (second, "decode"): tokens}
                        expected = min(prompts * known[first, "prefill"], tokens * known[second, "decode"])
                        choice = Choice(counts, expected, expected)
                        found.append(_Cell(lookup, traffic, money, f"Splitwise-{design}", "published", (choice,)))
                sized = {ANY: (tuple(MACHINES), tuple(MACHINES))}
                if money == "power" and not quick:
                    sized = {f"Splitwise-{name}": ((one,), (two,)) for name, (one, two) in DESIGNS.items()} | sized
                for design, (firsts, seconds) in sized.items():
                    kinds: list[tuple[str, Role]] = [(name, "prefill") for name in firsts]
                    kinds += [(name, "decode") for name in seconds]
                    kinds = [kind for kind in kinds if known[kind] > 0]
                    budget = Budget(power_w=1e3 * limit) if money == "power" else Budget(usd_per_h=limit)
                    try:
                        best = choices(machines, known, kinds, budget, 1 if quick else KEEP)
                    except NoFeasiblePlanError:
                        continue
                    found.append(_Cell(lookup, traffic, money, design, "sized", tuple(best)))
    return found


def _price(machine: Machine, money: Money) -> float:
    return machine.kw if money == "power" else machine.usd_per_h


def _row(cell: _Cell, choice: Choice, reached: Throughput, machines: Mapping[str, Machine]) -> Row:
    counts = choice.counts
    return Row(
        cell.lookup,
        cell.traffic,
        cell.money,
        cell.design,
        cell.sized,
        counts,
        sum(machines[name].usd_per_h * count for (name, _), count in counts.items()),
        sum(machines[name].kw * count for (name, _), count in counts.items()),
        reached.rate_per_s,
        None if cell.sized == "budget" else choice.expected_per_s,
        reached.limited_by,
        reached.peak_seqs,
    )


def _in_rounds(
    function: Callable[[Task], Answer], tasks: Sequence[Task], jobs: int, progress: Progress, what: str
) -> list[Answer]:
    """Answers in the order of the tasks, with a word to people now and then."""
    answers: list[Answer] = []
    size = 6 * jobs
    with Workers(function, jobs) as workers:
        for start in range(0, len(tasks), size):
            progress(f"{what}: {start} of {len(tasks)}", start / len(tasks))
            answers += workers.map(tasks[start : start + size])
    return answers
