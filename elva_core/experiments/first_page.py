"""README's first screen and the report's first page; every number is from a table of the report.

tables = findings.read(Path("outputs/cpu/seed-17/90_report"))
result(tables, config.load("cpu"), statistics.reported())
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elva_core.config import Settings
from elva_core.experiments import claims, decomposition, findings, sizes
from elva_core.experiments.findings import Tables


def result(tables: Tables, settings: Settings, reported: dict) -> str:
    """The main result in words and as a table, for the first screen of README."""
    parts = [
        findings.in_short(tables, reported),
        _setting(tables, settings, reported),
        findings.steps(tables, settings),
    ]
    return "\n\n".join([*parts, listed(findings.questions(tables, settings, reported))])


def commands(tables: Tables, settings: Settings) -> str:
    """The commands of README, with their measured time."""
    minutes, hours = tables.cost["wall_s"].sum() / 60, tables.runs["wall_s"].sum() / 3600
    whole = f"one seed of everything: {minutes:.0f} minutes on {settings.threads} cores, after set-up"
    seeds, done = tables.runs["seed"].nunique(), len(tables.runs)
    study = f"{seeds} seeds and ablations, resumable: {hours:.1f} hours for the {done} trainings done so far"
    test = "unit tests, then every notebook at smoke size"
    return f"```\nmake reproduce    # {whole}\nmake test         # {test}\nmake study        # {study}\n```"


def page(tables: Tables, settings: Settings, seed: int, reported: dict) -> str:
    """The report's first page: scope, what was claimed, measured, easy, hard, and what it cost."""
    figures = tables.claims["paper"].notna()
    not_run = figures & tables.claims["ours"].isna()
    scope = (
        f"{_setting(tables, settings, reported)} Profile {settings.profile}, seed {seed}, device "
        f"{settings.device}. {int(not_run.sum())} numbers of the paper need its data and GPUs and were not "
        "run."
    )
    said = findings.in_short(tables, reported).removeprefix("**In short:** ")
    return f"""**Scope.** {scope}

**What was claimed.**

{listed(_claimed(reported))}

**What was measured.** {said[:1].upper()}{said[1:]}

{findings.steps(tables, settings)}

{listed(findings.questions(tables, settings, reported))}

{claims.counted(tables.claims)}

**What was easy.**

{listed(_easy(tables, settings))}

**What was hard.**

{listed(_hard(tables, settings, reported))}

**Cost.** {_cost(tables)}"""


def changed_values(settings: Settings, reported: dict) -> list[tuple[str, object, object]]:
    """Values of stage 3 that the paper prints and the profile has otherwise: key, value, printed."""
    out = []
    for key, printed in reported["hyperparameters"]["stage3"].items():
        value = settings.stage3
        for part in key.split("."):
            value = getattr(value, part)
        if value != printed:
            out.append((f"stage3.{key}", value, printed))
    return out


def listed(lines: Sequence[str]) -> str:
    """Lines as a Markdown list."""
    return "\n".join(f"* {line}" for line in lines)


def _setting(tables: Tables, settings: Settings, reported: dict) -> str:
    """The setting: data of the training, queries, pools."""
    size = sizes.of_model(settings.backbone.path, sizes.known().architectures).parameters
    data = f"the data {settings.data.name}; its test split is unseen"
    if settings.data.emoji:
        vendors, apart = settings.data.emoji.vendors, 100 * settings.data.emoji.held_out_share
        data = (
            f"names of emoji and how {len(vendors['train'])} vendors draw them. The test has the drawings of "
            "another vendor (some are files of a training vendor: below); "
            f"{apart:.0f} % of the combinations of grains are in no training row"
        )
    bench = tables.mrbench
    scores = claims.main(tables.claims, reported).set_index(["claim", "metric"])["ours"]
    before = scores.get(("zero-shot, average", "hit@5"))
    start = "" if before is None else f"; the backbone before any stage reaches {before:.1f} % hit@5"
    pools = " to ".join(
        f"{count:,}" for count in sorted({bench["candidates"].min(), bench["candidates"].max()})
    )
    return (
        f"A model of {size / 1e6:,.1f} M parameters with Qwen2-VL's architecture, taught by us to name "
        f"drawings, is trained (vision tower frozen, LoRA) on {data}. "
        f"MRBench, the paper's benchmark of queries with {settings.mrbench.min_grains} grains or more, is "
        f"rebuilt on them: {bench['queries'].sum():,} queries, {pools} candidates each{start}. hit@k is the "
        "share of queries with a positive among the first k candidates; the average weighs tasks equally."
    )


