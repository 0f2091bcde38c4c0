"""What 90_report gathers and writes: the claims table, the cost of each stage, the report (Markdown and HTML) and the README's table."""

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
from elva_core.data import mbeir
from elva_core.evaluation import captions
from elva_core.experiments import claims
from elva_core.experiments.stages import STAGES, Stage, manifest

BASELINES = (
    "zero-shot,",
    "stage 2,",
    "InfoNCE control,",
)  # whose rows stand in claims.csv, not in the report
STYLE = (
    "body{max-width:72rem;margin:2rem auto;padding:0 1rem;font:15px/1.5 sans-serif}table{border-collapse:collapse;margin:1rem 0}"
    "td,th{border-bottom:1px solid #ccc;padding:.2rem .6rem;text-align:left}img{max-width:100%}summary{cursor:pointer;margin:.3rem 0}"
)
DEVIATIONS = (
    (
        "Half of stage 2 trains the state at [RET]",
        "the paper leaves open how that state becomes an embedding before stage 3",
    ),
    (
        "A small Qwen2-VL taught here instead of Qwen2-VL-2B/7B",
        "no GPU and no download; the class and the code path are the same",
    ),
    ("Emoji instead of M-BEIR", "real images with exact grains that come with a package"),
    (
        "Only the query's summaries are actions, candidates stay as mining encoded them (`rollout_sides: query`, `candidates: mined`)",
        "the literal reading samples 8 summaries of every candidate of every query; it is an arm of the study",
    ),
    (
        "KL weight and learning rate",
        "the paper's 1e-6 with LoRA hardly moves a model this small; an arm of the study",
    ),
    (
        "The gain is given over two baselines",
        "the paper compares with LamRA-Ret, stage 2 read at the EOL token; stage 2 at [RET] is the harder one",
    ),
)


def gather(run: Stage) -> Mapping[str, dict]:
    """Manifests of every stage before this one, each verified."""
    gathered = STAGES[run.name]
    for stage in gathered:
        run.require(stage)
    return {stage: manifest(run.settings.profile, stage) for stage in gathered}


def claims_table(run: Stage, reported: dict) -> pd.DataFrame:
    """claims.csv of this run: what was measured, then the paper's claims that were not run."""
    evaluated, analysed = run.require("50_evaluate"), run.require("70_analyse_grains")
    mrbench = pd.read_csv(evaluated / "mrbench.csv").query("metric in ['hit@1', 'hit@5']")
    pairs = pd.read_csv(evaluated / "comparisons.csv").to_dict("records")
    distances = pd.read_csv(analysed / "distances.csv", dtype={"qid": str})
    dataset, evidence = run.settings.data.name, run.settings.evidence
    rows = _costs(
        run, dataset
    )  # first, for of the models that both measure, the rows of the main result stand
    rows += claims.measured(
        mrbench, pairs, distances, reported, dataset, evidence, run.settings.evaluation.bootstrap
    )
    rows += claims.studied(
        study_table(run, "scores"), study_table(run, "differences"), reported, dataset, evidence
    )
    rows += claims.in_points(study_table(run, "ablations"), f"MRBench-{dataset}", evidence)
    rows += _transfers(run, dataset, evidence)
    own = claims.official(reported, run.settings.profile, _official(run, reported), evidence)
    table = claims.assemble([*rows, *claims.not_run(reported), *own], run.seed)
    first = claims.main(table, reported)
    return pd.concat([first, table.drop(first.index)], ignore_index=True)


