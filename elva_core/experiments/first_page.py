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
from elva_core.evaluation import headroom
from elva_core.experiments import claims, decomposition, sentences
from elva_core.files import ElvaDataError
from elva_core.tables import read_table

MEANING = {
    "reproduced": "its interval is above zero and reaches the paper's value",
    "same direction": "its interval is above zero and below the paper's value",
    "inconclusive": "its interval holds zero and reaches half of the paper's value",
    "contradicted": "its interval is not above zero and does not reach half of the paper's value",
}
STEPS = {
    "generation": "a summary first, read at [RET]",
    "more InfoNCE": "on the queries of stage 3, the control",
    "ranking reward": "in its place",
}
IN_SHORT = {
    "reproduced": "ELVA's gain over the EOL baseline is as large as the paper's",
    "same direction": "ELVA gains over the EOL baseline, less than in the paper",
    "inconclusive": "whether ELVA gains over the EOL baseline cannot be said",
    "contradicted": "ELVA does not gain over the EOL baseline as in the paper",
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
    """The main result in words, for the first screen of README."""
    sure = (
        f"**How sure?** Brackets are 95 % intervals over queries; {_seeds(tables)}. "
        f"{claims.counted(tables.claims)}"
    )
    lines = listed([*findings(tables, settings, reported), sure])
    return f"{_in_short(tables, reported)}\n\n{_setting(tables, settings)}\n\n{lines}"


def commands(tables: Tables, settings: Settings, seed: int) -> str:
    """The two commands of README with their measured time."""
    minutes, hours = tables.cost["wall_s"].sum() / 60, tables.runs["wall_s"].sum() / 3600
    whole = f"one seed of everything: {minutes:.0f} minutes on {settings.threads} cores, after set-up"
    seeds, done = tables.runs["seed"].nunique(), len(tables.runs)
    study = f"{seeds} seeds and ablations, resumable: {hours:.1f} hours for the {done} trainings done so far"
    return f"```\nmake reproduce    # {whole}\nmake study        # {study}\n```"


def findings(tables: Tables, settings: Settings, reported: dict) -> list[str]:
    """What was found, a line for each claim or question, whatever it says."""
    left = headroom.sentence(tables.headroom, tables.shares, settings.evaluation.headroom_samples)
    return [
        f"**Does the gain come?** {_gain(tables, reported)}",
        f"**From what?** {_parts(tables)}",
        f"**In every task?** {_tasks(tables)}",
        f"**Is it grain-blind?** {_distance(tables, reported)}",
        f"**What is left?** {left}",
    ]


def page(tables: Tables, settings: Settings, seed: int, reported: dict) -> str:
    """The report's first page: scope, what was claimed, measured, easy, hard, and what it cost."""
    figures = tables.claims["paper"].notna()
    not_run = figures & tables.claims["ours"].isna()
    scope = (
        f"{_setting(tables, settings)} Profile {settings.profile}, seed {seed}, device {settings.device}. "
        f"{int(not_run.sum())} figures of the paper need its data and GPUs and were not run."
    )
    return f"""**Scope.** {scope}

**What was claimed.**

{listed(_claimed(reported))}

**What was measured.** {claims.counted(tables.claims)}

{listed(findings(tables, settings, reported))}

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


def _setting(tables: Tables, settings: Settings) -> str:
    """What is trained on what, what is asked, and what ranks."""
    units = [unit for unit in dict.fromkeys(tables.decomposition["unit"]) if unit]
    tasks = "; ".join(f"{unit}: {_words(unit)}" for unit in units) or "of the profile's tasks"
    path, data = settings.backbone.path, f"the data {settings.data.name}"
    backbone = path if path.startswith("Qwen/") else "a small Qwen2-VL"
    if settings.data.emoji:
        train = len(settings.data.emoji.vendors["train"])
        data = (
            f"emoji as {train} vendors draw them, and on their names. The test's drawings are other "
            "vendors', which no training saw"
        )
    return (
        f"The language model of {backbone} is trained (LoRA) on {data}. Our MRBench is built as the "
        f"paper's, of this data: {_count(tables, settings):,} queries with {settings.mrbench.min_grains} "
        f"grains or more ({tasks}). hit@5 is the share of queries with a positive among the first five "
        "candidates."
    )


def _count(tables: Tables, settings: Settings) -> int:
    """Queries of MRBench: those that were measured, or else those of the profile."""
    measured = decomposition.average(tables.decomposition)["n"].dropna()
    return int(measured.max()) if len(measured) else settings.mrbench.queries


def _in_short(tables: Tables, reported: dict) -> str:
    """One sentence for who reads no further: the verdict, the parts of the gain, the grain distance."""
    five, one = (decomposition.at_cutoff(tables.decomposition, k) for k in (5, 1))
    whole, reward = five.loc["all"], five.loc["ranking reward"]
    if not whole["verdict"]:
        return "**In short:** no verdict."
    five_says, one_says = (
        sentences.direction(row["ci_low"], row["ci_high"]) for row in (reward, one.loc["ranking reward"])
    )
    seeds = "; seeds disagree" if min(reward["by seed"]) < 0 < max(reward["by seed"]) else ""
    distance = _distance_rows(tables, reported)["verdict"].get("stage 3 over stage 2", "without a verdict")
    return (
        f"**In short:** {IN_SHORT[whole['verdict']]}. Of {whole['value']:+.1f} points of hit@5, the summary "
        f"gives {five.loc['generation', 'value']:+.1f}, the ranking reward {reward['value']:+.1f} "
        f"({five_says}; at hit@1 {one_says}{seeds}). That ELVA is less grain-blind: {distance}."
    )


def _gain(tables: Tables, reported: dict) -> str:
    """Stage 3 over the counterpart of the paper's baseline, beside the paper's figure."""
    row = decomposition.at_cutoff(tables.decomposition, 5).loc["all"]
    paper = f"The paper: {reported['mrbench_gain']['value']:+.1f} % on its MRBench over LamRA-Ret. Here"
    if row["value"] != row["value"]:
        return f"{paper} not run: {row['missing']}."
    gain = _span(row, "relative", "relative low", "relative high")
    return (
        f"{paper} stage 3 has {row['new value']:.1f} % hit@5 and LamRA-Ret's counterpart, stage 2 read at "
        f"EOL, {row['old value']:.1f} %: {gain} %, n = {int(row['n']):,}, {len(row['seeds'])} seeds"
        f"{_verdict(row['verdict'])}."
    )


def _parts(tables: Tables) -> str:
    """The steps from the EOL baseline to stage 3, at both cut-offs, and the reward's gain under each seed."""
    five, one = (decomposition.at_cutoff(tables.decomposition, k) for k in (5, 1))
    parts = [
        f"*{name}* ({words}) {_span(five.loc[name])}, {_span(one.loc[name])}" for name, words in STEPS.items()
    ]
    text = f"Points of hit@5, and of hit@1: {'; '.join(parts)}."
    seeds = [f"{round(value, 1) + 0.0:+.1f}" for value in five.loc["ranking reward", "by seed"]]
    return text + (f" Single seeds of the reward, hit@5: {', '.join(seeds)}." if len(seeds) > 1 else "")


def _tasks(tables: Tables) -> str:
    """Stage 3 over the EOL baseline on each task, with what its interval says."""
    rows, parts = tables.decomposition, []
    rows = rows[(rows["step"] == "all") & (rows["metric"] == "hit@5") & (rows["unit"] != "")]
    for row in rows.to_dict("records"):
        word = sentences.direction(row["ci_low"], row["ci_high"])
        if word == "inconclusive":
            word = f"{'lower' if row['value'] < 0 else 'higher'}, inconclusive"
        parts.append(f"{_words(row['unit'])} {_span(row)} ({word})")
    return f"Stage 3 over EOL, points of hit@5: {'; '.join(parts)}." if parts else "Not run."


def _distance_rows(tables: Tables, reported: dict) -> pd.DataFrame:
    """The claims on the grain distance, by name."""
    rows = claims.main(tables.claims, reported)
    return rows[rows["metric"] == claims.DISTANCE].drop_duplicates("claim").set_index("claim")


def _distance(tables: Tables, reported: dict) -> str:
    """The grain distance before and after stage 3, beside the paper's."""
    rows = _distance_rows(tables, reported)
    values = reported["grain_distance"]["values"]
    text = (
        "Cosine distance between a query and itself without one grain. The paper: "
        f"{values['stage 2']} for its baseline, {values['stage 3']} for ELVA."
    )
    if not {"stage 2", "stage 3", "stage 3 over stage 2"} <= set(rows.index):
        return f"{text} Here: not run."
    change = rows.loc["stage 3 over stage 2"]
    before, after = rows.loc["stage 2", "ours"], rows.loc["stage 3", "ours"]
    return (
        f"{text} Here from {before:.3f} to {after:.3f}, {_span(change, 'ours', digits=3)}, n = "
        f"{int(change['n']):,} queries, one seed{_verdict(change['verdict'])}."
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
    rows = rows[rows["step"].isin(list(STEPS)) & rows["metric"].isin([f"hit@{k}" for k in cutoffs])]
    steps = rows.groupby("step", sort=False)
    return ", ".join(step for step, part in steps if all(map(holds, part.to_dict("records"))))


def _seeds(tables: Tables) -> str:
    """How many arms of the study have how many seeds."""
    arms = tables.runs.groupby("arm")["seed"].nunique().value_counts().sort_index(ascending=False)
    counts = [f"{n} {'arm has' if n == 1 else 'arms have'} {seeds}" for seeds, n in arms.items()]
    return f"of the study {', '.join(counts)} seeds; what is not of the study has one"


def _words(unit: str) -> str:
    """The modalities of a unit's queries and candidates.

    >>> _words("emoji_task7")
    'image and text to image'
    """
    return " to ".join(mbeir.MODALITIES_OF[int(unit.rpartition("task")[2])]).replace(",", " and ")


def _span(row, value: str = "value", low: str = "ci_low", high: str = "ci_high", digits: int = 1) -> str:
    """A signed value with its interval, "not run" without one."""
    if row[value] != row[value]:
        return "not run"
    middle, low, high = (round(row[name], digits) + 0.0 for name in (value, low, high))  # no -0.0
    return f"{middle:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _verdict(word: str) -> str:
    """A verdict and what the word means; nothing where there is none."""
    return f": *{word}* ({MEANING[word]})" if word in MEANING else ""
