"""One claim = one row = one verdict: the paper's numbers (params/reported.yaml) beside what was measured here.

table = assemble(reported(), measured, evidence=True)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from elva_core import distributed
from elva_core.evaluation import statistics, video
from elva_core.retrieval import metrics

COLUMNS = [
    "claim",
    "source",
    "dataset",
    "metric",
    "paper",
    "ours",
    "ci_low",
    "ci_high",
    "n",
    "seeds",
    "baseline",
    "verdict",
]
VERDICTS = ("reproduced", "same direction", "not reproduced", "not run")
# The paper's headline on MRBench compares with LamRA-Ret: stage 2, read at the EOL token. Stage 2 at [RET] is the harder one.
GAINS = ("stage 3 over stage 2, EOL only", "stage 3 over stage 2")


def not_run(tables: dict) -> list[dict]:
    """Claims that need M-BEIR, licensed sets or GPUs, each with the command that would run it."""
    rows = []
    for table in (t for t in tables.values() if "rows" in t):
        for method, profile in table["ours"].items():
            values = table["rows"][method]
            columns = [*table["columns"], "Avg"][: len(values)]
            common = {
                "source": table["source"],
                "metric": table["metric"],
                "baseline": table["needs"].format(profile=profile),
            }
            rows += [
                common | {"claim": f"{method}, {column}", "dataset": column, "paper": value}
                for column, value in zip(columns, values, strict=True)
            ]
    return rows


def official(tables: dict, profile: str, found: Mapping[str, pd.DataFrame], evidence: bool) -> list[dict]:
    """Figures of the paper's own tables that a run of its profile has measured; they take the place of the same claims not run.

    Args:
        found: name in params/reported.yaml -> value, ci_low, ci_high (shares; nan without an interval) and n, by column of that table.
    """
    rows = []
    for name, measured in found.items():
        table = tables[name]
        for method in (method for method, needed in table["ours"].items() if needed == profile):
            printed = dict(zip([*table["columns"], "Avg"], table["rows"][method], strict=False))
            for r in measured.itertuples():
                row = {
                    "claim": f"{method}, {r.Index}",
                    "source": table["source"],
                    "dataset": r.Index,
                    "metric": table["metric"],
                }
                row |= {"paper": printed[r.Index]} | statistics.percent(r)
                reached = row["ours"] >= row["paper"] or row["ci_high"] >= row["paper"]
                rows.append(
                    row
                    | {"verdict": ("reproduced" if reached else "not reproduced") if evidence else "not run"}
                )
    return rows


def measured(
    results: pd.DataFrame,
    pairs: Sequence[dict],
    distances: pd.DataFrame,
    tables: dict,
    dataset: str,
    evidence: bool,
    samples: int,
) -> list[dict]:
    """Rows for what this run measured; a verdict only where the paper has a number to compare the direction with.

    Args:
        results: MRBench rows with model, unit, metric, value, ci_low, ci_high, n; unit "average" is the mean over tasks.
        pairs: `comparison` dictionaries. distances: model, kind, distance, qid.
        evidence: False (smoke) makes every verdict "not run": such a run tests plumbing.
        samples: of the bootstrap.
    """
    common = {"source": "ours", "dataset": f"MRBench-{dataset}"}
    rows = [common | _score(r) for r in results.itertuples()]
    for pair in pairs:
        row = common | _gain(pair)
        if row["claim"] in GAINS and pair["metric"] == "hit@5":
            row |= {"paper": tables["mrbench_gain"]["value"], "source": tables["mrbench_gain"]["source"]}
        rows.append(row | {"verdict": verdict(row, evidence)})
    return rows + _distances(distances, tables["grain_distance"], dataset, evidence, samples)


def _distances(
    distances: pd.DataFrame, reported: dict, dataset: str, evidence: bool, samples: int
) -> list[dict]:
    """Mean distance of each model, and the paired growth from stage 2 to stage 3, with intervals over queries."""
    of_query = distances.groupby(["qid", "model"])["distance"].mean().unstack("model")
    values = {name: (of_query[name], paper) for name, paper in reported["values"].items() if name in of_query}
    if {"stage 2", "stage 3"} <= values.keys():
        (old, before), (new, after) = values["stage 2"], values["stage 3"]
        values["stage 3 over stage 2"] = new - old, after - before
    rows = []
    for name, (own, paper) in values.items():
        low, high = metrics.bootstrap_interval(
            own.to_numpy(), samples, distributed.rng_for(0, "grain distance", name)
        )
        row = {
            "claim": f"grain distance, {name}",
            "source": reported["source"],
            "dataset": f"MRBench-{dataset}",
        }
        row |= {
            "metric": "mean cosine distance",
            "paper": paper,
            "ours": own.mean(),
            "ci_low": low,
            "ci_high": high,
            "n": len(own),
        }
        gain = "over" in name
        rows.append(
            row | {"baseline": "stage 2" if gain else "", "verdict": verdict(row, evidence) if gain else ""}
        )
    return rows


def _score(r) -> dict:
    """The hit rate of a model on a unit."""
    return {
        "claim": f"{r.model}, {r.unit}",
        "metric": r.metric,
        "baseline": "",
        "verdict": "",
    } | statistics.percent(r)


def _gain(pair: dict) -> dict:
    """A `comparison` relative to its old model, in percent."""
    scale = 100 / pair["old value"] if pair["old value"] else np.nan
    row = {
        "claim": f"{pair['new']} over {pair['old']}",
        "metric": f"relative gain of {pair['metric']}, %",
        "n": pair["n"],
    }
    row |= {"ours": pair["relative %"], "ci_low": scale * pair["ci_low"], "ci_high": scale * pair["ci_high"]}
    return row | {"baseline": pair["old"]}


def traded(
    quality: pd.DataFrame, pairs: Sequence[dict], speed: pd.DataFrame, dataset: str, source: str
) -> list[dict]:
    """Rows for what an answer costs and what more or less cost buys; the paper has no numbers for it, so there are no verdicts.

    Args:
        quality, pairs: as `results` and `pairs` of `measured`; units other than the average stay in the table.
        speed: as `throughput.measure` gives it.
        source: the question they belong to, which the report folds them under.
    """
    common = {"source": source, "dataset": f"MRBench-{dataset}", "baseline": "", "verdict": ""}
    rows = [common | _score(r) for r in quality[quality["unit"] == "average"].itertuples()]
    rows += [common | _gain(pair) for pair in pairs]
    asked = speed[speed["side"] == "queries"].drop_duplicates(
        ["per second", "batch"]
    )  # one row where ways cost the same
    for r in asked.to_dict("records"):
        row = common | {"claim": r["way"], "n": r["n"]}
        rows.append(row | {"metric": f"queries per second, {r['batch']} at a time", "ours": r["per second"]})
        if r["batch"] == 1:  # in a larger one all wait for the longest summary
            rows.append(row | {"metric": "forward passes, queries", "ours": r["forwards"]})
    return rows


def reranked(pairs: pd.DataFrame, taken: pd.DataFrame, dataset: str) -> list[dict]:
    """Rows for what a second look brings and costs; no verdicts, for the paper does not rerank.

    Args:
        pairs: `fusion.compared`. taken: `fusion.seconds`.
    """
    common = {"source": "reranking", "dataset": f"MRBench-{dataset}", "verdict": ""}
    rows = []
    for pair in pairs.to_dict("records"):
        row = common | {
            "claim": f"{pair['new']} over {pair['old']}",
            "metric": f"difference of {pair['metric']}, points",
        }
        points = {
            "ours": 100 * pair["difference"],
            "ci_low": 100 * pair["ci_low"],
            "ci_high": 100 * pair["ci_high"],
        }
        rows.append(row | points | {"n": pair["n"], "baseline": pair["old"]})
    for r in taken.to_dict("records"):
        # the name of the retriever alone has many rows already
        rows.append(
            common
            | {
                "claim": r["model"],
                "metric": "milliseconds per query",
                "ours": 1000 * r["seconds"],
                "n": r["n"],
            }
        )
    return rows


def studied(
    scores: pd.DataFrame, differences: pd.DataFrame, tables: dict, dataset: str, evidence: bool
) -> list[dict]:
    """Rows for what the study measured; they take the place of the chain's rows of the same claim and metric.

    Args:
        scores: percent; arm, unit, value, ci_low, ci_high, n, seeds, spread. differences: relative to `old`, in percent, with interval.
    """
    common = {"source": "ours", "dataset": f"MRBench-{dataset}", "baseline": "", "verdict": ""}
    rows = []
    for r in scores.itertuples():
        seeds = _seeds(r.seeds, r.spread)
        numbers = {"ours": r.value, "ci_low": r.ci_low, "ci_high": r.ci_high, "n": r.n, "seeds": seeds}
        rows.append(common | {"claim": f"{r.arm}, {r.unit}", "metric": "hit@5"} | numbers)
    for r in differences.to_dict("records"):
        row = common | {
            "claim": r["arm"],
            "metric": "relative gain of hit@5, %",
            "baseline": r["old"],
            "seeds": _seeds(r["seeds"]),
        }
        row |= {
            "ours": r["relative"],
            "ci_low": r["relative low"],
            "ci_high": r["relative high"],
            "n": r["n"],
        }
        if r["arm"] in GAINS:
            row |= {"paper": tables["mrbench_gain"]["value"], "source": tables["mrbench_gain"]["source"]}
        rows.append(row | {"verdict": verdict(row, evidence)})
    return rows


def in_points(differences: pd.DataFrame, dataset: str, evidence: bool) -> list[dict]:
    """Rows for arms compared in points of hit@5, beside the points of the average that the paper compares.

    Args:
        differences: arm, old, value, ci_low, ci_high, paper, source, n, seeds, as `comparisons.beside_paper` gives them.
    """
    rows = []
    for r in differences.itertuples():
        row = {
            "claim": r.arm,
            "source": r.source,
            "dataset": dataset,
            "metric": "difference of hit@5, points",
            "baseline": r.old,
        }
        row |= {
            "ours": r.value,
            "ci_low": r.ci_low,
            "ci_high": r.ci_high,
            "paper": r.paper,
            "n": r.n,
            "seeds": _seeds(r.seeds),
        }
        same = (r.ci_high < 0) if r.paper < 0 else (r.ci_low > 0)
        said = (
            "" if r.paper != r.paper else "same direction" if same else "not reproduced"
        )  # another average than the paper's
        rows.append(row | {"verdict": said if evidence else "not run"})
    return rows


def generalised(scores: pd.DataFrame, differences: pd.DataFrame, dataset: str, evidence: bool) -> list[dict]:
    """Rows for unseen data: each model's score, and paired differences beside what the paper's model gains on the set of that kind.

    Args:
        scores: shares; model, set, group, metric, value, ci_low, ci_high, n, as `unseen.table` gives them. differences: as
            `unseen.differences` gives them; paper in points.
    """
    common, rows = (
        {"source": "Table 2, own rows", "dataset": f"{dataset}, unseen", "baseline": "", "verdict": ""},
        [],
    )
    for r in scores.itertuples():
        rows.append(
            common
            | {"claim": ", ".join(filter(None, (r.model, r.set, r.group))), "metric": r.metric}
            | statistics.percent(r)
        )
    for r in differences.itertuples():
        row = common | {
            "claim": ", ".join(filter(None, (f"{r.new} over {r.old}", r.set, r.group))),
            "baseline": r.old,
            "paper": r.paper,
        }
        said = (
            "" if r.paper != r.paper else "same direction" if r.ci_low > 0 else "not reproduced"
        )  # another set than the paper's
        rows.append(
            row
            | statistics.percent(r)
            | {"metric": f"difference of {r.metric}, points", "verdict": said if evidence else "not run"}
        )
    return rows


def verdict(row: dict, evidence: bool) -> str:
    """Of a gain, where the paper has one: reproduced if it is as large and its interval above zero, same direction if only the latter."""
    if not evidence:
        return "not run"
    if row.get("paper", np.nan) != row.get("paper", np.nan):
        return ""
    if not row["ci_low"] > 0:
        return "not reproduced"
    return "reproduced" if row["ours"] >= row["paper"] else "same direction"


def _seeds(seeds: Sequence[int], spread: float = np.nan) -> str:
    return f"{len(seeds)} ({', '.join(map(str, seeds))}){f', sd {spread:.1f}' if spread == spread else ''}"


def assemble(rows: Sequence[dict], seed: int) -> pd.DataFrame:
    """claims.csv: fixed columns, `not run` where nothing was measured; a later row replaces an earlier one of its claim and metric."""
    table = (
        pd.DataFrame(rows)
        .reindex(columns=COLUMNS)
        .astype(dict.fromkeys(("seeds", "verdict", "baseline"), object))
    )
    table = table[~table.duplicated(["claim", "metric", "dataset"], keep="last")].reset_index(drop=True)
    missing = table["ours"].isna()
    table.loc[missing, "verdict"] = "not run"
    table["seeds"] = table["seeds"].fillna(pd.Series(np.where(missing, "", f"1 ({seed})"), dtype=object))
    table["baseline"] = table["baseline"].fillna("")
    return table


def markdown(table: pd.DataFrame, tables: dict, note: str) -> str:
    """The result table of README and report: hit@5 of the main models, gains that the paper or the control ask for; provenance below."""
    own = main(table, tables)
    models = own[own["metric"] == "hit@5"]
    models = models.assign(
        model=models["claim"].str.rpartition(", ")[0], unit=models["claim"].str.rpartition(", ")[2]
    )
    units = [u for u in dict.fromkeys(models["unit"]) if u != "average"]
    lines = [
        f"| hit@5, % | {' | '.join(units)} | average [95 %] | n | seeds |",
        "|" + "--|" * (len(units) + 4),
    ]
    for name, part in models.groupby("model", sort=False):
        found = part.set_index("unit")
        mean = found.loc["average"]
        cells = [f"{found.loc[u, 'ours']:.1f}" for u in units]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {_number(mean)} | {int(mean['n']):,} | {mean['seeds']} |"
        )
    asked = own["paper"].notna() | own["baseline"].eq("InfoNCE control")
    return "\n".join(
        [
            *lines,
            "",
            listed(own[asked & own["metric"].str.contains("gain of hit@5|distance", regex=True)]),
            "",
            note,
        ]
    )


def main(table: pd.DataFrame, tables: dict) -> pd.DataFrame:
    """What was measured of the paper's main claims, on MRBench; the other measured rows name the table or the question they belong to."""
    sources = ["ours", tables["mrbench_gain"]["source"], tables["grain_distance"]["source"]]
    return table[table["ours"].notna() & table["source"].isin(sources)]


