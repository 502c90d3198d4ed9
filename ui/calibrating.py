"""`shardwise calibrate`: how well can a few coefficients say what kernels were measured to take?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

if TYPE_CHECKING:
    from hwmodels.calibration import Calibrated, Fit

#: Families of the headline error.
KERNELS = ("gemm", "attention_prefill", "attention_decode", "mla_prefill", "mla_decode")

#: Median error above which a fit is called poor.
POOR = 0.4


def calibrate(
    place: Annotated[
        str,
        typer.Argument(
            help="Folder of 'shardwise profile', tables of a known layout, or 'wheel' for the kernels of the extra "
            "'silicon'.",
            metavar="FOLDER",
        ),
    ],
    hardware: Annotated[
        str | None,
        typer.Option(help="Device whose rows are taken; needed where FOLDER holds several.", metavar="NAME"),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="Profile whose datasheet figures hold for the device [default: its own; peaks from the best measured "
            "rates where it has none].",
            metavar="NAME",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Profile to write; only its efficiency and calibration differ from what was there.", metavar="FILE"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the half of the shapes that is fitted to.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Fit the analytic model's coefficients to measured kernels, and say how far they are from the others.

    Half of the shapes is fitted to; errors are those of the other half. Coefficients of all engines together come
    first, then those of each engine's own kernels.
    """
    from hwmodels.calibration import calibrate as fit
    from hwmodels.calibration import open_measured, profile_text, save_profile
    from hwmodels.errors import ProfileError
    from ui import jsonout, rendering, saving
    from ui.waiting import bar

    if save is not None and save.suffix not in (".yaml", ".yml"):
        raise ProfileError(f"--save {save}: expected the name of a profile that ends in .yaml")
    if save is not None:
        saving.require_writable(save.parent, (save.name,))
    with bar() as waiting:
        waiting.at("reading", None)
        measured = open_measured(place, hardware, like)
        found = fit(measured.tables, measured.device, np.random.default_rng(seed), waiting.at)
        text = profile_text(measured.text, found.device)
        if save is not None:
            save_profile(text, save)
    left_out = {**measured.left_out, **found.left_out}
    if as_json:
        print(jsonout.dumps(report_object(found, left_out)))
        return
    out = rendering.console()
    columns = ["family", "format", "engine", "timings", "median error", "p90", "bias"]
    rendering.show_table(
        out, f"{found.device.name}: errors on shapes that were not fitted to", columns, rows(found), words=3
    )
    rendering.show_table(
        out, "By family", ["family", "timings", "median error", "p90", "engines: all together / own"], families(found)
    )
    medians = together(found)
    for own, median in medians.items():
        rendering.say(out, f"GEMM and attention together, coefficients of {own}: median error {_percent(median)}")
    if min(medians.values(), default=0.0) > POOR:
        rendering.say(out, "These coefficients say little: measure longer, on a machine that does nothing else.", "red")
    for reason, count in left_out.items():
        rendering.say(out, f"left out: {count:,} rows, {reason}")
    if save is not None:
        rendering.say(out, f"Saved to {save}.")


def rows(found: Calibrated) -> list[list[str]]:
    """One row per fit, as words."""
    return [
        [fit.family, fit.format, fit.engine or "all", f"{fit.timings:,}", *map(_percent, _errors(fit)), _bias(fit)]
        for fit in found.fits
    ]


def families(found: Calibrated) -> list[list[str]]:
    """One row per family, as words."""
    return [
        [
            family, f"{c.timings:,}", _percent(c.held_out_median_ape), _percent(c.held_out_p90_ape),
            ", ".join(f"{engine} {_percent(a)} / {_percent(b)}" for engine, (a, b) in c.by_engine.items()),
        ]
        for family, c in found.device.calibration.items()
    ]  # fmt: skip


def report_object(found: Calibrated, left_out: dict[str, int]) -> dict[str, Any]:
    """What --json prints.

    device, families {name: as in a profile's calibration}, gemm_and_attention {whose coefficients: median error}, fits,
    left_out {reason: rows}
    """
    from hwmodels.calibration import coefficients_of
    from hwmodels.efficiencyfile import calibration_block

    fits = []
    for fit in found.fits:
        median, p90 = _errors(fit)
        fits.append(
            {
                "family": fit.family,
                "format": fit.format,
                "engine": fit.engine,
                "timings": fit.timings,
                "held_out": len(fit.errors),
                "held_out_median_ape": median,
                "held_out_p90_ape": p90,
                "by_engine": {engine: float(np.median(np.abs(e))) for engine, e in fit.error.items()},
                "coefficients": coefficients_of(fit),
            }
        )
    return {
        "device": found.device.name,
        "families": calibration_block(found.device.calibration),
        "gemm_and_attention": together(found),
        "fits": fits,
        "left_out": left_out,
    }


def together(found: Calibrated) -> dict[str, float]:
    """Median error over all held-out rows of GEMM and attention, by whose coefficients predicted them."""
    errors = {name: found.errors(KERNELS, own=own) for name, own in (("all engines", False), ("each engine", True))}
    return {name: float(np.median(np.abs(away))) for name, away in errors.items() if len(away)}


def _errors(fit: Fit) -> tuple[float, float]:
    away = np.abs(fit.errors)
    return float(np.median(away)), float(np.quantile(away, 0.9))


def _bias(fit: Fit) -> str:
    return f"{np.median(fit.errors):+.1%}"


def _percent(value: float) -> str:
    return f"{value:.1%}"
