"""The chain: strict runner, skipping, stages that are done or not, claims and README."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from elva_core import config, files
from elva_core.data import mbeir
from elva_core.data import sources as prepare
from elva_core.evaluation import statistics
from elva_core.experiments import chain, claims, report, stages, study
from elva_core.experiments.chain import ChainError


def notebook(path, *sources):
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    book.cells = [nbformat.v4.new_code_cell(s) for s in sources]
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, path)
    return path


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "OUTPUTS", tmp_path / "outputs")
    return tmp_path / "outputs"


def test_a_misspelt_parameter_is_refused(tmp_path):
    book = notebook(tmp_path / "a.ipynb", "seed: int = 1")
    with pytest.raises(ChainError, match=r"declares no parameter \['sead'\]; it declares \['seed'\]"):
        chain.run_notebook(book, tmp_path / "out.ipynb", {"sead": 2})


def test_a_failing_cell_is_named_with_its_heading_and_executed_copy_which_names_no_place_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REPOSITORY", tmp_path)
    printed = "from pathlib import Path\nprint(Path('outputs').resolve())\nPath('models').resolve()"
    book = notebook(tmp_path / "a.ipynb", "seed: int = 1", printed, "exec(compile('1 / 0', Path('broken.py').resolve(), 'exec'))")
    read = nbformat.read(book, 4)
    read.cells.insert(1, nbformat.v4.new_markdown_cell("## Where it breaks"))
    nbformat.write(read, book)
    with pytest.raises(ChainError, match=r"(?s)a\.ipynb, cell \d \(Where it breaks\): ZeroDivisionError: division by zero.*out\.ipynb"):
        chain.run_notebook(book, tmp_path / "out.ipynb", {})
    copy = nbformat.read(tmp_path / "out.ipynb", 4)
    assert str(tmp_path) not in (tmp_path / "out.ipynb").read_text()
    assert [copy.metadata.papermill[f"{side}_path"] for side in ("input", "output")] == ["a.ipynb", "out.ipynb"]
    shown, resolved = next(cell for cell in copy.cells if "print(" in cell.source).outputs
    assert shown.text == "outputs\n" and resolved.data["text/plain"] == "PosixPath('models')"
    assert any("broken.py" in line for o in copy.cells[-1].outputs for line in o.traceback)


def test_cells_that_never_ran_are_noticed(tmp_path):
    book = notebook(tmp_path / "a.ipynb", "seed: int = 1", "import os, sys; sys.exit(0)", "x = 1")
    with pytest.raises(ChainError, match=r"never ran|SystemExit"):
        chain.run_notebook(book, tmp_path / "out.ipynb", {})


def test_a_stage_without_manifest_is_not_done_and_the_message_has_the_command(outputs):
    first = stages.open_stage("10_prepare_data", "smoke", 1)
    (first.folder / "data.txt").write_text("half")
    with pytest.raises(stages.MissingStageError, match=r"manifest\.json is missing; run: python -m elva_core run smoke --seed 1 --only 10"):
        stages.open_stage("20_build_mrbench", "smoke", 1).require("10_prepare_data")
    assert not (outputs / "smoke/10_prepare_data").exists()
    first.close()
    second = stages.open_stage("20_build_mrbench", "smoke", 1)
    assert (second.require("10_prepare_data") / "data.txt").read_text() == "half"
    with pytest.raises(stages.MissingStageError, match="made with seed 1, not 2"):
        stages.open_stage("20_build_mrbench", "smoke", 2).require("10_prepare_data")
    (outputs / "smoke/10_prepare_data/data.txt").write_text("changed")
    with pytest.raises(stages.MissingStageError, match="missing or changed"):
        second.require("10_prepare_data")


def test_a_killed_stage_leaves_the_old_result_and_keeps_its_work(outputs):
    done = stages.open_stage("10_prepare_data", "smoke", 1)
    (done.folder / "v").write_text("old")
    done.close()
    killed = stages.open_stage("10_prepare_data", "smoke", 1)
    (killed.folder / "work").mkdir()
    (killed.folder / "work/checkpoint").write_text("half")
    assert (outputs / "smoke/10_prepare_data/v").read_text() == "old"
    again = stages.open_stage("10_prepare_data", "smoke", 1)
    assert (again.folder / "work/checkpoint").read_text() == "half"
    other = stages.open_stage("10_prepare_data", "smoke", 2)
    assert not (other.folder / "work").exists()


def test_a_full_disk_leaves_no_table(outputs, monkeypatch):
    stage = stages.open_stage("10_prepare_data", "smoke", 1)

    def full(self, path, **_):
        path.write_text("a,b\n1,")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="No space"):
        stage.save_table("t", pd.DataFrame())
    assert not (stage.folder / "t.csv").exists() and stages.manifest("smoke", "10_prepare_data") is None


def test_up_to_date_means_same_inputs_profile_seed_and_code(outputs, monkeypatch):
    profile = config.load("smoke")
    monkeypatch.setitem(os.environ, "ELVA_FINGERPRINT", chain.current_fingerprint(profile, 1, "00_check_environment"))
    stages.open_stage("00_check_environment", "smoke", 1).close()
    assert chain.up_to_date(profile, 1, "00_check_environment")
    assert not chain.up_to_date(profile, 2, "00_check_environment")
    changed = profile.model_copy(update={"threads": 7})
    assert not chain.up_to_date(changed, 1, "00_check_environment")
    monkeypatch.setattr(chain, "code_hash", lambda path: "other")
    assert not chain.up_to_date(profile, 1, "00_check_environment")


def test_code_of_a_stage_is_what_its_notebook_reaches():
    used = chain._imports("from elva_core.experiments import figures\nfrom elva_core.training.rewards import ranks\nimport elva_core")
    assert {path.stem for path in used} == {"figures", "rewards"}


def hits():
    rng = np.random.default_rng(0)
    rows = []
    for unit, base in (("a", 0.2), ("b", 0.6)):
        for q in range(400):
            u = rng.random()
            rows += [{"model": m, "unit": unit, "qid": str(q), "hit@5": float(u < base + d)} for m, d in (("old", 0), ("new", 0.1))]
    return pd.DataFrame(rows)


def test_a_comparison_is_paired_and_weighs_tasks_equally():
    table = hits()
    got = statistics.comparison(table, "new", "old", 5, 500, 0)
    by_hand = table.groupby(["model", "unit"])["hit@5"].mean().groupby("model").mean()
    assert got["difference"] == pytest.approx(by_hand["new"] - by_hand["old"])
    assert got["ci_low"] < got["difference"] < got["ci_high"]
    # paired: the difference is 0 or 1, its standard error sqrt(0.1 * 0.9 / 800) = 0.011, far below the unpaired 0.022
    assert got["ci_high"] - got["ci_low"] < 2 * 1.96 * 0.014


def test_the_audit_finds_the_figures_that_do_not_add_up():
    audit = statistics.audit(statistics.reported()).set_index("what")
    assert audit.loc["Table 6, Qwen2-VL-7B: mean of 4 columns", "recomputed"] == 24.4
    assert not audit.loc["Table 6, Qwen2-VL-7B: mean of 4 columns", "agrees"]
    assert audit.loc["Table 1, ELVA-7B: mean of 16 columns", "recomputed"] == 58.64


def test_without_evidence_every_verdict_is_not_run():
    results = pd.DataFrame(
        [{"model": "stage 3", "unit": "average", "metric": "hit@5", "value": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n": 9}]
    )
    pair = {
        "new": "stage 3",
        "old": "stage 2",
        "metric": "hit@5",
        "new value": 0.5,
        "old value": 0.4,
        "ci_low": 0.05,
        "ci_high": 0.15,
        "relative %": 25.0,
        "n": 9,
    }
    far = [0.1, 0.3, 0.2, 0.4]  # of two queries, under two models
    distances = pd.DataFrame({"model": ["stage 2"] * 2 + ["stage 3"] * 2, "qid": ["a", "b"] * 2, "distance": far})
    for evidence, verdict in ((True, "reproduced"), (False, "not run")):
        rows = claims.measured(results, [pair], distances, statistics.reported(), "x", evidence, 20)
        table = claims.assemble([*rows, *claims.not_run(statistics.reported())], 1)
        gain = table.set_index("claim").loc["stage 3 over stage 2"]
        assert gain["verdict"] == verdict and gain["ci_low"] == pytest.approx(12.5)
        grown = table.set_index("claim").loc["grain distance, stage 3 over stage 2"]
        assert grown["verdict"] == verdict and grown["ours"] == pytest.approx(0.1) and grown["paper"] == pytest.approx(0.08)
        assert (table.loc[table["ours"].isna(), "verdict"] == "not run").all() and list(table.columns) == claims.COLUMNS


@pytest.mark.parametrize(
    ("ours", "low", "high", "verdict"),
    [(14, 9, 19, "reproduced"), (8, 3, 15, "same direction"), (20, -1, 40, "not reproduced"), (-3, -9, 3, "not reproduced")],
)
def test_a_gain_is_reproduced_only_if_it_is_as_large_as_the_papers_and_above_zero(ours, low, high, verdict):
    row = {"ours": ours, "ci_low": low, "ci_high": high, "paper": 13.1}
    assert claims.verdict(row, evidence=True) == verdict
    assert claims.verdict(row, evidence=False) == "not run"
    assert claims.verdict(row | {"paper": np.nan}, evidence=True) == ""


@pytest.mark.parametrize("trained", [False, True])
def test_a_study_shows_what_can_be_shown_and_names_the_command_for_the_rest(outputs, monkeypatch, capsys, trained):
    """Table 5 needs no stage 3 of the chain: a study of two arms ends well without it."""
    done = [s for s in chain.STAGES if trained or s < "40"]
    for stage in done:
        (outputs / "smoke" / stage).mkdir(parents=True)
        (outputs / "smoke" / stage / "manifest.json").write_text("{}")
    ran: list[str] = []

    def note(profile_name, *, seed, only):
        ran.append(only)
        (outputs / "smoke" / only).mkdir(parents=True, exist_ok=True)
        (outputs / "smoke" / only / "manifest.json").write_text("{}")

    monkeypatch.setattr(chain, "run", note)
    monkeypatch.setattr(study, "run", lambda *given: None)
    monkeypatch.setattr(study, "backbone_of", lambda trained: "x")
    monkeypatch.setattr(prepare, "locate", lambda data: (None, None))
    monkeypatch.setattr(mbeir, "Root", lambda folder: None)
    chain.study("smoke", 17)
    shown = ["60_ablate", *(["82_transfer", "90_report"] if trained else [])]
    assert ran == ["00_check_environment", *chain.STAGES["60_ablate"], *shown]
    out = capsys.readouterr().out
    assert trained != ("left out  82_transfer, which needs 40_finetune_rlvr, 50_evaluate; run: python -m elva_core run smoke" in out)


def test_rows_of_the_study_take_the_place_of_the_single_run():
    single = {"claim": "stage 3, average", "metric": "hit@5", "dataset": "MRBench-x", "ours": 30.0, "n": 9}
    scores = pd.DataFrame(
        [{"arm": "stage 3", "unit": "average", "value": 31.0, "ci_low": 29.0, "ci_high": 33.0, "n": 9, "seeds": (1, 2), "spread": 0.5}]
    )
    columns = ["arm", "old", "relative", "relative low", "relative high", "n", "seeds"]
    differences = pd.DataFrame([["stage 3 over stage 2", "stage 2", 15.0, 9.0, 20.0, 9, (1, 2)]], columns=columns)
    table = claims.assemble([single, *claims.studied(scores, differences, statistics.reported(), "x", True)], 7).set_index("claim")
    assert table.loc["stage 3, average", "ours"] == 31 and table.loc["stage 3, average", "seeds"] == "2 (1, 2), sd 0.5"
    gain = table.loc["stage 3 over stage 2"]
    assert gain["paper"] == 13.1 and gain["ci_low"] == 9 and gain["verdict"] == "reproduced"


def test_a_difference_in_points_has_the_papers_direction_only_if_its_interval_has():
    columns = ["arm", "old", "value", "ci_low", "ci_high", "paper", "source", "n", "seeds"]
    rows = [
        ["a", "stage 3", -2.0, -3.0, -1.0, -1.5, "Table 8", 9, (1,)],
        ["b", "stage 3", -2.0, -5.0, 1.0, -0.5, "Table 8", 9, (1,)],
        ["c", "stage 3", 1.0, 0.5, 2.0, np.nan, "ours", 9, (1,)],
        ["d", "stage 3", 1.0, 0.5, 2.0, 2.7, "Table 3", 9, (1,)],
    ]
    said = claims.in_points(pd.DataFrame(rows, columns=columns), "x", True)
    assert [r["verdict"] for r in said] == ["same direction", "not reproduced", "", "same direction"]


def test_what_a_run_of_the_papers_profile_measures_takes_the_place_of_claims_not_run(tmp_path):
    """Table 1 in the order of its columns, Table 6 from MRBench, Table 2 and Table 7 by the names of their columns."""
    profile, reported = config.load("qwen2vl-7b"), statistics.reported()
    common = {"model": "stage 3", "pool": "local", "n": 100}
    rows = [common | {"unit": u, "metric": f"hit@{k}", "value": i / 100} for i, (u, k) in enumerate(mbeir.OFFICIAL_UNITS.items())]
    tables = {"50_evaluate/results": pd.DataFrame(rows).assign(ci_low=lambda t: t["value"] - 0.01, ci_high=lambda t: t["value"] + 0.01)}
    bench = [{"unit": u, "metric": "hit@5", "value": 0.9} for u in (*profile.mrbench.units, "average")]
    tables["50_evaluate/mrbench"] = pd.DataFrame(bench).assign(model="stage 3", ci_low=0.8, ci_high=0.95, n=50)
    found = {"question": "Table 2", "set": "ccneg", "task": "pairs", "group": "", "metric": "accuracy", "model": "stage 3", "value": 0.5}
    tables["80_generalise/unseen"] = pd.DataFrame([found])
    clip = {
        "set": "MSVD",
        "metric": "hit@5",
        "frames": 8,
        "words": "name",
        "model": "stage 3",
        "value": 0.1,
        "ci_low": 0.0,
        "ci_high": 0.2,
        "n": 9,
    }
    tables["82_transfer/clips"] = pd.DataFrame([clip, clip | {"frames": 1, "value": 0.9}])
    for name, table in tables.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    run = SimpleNamespace(settings=profile, require=lambda stage: tmp_path / stage)
    own = claims.official(reported, "qwen2vl-7b", report._official(run, reported), True)
    table = claims.assemble([*claims.not_run(reported), *own], 17).set_index(["source", "claim"])
    assert len(table) == len(claims.not_run(reported))  # each in the place of its own
    of_7b = table[table["ours"].notna()]
    assert of_7b.loc["Table 1"]["ours"].tolist() == pytest.approx([*range(16), 7.5])
    assert of_7b.loc["Table 1"]["paper"].tolist() == reported["table1"]["rows"]["ELVA-7B"]
    assert of_7b.loc["Table 6"]["verdict"].tolist() == ["reproduced"] * 5 and len(of_7b) == 17 + 5 + 1 + 1
    assert of_7b.loc[("Table 2", "ELVA-7B, CC-Neg accuracy"), ["ours", "verdict"]].tolist() == [50, "not reproduced"]
    assert of_7b.loc[("Table 7", "ELVA-7B, MSVD R@5"), "ours"] == pytest.approx(10)
    assert table.loc[("Table 1", "ELVA-2B, VisualNews t0"), "verdict"] == "not run"
    assert claims.official(reported, "cpu", report._official(run, reported), True) == []


def test_every_figure_of_the_papers_tables_is_one_claim_with_a_command():
    tables = statistics.reported()
    rows = claims.not_run(tables)
    wanted = sum(len(t["rows"][m]) for t in tables.values() if "rows" in t for m in t["ours"])
    assert len(rows) == wanted and len({(r["source"], r["claim"]) for r in rows}) == wanted
    assert {r["source"] for r in rows} == {f"Table {i}" for i in range(1, 9)}
    assert all("make reproduce" in r["baseline"] or "python -m elva_core" in r["baseline"] for r in rows)


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


def committed(path: str) -> str:
    """A file as it is committed: a run of one's own replaces the one in the working tree."""
    shown = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=files.REPOSITORY, capture_output=True, text=True)
    if shown.returncode:
        pytest.skip(f"{path} cannot be read from git: {shown.stderr.strip()}")
    return shown.stdout


