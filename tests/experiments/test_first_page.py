"""README's first screen and the report's first page say what their tables say, also where that is against the paper."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from elva_core.evaluation import headroom, statistics
from elva_core.experiments import claims, decomposition, findings, first_page
from elva_core.files import ElvaDataError

REPORTED = statistics.reported()
INTERVALS = {  # step -> interval in points at hit@1, and at hit@5
    "generation": ((1.0, 3.0), (2.0, 4.0)),
    "more InfoNCE": ((-2.0, 1.0), (-1.0, 1.0)),
    "ranking reward": ((-1.0, 1.0), (0.5, 1.5)),
    "stage 3 over stage 2": ((-1.0, 1.0), (0.0, 2.0)),
    "all": ((1.0, 5.0), (2.0, 6.0)),
}


def step(name, unit, metric, low, high):
    new, old = {**decomposition.STEPS, **decomposition.SUMS}[name]
    seeds = (low, high)
    row = {
        "by seed": seeds,
        "step": name,
        "new": new,
        "old": old,
        "unit": unit,
        "group": "",
        "metric": metric,
        "n": 40,
        "seeds": (17, 18),
        "missing": "",
    }
    row |= {"old value": 50.0, "new value": 50 + (low + high) / 2, "value": (low + high) / 2, "ci_low": low, "ci_high": high}
    return row | {"relative": low + high, "relative low": 2 * low, "relative high": 2 * high, "paper": None, "verdict": ""}


@pytest.fixture
def tables() -> findings.Tables:
    rows = [step(name, "", f"hit@{k}", *ends) for name, both in INTERVALS.items() for k, ends in zip((1, 5), both, strict=True)]
    rows[-1] |= {"verdict": "same direction", "paper": 13.1}
    rows += [step("all", "x_task0", "hit@5", 3.0, 9.0), step("all", "x_task4", "hit@5", -6.0, 2.0)]
    distances = [("stage 2, EOL only", 0.5, ""), ("stage 3", 0.4, ""), ("stage 3 over stage 2, EOL only", -0.1, "contradicted")]
    distances += [("stage 2 over stage 2, EOL only", 0.05, ""), ("stage 3 over InfoNCE control", -0.15, "")]
    distances = [{"claim": c, "ours": v, "ci_low": v - 0.01, "ci_high": v + 0.01, "verdict": w, "paper": 0.1} for c, v, w in distances]
    hits = [("stage 2", headroom.GREEDY, 0.4), ("stage 2", headroom.BEST, 0.6), ("stage 3", headroom.GREEDY, 0.5)]
    return findings.Tables(
        claims=pd.DataFrame(distances)
        .assign(source="Figure 4", metric=claims.DISTANCE, n=8, seeds="2 (17, 18)")
        .reindex(columns=claims.COLUMNS),
        audit=pd.DataFrame({"what": ["a", "b"], "agrees": [True, False]}),
        cost=pd.DataFrame({"stage": ["30_x", "40_y"], "wall_s": [90.0, 30.0], "peak_memory_gb": [1.5, 2.0]}),
        answers=pd.DataFrame(),
        not_run=pd.DataFrame(),
        decomposition=pd.DataFrame(rows),
        reading=pd.DataFrame({"profile": ["x"], "reading": [50.0], "seeds": [2]}),
        runs=pd.DataFrame({"arm": ["stage 3", "stage 3", "z"], "seed": [17, 18, 17], "wall_s": [3600.0] * 3, "hit@5": [0.5, 0.625, 0]}),
        headroom=pd.DataFrame(hits, columns=["model", "summaries", "value"]).assign(unit="average", metric="hit@5"),
        shares=pd.DataFrame([{"metric": "hit@5", "value": 0.5, "ci_low": 0.1, "ci_high": 0.9, "n": 40}]),
        environment=pd.DataFrame(),
        mrbench=pd.DataFrame({"unit": ["x_task0", "x_task4"], "queries": [20, 30], "candidates": [7, 9]}),
    )


def test_in_short_says_the_verdict_and_what_holds_over_queries_only_or_at_one_cutoff_only(tables, smoke):
    said = first_page.result(tables, smoke, REPORTED).splitlines()[0]
    assert "gains over the EOL baseline, but less than in the paper. Here hit@5 rises from 50.0 to 54.0 %: +4.0 [2.0, 6.0] points" in said
    assert "or +8.0 [4.0, 12.0] % of the baseline (paper: +13.1 %). Training for a summary and reading after it, one step here" in said
    assert "gives +3.0 points of it, more InfoNCE +0.0, the ranking reward in its place +1.0 (its interval over queries lies above" in said
    assert "the whole gain is +3.0 [1.0, 5.0] points: +2.0 from the summary, -0.5 from more InfoNCE, +0.0 from the reward (its" in said
    assert "Grain blindness, the paper's reason, does not fall as in the paper; the ranking reward alone raises it." in said
    rows = tables.decomposition.copy()
    rows["by seed"] = [(-1.0, 2.0, 1.5)] * len(rows)
    said = first_page.result(replace(tables, decomposition=rows.assign(verdict="contradicted")), smoke, REPORTED).splitlines()[0]
    assert "does not gain" in said and "+1.0 (its interval over queries lies above zero, over seeds contains zero)" in said
    rows = rows.assign(verdict="", missing="stage 3, seeds 18")
    said = first_page.result(replace(tables, decomposition=rows), smoke, REPORTED)
    assert said.startswith("**In short:** no verdict; not run: stage 3, seeds 18.")


def test_every_arm_of_the_table_has_its_level_and_its_step_over_the_arm_above(tables, smoke):
    lines = findings.steps(tables, smoke).splitlines()[4:]
    assert [line.split("**")[1] for line in lines] == ["EOL baseline", *decomposition.CHAIN[1:], "stage 3", "stage 3"]
    assert [line.split("**")[3] for line in lines[4:]] == ["stage 2", "EOL baseline"] and "*the whole method*" in lines[5]
    assert lines[0].endswith("LamRA-Ret | 50.0 | | 50.0 | | |")
    assert lines[3].endswith("*ranking reward*, over the control | 50.0 | +0.0 [-1.0, 1.0] | 51.0 | +1.0 [0.5, 1.5] | +0.5, +1.5 |")
    assert lines[5].endswith("| | +3.0 [1.0, 5.0] | | +4.0 [2.0, 6.0] | +2.0, +6.0 |")


def test_what_is_trained_on_what_is_told_from_the_profile_and_the_tables(tables, smoke):
    said = first_page.result(tables, smoke, REPORTED).splitlines()[2]
    vendors = len(smoke.data.emoji.vendors["train"])
    assert f"how {vendors} vendors draw them" in said and ": 50 queries, 7 to 9 candidates each. hit@k" in said


def test_what_speaks_against_the_gain_is_said(tables, smoke):
    tasks, distance, left, read, sure = findings.questions(tables, smoke, REPORTED)
    assert left.endswith("the chain's own training; those of the table have 50.0 to 62.5 % hit@5 after stage 3.")
    assert read.endswith("?** Not measured.")
    assert "** At hit@5 not in image to image. " in tasks
    assert "points of hit@5: text to image +6.0 [3.0, 9.0], image to image -2.0 [-6.0, 2.0] (n = 40 each)" in tasks
    assert "** No. Without one of" in distance
    assert "0.15 for ELVA, of another model and other data. Here 0.500 and 0.400: -0.100 [" in distance
    assert "generation +0.050 [0.040, 0.060], ranking reward -0.150 [-0.160, -0.140] (n = 8 queries, seeds: 2)." in distance
    assert (
        "1 claims of the paper were measured: 1 *contradicted*, 2 seeds (not above zero, and below half of the paper's value); the" in sure
    )
    assert "Seeds: 0 for each model of the table, 1 for the study's 1 other arms" in sure


def test_results_on_unseen_pictures_are_told_with_the_queries_that_are_left_out(tables, smoke):
    rows = tables.decomposition
    apart = rows[rows["unit"] == ""].assign(group=f"queries with {decomposition.UNSEEN}", n=30)
    whole = replace(tables, decomposition=pd.concat([rows, apart], ignore_index=True))
    _, said, *_ = findings.questions(whole, smoke, REPORTED)
    assert "10 of the 40 queries show a picture, or ask for one, that a training vendor has" in said
    assert "On the other 30 hit@1 goes from 50.0 to 53.0 %, +3.0 [1.0, 5.0] points (generation +2.0 [1.0, 3.0]," in said


def test_easy_hard_and_cost_follow_from_what_was_measured(tables, smoke):
    page = first_page.page(tables, smoke, 17, REPORTED)
    assert "**What was measured.** The whole method gains over the EOL baseline, but less than in the paper. Here hit@5 rises" in page
    easy, hard = page.partition("**What was easy.**")[2].split("**What was hard.**")
    assert "2 notebooks ran to their end on cpu, 1 of them in less than a minute, with 2.0 GB" in easy
    assert "Above zero at both hit@1 and hit@5 over all seeds: generation." in easy and "with every single seed: generation." in easy
    assert "Not above zero at hit@1 nor at hit@5 over all seeds: more InfoNCE." in hard and "30_x takes 75 % of the time." in hard
    assert "Single seeds disagree in sign at hit@5: more InfoNCE." in hard and "1 of 1 compared claims are inconclusive or" in hard
    assert "2 minutes, 2.0 GB at most. The study so far: 3 trainings of 2 arms, 3.0 hours." in hard


def test_the_commands_have_their_measured_time(tables, smoke):
    one, _, study = first_page.commands(tables, smoke).splitlines()[1:4]
    assert one.startswith("make reproduce ") and one.endswith(f"one seed of everything: 2 minutes on {smoke.threads} cores, after set-up")
    assert study.endswith("2 seeds and ablations, resumable: 3.0 hours for the 3 trainings done so far")


def test_a_report_without_its_tables_is_refused_with_the_command(tmp_path):
    with pytest.raises(ElvaDataError, match=r"lacks claims, audit, .* \(.csv\); run: python -m elva_core run"):
        findings.read(tmp_path)
