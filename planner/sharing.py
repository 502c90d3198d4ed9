"""How is a device divided between prefill and decode that run at once? A pool's rule as the simulator knows it."""

from __future__ import annotations

from dataclasses import fields, replace

from hwmodels.shares import SharedSteps
from planner.plan import Pool
from simulator.deployment import ReplicaSpec
from simulator.shared import SharedSpec
from simulator.shares import Nexus, Policy, SemiPD, Shares, Static

#: Seconds of waiting that Nexus counts like a token less to compute, times its tokens a second (the paper's gamma).
AGEING = 15.0


def policy_of(pool: Pool) -> Policy:
    """The rule of a pool whose phases share its devices."""
    if pool.sharing == "nexus":
        return Nexus() if pool.shares is None else Nexus(shares=Shares(*pool.shares, lend=True))
    if pool.sharing == "semi-pd":
        assert pool.targets_s is not None
        ttft_s, tpot_s = pool.targets_s
        rule = SemiPD(ttft_s, tpot_s)
        return rule if pool.shares is None else replace(rule, shares=Shares(*pool.shares))
    assert pool.shares is not None
    return Static(Shares(*pool.shares))


def shared_spec(spec: ReplicaSpec, steps: SharedSteps, pool: Pool) -> SharedSpec:
    """The replica with its phases side by side instead of in common steps."""
    base = {entry.name: getattr(spec, entry.name) for entry in fields(ReplicaSpec)}
    return SharedSpec(
        **base, steps=steps, policy=policy_of(pool), ageing=AGEING if pool.sharing == "nexus" else None
    )  # fmt: skip
