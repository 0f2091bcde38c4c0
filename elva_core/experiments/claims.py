"""Claims: what was measured beside the paper's figure, with a verdict; and the figures that were not run.

table = assemble(measured, statistics.reported(), profile="cpu", evidence=True)
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from elva_core.data import mbeir
from elva_core.evaluation import statistics
from elva_core.experiments.results import MRBENCH
from elva_core.experiments.sizes import task_of
from elva_core.tables import number

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
]
COLUMNS += ["verdict", "backbone"]
VERDICTS = ("reproduced", "same direction", "inconclusive", "contradicted", "below", "not run")
GAIN, DISTANCE = "relative gain of hit@5, %", "mean cosine distance"


def assemble(
    measured: pd.DataFrame,
    tables: dict,
    *,
    evidence: bool,
    profile: str = "",
    official: Mapping[str, pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """claims.csv: the main claims first, then every other result, then the paper's figures that were not run.

    Args:
        measured: rows of results.SCHEMA; a later row replaces an earlier one of its claim, source, metric,
            dataset and backbone.
        tables: params/reported.yaml. evidence: False where a run tests plumbing; its verdicts are "not run".
        official: `own_setting` takes them: the paper's own tables as this profile measured them.

    Returns:
        COLUMNS; verdict is empty for a result without a figure in the paper, or in another setting than the
        paper's.
    """
    claims = _beside_paper(measured, tables)
    claims["verdict"] = [_verdict(row) for row in claims.to_dict("records")]
    papers = [*_not_run(tables), *own_setting(tables, profile, official or {})]
    table = pd.concat([claims, pd.DataFrame(papers)], ignore_index=True).reindex(columns=COLUMNS)
    table = table[~table.duplicated(["claim", "source", "metric", "dataset", "backbone"], keep="last")]
    if not evidence:
        table.loc[table["verdict"] != "", "verdict"] = "not run"
    first = table.index.isin(main(table, tables).index)
    return pd.concat([table[first], table[~first]], ignore_index=True)


def _beside_paper(measured: pd.DataFrame, tables: dict) -> pd.DataFrame:
    """Results as claims: named, and with the paper's figure where MRBench's main claims have one."""
    gain, distance = tables["mrbench_gain"], tables["grain_distance"]
    printed = {(gain["model"], gain["baseline"], GAIN): (gain["value"], gain["source"])}
    for model, value in distance["values"].items():
        printed[model, "", DISTANCE] = value, distance["source"]
    growth = round(distance["values"][gain["model"]] - distance["values"][gain["baseline"]], 6)
    printed[gain["model"], gain["baseline"], DISTANCE] = growth, distance["source"]
    rows = []
    for row in measured.to_dict("records"):
        of_model = row["model"] + (f" over {row['baseline']}" if row["baseline"] else "")
        claim = {
            "claim": ", ".join(filter(None, (of_model, row["unit"], row["group"]))),
            "source": row["experiment"],
        }
        key = row["model"], row["baseline"], row["metric"]
        if row["experiment"] == MRBENCH and not row["unit"] and key in printed:
            row["paper"], claim["source"] = printed[key]
        rows.append(claim | row | {"ours": row["value"], "seeds": row["seed"]})
    return pd.DataFrame(rows, columns=[column for column in COLUMNS if column != "verdict"])


def _verdict(claim: dict) -> str:
    """Of a difference that the paper has a figure for; a score stands in another setting than the paper's."""
    if not claim["baseline"] or not claim["paper"] or pd.isna(claim["paper"]) or pd.isna(claim["ci_low"]):
        return ""
    return statistics.verdict(claim["paper"], claim["ci_low"], claim["ci_high"], difference=True)


def _not_run(tables: dict) -> list[dict]:
    """Figures that need M-BEIR, licensed sets or GPUs; the command that would run each is its baseline."""
    rows = []
    for table in (t for t in tables.values() if "rows" in t):
        for method, profile in table["ours"].items():
            command = table["needs"].format(profile=profile)
            common = {"source": table["source"], "metric": table["metric"], "baseline": command, "seeds": ""}
            values = table["rows"][method]
            for column, value in zip([*table["columns"], "Avg"][: len(values)], values, strict=True):
                claim = {
                    "claim": f"{method}, {column}",
                    "dataset": column,
                    "paper": value,
                    "verdict": "not run",
                }
                rows.append(common | claim | {"backbone": ""})
    return rows


def own_setting(tables: dict, profile: str, measured: Mapping[str, pd.DataFrame]) -> list[dict]:
    """Figures of the paper's own tables as a run of their profile measures them, in place of figures not run.

    Args:
        measured: name in params/reported.yaml -> value, ci_low, ci_high (shares; nan without an interval) and
            n, by column of that table.
    """
    rows = []
    for name, frame in measured.items():
        table = tables[name]
        for method in (method for method, needed in table["ours"].items() if needed == profile):
            printed = dict(zip([*table["columns"], "Avg"], table["rows"][method], strict=False))
            for column, share in frame.iterrows():
                low, ours, high = 100 * share["ci_low"], 100 * share["value"], 100 * share["ci_high"]
                reached = ours if pd.isna(high) else high  # a mean of columns has no interval
                row = {"claim": f"{method}, {column}", "source": table["source"], "dataset": column}
                row |= {"metric": table["metric"], "paper": printed[column], "baseline": "", "backbone": ""}
                row |= {"ours": ours, "ci_low": low, "ci_high": high, "n": share["n"]}
                row["verdict"] = statistics.verdict(printed[column], low, reached, difference=False)
                rows.append(row)
    return rows