def listed(table: pd.DataFrame) -> str:
    """Claims as Markdown, one row each."""
    lines = ["| claim | metric | paper | ours [95 %] | n | seeds | verdict |", "|--|--|--|--|--|--|--|"]
    for _, r in table.iterrows():
        paper, n = (
            "" if r["paper"] != r["paper"] else f"{r['paper']:.3g}",
            "" if r["n"] != r["n"] else f"{int(r['n']):,}",
        )
        lines.append(
            f"| {r['claim']} | {r['metric']} | {paper} | {_number(r)} | {n} | {r['seeds']} | {r['verdict']} |"
        )
    return "\n".join(lines)


def _number(row: pd.Series) -> str:
    digits = 3 if "distance" in row["metric"] else 1
    ours, low, high = (
        f"{round(row[c], digits) + 0.0:.{digits}f}" for c in ("ours", "ci_low", "ci_high")
    )  # + 0.0: no -0.0
    return ours + (f" [{low}, {high}]" if row["ci_low"] == row["ci_low"] else "")


def clips(results: pd.DataFrame, gains: pd.DataFrame, dataset: str, evidence: bool) -> list[dict]:
    """Rows of csv.

    Args:
        results: `table` of `measure` of several models. gains: `gain`.
    """
    most = results[results["frames"] == results["frames"].max()]
    motions = most.loc[(most["words"] == "name, motion") & (most["motion"] != "all"), "motion"].nunique()
    found = most[(most["words"] == "name") & most["metric"].eq("hit@5") | (most["motion"] == "all")]
    rows = []
    for r in found.itertuples():
        row = {
            "claim": f"{r.model}, {r.motion}, {r.frames} frames",
            "source": video.SOURCES.get(r.set, "Table 7"),
            "dataset": dataset,
        }
        row |= {"metric": r.metric} | statistics.percent(r)
        chance = f"chance {100 / motions:.1f}" if r.motion == "all" else ""
        rows.append(row | {"baseline": chance, "verdict": "" if evidence else "not run"})
    return rows + in_points(gains, dataset, evidence)
