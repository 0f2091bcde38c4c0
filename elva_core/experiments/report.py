"""The report that 90_report writes: Markdown and HTML, the README's tables, the cost of each stage."""

from __future__ import annotations

import ast
import base64
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import mistune
import nbformat
import pandas as pd

from elva_core import files
from elva_core.config import Settings
from elva_core.data import mbeir
from elva_core.data.caption_sets import SETS
from elva_core.evaluation import captions, headroom, statistics
from elva_core.experiments import claims, decomposition
from elva_core.experiments.keys import STAGES, manifest
from elva_core.experiments.stages import Stage
from elva_core.tables import markdown_table, read_table
from elva_core.values import as_written

REPORT = "90_report"
PLAIN = (
    "zero-shot,",
    "stage 2,",
    "InfoNCE control,",
)  # models whose scores stand in claims.csv, not in the report
STYLE = (
    "body{max-width:72rem;margin:2rem auto;padding:0 1rem;font:15px/1.5 sans-serif}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{border-bottom:1px solid #ccc;padding:.2rem .6rem;text-align:left}"
    "img{max-width:100%}summary{cursor:pointer;margin:.3rem 0}"
)


def gather(run: Stage) -> Mapping[str, dict]:
    """Manifests of every stage before this one, each verified."""
    for stage in STAGES[REPORT]:
        run.require(stage)
    return {stage: manifest(run.settings.profile, run.seed, stage) for stage in STAGES[REPORT]}


def claims_table(run: Stage, reported: dict) -> pd.DataFrame:
    """claims.csv of this run: every notebook's measured.csv beside the paper, then what was not run.

    A later row takes the place of an earlier one of its name and backbone: the study's of the chain's single
    run.
    """
    order = sorted(STAGES[REPORT], key="60_ablate".__eq__)  # the study last
    tables = [run.require(stage) / "measured.csv" for stage in order]
    measured = pd.concat([read_table(path) for path in tables if path.is_file()], ignore_index=True)
    return claims.assemble(
        measured,
        reported,
        evidence=run.settings.evidence,
        profile=run.settings.profile,
        official=_official(run, reported),
    )


def _official(run: Stage, reported: dict) -> dict[str, pd.DataFrame]:
    """What this run measured of the paper's Tables 1, 2, 6 and 7, by their columns; empty on other data."""
    # Table 1: the sixteen units at their own cut-offs, and their mean
    columns = ["value", "ci_low", "ci_high", "n"]
    results = read_table(run.require("50_evaluate") / "results.csv")
    results = results.query("model == 'stage 3' and pool == 'local'").set_index(["unit", "metric"])
    official = dict(zip(reported["table1"]["columns"], mbeir.OFFICIAL_UNITS.items(), strict=True))
    keys = {column: (unit, f"hit@{k}") for column, (unit, k) in official.items()}
    units = pd.DataFrame({column: results.loc[key] for column, key in keys.items() if key in results.index}).T
    if len(units) == len(official):
        units.loc["Avg"] = {"value": units["value"].mean(), "n": units["n"].sum()}

    # Table 6: MRBench
    hits = read_table(run.require("50_evaluate") / "mrbench.csv")
    hits = hits.query("model == 'stage 3' and metric == 'hit@5'")
    names = dict(zip(run.settings.mrbench.units, reported["table6"]["columns"], strict=False)) | {
        "average": "Avg"
    }
    bench = (
        hits[hits["unit"].isin(names)]
        .assign(column=lambda table: table["unit"].map(names))
        .set_index("column")
    )

    # Table 2: unseen sets, without intervals
    unseen = read_table(run.require("80_generalise") / "unseen.csv")
    table2 = captions.table2(unseen.query("question == 'Table 2' and model == 'stage 3'")).drop(
        columns="model"
    )
    sets = table2.T.dropna().set_axis(["value"], axis=1) / 100 if len(table2) else pd.DataFrame()

    # Table 7: videos, at the most frames
    clips = read_table(run.require("82_transfer") / "clips.csv").query(
        "model == 'stage 3' and words == 'name'"
    )
    clips = clips[clips["frames"] == clips["frames"].max()]
    clips = clips.set_index(clips["set"] + clips["metric"].str.replace("hit@", " R@"))
    clips = clips[clips.index.isin(reported["table7"]["columns"])]
    frames = {
        "table1": units,
        "table6": bench if run.settings.mrbench.units else bench[:0],
        "table2": sets,
        "table7": clips,
    }
    return {name: frame.reindex(columns=columns) for name, frame in frames.items()}