def main(table: pd.DataFrame, tables: dict) -> pd.DataFrame:
    """Rows of the paper's main claims, on MRBench."""
    sources = [MRBENCH, tables["mrbench_gain"]["source"], tables["grain_distance"]["source"]]
    return table[table["ours"].notna() & table["source"].isin(sources)]


def counted(table: pd.DataFrame) -> str:
    """Numbers of claims by verdict, in words; results without a figure that is judged are counted apart.

    >>> verdicts, paper, ours = ["reproduced", "", "", "not run"], [1, None, 2, 3], [1.0, 2.0, 3.0, None]
    >>> print(counted(pd.DataFrame({"verdict": verdicts, "paper": paper, "ours": ours})).replace(". ", "\\n"))
    1 claim compared: 1 reproduced
    1 result without a counterpart in the paper
    1 result beside a number of another setting
    1 number of the paper not run.
    """
    there = table[table["ours"].notna()]
    judged = there[~there["verdict"].isin(["", "not run"])]
    order = judged["verdict"].value_counts().reindex(VERDICTS).dropna().astype(int)
    alone = int(there["paper"].isna().sum())
    apart = len(there) - len(judged) - alone
    parts = [
        _plural(len(judged), "claim") + " compared",
        ", ".join(f"{n} {name}" for name, n in order.items()),
    ]
    counts = [
        ": ".join(filter(None, parts)),
        f"{_plural(alone, 'result')} without a counterpart in the paper",
    ]
    counts += [f"{_plural(apart, 'result')} beside a number of another setting"] if apart else []
    counts.append(f"{_plural(int(table['ours'].isna().sum()), 'number')} of the paper not run")
    return ". ".join(counts) + "."


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def markdown(table: pd.DataFrame, tables: dict, note: str) -> str:
    """The result table of README and report: hit@5 of the main models, the main comparisons, provenance.

    Models that started from different backbones stand in tables of their own, the one of most seeds first.
    """
    rows = main(table, tables)
    models = rows[(rows["metric"] == "hit@5") & (rows["baseline"] == "")]
    models = models.assign(
        model=models["claim"].str.rpartition(", ")[0], unit=models["claim"].str.rpartition(", ")[2]
    )
    seeds = models["seeds"].str.extract(r"^(\d+)", expand=False).astype(int)
    most_first, blocks = seeds.sort_values(kind="stable", ascending=False).index, []
    for backbone in models.loc[most_first, "backbone"].unique():
        compared = rows[(rows["backbone"] == backbone) & rows["metric"].isin([GAIN, DISTANCE])]
        of_stage3 = compared["claim"].str.startswith("stage 3 over ")
        compared = compared[compared["paper"].notna() | of_stage3]
        blocks += [
            f"All rows start from the backbone whose weights have sha256 {backbone[:12]}...:",
            _of_models(models[models["backbone"] == backbone]),
        ]
        blocks += [listed(compared)] if len(compared) else []
    return "\n\n".join([*blocks, note])


def _of_models(models: pd.DataFrame) -> str:
    """hit@5 of each model on each unit and on average."""
    units = [unit for unit in dict.fromkeys(models["unit"]) if unit != "average"]
    lines = [
        f"| hit@5, % | {' | '.join(f'{modalities(u)} ({u})' for u in units)} | average [95 %] | n | seeds |",
        "|" + "--|" * (len(units) + 4),
    ]
    for name, rows in models.groupby("model", sort=False):
        by_unit = rows.set_index("unit")
        mean = by_unit.loc["average"]
        cells = [f"{by_unit.loc[unit, 'ours']:.1f}" for unit in units]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {_number(mean)} | {int(mean['n']):,} | {mean['seeds']} |"
        )
    return "\n".join(lines)


def modalities(unit: str) -> str:
    """The modalities of a unit's queries and candidates.

    >>> modalities("emoji_task7")
    'image and text to image'
    """
    return " to ".join(mbeir.MODALITIES_OF[task_of(unit)]).replace(",", " and ")


def listed(table: pd.DataFrame) -> str:
    """Claims as Markdown, one row each."""
    lines = ["| claim | metric | paper | ours [95 %] | n | seeds | verdict |", "|--|--|--|--|--|--|--|"]
    for _, row in table.iterrows():
        paper = "" if pd.isna(row["paper"]) else f"{row['paper']:.3g}"
        count = "" if pd.isna(row["n"]) else f"{int(row['n']):,}"
        cells = [row["claim"], row["metric"], paper, _number(row), count, row["seeds"], row["verdict"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _number(row: pd.Series) -> str:
    digits = 3 if "distance" in row["metric"] else 1
    said = number(row["ours"], row["ci_low"], row["ci_high"], "", digits=digits)
    return said.partition(" ")[0] if pd.isna(row["ci_low"]) else said
