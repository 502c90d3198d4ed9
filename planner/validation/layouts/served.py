"""The case of one published closed-loop measurement: names, ranks, lengths and concurrency become plan and client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping as Cut
from planner.catalogue import law_broken
from planner.plan import Plan, Pool
from planner.validation.case import Case
from planner.validation.halves import half_of
from planner.validation.layouts.clients import RANGE_RATIO, closed_loop
from planner.validation.layouts.formats import formats_of
from planner.validation.layouts.names import backend_named, model_named, precision_named, system_named
from planner.validation.layouts.recipes import CONTEXT_MARGIN, settings_of
from planner.validation.layouts.rows import Unmappable


@dataclass(frozen=True, slots=True)
class Ranks:
    """How one replica is cut, as in planner.plan.Pool."""

    tp: int = 1
    pp: int = 1
    attention_dp: int = 1
    ep: int = 1
    expert_tp: int = 1

    def __str__(self) -> str:
        """In words: TP4 EP4, DP8 EP8, TP8 PP2; expert parallelism only where there is some."""
        parts = (("TP", self.tp), ("PP", self.pp), ("DP", self.attention_dp), ("EP", self.ep))
        return " ".join(f"{name}{degree}" for name, degree in parts if degree > 1) or "TP1"


@dataclass(frozen=True, slots=True)
class Point:
    """One closed-loop measurement as published.

    model, system, backend, precision   as the source calls them
    gemm          format of dense products, "" where the source does not say
    version       of the engine, "" where the source does not say
    isl, osl      nominal prompt and output tokens
    concurrency   requests in flight over the whole deployment
    ratio         shortest length over the nominal one
    """

    model: str
    system: str
    backend: str
    precision: str
    version: str
    isl: int
    osl: int
    concurrency: int
    ranks: Ranks
    gemm: str = ""
    ratio: float = RANGE_RATIO


def served(row: str, point: Point, measured: Mapping[str, float], labels: Mapping[str, str]) -> Case:
    """The case of a point; Unmappable for names without a profile and for cuts the model forbids.

    labels   as published; the layout in words is added
    """
    model, system = model_named(point.model), system_named(point.system)
    engine, precision = backend_named(point.backend), precision_named(point.precision)
    assert model.profile is not None
    cut = point.ranks
    problem = forbidden(model.profile, cut)
    if problem:
        raise Unmappable(problem)
    formats = formats_of(model, precision, system, point.gemm)
    settings = settings_of(
        model,
        engine,
        system,
        formats,
        precision=precision,
        version=point.version,
        isl=point.isl,
        osl=point.osl,
        sequences=-(-point.concurrency // cut.attention_dp),
    )
    pool = Pool(
        1,
        tp=cut.tp,
        pp=cut.pp,
        attention_dp=cut.attention_dp,
        ep=cut.ep,
        expert_tp=cut.expert_tp,
        weights=formats.weights,
        activations=formats.activations,
        kv=settings.kv,
        experts=formats.experts,
        policy=settings.policy,
        max_seqs=settings.max_seqs,
        token_budget=settings.token_budget,
        block_tokens=settings.block_tokens,
        max_context_tokens=point.isl + point.osl + CONTEXT_MARGIN,
    )
    known = {
        **labels,
        "layout": str(cut),
        "gpus": str(pool.gpus),
        "isl": str(point.isl),
        "osl": str(point.osl),
        "concurrency": str(point.concurrency),
    }
    known["half"] = half_of(known)
    traffic = ("system", "model", "precision", "backend", "version", "isl", "osl", "concurrency")
    return Case(
        row=row,
        labels=known,
        plan=Plan(model.profile, system.cluster, pool.gpus, (pool,), engine),
        workload=closed_loop(point.isl, point.osl, point.concurrency, point.ratio),
        measured=measured,
        choice=tuple(known.get(key, "") for key in traffic),
    )


@lru_cache(maxsize=256)
def forbidden(profile: str, cut: Ranks) -> str | None:
    """The law of the shipped model that the ranks break, in words; None if they are legal."""
    shape = load_model(profile)
    law = law_broken(shape, Cut(cut.tp, cut.pp, cut.attention_dp, cut.ep, cut.expert_tp))
    return None if law is None else f"the ranks break the law that {law}"


@lru_cache(maxsize=64)
def has_experts(profile: str) -> bool:
    """Whether the shipped model is a mixture of experts."""
    return load_model(profile).is_moe
