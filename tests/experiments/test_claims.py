"""Results in the one schema, claims with their verdicts, the report and the README's tables."""

from __future__ import annotations

import base64
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image

from elva_core import config
from elva_core.data import mbeir
from elva_core.evaluation import statistics
from elva_core.experiments import claims, report, results

REPORTED = statistics.reported()
CHAIN = {"experiment": results.MRBENCH, "dataset": "MRBench-x", "seed": "1 (17)", "backbone": "aaaa"}


def gain(value, low, high, old="stage 2", **columns):
    """A relative gain of stage 3 in the schema."""
    row = {"new": "stage 3", "old": old, "metric": "hit@5", "n": 9, "relative": value, "relative low": low, "relative high": high}
    return results.gains(pd.DataFrame([row]), **CHAIN | columns)


def score(value, model="stage 3", unit="average", **columns):
    row = {"model": model, "unit": unit, "metric": "hit@5", "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1, "n": 9}
    return results.scores(pd.DataFrame([row]), **CHAIN | columns)


def assembled(*rows, evidence=True, **more):
    return claims.assemble(pd.concat(rows, ignore_index=True), REPORTED, evidence=evidence, **more)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(9, 19, "reproduced"), (3, 12, "same direction"), (-1, 40, "inconclusive"), (-9, 3, "contradicted")],
)
def test_only_the_gain_over_eol_is_judged_beside_the_papers(low, high, verdict):
    """The paper's baseline is read at EOL; over stage 2 at [RET] and over the control it has no figure."""
    table = assembled(*(gain(5, low, high, old) for old in ("stage 2, EOL only", "stage 2", "InfoNCE control"))).set_index("claim")
    row = table.loc["stage 3 over stage 2, EOL only"]
    assert row["paper"] == 13.1 and row["verdict"] == verdict and row["source"] == REPORTED["mrbench_gain"]["source"]
    for name in ("stage 3 over stage 2", "stage 3 over InfoNCE control"):
        assert pd.isna(table.loc[name, "paper"]) and table.loc[name, ["verdict", "source"]].tolist() == ["", results.MRBENCH]
    shown = claims.markdown(assembled(score(0.3), *(gain(5, low, high, old) for old in ("stage 2, EOL only", "stage 2"))), REPORTED, "")
    assert "| stage 3 over stage 2 |" in shown and "| stage 3 over stage 2, EOL only |" in shown  # without a counterpart, yet shown


def test_without_evidence_nothing_is_judged():
    table = assembled(gain(14, 9, 19, "stage 2, EOL only"), score(0.3), evidence=False)
    assert set(table["verdict"]) == {"", "not run"} and list(table.columns) == claims.COLUMNS
    assert table.set_index("claim").loc["stage 3 over stage 2, EOL only", "verdict"] == "not run"
    assert table.set_index("claim").loc["stage 3, average", "verdict"] == ""


def test_scores_are_percent_and_results_without_a_verdict():
    row = assembled(score(0.3)).set_index("claim").loc["stage 3, average"]
    assert [row["ours"], row["ci_low"], row["ci_high"]] == pytest.approx([30, 20, 40]) and row["verdict"] == ""


def test_a_grain_distance_is_a_score_in_another_setting_and_its_growth_is_judged():
    """Figure 4: 0.07 of the EOL baseline and 0.15, so 0.08 more; over stage 2 at [RET] the paper has no figure."""
    common = {"metric": claims.DISTANCE, "n": 9}
    far = pd.DataFrame(
        [
            common | {"model": "stage 3", "baseline": "", "value": 0.4, "ci_low": 0.3, "ci_high": 0.5},
            common | {"model": "stage 3", "baseline": "stage 2", "value": 0.1, "ci_low": 0.05, "ci_high": 0.2},
            common | {"model": "stage 3", "baseline": "stage 2, EOL only", "value": 0.1, "ci_low": 0.05, "ci_high": 0.2},
        ]
    )
    table = assembled(results.scores(far, scale=1.0, **CHAIN)).set_index("claim")
    assert table.loc["stage 3", ["paper", "verdict"]].tolist() == [0.15, ""]
    assert table.loc["stage 3 over stage 2, EOL only", "paper"] == pytest.approx(0.08)
    assert table.loc["stage 3 over stage 2, EOL only", "verdict"] == "reproduced"
    assert pd.isna(table.loc["stage 3 over stage 2", "paper"]) and table.loc["stage 3 over stage 2", "verdict"] == ""


