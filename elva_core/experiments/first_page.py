"""What README's first screen and the report's first page say; every number is from a table of the report.

tables = read(Path("outputs/cpu/seed-17/90_report"))
result(tables, config.load("cpu"), statistics.reported())
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from elva_core.config import Settings
from elva_core.data import mbeir
from elva_core.evaluation import headroom, statistics
from elva_core.experiments import claims, decomposition, sentences, sizes
from elva_core.experiments.decomposition import interval
from elva_core.files import ElvaDataError
from elva_core.tables import read_table

MEANING = {
    "reproduced": "above zero, and reaching the paper's value",
    "same direction": "above zero, and smaller than the paper's value",
    "inconclusive": "zero and at least half of the paper's value are both within the interval",
    "contradicted": "not above zero, and below half of the paper's value",
}
IN_SHORT = {
    "reproduced": "the whole method gains over the EOL baseline as much as in the paper",
    "same direction": "the whole method gains over the EOL baseline, less than in the paper",
    "inconclusive": "whether the whole method gains over the EOL baseline cannot be said",
    "contradicted": "the whole method does not gain over the EOL baseline as in the paper",
}
MODELS = {  # arm -> how it is trained and read
    decomposition.EOL: "trained and read at the prompt's last token, as the paper's baseline LamRA-Ret",
    decomposition.RET: "the same training with a share of its steps at [RET], read there after a summary",
    decomposition.CONTROL: "stage 2 continued with InfoNCE on the queries of stage 3",
    decomposition.STAGE3: "stage 2 continued with the ranking reward on these queries, against the control",
}


@dataclass(frozen=True)
class Tables:
    """The tables in a report's folder, and nothing else, are what it and README's blocks are made from."""

    claims: pd.DataFrame  # claims.COLUMNS
    audit: pd.DataFrame  # statistics.audit
    cost: pd.DataFrame  # stage, wall_s (seconds), peak_memory_gb
    answers: pd.DataFrame  # stage, answer
    not_run: pd.DataFrame  # source, missing, needs, command
    decomposition: pd.DataFrame  # decomposition.table
    runs: pd.DataFrame  # a row for each training of the study: arm, seed, steps, train_s, wall_s (seconds)
    headroom: pd.DataFrame  # headroom.table
    shares: pd.DataFrame  # headroom.shares_taken
    environment: pd.DataFrame  # package, installed
    mrbench: pd.DataFrame  # unit, queries, candidates of its pool


def read(folder: Path) -> Tables:
    """The tables of a report, as they were saved.

    Raises:
        ElvaDataError: one is missing; the message has the command that makes it.
    """
    if lacking := [name for name in Tables.__annotations__ if not (folder / f"{name}.csv").is_file()]:
        again = "python -m elva_core run PROFILE --only 90 --force"
        raise ElvaDataError(f"{folder} lacks {', '.join(lacking)} (.csv); run: {again}")
    readers = {"decomposition": read_study_table}
    return Tables(
        **{name: readers.get(name, read_table)(folder / f"{name}.csv") for name in Tables.__annotations__}
    )


def read_study_table(path: Path) -> pd.DataFrame:
    """A table that a notebook made from the study, its tuples of seeds read back, and "" for empty texts."""
    table = pd.read_csv(path, converters=dict.fromkeys(("seeds", "by seed"), ast.literal_eval))
    texts = {"unit", "group", "missing", "verdict"} & set(table)
    return table.astype(dict.fromkeys(texts, object)).fillna(dict.fromkeys(texts, ""))


def result(tables: Tables, settings: Settings, reported: dict) -> str:
    """The main result in words and as a table, for the first screen of README."""
    return (
        f"{_in_short(tables, reported)}\n\n{_setting(tables, settings, reported)}\n\n{steps(tables)}\n\n"
        f"{listed(findings(tables, settings, reported))}"
    )


def commands(tables: Tables, settings: Settings, seed: int) -> str:
    """The commands of README, with their measured time."""
    minutes, hours = tables.cost["wall_s"].sum() / 60, tables.runs["wall_s"].sum() / 3600
    whole = f"one seed of everything: {minutes:.0f} minutes on {settings.threads} cores, after set-up"
    seeds, done = tables.runs["seed"].nunique(), len(tables.runs)
    study = f"{seeds} seeds and ablations, resumable: {hours:.1f} hours for the {done} trainings done so far"
    test = "unit tests, then every notebook at smoke size"
    return f"```\nmake reproduce    # {whole}\nmake test         # {test}\nmake study        # {study}\n```"


def findings(tables: Tables, settings: Settings, reported: dict) -> list[str]:
    """What was found besides the steps, a line for each question, whatever it says."""
    left = headroom.sentence(tables.headroom, tables.shares, settings.evaluation.headroom_samples)
    return [
        f"**In every task?** {_tasks(tables)}",
        f"**Less grain-blind?** {_distance(tables, reported)}",
        f"**How much is left?** {left}",
        f"**How sure?** {_sure(tables)}",
    ]


def steps(tables: Tables) -> str:
    """The arms from the EOL baseline to stage 3, each beside the one before it, as a Markdown table."""
    one, five = (decomposition.at_cutoff(tables.decomposition, k) for k in decomposition.CUTOFFS)
    lines = [
        "| | hit@1, % | step, points | hit@5, % | step, points | single seeds, over seeds |",
        "|--|--|--|--|--|--|",
    ]
    begin = next(iter(decomposition.STEPS))
    first = [_level(rows.loc[begin, "old value"]) for rows in (one, five)]
    lines.append(f"| {_arm(decomposition.EOL)} | {first[0]} | | {first[1]} | | |")
    for step, (new, _) in decomposition.STEPS.items():
        before, row = one.loc[step], five.loc[step]
        levels = _level(before["new value"]), _level(row["new value"])
        cells = f"{levels[0]} | {interval(before)} | {levels[1]} | {interval(row)}"
        lines.append(f"| {_arm(new)}: *{step}* | {cells} | {_over_seeds(row)} |")
    for step, (new, old) in decomposition.SUMS.items():
        cells = f"| {interval(one.loc[step])} | | {interval(five.loc[step])}"
        lines.append(f"| **{new} over {old}** | {cells} | {_over_seeds(five.loc[step])} |")
    return "\n".join(lines)


def page(tables: Tables, settings: Settings, seed: int, reported: dict) -> str:
    """The report's first page: scope, what was claimed, measured, easy, hard, and what it cost."""
    figures = tables.claims["paper"].notna()
    not_run = figures & tables.claims["ours"].isna()
    scope = (
        f"{_setting(tables, settings, reported)} Profile {settings.profile}, seed {seed}, device "
        f"{settings.device}. {int(not_run.sum())} figures of the paper need its data and GPUs and were not "
        "run."
    )
    return f"""**Scope.** {scope}

**What was claimed.**

{listed(_claimed(reported))}

**What was measured.** {_in_short(tables, reported).partition(": ")[2]}

{steps(tables)}

{listed(findings(tables, settings, reported))}

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
    """What is trained on what, what is asked, and what ranks."""
    size = sizes.of_model(settings.backbone.path, sizes.known().architectures).parameters
    data = f"the data {settings.data.name}; its test split is unseen"
    if settings.data.emoji:
        vendors, apart = settings.data.emoji.vendors, 100 * settings.data.emoji.held_out_share
        data = (
            f"names of emoji and how {len(vendors['train'])} vendors draw them. The test has the drawings of "
            f"a vendor that no training saw; {apart:.0f} % of the names are new, too"
        )
    bench = tables.mrbench
    scores = claims.main(tables.claims, reported).set_index(["claim", "metric"])["ours"]
    before = scores.get(("zero-shot, average", "hit@5"))
    start = "" if before is None else f"; the backbone before any stage reaches {before:.1f} % hit@5"
    pools = " to ".join(
        f"{count:,}" for count in sorted({bench["candidates"].min(), bench["candidates"].max()})
    )
    return (
        f"A Qwen2-VL of {size / 1e6:,.1f} M parameters (vision tower frozen, LoRA) is trained on {data}. "
        f"MRBench, the paper's benchmark of queries with {settings.mrbench.min_grains} grains or more, is "
        f"rebuilt on them: {bench['queries'].sum():,} queries, {pools} candidates each{start}. hit@k is the "
        "share of queries with a positive among the first k candidates; the average weighs tasks equally."
    )


def _in_short(tables: Tables, reported: dict) -> str:
    """What holds, for who reads no further: the verdict, the parts of the gain, the grain distance."""
    one, five = (decomposition.at_cutoff(tables.decomposition, k) for k in decomposition.CUTOFFS)
    whole, reward = five.loc["all"], five.loc["ranking reward"]
    if not whole["verdict"]:
        lacking = f"; not run: {whole['missing']}" if whole["missing"] else ""
        return f"**In short:** no verdict{lacking}."
    words = [
        sentences.direction(row["ci_low"], row["ci_high"], ("above zero", "below zero"))
        for row in (reward, one.loc["ranking reward"])
    ]
    low, _ = statistics.over_seeds(reward["by seed"])
    over = "" if low != low else f" over queries, {'above zero' if low > 0 else 'inconclusive'} over seeds"
    relative = interval(whole, "relative", "relative low", "relative high")
    distance = _distance_rows(tables, reported)["verdict"].get("stage 3 over stage 2", "")
    return (
        f"**In short:** {IN_SHORT[whole['verdict']]}: {whole['old value']:.1f} to {whole['new value']:.1f} % "
        f"hit@5, {interval(whole)} points, {relative} % of the baseline (paper: {whole['paper']:+.1f} %). "
        f"Writing a summary gives {five.loc['generation', 'value']:+.1f} points of it, the ranking reward "
        f"{reward['value']:+.1f} ({words[0]}{over}; at hit@1 {words[1]}). The paper's reason, less grain "
        f"blindness, is {distance or 'without a verdict'} here."
    )


def _arm(name: str) -> str:
    return f"**{name}**, {MODELS[name]}"


def _level(value: float) -> str:
    return "not run" if value != value else f"{value:.1f}"


def _over_seeds(row) -> str:
    """Points under each seed alone, and the interval over seeds."""
    if len(row["by seed"]) < 2:
        return ""
    points = ", ".join(f"{round(round(value, 9), 1) + 0.0:+.1f}" for value in row["by seed"])
    low, high = (round(end, 1) + 0.0 for end in statistics.over_seeds(row["by seed"]))
    return points if low != low else f"{points}; [{low:.1f}, {high:.1f}]"


def _tasks(tables: Tables) -> str:
    """Stage 3 over the EOL baseline on each task."""
    rows = tables.decomposition
    rows = rows[(rows["step"] == "all") & (rows["metric"] == "hit@5") & (rows["unit"] != "")]
    if rows.empty:
        return "Not run."
    parts = [f"{_words(row['unit'])} {interval(row)}" for row in rows.to_dict("records")]
    worse = [_words(row.unit) for row in rows.itertuples() if row.value < 0]
    said = f"No, not in {' and '.join(worse)}" if worse else "Yes"
    n = f"n = {int(rows['n'].min()):,} each"
    return f"{said}. Stage 3 over the EOL baseline, points of hit@5: {'; '.join(parts)} ({n})."


def _sure(tables: Tables) -> str:
    """What the intervals hold, how many seeds there are, and the claims by verdict, each by its name."""
    judged = tables.claims[tables.claims["verdict"].isin(MEANING) & tables.claims["ours"].notna()]
    over = judged["claim"].str.removeprefix("stage 3 over stage 2").str.removeprefix(", ")
    what = over.where(~over.isin(["", "EOL only"]), judged["metric"])
    judged = judged.assign(what=what, source=judged["source"].str.replace(r",.*", "", regex=True))
    words = []
    for word, meaning in MEANING.items():
        parts = [
            f"{source} ({rows['what'].iloc[0] if len(rows) == 1 else f'{len(rows)} claims'})"
            for source, rows in judged[judged["verdict"] == word].groupby("source", sort=False)
        ]
        words += [f"*{word}* ({meaning}): {', '.join(parts)}"] if parts else []
    claimed = f"{len(judged)} claims of the paper have a figure here; {'; '.join(words)}"
    return (
        "Brackets are 95 % intervals over queries, seeds averaged; the table's last column has each seed's "
        "points of hit@5 and the interval over seeds. "
        f"{_seeds(tables)}. {claimed if words else 'No claim of the paper is judged here'}."
    )


def _distance_rows(tables: Tables, reported: dict) -> pd.DataFrame:
    """The claims on the grain distance, by name."""
    rows = claims.main(tables.claims, reported)
    return rows[rows["metric"] == claims.DISTANCE].drop_duplicates("claim").set_index("claim")


def _distance(tables: Tables, reported: dict) -> str:
    """The grain distance before and after stage 3, beside the paper's."""
    rows = _distance_rows(tables, reported)
    values = reported["grain_distance"]["values"]
    text = (
        "Without one of its grains a query should be embedded elsewhere (cosine distance; larger is less "
        f"blind). The paper: {values['stage 2']} for its baseline, {values['stage 3']} for ELVA."
    )
    if not {"stage 2", "stage 3", "stage 3 over stage 2"} <= set(rows.index):
        return f"Not run. {text}"
    change = rows.loc["stage 3 over stage 2"]
    before, after = rows.loc["stage 2", "ours"], rows.loc["stage 3", "ours"]
    word = change["verdict"] if change["verdict"] in MEANING else "no verdict"
    return (
        f"{word.capitalize()}. {text} Here stage 2 has {before:.3f}, stage 3 "
        f"{after:.3f}: {interval(change, 'ours', digits=3)}, n = {int(change['n']):,} queries, one seed."
    )