def test_the_readme_shows_the_committed_reference_run():
    readme = committed("README.md")
    for name, file in (("claims", "table.md"), ("stages", "stages.md")):
        shown = readme.split(f"<!-- {name}:start -->")[1].split(f"<!-- {name}:end -->")[0]
        assert shown.strip() == committed(f"outputs/cpu/90_report/{file}").strip()
    table = pd.read_csv(io.StringIO(committed("outputs/cpu/90_report/claims.csv")))
    assert list(table.columns) == claims.COLUMNS
    texts = dict.fromkeys(("verdict", "baseline", "seeds"), "")
    assert claims.markdown(table.fillna(texts), statistics.reported(), "").strip() in readme


def test_a_readme_without_markers_is_refused(tmp_path):
    (tmp_path / "R.md").write_text("nothing")
    with pytest.raises(ValueError, match="once each"):
        report.update_readme(tmp_path / "R.md", {"claims": "x"})


def test_the_manifest_lists_every_file_and_is_written_last(outputs):
    stage = stages.open_stage("00_check_environment", "smoke", 1)
    stage.save_table("t", pd.DataFrame({"a": [1]}))
    stage.close(metrics={"x": 1})
    found = json.loads((outputs / "smoke/00_check_environment/manifest.json").read_text())
    assert set(found["files"]) == {"t.csv"} and found["metrics"] == {"x": 1} and found["files"]["t.csv"]["sha256"]