def test_a_later_row_takes_the_place_of_an_earlier_one_of_the_same_backbone_only():
    study = {"seed": results.seed_label((1, 2), 0.5)}
    table = assembled(score(0.30), score(0.31, **study)).query("ours.notna()")
    assert table["ours"].tolist() == pytest.approx([31]) and table["seeds"].tolist() == ["2 (1, 2), sd 0.5"]
    apart = assembled(score(0.30), score(0.31, backbone="bbbb", **study)).query("ours.notna()")
    assert apart["ours"].tolist() == pytest.approx([30, 31]) and apart["backbone"].tolist() == ["aaaa", "bbbb"]


def test_models_of_two_backbones_are_never_in_one_table():
    table = assembled(score(0.30), score(0.31, backbone="bbbb", seed="2 (1, 2), sd 0.5"), gain(1, -1, 2))
    first, second = claims.markdown(table, REPORTED, "note").split("sha256 ")[1:]
    assert first.startswith("bbbb") and "31.0" in first and "30.0" not in first  # of most seeds first
    assert second.startswith("aaaa") and "30.0" in second and "stage 3 over stage 2" in second and second.endswith("note")


def test_the_row_of_another_question_never_takes_the_place_of_mrbenchs():
    """Notebook 85 measures stage 3 again; with a study of another backbone its rows are the last of their name."""
    again = score(0.30, experiment="single pass")
    table = assembled(score(0.30), again, score(0.31, backbone="bbbb", seed="2 (1, 2), sd 0.5"))
    assert table.query("ours.notna()")["source"].tolist() == [results.MRBENCH, results.MRBENCH, "single pass"]
    assert claims.markdown(table, REPORTED, "").count("| stage 3 |") == 2


def test_points_carry_the_papers_figure_and_its_sign():
    rows = [("a", -2.0, -3.0, -1.0, -1.5), ("b", -2.0, -5.0, 1.0, -0.5), ("c", 1.0, 0.5, 2.0, None), ("d", 1.0, 0.5, 2.0, 2.7)]
    table = pd.DataFrame(rows, columns=["new", "value", "ci_low", "ci_high", "paper"]).assign(old="stage 3", metric="hit@5", n=9)
    said = assembled(results.points(table, scale=1.0, **CHAIN | {"experiment": "Table 8"})).set_index("claim")["verdict"]
    verdicts = [said[f"{name} over stage 3"] for name in "abcd"]
    assert verdicts == ["reproduced", "inconclusive", "", "same direction"]


def test_every_figure_of_the_papers_tables_is_one_claim_with_a_command():
    rows = claims._not_run(REPORTED)
    expected = sum(len(t["rows"][m]) for t in REPORTED.values() if "rows" in t for m in t["ours"])
    assert len(rows) == expected and len({(r["source"], r["claim"]) for r in rows}) == expected
    assert {r["source"] for r in rows} == {f"Table {i}" for i in range(1, 9)}
    assert all("make reproduce" in r["baseline"] or "python -m elva_core" in r["baseline"] for r in rows)


