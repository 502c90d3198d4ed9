"""When a model fits no plan: by how much, and the smallest cluster that would do."""

from __future__ import annotations

from math import inf

from hwmodels.contextattention import kind_of
from hwmodels.errors import ShardwiseError
from hwmodels.hardware import load_cluster
from hwmodels.memory import GIB
from planner.catalogue import Catalogue, format_problem, law_broken, mapping_of
from planner.errors import NoFeasiblePlanError
from planner.plan import Pool
from planner.question import Question
from planner.space import mappings, placement_broken, powers_of_two


def shortest(question: Question, catalogue: Catalogue, longest_tokens: int) -> float:
    """Bytes by which the best legal replica misses on its fullest device; 0 or below when one fits, inf without any."""
    least = inf
    cps = question.choices.cp or powers_of_two(catalogue.cluster.gpus)
    for mapping in mappings(catalogue.model, catalogue.cluster, cps=cps, cp_kinds=question.choices.cp_kinds):
        if law_broken(catalogue.model, mapping) or placement_broken(mapping, catalogue.cluster):
            continue
        for precision in question.choices.precisions:
            if format_problem(catalogue.cluster, precision) is not None:
                continue
            budget = min(question.choices.token_budgets)
            pool = Pool(
                1, mapping.tp, mapping.pp, mapping.attention_dp, mapping.ep, mapping.expert_tp, None,
                precision.weights, precision.activations, precision.kv, precision.experts, "chunked",
                min(min(question.choices.max_seqs), budget), budget, question.choices.block_tokens, longest_tokens,
                cp=mapping.cp, cp_kind=kind_of(mapping),
            )  # fmt: skip
            memory = catalogue.memory(pool)
            needed = -(-longest_tokens // pool.block_tokens) * pool.block_tokens * memory.kv_bytes_per_token
            least = min(least, needed * mapping_of(pool).pp - memory.kv_bytes)
    return least


def nothing_fits(question: Question, catalogue: Catalogue, longest_tokens: int) -> NoFeasiblePlanError:
    """The error that says how much memory is missing, and how many of the devices would do."""
    device = catalogue.cluster.device
    missing = shortest(question, catalogue, longest_tokens)
    what = f"{question.model} on {question.gpus} x {device.name}"
    problems = [format_problem(catalogue.cluster, precision) for precision in question.choices.precisions]
    if all(problems):
        return NoFeasiblePlanError(f"{what}: {problems[0]}")
    if missing == inf:
        return NoFeasiblePlanError(
            f"{what}: no legal degrees; expected a device count that divides the heads or layers"
        )
    gpus = question.gpus
    while gpus < 2048:
        gpus += 1 if gpus < 16 else 8
        try:
            larger = Catalogue(
                catalogue.model, load_cluster(question.hardware, gpus), catalogue.engine, catalogue.kernels
            )
        except ShardwiseError:
            break
        if shortest(question, larger, longest_tokens) <= 0:
            return NoFeasiblePlanError(
                f"{what}: {missing / GIB:.1f} GiB short on the fullest device (weights, activations and one request of "
                f"{longest_tokens} tokens); the smallest cluster that would do is {gpus} x {device.name}, "
                "or use narrower weights"
            )
    return NoFeasiblePlanError(
        f"{what}: {missing / GIB:.1f} GiB short on the fullest device (weights, activations and one request of "
        f"{longest_tokens} tokens); expected larger devices or narrower weights"
    )
