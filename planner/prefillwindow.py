"""How far are schedules from the best possible at a TBT limit, from the middle of a simulated run on?"""

from __future__ import annotations

from planner.prefill import BestPossible, best_possible
from planner.prefillcontenders import Ways
from planner.prefillcosts import LinearStep
from planner.prefilllinear import TableClock
from planner.prefillnext import Receding as Program
from planner.prefillpolicies import layered, orca, prefill_first, sarathi, sarathi_serve, shortest_first
from planner.prefillsteps import Policy, Prompt, Running, Window, follow
from planner.recedingscheduler import Receding
from simulator.deployment import Deployment, ReplicaSpec
from simulator.limits import Limit
from simulator.result import Result
from simulator.simulate import simulate
from simulator.workload import Requests

#: Prompts of a window.
WINDOW = 100


def from_within(
    spec: ReplicaSpec,
    below: LinearStep,
    clock: TableClock,
    rule: Receding,
    requests: Requests,
    limit: Limit,
    ways: Ways,
    max_tokens: int,
) -> BestPossible:
    """How far followed schedules are from the best at the TBT limit, from the middle of a run of the replica on.

    The window has the sequences that decode then, the prompts that wait, whole, and those of the WINDOW that come
    next; decisions of the program take no time in it. Raises NoFeasiblePlanError where the sequences that run already
    take longer than the limit.
    """
    window = window_within(simulate(Deployment([spec]), requests, record=False), spec)
    tried: dict[str, Policy] = {f"sarathi-serve {b}": sarathi_serve(b) for b in ways.budgets}
    tried |= {f"shortest {b}": shortest_first(b, ways.ageing_tokens_per_s) for b in ways.budgets}
    tried |= {f"sarathi {c}": sarathi(c) for c in ways.chunks}
    tried |= {"layered by rule": layered(), "orca": orca(max_tokens), "prefill-first": prefill_first(max_tokens)}
    tried["receding"] = Program(rule.linear, rule.tbt_s, steps=rule.steps, ageing_per_s=rule.ageing_per_s)
    schedules = [follow(window, policy, clock, name) for name, policy in tried.items()]
    return best_possible(window, below, schedules, limit.seconds, max_tokens, limit.quantile or 0.99)


def window_within(result: Result, spec: ReplicaSpec) -> Window:
    """What runs, waits and comes from the time on at which half of the requests have come.

    A prompt that is half computed then counts as one that waits; tokens of sequences are spread evenly over their time.
    """
    frame = result.requests
    frame = frame[~frame["rejected"]]
    now = float(frame["arrival_s"].iloc[len(frame) // 2])
    running: list[Running] = []
    prompts: list[Prompt] = []
    columns = ("arrival_s", "first_token_s", "finish_s", "prompt_tokens", "output_tokens")
    for arrival, first, finish, prompt, output in frame[list(columns)].itertuples(index=False):
        if first <= now < finish:
            done = min(int(1 + (output - 1) * (now - first) / (finish - first)), output - 1)
            running.append(Running(int(prompt) + done, int(output) - done))
        elif first > now and len(prompts) < WINDOW:
            prompts.append(Prompt(max(0.0, arrival - now), int(prompt), int(output)))
    # Followed schedules set KV aside for whole lives, which the run did not: what it held at once must have room.
    needed = sum(r.context + r.left for r in running) + max(p.tokens + p.outputs for p in prompts)
    kv_tokens = float(max(needed, spec.kv_blocks * spec.scheduler.block_tokens))
    return Window(tuple(prompts), tuple(running), kv_tokens, spec.scheduler.max_seqs)