def test_what_a_run_of_the_papers_profile_measures_takes_the_place_of_claims_not_run(tmp_path):
    """Table 1 in the order of its columns, Table 6 from MRBench, Table 2 and Table 7 by the names of their columns."""
    profile = config.load("qwen2vl-7b")
    common = {"model": "stage 3", "pool": "local", "n": 100}
    rows = [common | {"unit": u, "metric": f"hit@{k}", "value": i / 100} for i, (u, k) in enumerate(mbeir.OFFICIAL_UNITS.items())]
    tables = {"50_evaluate/results": pd.DataFrame(rows).assign(ci_low=lambda t: t["value"] - 0.01, ci_high=lambda t: t["value"] + 0.01)}
    bench = [{"unit": u, "metric": "hit@5", "value": 0.9} for u in (*profile.mrbench.units, "average")]
    tables["50_evaluate/mrbench"] = pd.DataFrame(bench).assign(model="stage 3", ci_low=0.8, ci_high=0.95, n=50)
    row = {"question": "Table 2", "set": "ccneg", "task": "pairs", "group": "", "metric": "accuracy", "model": "stage 3", "value": 0.5}
    tables["80_generalise/unseen"] = pd.DataFrame([row])
    clip = {"set": "MSVD", "metric": "hit@5", "frames": 8, "words": "name", "model": "stage 3"}
    clip |= {"value": 0.1, "ci_low": 0.0, "ci_high": 0.2, "n": 9}
    tables["82_transfer/clips"] = pd.DataFrame([clip, clip | {"frames": 1, "value": 0.9}])
    for name, table in tables.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    run = SimpleNamespace(settings=profile, require=lambda stage: tmp_path / stage)
    table = assembled(score(0.3), profile="qwen2vl-7b", official=report._official(run, REPORTED))
    assert len(table) == 1 + len(claims._not_run(REPORTED))  # each in the place of its own
    of_7b = table[table["ours"].notna() & table["source"].str.startswith("Table")].set_index(["source", "claim"])
    assert of_7b.loc["Table 1"]["ours"].tolist() == pytest.approx([*range(16), 7.5])
    assert of_7b.loc["Table 1"]["paper"].tolist() == REPORTED["table1"]["rows"]["ELVA-7B"]
    assert of_7b.loc["Table 6"]["verdict"].tolist() == ["reproduced"] * 5 and len(of_7b) == 17 + 5 + 1 + 1
    assert of_7b.loc[("Table 2", "ELVA-7B, CC-Neg accuracy"), ["ours", "verdict"]].tolist() == [50, "below"]
    assert of_7b.loc[("Table 7", "ELVA-7B, MSVD R@5"), "ours"] == pytest.approx(10)
    assert table.set_index(["source", "claim"]).loc[("Table 1", "ELVA-2B, VisualNews t0"), "verdict"] == "not run"
    assert claims.own_setting(REPORTED, "cpu", report._official(run, REPORTED)) == []


def test_deviations_follow_from_the_profile():
    cpu, paper = (report.deviations(config.load(name), REPORTED) for name in ("cpu", "qwen2vl-7b"))
    assert any("Emoji" in line for line in cpu) and not any("Emoji" in line for line in paper)
    assert any("The backbone is outputs/backbone/qwen2vl" in line for line in cpu) and not any("The backbone" in line for line in paper)
    assert any("stage3.beta is 0.04, in the paper 0.2" in line for line in cpu)
    exact = config.load("cpu").changed({"stage3": {"beta": 0.2}})
    assert not any("beta" in line for line in report.deviations(exact, REPORTED))


def test_the_page_holds_its_pictures_and_needs_no_other_file(tmp_path):
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "figures/a.png")
    text = "# Title\n\n| a | b |\n|--|--|\n| 1 | 2 |\n\n![what it shows](figures/a.png)\n"
    text += "\n" + report._folded("More", pd.DataFrame([dict.fromkeys(claims.COLUMNS, 0.5) | {"claim": "folded", "metric": "hit@5"}]))
    page = report.page(text, tmp_path)
    assert "<title>Title</title>" in page and "<td>1</td>" in page
    assert "<td>folded</td>" in page.split("<details><summary>More (1)</summary>")[1].split("</details>")[0]
    assert "figures/a.png" not in page and "http" not in page
    picture = base64.b64decode(page.split("data:image/png;base64,")[1].split('"')[0])
    assert picture == (tmp_path / "figures/a.png").read_bytes()


def test_a_readme_without_markers_is_refused(tmp_path):
    (tmp_path / "R.md").write_text("nothing")
    with pytest.raises(ValueError, match="once each"):
        report.update_readme(tmp_path / "R.md", {"claims": "x"})
