"""Prints predicted against measured TTFT and TPOT of the APEX+ runs: python tests/published/report.py."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
spec = importlib.util.spec_from_file_location("apex", Path(__file__).with_name("test_apex_plus.py"))
assert spec is not None and spec.loader is not None
apex = importlib.util.module_from_spec(spec)
sys.modules["apex"] = apex
spec.loader.exec_module(apex)


def main() -> None:
    """One line for every trace, rate and plan."""
    if not apex.MEASURED.exists():
        sys.exit(f"error: {apex.MEASURED}: not found; the measurements are not part of this repository")
    errors = []
    print("trace          rate  plan    TPOT ms predicted measured  error   TTFT ms predicted measured  error")
    for trace, rate in apex.CASES:
        for plan in apex.PLANS:
            row = apex.measured()[trace, rate, plan]
            ttft_s, tpot_s = apex.predicted("vllm-0.6", trace, rate, plan)
            errors.append(tpot_s / row.tpot_s - 1)
            print(
                f"{trace:13} {rate:5}  {plan:7} {1e3 * tpot_s:17.2f} {1e3 * row.tpot_s:8.2f} {errors[-1]:+6.1%}"
                f" {1e3 * ttft_s:19.0f} {1e3 * row.ttft_s:8.0f} {ttft_s / row.ttft_s - 1:+6.1%}"
            )
    worst = max(errors, key=abs)
    print(f"TPOT: median absolute error {statistics.median(map(abs, errors)):.1%}, worst {worst:+.1%}")


if __name__ == "__main__":
    main()
