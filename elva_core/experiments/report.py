"""The report that 90_report writes: Markdown and HTML, the README's blocks, the cost of each stage.

collect(run)  # after claims.csv, cost.csv and the others are saved
write(run.folder, run.settings, run.seed, statistics.reported())
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import mistune
import nbformat
import pandas as pd

from elva_core import config, files
from elva_core.config import Settings
from elva_core.data import mbeir
from elva_core.data.caption_sets import SETS
from elva_core.evaluation import captions, headroom, statistics
from elva_core.experiments import claims, decomposition, findings, first_page, reading, study
from elva_core.experiments.arms import planned
from elva_core.experiments.findings import Tables
from elva_core.experiments.keys import STAGES, read_manifest, stage_folder
from elva_core.experiments.stages import Stage, listed_files, no_evidence
from elva_core.tables import markdown_rows, markdown_table, read_table
from elva_core.values import as_written

REPORT = "90_report"
PLAIN = (
    "zero-shot,",
    "stage 2,",
    "InfoNCE control,",
)  # models whose scores stand in claims.csv, not in the report
# tables of other stages that the report is made from, and that are saved beside it
TAKEN = {
    "00_check_environment": ("environment",),
    "60_ablate": ("decomposition", "runs", "reading"),
    "70_analyse_grains": ("headroom", "shares"),
}
BLOCKS = ("result", "commands", "claims", "stages")  # of README, each a Markdown file of the report's folder
STYLE = (
    "body{max-width:72rem;margin:2rem auto;padding:0 1rem;font:15px/1.5 sans-serif}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "td,th{border-bottom:1px solid #ccc;padding:.2rem .6rem;text-align:left}"
    "img{max-width:100%}summary{cursor:pointer;margin:.3rem 0}"
)


def gather(run: Stage) -> Mapping[str, dict]:
    """Manifests of every stage before this one, each verified."""
    return {stage: read_manifest(run.require(stage)) for stage in STAGES[REPORT]}


def claims_table(run: Stage, reported: dict) -> pd.DataFrame:
    """claims.csv of this run: every notebook's measured.csv beside the paper, then what was not run.

    A later row takes the place of an earlier one of its name and backbone: the study's of the chain's single
    run.
    """
    order = sorted(STAGES[REPORT], key="60_ablate".__eq__)  # the study last
    tables = [run.require(stage) / "measured.csv" for stage in order]
    measured = pd.concat([read_table(path) for path in tables if path.is_file()], ignore_index=True)
    return claims.assemble(
        measured.dropna(subset="value"),  # a share of what may be nothing has none
        reported,
        evidence=run.settings.evidence,
        profile=run.settings.profile,
        official=_official(run, reported),
    )


def _official(run: Stage, reported: dict) -> dict[str, pd.DataFrame]:
    """This run's values in the paper's Tables 1, 2, 6 and 7, by their columns; empty on other data."""
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
    bench = hits[hits["unit"].isin(names)].set_index("unit").rename(index=names)

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
    """A table that notebook 60 made from the study (`findings.read_study_table`)."""
    return findings.read_study_table(run.require("60_ablate") / f"{name}.csv")


def collect(run: Stage) -> None:
    """Copies the tables of other stages into the report's folder: the report is made from what lies there."""
    for stage, names in TAKEN.items():
        for name in names:
            shutil.copyfile(run.require(stage) / f"{name}.csv", run.folder / f"{name}.csv")
    counts = read_table(run.require("20_build_mrbench") / "counts.csv")
    run.save_table(
        "mrbench",
        counts[["unit", "drawn", "pool"]].rename(columns={"drawn": "queries", "pool": "candidates"}),
    )


def answers(stages: Mapping[str, dict]) -> pd.DataFrame:
    """The answer of each notebook to its question, as its manifest has it: stage, answer."""
    rows = [(stage, done.get("answer", "")) for stage, done in stages.items()]
    return pd.DataFrame(rows, columns=["stage", "answer"])


def gain(tables: Tables, settings: Settings) -> str:
    """The section on where the gain over the EOL baseline comes from, and on what it leaves."""
    steps, room = tables.decomposition, tables.headroom
    by = {"index": "summaries", "columns": ["metric", "model"], "values": "value"}
    cells = room[room["unit"] == "average"].assign(value=100 * room["value"]).pivot(**by).sort_index(axis=1)
    cells = cells.loc[list(dict.fromkeys(room["summaries"]))]
    cells.columns = [f"{metric}, {model}" for metric, model in cells.columns]
    room_left = headroom.sentence(room, tables.shares, settings.evaluation.headroom_samples)
    return f"""{decomposition.sentence(steps, settings.profile)}

![Points after each step](figures/decomposition.png)

{markdown_table(decomposition.overview(steps))}
![Points of each step under each backbone](figures/reading.png)

What others report, each on its own benchmark:

{markdown_table(reading.public_work())}
Summaries of another origin, in percent. {room_left}

{markdown_table(cells.reset_index())}"""


def cost(stages: Mapping[str, dict]) -> pd.DataFrame:
    """Seconds and peak memory of each stage, as its manifest says."""
    rows = [(stage, done["wall_s"], done["peak_memory_gb"]) for stage, done in stages.items()]
    return pd.DataFrame(rows, columns=["stage", "wall_s", "peak_memory_gb"])


