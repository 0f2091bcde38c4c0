"""A model leaves this machine whole, loadable, and without a word of where it was made."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import re
import shutil

import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, constants

import families
from elva_core import cli
from elva_core.data import images
from elva_core.data import items as data_items
from elva_core.export import hub
from elva_core.export.hub import PublishError
from elva_core.models import encoder, generation
from elva_core.models.lineage import lineage
from elva_core.retrieval import retriever


@pytest.fixture
def trained(tiny, model_folder, tmp_path):
    """Two generations: a backbone, a stage 2 that came from it, a stage 3 that came from that."""
    tiny.save(tmp_path / "stage2", stage="stage 2", parent=str(model_folder))
    tiny.save(tmp_path / "made here", stage="stage 3", parent=str(tmp_path / "stage2"))
    return tmp_path / "made here"


class Recorder:
    """HfApi's two methods; a call that the real ones would not take is an error."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        signature = inspect.signature(getattr(HfApi, name))

        def call(**arguments):
            bound = signature.bind(self, **arguments).arguments
            files = {p.name: p.read_bytes() for p in bound["folder_path"].iterdir()} if "folder_path" in bound else {}
            self.calls.append((name, bound, files))
            return f"hub:{bound['repo_id']}"

        return call


@pytest.fixture(params=["qwen2_vl", "qwen3_vl", "llava_next", "gemma3", "idefics3"])
def any_family(request, model_folder, texts, smoke, tmp_path):
    """A model that splices features into its prompts, and some that are read by their own processors."""
    if request.param == "qwen2_vl":
        return encoder.load(model_folder, smoke.encoder)
    return encoder.load(families.write(getattr(families, request.param), texts, tmp_path / "start"), smoke.encoder)


def test_the_code_on_the_card_gives_the_vectors_of_elva_core(any_family, items, tmp_path):
    with torch.no_grad():  # what must never be sampled is what the model would like best, and then it would like to end
        liked = any_family.states(any_family.batch(items[:1], any_family.settings.summary_request))[0, -1]
        head = any_family.backbone.get_output_embeddings().weight
        head[any_family.processor.tokenizer.convert_tokens_to_ids(any_family.processor.image_token)] = 50 * liked
        head[any_family.end_id] = 5 * liked
    any_family.save(tmp_path / "model", stage="stage 3", parent="none")
    target = tmp_path / "elva"
    hub.push(tmp_path / "model", str(target))
    code = re.search(r"```python\n(.*?)```", (target / "README.md").read_text(), re.DOTALL)[1]
    space: dict = {}
    exec(code.replace('from_pretrained("elva")', f"from_pretrained({str(target)!r})"), space)
    out = generation.generate(any_family, items)
    ends = (out.tokens == any_family.end_id) & out.actions
    assert ends.any() and (space["end"], "Images have" in (target / "README.md").read_text()) == (any_family.end_id, False)
    for item, vector, (summary,) in zip(items, out.embeddings[:, 0], out.summaries(any_family.end_id), strict=True):
        image = images.open_image(item.image) if item.image else None
        theirs, text = space["embed"](item.text, image)
        assert text == any_family.processor.tokenizer.decode(summary)
        torch.testing.assert_close(theirs, vector, atol=1e-5, rtol=0)


def test_the_card_has_a_valid_header_and_the_whole_line_of_descent(trained, tmp_path, smoke):
    table = pd.DataFrame(
        [
            {"model": "None", "unit": "007", "pool": "local", "metric": m, "value": 0.25, "ci_low": 0.2, "ci_high": 0.3, "n": 40}
            for m in ("hit@5", "mrr@10")
        ]
    )
    table.to_csv(tmp_path / "results.csv", index=False)
    hub.push(trained, str(tmp_path / "elva"), profile=smoke, results=tmp_path / "results.csv")
    card = ModelCard.load(tmp_path / "elva/README.md")
    header = card.data.to_dict()
    assert header["library_name"] == "transformers" and header["license"] == "apache-2.0" and "base_model" not in header
    parents = json.loads((tmp_path / "elva/elva.json").read_text())["parents"]
    assert [p["stage"] for p in parents] == ["backbone", "stage 2"] and all(p["sha256"] in card.text for p in parents)
    assert "| None | 007 | local | hit@5 | 25.0 [20.0, 30.0] | 40 |" in card.text and "mrr@10" not in card.text
    values = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
    assert values["stage3"] == smoke.model_dump(mode="json")["stage3"]
    for word in (smoke.encoder.summary_request, smoke.encoder.eol_request, "[RET]", "## Limits", "2606.20280"):
        assert word in card.text