def _official(run: Stage, reported: dict, model: str = "stage 3") -> dict[str, pd.DataFrame]:
    """What this run measured of the paper's Tables 1, 2, 6 and 7, by their columns; empty where the data is another."""
    shares = ["value", "ci_low", "ci_high", "n"]
    results = (
        pd.read_csv(run.require("50_evaluate") / "results.csv")
        .query("model == @model and pool == 'local'")
        .set_index(["unit", "metric"])
    )
    hits = (
        pd.read_csv(run.require("50_evaluate") / "mrbench.csv")
        .query("model == @model and metric == 'hit@5'")
        .set_index("unit")
    )
    clips = study_table(run, "clips", "82_transfer").query("model == @model and words == 'name'")
    clips = clips[clips["frames"] == clips["frames"].max()]
    clips = clips.set_index(clips["set"] + clips["metric"].str.replace("hit@", " R@"))
    wanted = dict(zip(reported["table1"]["columns"], mbeir.OFFICIAL_UNITS.items(), strict=True))
    units = {
        column: results.loc[unit, f"hit@{k}"]
        for column, (unit, k) in wanted.items()
        if (unit, f"hit@{k}") in results.index
    }
    if len(units) == len(wanted):
        units["Avg"] = pd.Series(
            {
                "value": sum(u["value"] for u in units.values()) / len(units),
                "n": sum(u["n"] for u in units.values()),
            }
        )
    bench = [
        *zip(reported["table6"]["columns"], run.settings.mrbench.units, strict=False),
        ("Avg", "average"),
    ]
    table2 = captions.table2(
        pd.read_csv(run.require("80_generalise") / "unseen.csv")
        .fillna({"group": ""})
        .query("question == 'Table 2'")
    )
    table2 = (
        table2[table2["model"] == model].drop(columns="model").T.dropna().set_axis(["value"], axis=1)
        if len(table2)
        else table2
    )
    frames = {
        "table1": pd.DataFrame(units).T,
        "table6": pd.DataFrame({column: hits.loc[unit] for column, unit in bench if unit in hits.index}).T,
        "table2": table2.assign(value=table2["value"] / 100) if len(table2) else pd.DataFrame(),
        "table7": clips[clips.index.isin(reported["table7"]["columns"])],
    }
    return {name: frame.reindex(columns=shares) for name, frame in frames.items()}


def _costs(run: Stage, dataset: str) -> list[dict]:
    """Rows of 85_trade_cost: the single pass and the second look."""
    names = ("quality", "comparisons", "speed", "reranking", "reranking_seconds")
    quality, pairs, speed, gains, seconds = (
        pd.read_csv(run.require("85_trade_cost") / f"{name}.csv") for name in names
    )
    return claims.traded(quality, pairs.to_dict("records"), speed, dataset, "single pass") + claims.reranked(
        gains, seconds, dataset
    )


def _transfers(run: Stage, dataset: str, evidence: bool) -> list[dict]:
    """Rows of 82_transfer (held-out units, another architecture, clips) and of 80_generalise (what no stage saw)."""
    booster, held_out, clips, gain = (
        study_table(run, name, "82_transfer") for name in ("booster", "held_out", "clips", "clips_gain")
    )
    rows = claims.in_points(booster, f"MRBench-{dataset}", evidence) + claims.in_points(
        held_out, f"{dataset}, units held out", evidence
    )
    rows += claims.clips(clips, gain, f"{dataset} clips", evidence)
    tables = [
        pd.read_csv(run.require("80_generalise") / f"{name}.csv").fillna({"group": ""})
        for name in ("unseen", "unseen_differences")
    ]
    return rows + claims.generalised(*map(captions.headline, tables), dataset, evidence)


def study_table(run: Stage, name: str, stage: str = "60_ablate") -> pd.DataFrame:
    """A table that a notebook made from the study, its tuples read back."""
    tuples = dict.fromkeys(("seeds", "by seed"), ast.literal_eval)
    return pd.read_csv(run.require(stage) / f"{name}.csv", converters=tuples)


def cost(stages: Mapping[str, dict]) -> pd.DataFrame:
    """Seconds and peak memory of each stage, as its manifest says."""
    rows = [
        {"stage": s, "wall_s": m["wall_s"], "peak_memory_gb": m["peak_memory_gb"]} for s, m in stages.items()
    ]
    return pd.DataFrame(rows)


