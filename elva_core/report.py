"""What 90_report gathers and writes: the claims table, the cost of each stage, report.md and the README's table."""

from __future__ import annotations

import ast
from collections.abc import Mapping

import pandas as pd

from elva_core import artifacts, claims, runtime
from elva_core.artifacts import Stage

GATHERED = (
    "00_check_environment",
    "10_prepare_data",
    "20_build_mrbench",
    "30_pretrain_contrastive",
    "40_finetune_rlvr",
    "50_evaluate",
    "60_ablate",
    "70_analyse_grains",
)
DEVIATIONS = (
    ("Half of stage 2 trains the state at [RET]", "the paper leaves open how that state becomes an embedding before stage 3"),
    ("A small Qwen2-VL taught here instead of Qwen2-VL-2B/7B", "no GPU and no download; the class and the code path are the same"),
    ("Emoji instead of M-BEIR", "real images with exact grains that come with a package"),
    (
        "Only the query's summaries are actions, candidates stay as mining encoded them (`rollout_sides: query`, `candidates: mined`)",
        "the literal reading samples 8 summaries of every candidate of every query; it is an arm of the study",
    ),
    ("KL weight and learning rate", "the paper's 1e-6 with LoRA hardly moves a model this small; an arm of the study"),
    (
        "The gain is given over two baselines",
        "the paper compares with LamRA-Ret, stage 2 read at the EOL token; stage 2 at [RET] is the harder one",
    ),
)


def gather(run: Stage) -> Mapping[str, dict]:
    """Manifests of every stage before this one, each verified."""
    for stage in GATHERED:
        run.require(stage)
    return {stage: artifacts.manifest(run.settings.profile, stage) for stage in GATHERED}


def claims_table(run: Stage, reported: dict) -> pd.DataFrame:
    """claims.csv of this run: what was measured, then the paper's claims that were not run."""
    evaluated, analysed = run.require("50_evaluate"), run.require("70_analyse_grains")
    mrbench = pd.read_csv(evaluated / "mrbench.csv").query("metric in ['hit@1', 'hit@5']")
    pairs = pd.read_csv(evaluated / "comparisons.csv").to_dict("records")
    distances = pd.read_csv(analysed / "distances.csv", dtype={"qid": str})
    dataset = run.settings.data.name
    rows = claims.measured(mrbench, pairs, distances, reported, dataset, run.settings.evidence, run.settings.evaluation.bootstrap)
    tables = [study_table(run, name) for name in ("scores", "differences", "ablations")]
    rows += claims.studied(*tables, reported, dataset, run.settings.evidence)
    return claims.assemble([*rows, *claims.not_run(reported)], run.seed)


def study_table(run: Stage, name: str) -> pd.DataFrame:
    """A table of 60_ablate, its tuples read back."""
    tuples = dict.fromkeys(("seeds", "by seed"), ast.literal_eval)
    return pd.read_csv(run.require("60_ablate") / f"{name}.csv", converters=tuples)


def cost(stages: Mapping[str, dict]) -> pd.DataFrame:
    """Seconds and peak memory of each stage, as its manifest says."""
    rows = [{"stage": s, "wall_s": m["wall_s"], "peak_memory_gb": m["peak_memory_gb"]} for s, m in stages.items()]
    return pd.DataFrame(rows)


def write(run: Stage, table: pd.DataFrame, cost_table: pd.DataFrame, audit: pd.DataFrame) -> None:
    """table.md (the README's block) and report.md."""
    evidence = "" if run.settings.evidence else " This profile tests plumbing; its numbers are no evidence."
    made_with = f"Profile {run.settings.profile}, seed {run.seed}, device {run.settings.device}"
    note = f"{made_with}; hit rates in percent, 95 % intervals over queries; several seeds: outputs/{run.settings.profile}/study.{evidence}"
    block = claims.markdown(table, note)
    runtime.write_whole(run.folder / "table.md", block + "\n")
    total = cost_table["wall_s"].sum()
    deviations = "\n".join(f"* {what}: {why}." for what, why in DEVIATIONS)
    missing = table[table["ours"].isna()]
    commands = "\n".join(f"* {source}, {len(own)} claims: {reason}" for (source, reason), own in missing.groupby(["source", "baseline"]))
    wrong = audit[~audit["agrees"]]
    text = f"""# Report

## Measured
{block}

![Paired differences on MRBench](figures/differences.png)

## Not run
{commands}

## Deviations from the paper
{deviations}

## Figures of the paper that do not add up
{_table(wrong.drop(columns="agrees"))}

## Cost
{_table(cost_table)}

{total / 60:.1f} minutes in all.
"""
    runtime.write_whole(run.folder / "report.md", text)


def _table(frame: pd.DataFrame) -> str:
    lines = [frame.columns, ["--"] * len(frame.columns), *frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