def study_table(run: Stage, name: str) -> pd.DataFrame:
    """A table that a notebook made from the study, its tuples of seeds read back, and "" for empty texts."""
    tuples = dict.fromkeys(("seeds", "by seed"), ast.literal_eval)
    table = pd.read_csv(run.require("60_ablate") / f"{name}.csv", converters=tuples)
    texts = {"unit", "group", "missing", "verdict"} & set(table)
    return table.astype(dict.fromkeys(texts, object)).fillna(dict.fromkeys(texts, ""))


def _headroom(run: Stage) -> tuple[pd.DataFrame, str]:
    """Hit rates by the origin of the summaries, and the sentence on what stage 3 takes of the room."""
    folder = run.require("70_analyse_grains")
    room, shares = (read_table(folder / f"{name}.csv") for name in ("headroom", "shares"))
    return room, headroom.sentence(room, shares, run.settings.evaluation.headroom_samples)


def gain(run: Stage) -> str:
    """The section on where the gain over the EOL baseline comes from, and on what it leaves."""
    steps, (room, room_left) = study_table(run, "decomposition"), _headroom(run)
    by = {"index": "summaries", "columns": ["metric", "model"], "values": "value"}
    cells = room[room["unit"] == "average"].assign(value=100 * room["value"]).pivot(**by).sort_index(axis=1)
    cells = cells.loc[list(dict.fromkeys(room["summaries"]))]
    cells.columns = [f"{metric}, {model}" for metric, model in cells.columns]
    return f"""{decomposition.sentence(steps, run.settings.profile)}

![Points after each step](figures/decomposition.png)

{markdown_table(decomposition.overview(steps))}
What others report, each on its own benchmark:

{markdown_table(decomposition.public_work())}
Summaries of another origin, in percent. {room_left}

{markdown_table(cells.reset_index())}"""


def result(run: Stage, table: pd.DataFrame, minutes: float) -> str:
    """The main result in words, for the first screen of README; every number is computed."""
    steps, (_, room_left) = study_table(run, "decomposition"), _headroom(run)
    lines = [
        f"**Does the gain come?** {decomposition.sentence(steps, run.settings.profile)}",
        f"**What is left?** {room_left}",
        f"**How sure?** {claims.counted(table)} Intervals are 95 % over queries; "
        f"one run of everything (seed {run.seed}) takes {minutes:.0f} minutes.",
    ]
    return _list(lines)


def cost(stages: Mapping[str, dict]) -> pd.DataFrame:
    """Seconds and peak memory of each stage, as its manifest says."""
    columns = ["wall_s", "peak_memory_gb"]
    return (
        pd.DataFrame(stages)
        .T[columns]
        .rename_axis("stage")
        .reset_index()
        .astype(dict.fromkeys(columns, float))
    )