def write(
    run: Stage, reported: dict, table: pd.DataFrame, cost_table: pd.DataFrame, audit: pd.DataFrame
) -> None:
    """table.md and stages.md (the README's blocks), report.md, and the same page with its figures inside as report.html."""
    evidence = "" if run.settings.evidence else " This profile tests plumbing; its numbers are no evidence."
    made_with = f"Profile {run.settings.profile}, seed {run.seed}, device {run.settings.device}"
    note = f"{made_with}; hit rates in percent, 95 % intervals over queries; several seeds: outputs/{run.settings.profile}/study.{evidence}"
    block = claims.markdown(table, reported, note)
    files.write_whole(run.folder / "table.md", block + "\n")
    files.write_whole(run.folder / "stages.md", stages(cost_table) + "\n")
    verdicts = table["verdict"].replace("", "no figure in the paper").value_counts()
    measured = table[table["ours"].notna() & ~table.index.isin(claims.main(table, reported).index)]
    measured = measured[~measured["claim"].str.startswith(BASELINES)]
    beside = measured[measured["paper"].notna()].sort_values("source", kind="stable")
    beside = claims.listed(beside.assign(claim=beside["source"] + ": " + beside["claim"]))
    own_questions = "\n\n".join(
        _folded(source, own) for source, own in measured[measured["paper"].isna()].groupby("source")
    )
    missing = table[table["ours"].isna() & table["paper"].notna()].groupby(["source", "baseline"], sort=False)
    total, memory = cost_table["wall_s"].sum() / 60, cost_table["peak_memory_gb"].max()
    installed = pd.read_csv(run.require("00_check_environment") / "environment.csv")
    text = f"""# Report: profile {run.settings.profile}, seed {run.seed}

{len(table)} claims: {", ".join(f"{n} {verdict}" for verdict, n in verdicts.items())}. Every row: claims.csv.

## What was claimed, what was measured
{block}

![Paired differences on MRBench](figures/differences.png)

## Deviations from the paper
{_list(f"{what}: {why}." for what, why in DEVIATIONS)}

## What was not run
{_list(f"{source}, {len(own)} claims: needs {needs}" for (source, needs), own in missing)}

## What else the paper has a figure for, at this size
{beside}

## What the paper has no figure for
What stage 3 reaches, and what it gains; {", ".join(name.rstrip(",") for name in BASELINES)} alone: claims.csv.

{own_questions}

## Figures of the paper that do not add up
{_table(audit[~audit["agrees"]].drop(columns="agrees"))}

## Cost
{total:.1f} minutes in all, {memory:.1f} GB at most.

{_table(cost_table)}

## Environment
{", ".join(f"{package} {version}" for package, version in installed[["package", "installed"]].itertuples(index=False))}.
"""
    files.write_whole(run.folder / "report.md", text)
    files.write_whole(run.folder / "report.html", page(text, run.folder))


def stages(cost_table: pd.DataFrame) -> str:
    """The README's table of notebooks: the question each asks, its seconds and peak memory; the report's own are not known yet."""
    measured, lines = (
        cost_table.set_index("stage"),
        ["| notebook | question | seconds | peak, GB |", "|--|--|--|--|"],
    )
    for path in sorted((files.REPOSITORY / "notebooks").glob("*.ipynb")):
        (question,) = re.findall(
            r"^\*\*Question\*\* (.+)$", nbformat.read(path, as_version=4).cells[0].source, re.MULTILINE
        )
        numbers = [
            f"{measured.loc[path.stem, c]:.{d}f}" if path.stem in measured.index else ""
            for c, d in (("wall_s", 0), ("peak_memory_gb", 1))
        ]
        lines.append(f"| [{path.stem}](notebooks/{path.name}) | {question} | {' | '.join(numbers)} |")
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
    """Markdown as one HTML file that needs no other: its pictures, named relative to `folder`, stand inside."""
    body = mistune.create_markdown(escape=False, plugins=["table"])(text)
    for name in re.findall(r'<img src="([^"]+)"', body):
        picture = base64.b64encode((folder / name).read_bytes()).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{picture}"')
    title = text.splitlines()[0].lstrip("# ")
    return f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>\n<body>{body}</body></html>\n'


def _folded(title: str, own: pd.DataFrame) -> str:
    """Claims that are seen once their title is clicked."""
    return f"<details><summary>{title} ({len(own)})</summary>\n\n{claims.listed(own)}\n\n</details>"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _table(frame: pd.DataFrame) -> str:
    lines = [frame.columns, ["--"] * len(frame.columns), *frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
