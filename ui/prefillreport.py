"""What a study of prefill scheduling says: ways side by side, the best at each load, how near to the best possible."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.prefillstudy import Outcome, Study

#: Families whose cut is a number: which of it is best at each load.
CUTS = {"budget": ("sarathi-serve",), "chunk": ("sarathi",), "groups": ("layered",), "order": ("shortest", "deadline")}
#: Columns of study.csv.
COLUMNS = (
    "load_per_s", "name", "family", "ttft_mean_s", "ttft_p99_s", "tbt_s", "tbt_p99_s", "tbt_max_s", "keeps", "refused",
    "preemptions", "gap",
)  # fmt: skip


def report_object(study: Study) -> dict[str, Any]:
    """What --json prints; times in seconds, loads in requests per second of the replica.

    limit        {statistic, seconds} of the time between tokens; floor_s: of a decode step alone
    loads        by load: {load_per_s, bound_s, proof, outcomes, best (name), published (the best without the program),
                 cuts {kind: name of the best}}; outcomes as planner.prefillstudy.Outcome
    most         list of {name, rate_per_s (prompts when all requests wait), tbt_s (the limit's statistic then), keeps}
    frontier     {load_per_s, wider (outcomes of the program at other limits), equal (at the TBT of the
                 best with bounded steps)}
    window       {bound_s, proof, tbt_s, standings}: from the middle of a run on, at the TBT limit; null: not known
    """
    loads = []
    for load in study.loads:
        best, published = load.best(), load.best(program=False)
        cuts = {kind: load.best(families) for kind, families in CUTS.items()}
        loads.append(
            {
                "load_per_s": load.load_per_s, "bound_s": load.bound_s, "proof": load.proof,
                "best": None if best is None else best.name,
                "published": None if published is None else published.name,
                "cuts": {kind: None if one is None else one.name for kind, one in cuts.items()},
                "outcomes": [asdict(o) for o in load.outcomes],
            }
        )  # fmt: skip
    window = None
    if study.window is not None:
        window = {
            "bound_s": study.window.bound.ttft_s, "proof": study.window.bound.proof, "tbt_s": study.window.tbt_s,
            "standings": [
                {"name": s.name, "ttft_s": s.ttft_s, "tbt_s": s.tbt_s, "max_tbt_s": s.max_tbt_s, "keeps": s.keeps,
                 "bound_s": s.bound.ttft_s, "gap": s.gap}
                for s in study.window.standings
            ],
        }  # fmt: skip
    return {
        "limit": {"statistic": study.limit.statistic, "seconds": study.limit.seconds},
        "floor_s": study.floor_s,
        "loads": loads,
        "most": [asdict(one) for one in study.most],
        "frontier": {
            "load_per_s": study.loads[study.frontier].load_per_s,
            "wider": [asdict(o) for o in study.wider],
            "equal": None if study.equal is None else asdict(study.equal),
        },
        "window": window,
    }


def rows_text(study: Study) -> str:
    """All outcomes as CSV."""
    every = [o for load in study.loads for o in load.outcomes] + list(study.wider)
    lines = [",".join(COLUMNS)]
    lines += [",".join("" if getattr(o, c) is None else str(getattr(o, c)) for c in COLUMNS) for o in every]
    return "\n".join(lines) + "\n"


def show(out: Any, study: Study, content: dict[str, Any]) -> None:
    """The ways at the load of the frontier, the best at each load, and the bounds."""
    from planner.prefillcontenders import PROGRAMS
    from planner.prefillstudy import STALL_FREE
    from ui import rendering
    from ui.words import number, percent, seconds

    load = study.loads[study.frontier]
    limit = f"{study.limit.statistic} of the time between tokens at most {seconds(study.limit.seconds)}"
    rendering.say(
        out,
        f"{content['model']} on {content['gpus']} x {content['hardware']}; {content['requests']:,} requests of "
        f"{content['traffic']}: prompts of {content['prompt_tokens']:,.0f} tokens, answers of "
        f"{content['output_tokens']:,.0f} in the mean. Limit: {limit}; a step of one decode takes "
        f"{seconds(study.floor_s)}.",
    )
    rows = [
        [
            o.name, seconds(o.ttft_mean_s), seconds(o.ttft_p99_s), seconds(o.tbt_p99_s), seconds(o.tbt_max_s),
            "yes" if o.keeps else f"no ({o.refused} refused)" if o.refused else "no", percent(o.gap),
            number(study.capacity_per_s(o.name)),
        ]
        for o in sorted((*load.outcomes, *study.wider), key=lambda o: o.ttft_mean_s)
    ]  # fmt: skip
    columns = ["schedule", "mean TTFT", "p99 TTFT", "p99 TBT", "longest", "keeps", "gap", "serves, per s"]
    rendering.show_table(out, f"At {load.load_per_s:g} requests per second, by mean TTFT", columns, rows)
    below = f"no schedule of these requests has a mean TTFT below {seconds(load.bound_s)} ({load.proof})"
    if load.bound_s is None:
        below = f"no bound is {load.proof.removeprefix('not ')}"
    rendering.say(
        out,
        f"Gap: the part of the mean TTFT that a better schedule might save at most, whatever its TBT; {below}. Serves: "
        "prompts per second at most, when all wait, where the limit is then kept.",
    )
    rows = []
    for one in study.loads:
        cells = [_told(one.best(families), short=kind != "order") for kind, families in CUTS.items()]
        cells.append(_told(one.best(PROGRAMS)))
        rows.append([f"{one.load_per_s:g}", *cells, seconds(one.bound_s)])
    columns = ["requests/s", *CUTS, "program", "bound"]
    rendering.show_table(out, "The best that keeps the limit, and its mean TTFT", columns, rows, words=6)
    rendering.say(out, _where(study))
    program = load.best(PROGRAMS) or next((o for o in load.outcomes if o.family in PROGRAMS), None)
    if program is not None:
        _show_program(out, program, load.best(STALL_FREE), study.equal, content)
    if study.window is not None:
        kept = [s for s in study.window.standings if s.tbt_s <= study.limit.seconds]
        if kept:
            near = min(kept, key=lambda s: s.ttft_s)
            rendering.say(
                out,
                f"From the middle of that run on, with what then runs and waits: no schedule whose gaps between tokens "
                f"keep {seconds(study.window.tbt_s)} has a mean TTFT below {seconds(study.window.bound.ttft_s)} "
                f"({study.window.bound.proof}); {near.name}, which keeps the limit, has {seconds(near.ttft_s)}: at "
                f"most {percent(near.gap)} can be saved.",
            )


def _where(study: Study) -> str:
    """What "-" means in the table of the best, where it has any, and at which load the table of all schedules is."""
    from planner.prefillcontenders import PROGRAMS

    kinds = {**CUTS, "program": PROGRAMS}
    tried = {o.family for load in study.loads for o in load.outcomes}
    none = [kind for kind, families in kinds.items() if tried.isdisjoint(families)]
    some = [families for kind, families in kinds.items() if kind not in none]
    dashes = []
    if any(load.best(families) is None for load in study.loads for families in some):
        dashes.append("no schedule of that kind keeps the limit at that load")
    if none:
        dashes.append(f"{' and '.join(none)} not tried for pipelines and attention groups")
    at = study.loads[study.frontier]
    why = "the highest at which a schedule keeps the limit"
    if at.best() is None:
        why = "the lowest, as no schedule keeps the limit at any"
    text = f"The longer table above is at {at.load_per_s:g} requests per second, {why}."
    return f"-: {'; '.join(dashes)}. {text}" if dashes else text


def _show_program(
    out: Any, o: Outcome, published: Outcome | None, equal: Outcome | None, content: dict[str, Any]
) -> None:
    """How the program decided, and how it compares to the best published way within the limit."""
    from ui import rendering
    from ui.words import seconds

    taken = o.decisions
    if taken is None:
        return
    how = "measured" if content["decision_s"] is None else "given"
    text = (
        f"{o.name}: the program decided {taken.solved:,} steps, fell back {taken.fell_back:,} times, and took "
        f"{seconds(taken.median_s)} in the median, {seconds(taken.most_s)} at most ({how}), which its steps include."
    )
    if published is not None and equal is not None:
        text += (
            f" Of the schedules with bounded steps within the limit, {published.name} has the least mean TTFT, "
            f"{seconds(published.ttft_mean_s)} with gaps of {seconds(published.tbt_s)}; {equal.family} at "
            f"{seconds(equal.tbt_s)} has {seconds(equal.ttft_mean_s)}, "
            f"{_apart(equal.ttft_mean_s / published.ttft_mean_s)}"
        )
        text += f", and at the limit {seconds(o.ttft_mean_s)}." if o.keeps else "."
    rendering.say(out, text)


def _apart(ratio: float) -> str:
    from ui.words import percent

    return f"{percent(abs(1 - ratio))} {'less' if ratio <= 1 else 'more'}"


def _told(o: Outcome | None, *, short: bool = False) -> str:
    from ui.words import seconds

    if o is None:
        return "-"
    name = o.name.removeprefix(o.family).strip() if short else o.name
    return f"{name.replace('receding-', '')}: {seconds(o.ttft_mean_s)}"