def deviations(settings: Settings, reported: dict) -> list[str]:
    """Where this profile does something else than the paper, and why; each follows from its values."""
    stage3, out = settings.stage3, []
    if settings.stage2.ret_share:
        share = f"{100 * settings.stage2.ret_share:.0f} % of the steps of stage 2 train the state at [RET]"
        out.append(f"{share}: the paper leaves open how that state becomes an embedding before stage 3.")
    if not settings.backbone.path.startswith("Qwen/Qwen2-VL-"):
        out.append(f"The backbone is {settings.backbone.path}, not Qwen2-VL-2B or 7B.")
    if settings.data.emoji:
        out.append("Emoji instead of M-BEIR: real images with exact grains that come with a package.")
    if settings.mrbench.annotator.kind == "exact":
        out.append("The grains of MRBench are those of the names; no model annotates them.")
    if stage3.rollout_sides == "query":
        sides = "Summaries of the query are actions, those of candidates are not (`rollout_sides: query`)"
        out.append(
            f"{sides}: the literal reading samples every candidate as well; it is an arm of the study."
        )
    if stage3.rollout_sides == "both":
        sides = "Summaries of queries and of positives are actions in turns (`rollout_sides: both`)"
        out.append(f"{sides}, those of negatives are not: all at once are an arm of the study.")
    if stage3.resample or stage3.negatives.difficulty:
        chosen = f"difficulty {stage3.negatives.difficulty}, resample {stage3.resample}"
        out.append(f"Stage 3 prefers queries that teach it ({chosen}): the paper takes what it has drawn.")
    for key, printed in reported["hyperparameters"]["stage3"].items():
        value = stage3
        for part in key.split("."):
            value = getattr(value, part)
        if value != printed:
            out.append(f"stage3.{key} is {value}, in the paper {printed}: the profile names its source.")
    out.append(
        "The gain is given over two baselines: the paper's is LamRA-Ret, stage 2 read at the EOL token; "
        "stage 2 at [RET] is the harder one."
    )
    return out


def missing_sets(run: Stage, reported: dict) -> list[str]:
    """A line on the unseen sets, and one on the videos, that the folder of the profile did not have."""
    unseen, video, lines = run.settings.unseen, run.settings.video, []
    videos = {column.partition(" R@")[0] for column in reported["table7"]["columns"]}
    for section, stage, table, names in (
        (unseen, "80_generalise", "unseen.csv", SETS),
        (video, "82_transfer", "clips.csv", videos),
    ):
        if section is None or section.sets is None:
            continue
        scored = read_table(run.require(stage) / table)["set"]
        if lacking := ", ".join(sorted(set(names) - set(scored))):
            again = f"run {run.settings.profile} --seed {run.seed} --only {stage[:2]} --force"
            place = f"{lacking}: not in {as_written(section.sets)} when {stage} ran"
            lines.append(f"{place}; put it there, then: python -m elva_core {again}")
    return lines


