"""What --save writes, and whether it could, asked before the work is done."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import yaml

from planner.plan import Plan
from planner.planfile import check_plan
from planner.search import SearchResult
from simulator.errors import SaveError
from simulator.save import Writer, write_files
from ui.words import in_short, kept

#: Of plans.csv.
COLUMNS = (
    *("rank", "tie", "plan", "gpus_used", "idle_gpus", "policy", "max_seqs", "token_budget", "formats"),
    *("chunk_tokens", "group_tokens", "order", "overlap"),
    *("value", "unit", "bound", "capacity_per_s"),
    *("rate_per_s", "goodput_per_s", "output_tokens_per_s", "mean_tpot_s", "mean_e2e_s"),
)


def require_writable(folder: Path | None, names: tuple[str, ...] = ()) -> None:
    """Raise SaveError unless a folder could be made or written to, and hold files of these names."""
    if folder is None:
        return
    try:
        place = folder
        while not place.exists():
            if place.is_symlink():
                raise NotADirectoryError(20, f"{place.name} is a link to nothing")
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError(20, f"{place} is a file")
        taken = next((name for name in names if (folder / name).is_dir()), None)
        if taken is not None:
            raise IsADirectoryError(21, f"{taken} is a folder")
        with tempfile.TemporaryDirectory(prefix=".shardwise.", dir=place):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SaveError(
            f"{folder}: cannot be written ({reason}), expected a folder that is writable or can be made; "
            "choose another path"
        ) from None


def plan_text(plan: Plan) -> str:
    """The plan as the YAML of a plan file."""
    check_plan(plan)
    return yaml.safe_dump(asdict(plan), sort_keys=False, allow_unicode=True)


def ranking_text(result: SearchResult) -> str:
    """The ranking as CSV, one row per plan; pools of a mixture share a row."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for rank, ranked in enumerate(result.ranked, 1):
        plan, trial = ranked.plan, ranked.trial
        together = [
            "/".join(str(value) for value in dict.fromkeys(values))
            for values in (
                [pool.policy for pool in plan.pools],
                [pool.max_seqs for pool in plan.pools],
                [pool.token_budget for pool in plan.pools],
                [kept(pool) for pool in plan.pools],
                ["" if pool.chunk_tokens is None else pool.chunk_tokens for pool in plan.pools],
                [pool.group_tokens if pool.policy == "layered" else "" for pool in plan.pools],
                [pool.order for pool in plan.pools],
                [pool.overlap for pool in plan.pools],
            )
        ]
        writer.writerow(
            [rank, int(ranked.tie), in_short(plan), plan.gpus_used, plan.idle, *together,
             ranked.value, result.unit, ranked.bound, ranked.capacity_per_s, trial.rate_per_s, trial.goodput_per_s,
             trial.output_tokens_per_s, trial.mean_tpot_s, trial.mean_e2e_s]
        )  # fmt: skip
    return table.getvalue()


def write_launch_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write launch files, all or none; scripts may be run."""
    write_files(folder, {name: text_writer(text, executable=name.endswith(".sh")) for name, text in files.items()})


def text_writer(text: str, *, executable: bool = False) -> Writer:
    """What writes the text into a file, for simulator.save.write_files."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")
        if executable:
            path.chmod(path.stat().st_mode | 0o111)

    return write
