"""Results in words and a table: the steps from the EOL baseline to stage 3, tasks, grains, certainty.

Every number is from a table of the report.

tables = read(Path("outputs/cpu/seed-17/90_report"))
in_short(tables, statistics.reported())
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from elva_core.config import Settings
from elva_core.evaluation import headroom, statistics
from elva_core.experiments import claims, decomposition, reading, sentences
from elva_core.experiments.decomposition import interval
from elva_core.files import ElvaDataError
from elva_core.tables import read_table, rounded, signed

MEANING = {
    "reproduced": "above zero over queries, and reaching the paper's value",
    "same direction": "above zero over queries, and smaller than the paper's value",
    "inconclusive": "zero and at least half of the paper's value are both within the interval",
    "contradicted": "not above zero, and below half of the paper's value",
}
IN_SHORT = {
    "reproduced": "the whole method gains over the EOL baseline as much as in the paper",
    "same direction": "the whole method gains over the EOL baseline, but less than in the paper",
    "inconclusive": "whether the whole method gains over the EOL baseline cannot be said",
    "contradicted": "the whole method does not gain over the EOL baseline as in the paper",
}
BLIND = {  # does grain blindness fall from the EOL baseline to stage 3?
    "reproduced": ("Yes", "falls as in the paper"),
    "same direction": ("Yes, but by less than in the paper", "falls, but by less than in the paper"),
    "inconclusive": ("Not shown", "may or may not fall"),
    "contradicted": ("No", "does not fall as in the paper"),
}
BASELINE = "EOL baseline"
MODELS = {  # arm -> its name here, how it is trained and read, what it is compared with
    decomposition.EOL: (
        BASELINE,
        "stage 2 trained and read at the prompt's last token, as the paper's baseline LamRA-Ret",
        "",
    ),
    decomposition.RET: (
        "stage 2",
        "trained as long, a share of its steps at [RET], and read there after a summary",
        f"over the {BASELINE}",
    ),
    decomposition.CONTROL: (
        "InfoNCE control",
        "stage 2 continued with InfoNCE, with {negatives} (chosen on validation), on {control} queries",
        "over stage 2",
    ),
    decomposition.STAGE3: (
        "stage 3",
        "stage 2 continued with the ranking reward on {stage3} queries",
        "over the control",
    ),
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
    reading: pd.DataFrame  # reading.against_reading
    runs: pd.DataFrame  # a row for each training: arm, seed, hit@5, steps, train_s, wall_s (seconds)
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


def in_short(tables: Tables, reported: dict) -> str:
    """The main results in three sentences: the verdict, the parts of the gain, the grain distance."""
    one, five = (decomposition.at_cutoff(tables.decomposition, k) for k in decomposition.CUTOFFS)
    whole, reward = five.loc["all"], five.loc["ranking reward"]
    if not whole["verdict"]:
        lacking = f"; not run: {whole['missing']}" if whole["missing"] else ""
        return f"**In short:** no verdict{lacking}."
    words = [_lies(row["ci_low"], row["ci_high"]) for row in (reward, one.loc["ranking reward"])]
    low, high = statistics.over_seeds(reward["by seed"])
    over = "" if low != low else f", over seeds {_lies(low, high)}"
    relative = interval(whole, "relative", "relative low", "relative high")
    blind = _growth(tables, reported, decomposition.STAGE3, decomposition.EOL)
    falls = "is not judged" if blind is None or blind["verdict"] not in BLIND else BLIND[blind["verdict"]][1]
    of_reward = _growth(tables, reported, *decomposition.STEPS["ranking reward"])
    if of_reward is not None and of_reward["ci_high"] < 0:
        falls += "; the ranking reward alone raises it"
    (of_five, more_five, reward_five), (of_one, more_one, reward_one) = (
        signed(rows.loc[list(decomposition.STEPS), "value"]) for rows in (five, one)
    )
    return (
        f"**In short:** {IN_SHORT[whole['verdict']]}. Here hit@5 rises from {whole['old value']:.1f} to "
        f"{whole['new value']:.1f} %: {interval(whole)} points, or {relative} % of the baseline (paper: "
        f"{whole['paper']:+.1f} %). Training for a summary and reading after it, one step here, gives "
        f"{of_five} points of it, more InfoNCE {more_five}, the ranking reward in its place {reward_five} "
        f"(its interval over queries {words[0]}{over}). At hit@1 the whole gain is "
        f"{interval(one.loc['all'])} points: {of_one} from the summary, {more_one} from more InfoNCE, "
        f"{reward_one} from the reward (its interval {words[1]}). Grain blindness, the paper's reason, "
        f"{falls}."
    )


def steps(tables: Tables, settings: Settings) -> str:
    """The arms from the EOL baseline to stage 3, each beside the one before it, as a Markdown table."""
    seen = {name: f"{getattr(settings, name).queries:,}" for name in ("control", "stage3")}
    values = seen | {"negatives": decomposition.negatives(settings)}
    one, five = (decomposition.at_cutoff(tables.decomposition, k) for k in decomposition.CUTOFFS)
    lines = [
        "Gains are paired differences in percentage points, taken before rounding, with 95 % intervals over "
        "queries, seeds averaged; the last column has the gain at hit@5 of each seed alone, and the interval "
        "over seeds.",
        "",
        "| | hit@1, % | gain | hit@5, % | gain | each seed; over seeds |",
        "|--|--|--|--|--|--|",
    ]
    begin = next(iter(decomposition.STEPS))
    first = [_level(rows.loc[begin, "old value"]) for rows in (one, five)]
    lines.append(f"| {_arm(decomposition.EOL, values)} | {first[0]} | | {first[1]} | | |")
    for step, (new, _) in decomposition.STEPS.items():
        before, row = one.loc[step], five.loc[step]
        levels = _level(before["new value"]), _level(row["new value"])
        cells = f"{levels[0]} | {interval(before)} | {levels[1]} | {interval(row)}"
        lines.append(f"| {_arm(new, values)}; *{step}*, {MODELS[new][2]} | {cells} | {_over_seeds(row)} |")
    for step, (new, old) in decomposition.SUMS.items():
        what = f"**{MODELS[new][0]}** over {'the ' * (old == decomposition.EOL)}**{MODELS[old][0]}**"
        what += ": *the whole method*" * (step == "all")
        cells = f"| {interval(one.loc[step])} | | {interval(five.loc[step])}"
        lines.append(f"| {what} | {cells} | {_over_seeds(five.loc[step])} |")
    return "\n".join(lines)


def questions(tables: Tables, settings: Settings, reported: dict) -> list[str]:
    """The other results, a line for each question, negative ones among them."""
    left = headroom.sentence(tables.headroom, tables.shares, settings.evaluation.headroom_samples)
    unseen = decomposition.unseen_told(tables.decomposition)
    return [
        f"**In every task?** {_tasks(tables)}",
        *([f"**On drawings that no training saw?** {unseen}"] if unseen else []),
        f"**Less grain-blind?** {_distance(tables, reported)}",
        f"**How much is left?** {left} This is the chain's own training{_spread(tables)}.",
        f"**On a backbone that reads less well?** {reading.told(tables.reading) or 'Not measured.'}",
        f"**How sure?** {_sure(tables)}",
    ]


def _lies(low: float, high: float) -> str:
    """The side of zero on which an interval lies, in words."""
    return sentences.direction(low, high, ("lies above zero", "lies below zero"), "contains zero")


def _arm(name: str, values: dict[str, str]) -> str:
    label, how, _ = MODELS[name]
    return f"**{label}**, {how.format(**values)}"


def _level(value: float) -> str:
    return "not run" if value != value else f"{value:.1f}"


def _over_seeds(row) -> str:
    """Points under each seed alone, and the interval over seeds."""
    if len(row["by seed"]) < 2:
        return ""
    points = ", ".join(signed(row["by seed"]))
    low, high = map(rounded, statistics.over_seeds(row["by seed"]))
    return points if low != low else f"{points}; [{low:.1f}, {high:.1f}]"


def _spread(tables: Tables) -> str:
    """The hit rates of the study's trainings of stage 3, in words, beside which the chain's stands."""
    rates = 100 * tables.runs.loc[tables.runs["arm"] == decomposition.STAGE3, "hit@5"]
    if rates.empty:
        return ""
    return f"; those of the table have {rates.min():.1f} to {rates.max():.1f} % hit@5 after stage 3"


def _tasks(tables: Tables) -> str:
    """Stage 3 over the EOL baseline on each task, at every cut-off."""
    rows = tables.decomposition
    rows = rows[(rows["step"] == "all") & (rows["unit"] != "")]
    if rows.empty:
        return "Not run."
    said, points = [], []
    for metric, part in rows.groupby("metric", sort=False):
        worse = [claims.modalities(row.unit) for row in part.itertuples() if row.value < 0]
        said.append(f"at {metric} " + (f"not in {' and '.join(worse)}" if worse else "yes"))
        each = (f"{claims.modalities(row['unit'])} {interval(row)}" for row in part.to_dict("records"))
        points.append(f"{metric}: {', '.join(each)}")
    told = "; ".join(said)
    n = f"n = {int(rows['n'].min()):,} each"
    return (
        f"{told[:1].upper()}{told[1:]}. Stage 3 over the EOL baseline, points of {'; '.join(points)} ({n})."
    )


def _sure(tables: Tables) -> str:
    """Numbers of seeds, and of the paper's claims by verdict, in words."""
    judged = tables.claims[tables.claims["verdict"].isin(MEANING) & tables.claims["ours"].notna()]
    words = []
    for word, meaning in MEANING.items():
        seeds = sorted({int(text.partition(" ")[0]) for text in judged["seeds"][judged["verdict"] == word]})
        if seeds:
            each = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) + " seeds"
            each = "one seed each" if seeds[-1] == 1 else each
            count = int((judged["verdict"] == word).sum())
            words.append(f"{count} *{word}*, {each} ({meaning})")
    claimed = f"{len(judged)} claims of the paper were measured: {', '.join(words)}; the report names them"
    return f"{_seeds(tables)}. {claimed if words else 'No claim of the paper is judged here'}."


