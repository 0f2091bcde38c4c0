"""mteb measures our model as we do."""

from __future__ import annotations

import mteb
import numpy as np
import pytest
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.models.models_protocols import EncoderProtocol
from mteb.types import PromptType
from PIL import Image

from elva_core.data import items as data_items
from elva_core.data import mbeir
from elva_core.export.mteb_encoder import MtebEncoder
from elva_core.models import encoder
from elva_core.retrieval import metrics, retriever, search

INSTRUCTION = "find what belongs to it"
TASKS = {"t2i": ("text", "image"), "i2t": ("image", "text"), "it2i": ("image,text", "image"), "t2it": ("text", "image,text")}
DOCUMENTS, QUERIES = 14, 9


def rows(modality, count, rng):
    """Records of one modality: noise, partly transparent, and texts of several lengths."""
    out = []
    for n in range(count):
        image = Image.fromarray(rng.integers(0, 256, (40 + n, 64, 4), np.uint8), "RGBA") if "image" in modality else None
        text = "the woman is running " * int(rng.integers(1, 4)) + str(n) if "text" in modality else None
        out.append((text, image))
    return out


def table(name, entries):
    columns = {"id": [f"{name}{n}" for n in range(len(entries))]}
    for place, key in enumerate(("text", "image")):
        if entries[0][place] is not None:
            columns[key] = [entry[place] for entry in entries]
    return Dataset.from_dict(columns)


def task_of(category, prompt):
    """A retrieval task with images made here; every third query has two positives."""
    rng = np.random.default_rng(len(category))
    query_modality, candidate_modality = TASKS[category]
    asked, pool = rows(query_modality, QUERIES, rng), rows(candidate_modality, DOCUMENTS, rng)
    relevant = [sorted(rng.choice(DOCUMENTS, 2 if n % 3 == 0 else 1, replace=False).tolist()) for n in range(QUERIES)]

    class Mock(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name=f"Mock{category}", description="noise", dataset={"path": "none", "revision": "none"}, type="Any2AnyRetrieval",
            category=category, modalities=["image", "text"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10",
            prompt=prompt,
        )  # fmt: skip

        def load_data(self, **_):
            judged = {f"q{n}": {f"d{row}": 1 for row in found} for n, found in enumerate(relevant)}
            data = RetrievalSplitData(queries=table("q", asked), corpus=table("d", pool), relevant_docs=judged, top_ranked=None)
            self.dataset, self.data_loaded = {"default": {"test": data}}, True

    return Mock(), asked, pool, relevant


def ours(model, entries, instruction, folder, template):
    """Vectors of the same records by the way that everything else takes: files and items."""
    items = []
    for n, (text, image) in enumerate(entries):
        path = folder / f"{instruction}{n}.png" if image else None
        if image:
            image.save(path)
        asked = mbeir.normalise(f"{mbeir.normalise(instruction)} {text or ''}") if instruction else mbeir.normalise(text)
        items.append(data_items.Item(asked, path))
    return retriever.encode(model, items, batch=4, template=template)[0]


@pytest.mark.parametrize(("category", "template"), [("t2i", "summary"), ("i2t", "summary"), ("it2i", "summary"), ("t2it", "eol")])
def test_mteb_measures_what_our_metrics_measure(tiny, tmp_path, category, template):
    task, asked, pool, relevant = task_of(category, {"query": INSTRUCTION})
    model = MtebEncoder(tiny, template=template)
    result = mteb.evaluate(model, task, cache=None, encode_kwargs={"batch_size": 4}, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    queries, candidates = ours(tiny, asked, INSTRUCTION, tmp_path, template), ours(tiny, pool, "", tmp_path, template)
    ranks = search.exact(queries, candidates, 10, relevant).ranks
    sizes = [len(r) for r in relevant]
    wanted = {f"ndcg_at_{k}": metrics.ndcg_at_k(ranks, k, sizes) for k in (1, 5, 10)}
    wanted |= {f"hit_rate_at_{k}": metrics.hit_rate_at_k(ranks, k) for k in (1, 5, 10)}
    wanted |= {f"recall_at_{k}": metrics.recall_at_k(ranks, k, sizes) for k in (1, 5, 10)}
    for name, values in wanted.items():
        assert scores[name] == pytest.approx(values.mean(), abs=1e-5), name  # mteb rounds to five places
    assert 0 < scores["ndcg_at_10"] < 1


def test_only_queries_carry_the_instruction_that_was_given_last(tiny, tmp_path):
    task, asked, pool, _ = task_of("t2it", INSTRUCTION)
    batches = [{"text": [t for t, _ in asked]}], [{"text": [t for t, _ in pool], "image": [i for _, i in pool]}]
    where = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    for given, instruction in (({}, INSTRUCTION), ({"Mockt2it": "other"}, "other"), ({"Elsewhere": "other"}, INSTRUCTION)):
        model = MtebEncoder(tiny, instructions=given)
        assert isinstance(model, EncoderProtocol)
        found = model.encode(batches[0], prompt_type=PromptType.query, **where)
        np.testing.assert_allclose(found, ours(tiny, asked, instruction, tmp_path, "summary"), atol=1e-5)
    found = model.encode(batches[1], prompt_type=PromptType.document, **where)
    np.testing.assert_allclose(found, ours(tiny, pool, "", tmp_path, "summary"), atol=1e-5)


def test_results_of_other_weights_or_another_template_are_kept_apart(tiny, tmp_path):
    tiny.save(tmp_path / "model", stage="test", parent="none")
    first = encoder.load(tmp_path / "model")
    names = {(m.mteb_model_meta.name, m.mteb_model_meta.revision) for m in (MtebEncoder(first), MtebEncoder(first, template="eol"))}
    tiny.backbone.lm_head.weight.data[0, 0] += 1
    tiny.save(tmp_path / "model", stage="test", parent="none")
    meta = MtebEncoder(encoder.load(tmp_path / "model")).mteb_model_meta
    assert len(names | {(meta.name, meta.revision)}) == 3


def test_what_the_model_cannot_read_is_refused(tiny):
    task, *_ = task_of("t2i", INSTRUCTION)
    where = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    with pytest.raises(ValueError, match=r"a batch has \['audio'\]"):
        MtebEncoder(tiny).encode([{"audio": [0]}], **where)
    with pytest.raises(ValueError, match="input 1 of a batch has neither text nor image"):
        MtebEncoder(tiny).encode([{"text": ["A dog.", None]}], **where)
    with pytest.raises(ValueError, match="precision 'int8'"):
        MtebEncoder(tiny).encode([], precision="int8", **where)
