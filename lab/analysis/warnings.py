"""What to know before the figures of a run set are trusted."""

from __future__ import annotations

from lab.runs.cases import by_case, case_label, df_runs
from lab.runs.columns import METRICS
from lab.runs.sets import RunSet
from lab.stats import check_stability

# A guest whose rate takes longer to come back after completion is not slow to recover: either the
# baseline was measured in a fast second, or the host was busy.  Lost work counts that time.
LONG_RECOVERY_MS = 2000


def warnings_of(run_set: RunSet) -> list[str]:
    """Reasons to distrust a set, one sentence each: few boots, wide spread, drift, lower
    bounds, long recoveries, failures, warnings.
    """
    found = []
    frame = df_runs(run_set)
    counted = frame[(frame["outcome"] == "ok") & ~frame["warmup"]]
    for case, part in by_case(counted):
        name = case_label(case)
        for metric in ("pause_ms", "duration_ms", "lost_work_ms"):
            values = part[metric].dropna().tolist()
            found += [
                f"{name}, {METRICS[metric].title}: {reason}"
                for reason in (check_stability(values) if values else [])
                if not reason.startswith("only") or metric == "duration_ms"
            ]
        capped = part["back_capped"] == True  # noqa: E712 - the column holds null too
        if capped.any():
            found.append(
                f"{name}: in {capped.sum()} of {len(part)} boots the old rate was not seen again; "
                f"lost work is a lower bound there"
            )
        late = ~capped & (part["recovery_ms"] > LONG_RECOVERY_MS)
        if late.any():
            found.append(
                f"{name}: in {late.sum()} of {len(part)} boots the old rate took over "
                f"{LONG_RECOVERY_MS / 1000:g} s from completion to come back; if the baseline had "
                f"drifted, lost work is too large there"
            )
    for run in run_set:
        if not run.ok:
            found.append(f"{run.name} is {run.record.outcome}: {run.record.reason}")
        found += [f"{run.name}: {warning}" for warning in run.record.warnings]
    return found