def write(
    run: Stage, reported: dict, table: pd.DataFrame, cost_table: pd.DataFrame, audit: pd.DataFrame
) -> None:
    """Writes table.md and stages.md (the README's blocks), report.md, and report.html with its figures."""
    # the README's blocks
    settings = run.settings
    note = (
        f"Profile {settings.profile}, seed {run.seed}, device {settings.device}; hit rates in percent, 95 % "
        f"intervals over queries; several seeds: outputs/{settings.profile}/study."
    )
    if not settings.evidence:
        note += " This profile tests plumbing; its numbers are no evidence."
    block = claims.markdown(table, reported, note)
    steps = decomposition.sentence(study_table(run, "decomposition"), settings.profile)
    block += f"\n\nWhere the gain comes from, over {settings.profile}'s study. {steps}"
    minutes, memory = cost_table["wall_s"].sum() / 60, cost_table["peak_memory_gb"].max()
    files.write_whole(run.folder / "result.md", result(run, table, minutes) + "\n")
    files.write_whole(run.folder / "table.md", block + "\n")
    files.write_whole(run.folder / "stages.md", stages(cost_table) + "\n")

    # what was measured besides the main claims: beside the paper, without it, and what was not run
    others = table[table["ours"].notna() & ~table.index.isin(claims.main(table, reported).index)]
    others = others[~others["claim"].str.startswith(PLAIN)]
    beside = others[others["paper"].notna()].sort_values("source", kind="stable")
    beside = beside.assign(claim=beside["source"] + ": " + beside["claim"])
    folded = "\n\n".join(
        _folded(source, rows) for source, rows in others[others["paper"].isna()].groupby("source", sort=True)
    )
    missing = table[table["ours"].isna()].groupby(["source", "baseline"], sort=False)
    not_run = [f"{source}, {len(rows)} figures: needs {needs}" for (source, needs), rows in missing]
    installed = pd.read_csv(run.require("00_check_environment") / "environment.csv")
    packages = installed["package"] + " " + installed["installed"]

    text = f"""# Report: profile {settings.profile}, seed {run.seed}

{claims.counted(table)} Every row: claims.csv.

{statistics.RULE}

## What was claimed, what was measured
{block}

![Paired differences on MRBench](figures/differences.png)

## Where the gain comes from
{gain(run)}

## Deviations from the paper
{_list(deviations(settings, reported))}

## What was not run
{_list([*missing_sets(run, reported), *not_run])}

## What else the paper has a figure for, at this size
{claims.listed(beside)}

## What the paper has no figure for
What stage 3 reaches, and what it gains; {", ".join(name.rstrip(",") for name in PLAIN)} alone: claims.csv.

{folded}

## Figures of the paper that do not add up
{_table(audit[~audit["agrees"]].drop(columns="agrees"))}

## Cost
{minutes:.1f} minutes in all, {memory:.1f} GB at most.

{_table(cost_table)}

## Environment
{", ".join(packages)}.
"""
    files.write_whole(run.folder / "report.md", text)
    files.write_whole(run.folder / "report.html", page(text, run.folder))


def stages(cost_table: pd.DataFrame) -> str:
    """The README's table of notebooks: the question of each, its seconds and peak memory."""
    measured = cost_table.set_index("stage")
    lines = ["| notebook | question | seconds | peak, GB |", "|--|--|--|--|"]
    for path in sorted((files.REPOSITORY / "notebooks").glob("*.ipynb")):
        head = nbformat.read(path, as_version=4).cells[0].source
        (question,) = re.findall(r"^\*\*Question\*\* (.+)$", head, re.MULTILINE)
        numbers = " | "
        if path.stem in measured.index:
            row = measured.loc[path.stem]
            numbers = f"{row['wall_s']:.0f} | {row['peak_memory_gb']:.1f}"
        lines.append(f"| [{path.stem}](notebooks/{path.name}) | {question} | {numbers} |")
    return "\n".join(lines)


def update_readme(readme: Path, blocks: Mapping[str, str]) -> None:
    """Replaces what stands between the markers of each block, "<!-- NAME:start -->" and "<!-- NAME:end -->".

    Raises:
        ValueError: a marker is missing.
    """
    text = readme.read_text(encoding="utf-8")
    for name, block in blocks.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"{readme}: expected {start} and {end} once each; restore them around the table")
        text = f"{text.split(start)[0]}{start}\n{block.strip()}\n{end}{text.split(end)[1]}"
    files.write_whole(readme, text)


def page(text: str, folder: Path) -> str:
    """Markdown as one HTML file that needs no other: its pictures, relative to `folder`, stand inside."""
    body = mistune.create_markdown(escape=False, plugins=["table"])(text)
    for name in re.findall(r'<img src="([^"]+)"', body):
        picture = base64.b64encode((folder / name).read_bytes()).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{picture}"')
    title = text.splitlines()[0].lstrip("# ")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n<body>{body}</body></html>\n'


def _folded(title: str, rows: pd.DataFrame) -> str:
    """Claims that are seen once their title is clicked."""
    return f"<details><summary>{title} ({len(rows)})</summary>\n\n{claims.listed(rows)}\n\n</details>"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _table(frame: pd.DataFrame) -> str:
    lines = [frame.columns, ["--"] * len(frame.columns), *frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
