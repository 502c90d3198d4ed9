"""From what was typed to what is executed on this machine, and in which words it is told."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import get_args

from hwmodels.errors import MappingError
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping
from planner.catalogue import law_broken, mapping_of
from planner.execute.records import Job
from planner.execute.transformer import refused
from planner.plan import Plan
from planner.planfile import read_plan
from planner.profiling.machine import Machine, open_machine
from planner.scheduling import scheduler_of
from planner.validation.run import Question, sized
from simulator.policies import Policy
from simulator.scheduler import SchedulerConfig
from ui.questions import OptionError, Traffic

#: What is not typed follows from the device: format, traffic, tokens and sequences of a step.
USUAL: dict[str, tuple[str, str, int, int]] = {
    "cpu": ("fp32", "short-questions", 128, 8),
    "cuda": ("bf16", "azure-conversation-2023", 2048, 64),
}
MODEL = "tiny-llama-256m"
DTYPES = ("fp32", "bf16", "fp16")
#: More threads than this a small model's steps do not use.
MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of `validate run` that say what is executed; None where nothing was typed."""

    device: str
    model: str | None
    plan: Path | None
    dtype: str | None
    tp: int | None
    pp: int | None
    dp: int | None
    scheduler: str | None
    budget: int | None
    max_seqs: int | None
    threads: int | None
    seed: int
    rate_per_s: float | None = None

    def question(self, traffic: Traffic) -> tuple[Question, Machine]:
        """What is executed, on which machine; raises a ShardwiseError for what cannot be."""
        plan = None if self.plan is None else read_plan(self.plan)
        if plan is not None and self.model is not None:
            raise OptionError(f"--plan {self.plan} and --model {self.model}: expected one of them")
        machine = open_machine(self.device)
        shape = load_model(plan.model if plan is not None else self.model or MODEL)
        mapping, replicas = self._cut(plan, machine, shape.is_moe)
        reason = law_broken(shape, mapping)
        if reason is not None:
            raise MappingError(f"tp={mapping.tp} pp={mapping.pp}: breaks the law that {reason} of {shape.name}")
        if plan is not None and plan.pools[0].expert_cache is not None:
            raise MappingError(
                f"{self.plan}: pools[0].expert_cache is {plan.pools[0].expert_cache}, expected null: experts that "
                "are not on the device are simulated, not executed"
            )
        reason = refused(shape, mapping)
        if mapping.redundant_experts or mapping.expert_map is not None:
            reason = "redundant experts or a map of its experts"
        if reason is not None:
            raise MappingError(f"{shape.name}: has {reason}, which is not executed; choose another model or degree")
        requests = traffic.requests(self.seed)
        longest = int((requests.prompt_tokens + requests.output_tokens).max())
        if longest > shape.max_context_tokens:
            raise OptionError(
                f"{traffic.name}: its longest request has {longest} tokens and {shape.name} takes "
                f"{shape.max_context_tokens}; expected shorter ones, choose another --workload or --trace"
            )
        if requests.span_s == 0:
            raise OptionError(
                f"{traffic.name}: its {len(requests)} request(s) arrive at one instant; expected two or more that "
                "arrive apart, choose another --workload or --trace"
            )
        if self.rate_per_s is not None:
            requests = requests.scaled_to_rate(self.rate_per_s)
        config = self._scheduler(plan, longest)
        threads = self._threads(replicas * mapping.gpus)
        if self.device == "cpu":
            machine = open_machine("cpu", threads=threads)
        job = Job(shape, mapping, replicas, self.device, self._dtype(plan), threads, 1, config.block_tokens, self.seed)
        return sized(Question(job, config, requests), machine), machine

    def note(self, question: Question) -> str | None:
        """What of the plan is executed, and what differently; None without a plan."""
        if self.plan is None:
            return None
        plan, job = read_plan(self.plan), question.job
        pool = plan.pools[0]
        formats = {"weights": pool.weights, "activations": pool.activations, "kv": pool.kv, "experts": pool.experts}
        changed = [
            f"{name} {job.dtype} instead of {was}" for name, was in formats.items() if was not in (None, job.dtype)
        ]
        parts = [f"pool 1 of {len(plan.pools)}", f"{job.replicas} of its {pool.replicas} replica(s)", *changed]
        return f"{self.plan}: {', '.join(parts)}"

    def _cut(self, plan: Plan | None, machine: Machine, experts: bool) -> tuple[Mapping, int]:
        """How a replica is cut, and as many replicas as were typed, or as the plan has and fit."""
        devices = machine.count if self.device == "cuda" else os.cpu_count() or 1
        what = "GPUs" if self.device == "cuda" else "processor cores"
        if plan is None:
            mapping, replicas = Mapping(tp=self.tp or 1, pp=self.pp or 1), self.dp or 1
            if experts:
                mapping = replace(mapping, expert_tp=mapping.tp)
        else:
            pool = plan.pools[0]
            mapping = mapping_of(pool)
            if self.tp is not None:
                mapping = replace(mapping, tp=self.tp, ep=1, expert_tp=self.tp if experts else 1)
            if self.pp is not None:
                mapping = replace(mapping, pp=self.pp, stages=None)
            replicas = self.dp or max(1, min(pool.replicas, devices // mapping.gpus))
        if replicas * mapping.gpus > devices:
            raise MappingError(
                f"tp={mapping.tp} pp={mapping.pp} dp={replicas}: {replicas * mapping.gpus} processes and {devices} "
                f"{what} here, expected at most one process each; choose smaller degrees, such as --tp 1 --pp 1"
            )
        return mapping, replicas

    def _scheduler(self, plan: Plan | None, longest: int) -> SchedulerConfig:
        """What was typed, else the plan's, else what is usual; contexts no longer than the requests'."""
        if self.scheduler is not None and self.scheduler not in get_args(Policy):
            raise OptionError(f"--scheduler {self.scheduler}: expected one of {', '.join(get_args(Policy))}")
        _, _, budget, seqs = USUAL[self.device]
        base = SchedulerConfig(token_budget=budget, max_seqs=seqs)
        if plan is not None:
            base = scheduler_of(plan.pools[0])
        policy = next((p for p in get_args(Policy) if p == self.scheduler), base.policy)
        budget, seqs = self.budget or base.token_budget, self.max_seqs or base.max_seqs
        if self.budget is None and plan is None and policy != "chunked":
            budget = max(budget, longest)  # whole prompts have to fit in a step
        if self.max_seqs is None:
            seqs = min(seqs, budget)
        return replace(base, policy=policy, token_budget=budget, max_seqs=seqs, max_context_tokens=longest)

    def _dtype(self, plan: Plan | None) -> str:
        found = self.dtype or (plan.pools[0].weights if plan is not None else USUAL[self.device][0])
        if found not in DTYPES:
            raise OptionError(f"format {found}: this engine executes {', '.join(DTYPES)}; choose one with --dtype")
        return found

    def _threads(self, processes: int) -> int:
        """What was typed, else as many as leave one core to the rest of the machine."""
        cores = os.cpu_count() or 1
        if self.threads is not None and self.threads * processes > cores and self.device == "cpu":
            raise OptionError(
                f"--threads {self.threads}: {self.threads * processes} threads of {processes} process(es) and {cores} "
                "processor cores here, expected at most one thread each"
            )
        return self.threads or max(1, min((cores - 1) // processes, MOST_THREADS))


def about(question: Question, machine: Machine, traffic: Traffic, note: str | None) -> dict[str, str]:
    """What was executed, in words."""
    job, config, requests = question.job, question.config, question.requests
    threads = f", {job.threads} thread(s) a process" if job.device == "cpu" else ""
    return {
        **({} if note is None else {"plan": note}),
        "model": f"{job.model.name}, random weights, {job.dtype}",
        "mapping": f"tp={job.mapping.tp} pp={job.mapping.pp} dp={job.replicas}",
        "machine": f"{machine.name} ({machine.reported}), {machine.software}{threads}",
        "scheduler": f"{config.policy} {config.max_seqs}/{config.token_budget}, {job.kv_blocks} KV blocks of "
        f"{config.block_tokens} tokens",
        "traffic": f"{len(requests):,} requests of {traffic.name} at {requests.rate_per_s:.3g}/s; mean prompt "
        f"{requests.prompt_tokens.mean():.0f}, mean output {requests.output_tokens.mean():.0f} tokens",
    }


def read_rate(text: str) -> float | None:
    """Requests per second; None for 'auto'.

    >>> read_rate("auto"), read_rate("0.7")
    (None, 0.7)
    """
    if text == "auto":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not (isfinite(rate) and rate > 0):
        raise OptionError(f"--rate {text}: expected auto or requests per second above 0, such as 0.7")
    return rate