def test_a_hub_name_is_the_base_model_and_a_folder_only_a_hash(trained, tiny, tmp_path):
    tiny.save(tmp_path / "first", stage="stage 2", parent="Qwen/Qwen2-VL-2B-Instruct")
    tiny.save(tmp_path / "second", stage="stage 3", parent=str(tmp_path / "first"))
    assert ModelCard(hub.card(tmp_path / "second", "out")).data.base_model == "Qwen/Qwen2-VL-2B-Instruct"
    for folder in (trained, tmp_path / "second"):
        assert str(tmp_path) not in (folder / "elva.json").read_text()


def test_the_hash_of_a_parent_is_that_of_its_weights(tiny, tmp_path):
    tiny.save(tmp_path / "a", stage="stage 2", parent="none")
    (before,) = lineage(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert lineage(tmp_path / "b") == [before]
    with torch.no_grad():
        tiny.backbone.lm_head.weight[0, 0] += 1
    tiny.save(tmp_path / "c", stage="stage 2", parent="none")
    assert lineage(tmp_path / "c")[0]["sha256"] != before["sha256"]


def test_a_model_of_the_hub_is_recorded_with_the_weights_of_its_copy_here(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert lineage("me/base") == [{"hub": "me/base"}]
    store = tmp_path / "models--me--base"
    (store / "refs").mkdir(parents=True)
    (store / "refs/main").write_text("c0ffee")
    shutil.copytree(model_folder, store / "snapshots/c0ffee")
    (own,) = lineage(model_folder)
    assert lineage("me/base") == [own | {"hub": "me/base"}]


def test_a_hub_that_is_not_there_is_one_line_with_both_ways_out(trained, monkeypatch, capsys):
    def unreachable(self, **arguments):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(HfApi, "create_repo", unreachable)
    assert cli.main(["push", "--model", str(trained), "--to", "mine"]) == 1
    said = capsys.readouterr().err
    wanted = (
        "the hub did not take mine: ConnectionError: Name or service not known; log in with hf auth login, or write ./mine for a folder"
    )
    assert wanted in said and "Traceback" not in said


def test_the_hub_gets_one_commit_with_the_whole_model(trained, monkeypatch):
    api = Recorder()
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    assert hub.push(trained, "me/elva") == "hub:me/elva"
    (create, created, _), (upload, uploaded, files) = api.calls
    assert (create, upload) == ("create_repo", "upload_folder")
    assert created["repo_id"] == uploaded["repo_id"] == "me/elva" and created["exist_ok"] is True
    assert {"README.md", "elva.json", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert 'from_pretrained("me/elva")' in files["README.md"].decode()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "state.pt", "x.pkl"])
def test_pickled_weights_are_refused(trained, tmp_path, name):
    (trained / name).write_bytes(b"")
    with pytest.raises(PublishError, match=f"{name} may run code"):
        hub.push(trained, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("README.md", "Trained on /work/data/M-BEIR, see there."),
        ("README.md", "Weights: `C:\\Users\\me\\model`"),
        ("README.md", "See ~/models/elva"),
        ("elva.json", '{"encoder": {}, "stage": "x", "parent": "/home/me/outputs/model"}'),
        ("config.json", '{"_name_or_path": "/tmp/backbone-1"}'),
    ],
)
def test_a_local_path_is_refused_and_named(trained, tmp_path, file, text):
    (trained / "README.md").write_text("---\nlicense: mit\n---\n")
    (trained / file).write_text("\n" + text)
    with pytest.raises(PublishError, match=rf"{re.escape(file)}:2 names a path of this machine"):
        hub.push(trained, "me/elva")


def test_addresses_and_fractions_are_no_local_paths(tmp_path):
    (tmp_path / "README.md").write_text("https://host/a/b image/text 1/2 </tool_call> owner/model (arXiv/2606) params/plan.yaml")
    hub.refuse_local_paths(tmp_path)


