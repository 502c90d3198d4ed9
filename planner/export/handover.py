"""Which pools may hand KV to each other under the rules of a serving engine, and who of them does what?

Rules are those of the versions the exports are written for; where each was read stands with the engine's `RULES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from hwmodels.errors import ProfileError
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from planner.errors import PlanError
from planner.export.launch import WIDE, Replica
from planner.plan import Plan, Pool


@dataclass(frozen=True, slots=True)
class Rules:
    """What an engine asks of a prefill pool and a decode pool between which KV goes.

    engine           name and version, for messages
    tp               of an attention group: decode's a multiple of prefill's, one a multiple of the other, or free
    blocks           decode's as large as prefill's, or a multiple
    prefill_stages   whether prefill pools may be pipelined
    decode_stages    whether decode pools may be pipelined
    even_stages      whether pipeline stages must hold as many layers each
    copies           whether tp may differ where both pools keep copies of KV heads, and where layers have windows
    """

    engine: str
    tp: Literal["grows", "divides", "free"]
    blocks: Literal["same", "multiple"]
    prefill_stages: bool
    decode_stages: bool
    even_stages: bool = False
    copies: bool = True


def of_role(replicas: Iterable[Replica], role: str) -> list[Replica]:
    """The replicas of the pools of a role."""
    return [replica for replica in replicas if replica.pool.role == role]


def pools_of_role(plan: Plan, role: str) -> list[tuple[int, Pool]]:
    """Position and pool of the pools of a role."""
    return [(index, pool) for index, pool in enumerate(plan.pools) if pool.role == role]


def check_handover(plan: Plan, rules: Rules, notes: list[str]) -> None:
    """Raise PlanError unless every prefill pool can hand its KV to every decode pool, the router being free to choose.

    Nothing is asked of plans without prefill and decode pools.
    """
    if not plan.disaggregated:
        return
    for index, pool in enumerate(plan.pools):
        _check_role(pool, index, rules)
    for (i, prefill), (j, decode) in product(pools_of_role(plan, "prefill"), pools_of_role(plan, "decode")):
        _check_formats(prefill, decode, i, j, rules)
        _check_blocks(prefill, decode, i, j, rules, notes)
        _check_tp(prefill, decode, i, j, rules)
        _check_heads(plan, prefill, decode, i, j, rules, notes)
    vendors = sorted({vendor for name in _hardware(plan) if (vendor := _vendor(name))})
    if len(vendors) > 1:
        raise PlanError(
            f"prefill and decode pools are on devices of {', '.join(vendors)}, expected one vendor's for "
            f"{rules.engine}; plan pools on one vendor's devices"
        )
    contexts = {pool.max_context_tokens for pool in plan.pools}
    if len(contexts) > 1:
        notes.append(f"Pools accept contexts of different length: keep requests within {min(contexts)} tokens.")


def transfer_note(plan: Plan, how: str, layerwise: bool = False) -> list[str]:
    """What the engine does about KV transfer, and that the plan assumes something else where it does."""
    if not plan.disaggregated:
        return []
    same = (plan.transfer == "layer-wise") == layerwise
    return [how if same else f"{how.removesuffix('.')}; the plan's transfer is {plan.transfer}."]


def routing_weights_note(plan: Plan) -> list[str]:
    """That two-stage routers know no shares, where a plan gives its pools some."""
    if plan.disaggregated and any(pool.share is not None for pool in plan.pools):
        return ["The router knows no shares: replicas of a role get requests alike."]
    return []


def _check_role(pool: Pool, index: int, rules: Rules) -> None:
    where = f"pools[{index}]"
    if pool.role not in ("prefill", "decode"):
        raise PlanError(
            f"{where}.role is {pool.role!r} beside prefill and decode pools, expected prefill or decode: the router of "
            f"{rules.engine} knows no other; make it one of them, or a plan of its own"
        )
    if pool.pp > 1 and not (rules.prefill_stages if pool.role == "prefill" else rules.decode_stages):
        raise PlanError(
            f"{where}.pp is {pool.pp}, expected 1: {rules.engine} moves no KV of pipelined {pool.role} pools; plan "
            "tensor parallelism instead"
        )
    if rules.even_stages and pool.stages is not None and len(set(pool.stages)) > 1:
        raise PlanError(
            f"{where}.stages is {list(pool.stages)}, expected as many layers in each: {rules.engine} moves no KV of "
            "uneven stages; plan even stages"
        )


def _check_formats(prefill: Pool, decode: Pool, i: int, j: int, rules: Rules) -> None:
    kept, wanted = _kv_format(prefill), _kv_format(decode)
    if kept != wanted:
        raise PlanError(
            f"pools[{j}].kv is {wanted} with {kept} in pools[{i}], expected the same: {rules.engine} does not convert "
            "KV on the way; plan one format for both"
        )


def _check_blocks(prefill: Pool, decode: Pool, i: int, j: int, rules: Rules, notes: list[str]) -> None:
    ours, theirs = prefill.block_tokens, decode.block_tokens
    if ours == theirs:
        return
    if rules.blocks == "same" or theirs % ours:
        wanted = "as many" if rules.blocks == "same" else "a multiple"
        raise PlanError(
            f"pools[{j}].block_tokens is {theirs} with {ours} in pools[{i}], expected {wanted} for {rules.engine}; "
            "plan one block size for both"
        )
    notes.append(f"pools[{j}]: {rules.engine} joins blocks of {ours} tokens into {theirs} on arrival.")


def _check_tp(prefill: Pool, decode: Pool, i: int, j: int, rules: Rules) -> None:
    if rules.tp == "free" or decode.tp % prefill.tp == 0:
        return
    if rules.tp == "divides" and prefill.tp % decode.tp == 0:
        return
    wanted = "a multiple of it" if rules.tp == "grows" else "one to divide the other"
    raise PlanError(
        f"pools[{j}].tp is {decode.tp} with {prefill.tp} in pools[{i}], expected {wanted} for {rules.engine} to move "
        "KV from prefill to decode; plan other degrees"
    )


def _check_heads(plan: Plan, prefill: Pool, decode: Pool, i: int, j: int, rules: Rules, notes: list[str]) -> None:
    """KV is cut between ranks by heads, which ends where a rank has only a copy of one; latents are never cut."""
    if rules.tp == "free" or prefill.tp == decode.tp:
        return
    most = max(prefill.tp, decode.tp)
    try:
        attentions = [layer.attention for layer in load_model(plan.model).layers if layer.attention.latent is None]
    except ProfileError:
        notes.append(
            f"pools[{i}] and pools[{j}] differ in tp: {rules.engine} needs a model of at least {most} KV heads, or one "
            "with latent attention."
        )
        return
    if not attentions:
        return
    where, heads = f"pools[{j}].tp is {decode.tp} with {prefill.tp} in pools[{i}]", min(a.kv_heads for a in attentions)
    if heads < most and not (rules.copies and prefill.tp >= heads):
        raise PlanError(
            f"{where}, expected at most the model's {heads} KV heads where they differ, for {rules.engine}; plan the "
            "same tp for both"
        )
    if not rules.copies and any(a.window_tokens is not None for a in attentions):
        raise PlanError(
            f"{where}, expected the same for a model with sliding windows and {rules.engine}; plan one tp for both"
        )


def _kv_format(pool: Pool) -> str:
    """What engines keep: KV of a wide format is kept in the format the model computes in."""
    if pool.kv not in WIDE:
        return pool.kv
    return pool.activations if pool.activations in WIDE else "bf16"


def _hardware(plan: Plan) -> Sequence[str]:
    return sorted({plan.hardware_of(pool) for pool in plan.pools})


def _vendor(hardware: str) -> str | None:
    try:
        return load_cluster(hardware, 1).device.vendor
    except ProfileError:
        return None