def _claimed(reported: dict) -> list[str]:
    """The paper's main claims with its own figures."""
    gain, distance, ablation = (reported[name] for name in ("mrbench_gain", "grain_distance", "table8"))
    lost = ablation["rows"]["full"][-1] - ablation["rows"]["without ranking reward"][-1]
    return [
        f"Multi-grain retrieval gains {gain['value']} % on MRBench over LamRA-Ret ({gain['source']}).",
        "Embeddings are less grain-blind: the distance of a query to itself without one grain grows from "
        f"{distance['values']['stage 2']} to {distance['values']['stage 3']} ({distance['source']}).",
        f"The ranking reward matters: without it M-BEIR loses {lost:.1f} points ({ablation['source']}).",
    ]


def _easy(tables: Tables, settings: Settings) -> list[str]:
    """What went well, by what was measured."""
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
    """What did not go well, by what was measured."""
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


def _seeds(tables: Tables) -> str:
    """How many arms of the study have how many seeds."""
    arms = tables.runs.groupby("arm")["seed"].nunique().value_counts().sort_index(ascending=False)
    counts = [f"{n} {'arm has' if n == 1 else 'arms have'} {seeds}" for seeds, n in arms.items()]
    return f"Of the study {', '.join(counts)} seeds; what is not of the study has one"


def _words(unit: str) -> str:
    """The modalities of a unit's queries and candidates.

    >>> _words("emoji_task7")
    'image and text to image'
    """
    return " to ".join(mbeir.MODALITIES_OF[int(unit.rpartition("task")[2])]).replace(",", " and ")