def test_a_folder_that_is_no_model_of_ours_is_neither_published_nor_replaced(trained, model_folder, tmp_path):
    with pytest.raises(PublishError, match=r"elva\.json is missing"):
        hub.push(model_folder, str(tmp_path / "out"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years")
    with pytest.raises(PublishError, match="holds other files"):
        hub.push(trained, str(tmp_path / "thesis"))
    assert (tmp_path / "thesis/chapter.txt").read_text() == "years"


def test_a_second_push_replaces_the_first_and_one_that_is_killed_leaves_it(trained, tmp_path, monkeypatch):
    target = tmp_path / "out"
    for content in ("one", "two"):
        (trained / "README.md").write_text(content)
        hub.push(trained, str(target))
    assert (target / "README.md").read_text() == "two"
    assert not list(tmp_path.glob(".out.*"))

    def full(*_args, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.shutil, "copytree", full)
    (trained / "README.md").write_text("three")
    with pytest.raises(OSError, match="No space"):
        hub.push(trained, str(target))
    assert (target / "README.md").read_text() == "two"


def test_what_is_a_folder_and_what_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert all(map(hub.is_folder, ("./out", "../out", "/data/out", "~/out", "models")))
    assert not any(map(hub.is_folder, ("me/elva", "elva", "models/elva")))


def test_the_command_line_pushes_and_says_what_is_wrong(trained, tmp_path, capsys):
    assert cli.main(["push", "--model", str(trained), "--to", str(tmp_path / "out"), "--profile", "smoke"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert retriever.encode(encoder.load(tmp_path / "out"), [data_items.Item("A dog.")], batch=1)[0].shape[0] == 1
    assert cli.main(["push", "--model", str(tmp_path), "--to", "me/elva"]) == 1
    assert "elva.json is missing: push takes a folder" in capsys.readouterr().err
    assert cli.main(["push", "--model", str(trained), "--to", "not a name"]) == 1


def test_a_results_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(PublishError, match=r"columns \['a', 'b'\] are neither"):
        hub.results_table(tmp_path / "x.csv")


def test_claims_show_what_the_report_shows_first(tmp_path):
    columns = ["claim", "source", "dataset", "metric", "paper", "ours", "ci_low", "ci_high", "n", "seeds", "baseline", "verdict"]
    rows = [
        ["stage 3, average", "ours", "B", "hit@5", None, 33.6, 31.1, 36.1, 1200, "3", "", ""],
        ["stage 3, unit", "ours", "B", "hit@5", None, 35.9, 31.1, 36.1, 300, "3", "", ""],
        ["stage 3 over stage 2", "text", "B", "relative gain of hit@5, %", 13.1, 0.7, -1.5, 2.7, 1200, "3", "", "not reproduced"],
        ["Table 1", "text", "B", "hit@5", 58.7, None, None, None, None, "", "", "not run"],
    ]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "claims.csv", index=False)
    shown = hub.results_table(tmp_path / "claims.csv").splitlines()[2:]
    assert shown == [
        "| stage 3, average | B | hit@5 |  | 3 |  | 33.6 [31.1, 36.1] | 1200 |",
        "| stage 3 over stage 2 | B | relative gain of hit@5, % | 13.1 | 3 | not reproduced | 0.7 [-1.5, 2.7] | 1200 |",
    ]


def test_two_processes_that_export_to_one_place_do_not_disturb_each_other(tmp_path):
    fork = multiprocessing.get_context("fork")
    begun, first_ended = fork.Barrier(2), fork.Event()

    def export(name):
        with hub.whole_folder(tmp_path / "out", "elva.json") as partial:
            partial.mkdir()
            (partial / "elva.json").write_text(name)
            begun.wait(timeout=20)
            assert name == "first" or first_ended.wait(timeout=20)
        first_ended.set()

    two = [fork.Process(target=export, args=(name,)) for name in ("first", "second")]
    for one in two:
        one.start()
    for one in two:
        one.join(timeout=60)
    assert [one.exitcode for one in two] == [0, 0]
    assert (tmp_path / "out/elva.json").read_text() == "second" and [path.name for path in tmp_path.iterdir()] == ["out"]