def _seeds(tables: Tables) -> str:
    """Seeds of the models in the table, and the other trainings, in words."""
    counts = tables.runs.groupby("arm")["seed"].nunique()
    models = counts.reindex(list(decomposition.CHAIN), fill_value=0).min()
    others = counts.drop(list(decomposition.CHAIN), errors="ignore")
    each = " to ".join(map(str, sorted({others.min(), others.max()})) if len(others) else ["none"])
    return f"Seeds: {models} for each model of the table, {each} for the study's {len(others)} other arms"


def _distance(tables: Tables, reported: dict) -> str:
    """The grain distance of the EOL baseline and of stage 3, beside the paper's, and what each step adds."""
    eol, stage3 = decomposition.EOL, decomposition.STAGE3
    values, change = reported["grain_distance"]["values"], _growth(tables, reported, stage3, eol)
    text = (
        "Without one of its grains a query should be embedded elsewhere (cosine distance; larger is less "
        f"blind). The paper: {values[eol]} for its {BASELINE}, {values[stage3]} for ELVA, of another model "
        "and other data."
    )
    if change is None or change["verdict"] not in BLIND:
        return f"Not run. {text}"
    before, after = (_distance_rows(tables, reported).loc[name, "ours"] for name in (eol, stage3))
    steps = ((step, _growth(tables, reported, *pair)) for step, pair in decomposition.STEPS.items())
    each = [f"{step} {interval(row, 'ours', digits=3)}" for step, row in steps if row is not None]
    seeds = change["seeds"].partition(" ")[0]
    return (
        f"{BLIND[change['verdict']][0]}. {text} Here {before:.3f} and {after:.3f}: "
        f"{interval(change, 'ours', digits=3)}. Step by step: {', '.join(each)} "
        f"(n = {int(change['n']):,} queries, seeds: {seeds})."
    )


def _growth(tables: Tables, reported: dict, new: str, old: str) -> pd.Series | None:
    """The claim on how far the grain distance grows between two models; None where it was not measured."""
    rows, name = _distance_rows(tables, reported), f"{new} over {old}"
    return rows.loc[name] if name in rows.index else None


def _distance_rows(tables: Tables, reported: dict) -> pd.DataFrame:
    """The claims on the grain distance, by name."""
    rows = claims.main(tables.claims, reported)
    return rows[rows["metric"] == claims.DISTANCE].drop_duplicates("claim").set_index("claim")