def _claimed(reported: dict) -> list[str]:
    """The paper's main claims with its own figures."""
    gain, distance, ablation = (reported[name] for name in ("mrbench_gain", "grain_distance", "table8"))
    lost = ablation["rows"]["full"][-1] - ablation["rows"]["without ranking reward"][-1]
    return [
        f"Multi-grain retrieval gains {gain['value']} % on MRBench over LamRA-Ret ({gain['source']}).",
        "Embeddings are less grain-blind: the distance of a query to itself without one grain grows from "
        f"{distance['values'][decomposition.EOL]} to {distance['values'][decomposition.STAGE3]} "
        f"({distance['source']}).",
        f"The ranking reward matters: without it M-BEIR loses {lost:.1f} points ({ablation['source']}).",
    ]


def _easy(tables: Tables, settings: Settings) -> list[str]:
    """The section on what was easy, line by line, from measured values."""
    cost, audit = tables.cost, tables.audit
    lines = [
        f"{len(cost)} notebooks ran to their end on {settings.device}, {int((cost['wall_s'] < 60).sum())} of "
        f"them in less than a minute, with {cost['peak_memory_gb'].max():.1f} GB at most.",
        f"{int(audit['agrees'].sum())} of {len(audit)} averages and gains of the paper come out again from "
        "the figures that it prints.",
    ]
    if clear := _steps_that(tables, lambda row: row["ci_low"] > 0):
        lines.append(f"Above zero at both hit@1 and hit@5 over all seeds: {clear}.")
    if same := _steps_that(tables, lambda row: len(row["by seed"]) > 1 and min(row["by seed"]) > 0):
        lines.append(f"Above zero at both with every single seed: {same}.")
    return lines


def _hard(tables: Tables, settings: Settings, reported: dict) -> list[str]:
    """The section on what was hard, line by line, from measured values."""
    doubtful = tables.claims["verdict"].isin(("inconclusive", "contradicted"))
    judged = doubtful | tables.claims["verdict"].isin(("reproduced", "same direction", "below"))
    lines = [
        f"{int(doubtful.sum())} of {int(judged.sum())} compared claims are inconclusive or contradicted."
    ]
    if unclear := _steps_that(tables, lambda row: row["ci_low"] <= 0):
        lines.append(f"Not above zero at hit@1 nor at hit@5 over all seeds: {unclear}.")
    if split := _steps_that(tables, lambda row: min(row["by seed"]) < 0 < max(row["by seed"]), (5,)):
        lines.append(f"Single seeds disagree in sign at hit@5: {split}.")
    changed = len(changed_values(settings, reported))
    values = len(reported["hyperparameters"]["stage3"])
    lines.append(f"{changed} of the {values} values that the paper prints for stage 3 are others here.")
    if wrong := int((~tables.audit["agrees"]).sum()):
        lines.append(f"{wrong} printed averages or relative gains of the paper do not add up.")
    longest = tables.cost.loc[tables.cost["wall_s"].idxmax()]
    share = 100 * longest["wall_s"] / tables.cost["wall_s"].sum()
    lines.append(f"{longest['stage']} takes {share:.0f} % of the time.")
    return lines


def _cost(tables: Tables) -> str:
    minutes, memory = tables.cost["wall_s"].sum() / 60, tables.cost["peak_memory_gb"].max()
    hours, arms = tables.runs["wall_s"].sum() / 3600, tables.runs["arm"].nunique()
    return (
        f"One seed of everything: {minutes:.0f} minutes, {memory:.1f} GB at most. The study so far: "
        f"{len(tables.runs)} trainings of {arms} arms, {hours:.1f} hours."
    )


def _steps_that(tables: Tables, holds: Callable, cutoffs: Sequence[int] = decomposition.CUTOFFS) -> str:
    """The steps of which the row at every cut-off has a property; those that were not run have none."""
    rows = decomposition.average(tables.decomposition).dropna(subset="value")
    rows = rows[
        rows["step"].isin(list(decomposition.STEPS)) & rows["metric"].isin([f"hit@{k}" for k in cutoffs])
    ]
    steps = rows.groupby("step", sort=False)
    return ", ".join(step for step, part in steps if all(map(holds, part.to_dict("records"))))