def deviations(settings: Settings, reported: dict) -> list[str]:
    """Deviations of this profile from the paper, with reasons; each follows from its values."""
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
    out += [
        f"{key} is {value}, in the paper {printed}: the profile names its source."
        for key, value, printed in first_page.changed_values(settings, reported)
    ]
    out.append(
        "The gain is given over two baselines: the paper's is LamRA-Ret, stage 2 read at the EOL token; "
        "stage 2 at [RET] is the harder one."
    )
    return out


def not_run(run: Stage, reported: dict, table: pd.DataFrame) -> pd.DataFrame:
    """Table of what was not run: figures of the paper, missing sets, trainings of the study.

    Args:
        table: of `claims_table`.

    Returns:
        source, missing (how much), needs and the command that runs it.
    """
    rows = []
    figures = table[table["ours"].isna() & table["paper"].notna()]
    for (source, needed), part in figures.groupby(["source", "baseline"], sort=False):
        needs, _, command = needed.partition(": ")
        rows.append((source, f"{len(part)} numbers", needs, command))
    profile = f"{run.settings.profile} --seed {run.seed}"
    for section, stage, name, names in (
        (run.settings.unseen, "80_generalise", "unseen.csv", SETS),
        (
            run.settings.video,
            "82_transfer",
            "clips.csv",
            {column.partition(" R@")[0] for column in reported["table7"]["columns"]},
        ),
    ):
        if section is None or section.sets is None:
            continue
        scored = read_table(run.require(stage) / name)["set"]
        if lacking := ", ".join(sorted(set(names) - set(scored))):
            command = f"python -m elva_core run {profile} --only {stage[:2]} --force"
            rows.append((stage, lacking, f"these in {as_written(section.sets)}", command))
    runs = read_table(run.require("60_ablate") / "runs.csv")
    trained = set(zip(runs["arm"], runs["seed"].astype(int), strict=True))
    plan = {(name, seed) for name, _, seed in planned(run.settings)}
    if lacking := len(plan - trained):
        rows.append(("ablation study", f"{lacking} of {len(plan)} trainings", "time", study.command(profile)))
    return pd.DataFrame(rows, columns=["source", "missing", "needs", "command"])


def write(folder: Path, settings: Settings, seed: int, reported: dict) -> None:
    """Writes the README's blocks (*.md), report.md, and report.html with its figures, from a folder's tables.

    Args:
        folder: with a CSV file for each of `Tables`, and figures/.
    """
    # the README's blocks
    tables = findings.read(folder)
    table = tables.claims
    note = (
        f"Profile {settings.profile}, seed {seed}, device {settings.device}; hit rates in percent, 95 % "
        f"intervals over queries; rows of several seeds are of outputs/{settings.profile}/study."
    )
    if not settings.evidence:
        note += f" {no_evidence(settings.profile)}"
    block = claims.markdown(table, reported, note)
    blocks = {
        "result": first_page.result(tables, settings, reported),
        "commands": first_page.commands(tables, settings),
        "claims": block,
        "stages": stages(tables.cost),
    }
    for name, text in blocks.items():
        files.write_whole(folder / f"{name}.md", text + "\n")

    # claims by verdict; results without a figure in the paper, by their table
    measured = table[table["ours"].notna()]
    judged = measured[measured["verdict"].isin(claims.VERDICTS)]
    judged = judged.sort_values("verdict", key=lambda words: words.map(claims.VERDICTS.index), kind="stable")
    judged = judged.assign(claim=judged["source"] + ": " + judged["claim"])
    others = measured[measured["paper"].isna() & ~measured.index.isin(claims.main(table, reported).index)]
    others = others[~others["claim"].str.startswith(PLAIN)]
    folded = "\n\n".join(_folded(source, rows) for source, rows in others.groupby("source", sort=True))
    linked = tables.answers.assign(
        stage=[f"[{stage}](../executed/{stage}.ipynb)" for stage in tables.answers["stage"]]
    )
    packages = tables.environment["package"] + " " + tables.environment["installed"].astype(str)

    warning = "" if settings.evidence else f"**{no_evidence(settings.profile)}**\n\n"
    text = f"""# Report: profile {settings.profile}, seed {seed}

{warning}{first_page.page(tables, settings, seed, reported)}

## Claims that can be compared, by verdict
{statistics.RULE}

{claims.counted(table)} Every row: claims.csv.

{claims.listed(judged)}

## What was measured on MRBench
{block}

![Paired differences on MRBench](figures/differences.png)

## Where the gain comes from
{gain(tables, settings)}

## What each notebook answers
{_table(linked)}

## Deviations from the paper
{first_page.listed(deviations(settings, reported))}

## What was not run
{_table(tables.not_run.assign(command="`" + tables.not_run["command"] + "`"))}

## Results without a number in the paper
What stage 3 reaches, and what it gains; {", ".join(name.rstrip(",") for name in PLAIN)} alone: claims.csv.

{folded}

## Numbers of the paper that do not add up
{_table(tables.audit[~tables.audit["agrees"]].drop(columns="agrees"))}

## Cost
{_table(tables.cost)}

## Environment
{", ".join(packages)}.
"""
    files.write_whole(folder / "report.md", text)
    files.write_whole(folder / "report.html", page(text, folder))


def renew(profile: str, seed: int) -> Path:
    """Writes a finished report's texts anew from its tables, with today's words; returns its folder."""
    folder = stage_folder(profile, seed, REPORT)
    write(folder, config.load(profile), seed, statistics.reported())
    record = read_manifest(folder) | {"files": listed_files(folder)}
    files.write_whole(folder / "manifest.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
    return folder


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


def _table(frame: pd.DataFrame) -> str:
    return markdown_rows(frame.columns, frame.itertuples(index=False))
