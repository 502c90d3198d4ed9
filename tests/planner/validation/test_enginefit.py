"""Overheads are found again where the simulator itself measured, and judged on layouts they were not fitted to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hwmodels.engine import load_engine
from hwmodels.errors import MeasurementError
from planner.catalogue import Catalogue, open_catalogue
from planner.plan import Plan, Pool
from planner.validation.case import Case
from planner.validation.enginefit import COEFFICIENTS, fit_engine, may_speculate
from planner.validation.halves import half_of
from simulator.result import latencies
from simulator.simulate import run
from simulator.workload import Requests, Workload

TRUE = {
    "step_overhead_s": 2e-3,
    "sequence_overhead_s": 2e-5,
    "prompt_overhead_s": 8e-3,
    "unfused": 0.4,
    "request_overhead_s": 0.05,
}


def cases() -> list[Case]:
    """What an engine with the TRUE overheads would have measured, on many layouts' worth of labels."""
    base = open_catalogue("llama-3.2-1b", "h100-sxm", 1, "vllm")
    engine = replace(base.engine, **TRUE)
    catalogue = Catalogue(base.model, base.cluster, engine)
    plan = Plan("llama-3.2-1b", "h100-sxm", 1, (Pool(1, max_context_tokens=4096),), "vllm")
    found = []
    for index, (prompt, output, concurrency) in enumerate(
        (p, o, c) for p in (128, 1500) for o in (8, 60) for c in (1, 4, 16, 48) for _ in range(5)
    ):
        rng = np.random.default_rng(index)
        count = 3 * concurrency + 4
        lengths = (rng.integers(max(1, int(0.8 * most)), most, count, endpoint=True) for most in (prompt, output))
        workload = Workload(Requests(np.zeros(count), *lengths), concurrency)
        log = run(catalogue.deployment(plan), workload)
        ttft_s, tpot_s, _ = latencies(
            log.arrival_s, np.array(log.first_token_s), np.array(log.finish_s), workload.requests.output_tokens
        )
        measured = {"ttft": float(ttft_s.mean()), "tpot": float(np.nanmean(tpot_s))}
        labels = {"system": "h100_sxm", "backend": "vllm", "model": "m", "precision": "bf16", "layout": f"TP{index}"}
        found.append(Case(f"row {index}", labels, plan, workload, measured, ("all",)))
    return found


def test_known_overheads_are_found_again() -> None:
    fit = fit_engine(cases(), "vllm", "calibrated", jobs=1, progress=lambda what: None)
    assert fit.points["fitted"] >= 10 <= fit.points["held-out"]
    assert fit.engine.request_overhead_s == pytest.approx(TRUE["request_overhead_s"], rel=0.05)
    assert fit.engine.prompt_overhead_s == pytest.approx(TRUE["prompt_overhead_s"], rel=0.2)
    for half in ("fitted", "held-out"):
        for metric, (before, after) in fit.errors[half].items():
            assert after < 0.02 < before, (half, metric)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(MeasurementError, match="expected at least 30"):
        fit_engine(cases()[:4], "vllm", "calibrated", jobs=1, progress=lambda what: None)


def test_all_points_of_a_layout_are_on_one_side() -> None:
    labels = {"system": "s", "backend": "b", "model": "m", "precision": "p", "layout": "TP8"}
    assert {half_of({**labels, "isl": str(isl)}) for isl in range(50)} == {half_of(labels)}
    sides = [half_of({**labels, "layout": f"TP{n}"}) for n in range(200)]
    assert 60 < sides.count("fitted") < 140


def test_models_with_a_draft_of_their_own_are_not_fitted_to() -> None:
    case = cases()[0]
    assert not may_speculate(case)
    assert may_speculate(replace(case, plan=replace(case.plan, model="deepseek-r1")))


def test_every_coefficient_is_one_of_the_profile() -> None:
    engine = load_engine("vllm")
    assert len(COEFFICIENTS) <= 6
    assert all(getattr(engine, key) >= 0 for key in COEFFICIENTS)
