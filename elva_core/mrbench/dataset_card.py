"""The finished benchmark for people who load `datasets`: queries and pools as Parquet beside a data card.

write(bench, folder, settings, counts, agreement)
load_dataset(str(folder), "queries")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from elva_core import files
from elva_core.config import Settings
from elva_core.data import mbeir
from elva_core.mrbench import annotate
from elva_core.tables import markdown_table

CARD = """---
pretty_name: MRBench of {data}
license: other
license_name: see-below
tags: [multimodal-retrieval, multi-grain, m-beir]
configs:
- config_name: queries
  data_files: queries.parquet
  default: true
- config_name: corpus
  data_files: corpus.parquet
---

# MRBench of {data}

Retrieval queries that have at least {min_grains} grains: atomic units of meaning that an answer must match. \
Built after ELVA
(arXiv 2606.20280, section 3) by profile {profile}: of every unit the test queries were annotated \
in a random order until
{share} of them had enough grains; all of a unit's candidates are its pool.

{table}

## Grains

{annotator}

## Verification

{verification}

## Files

* `queries.parquet`: unit, qid, text, image, grains (kind and text), positives (dids).
* `corpus.parquet`: unit, did, modality, text, image: a path inside the M-BEIR folder `bench`, \
which holds {images:,} images
  ({megabytes:,.1f} MB).

A query is asked against the candidates of its unit; hit rate at 5 is the share of queries with \
a positive among the first five.

## Licence

Images: {licence}. They stay under their own licences.
"""


def write(
    bench: mbeir.Root,
    folder: Path,
    settings: Settings,
    counts: pd.DataFrame,
    agreement: Mapping[str, object],
) -> None:
    """queries.parquet, corpus.parquet and README.md, the data card.

    The few images of the queries are inside queries.parquet. Those of the pools are named, not held: they are
    the bulk (M-BEIR's four units: 66,000), and `bench`, the M-BEIR folder, has them.

    Args:
        counts: of `mrbench.build`. agreement: of `verify.agreement`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (("queries", queries(bench)), ("corpus", corpus(bench))):
        table.to_parquet(folder / f"{name}.parquet")
    files.write_whole(folder / "README.md", card(bench, settings, counts, agreement))


def queries(bench: mbeir.Root):
    """A row per query: unit, qid, text, image (decoded on access), grains (kind, text), positives (dids)."""
    from datasets import Dataset, Features, Image, List, Value

    grain = {"kind": Value("string"), "text": Value("string")}
    text = dict.fromkeys(("unit", "qid", "text"), Value("string"))
    rows = [
        {
            "unit": unit,
            "qid": q.qid,
            "text": q.text,
            "image": {"bytes": bench.image_path(q.image).read_bytes(), "path": q.image} if q.image else None,
            "grains": [{"kind": kind, "text": text} for kind, text in mbeir.grains(q)],
            "positives": list(q.positives),
        }
        for unit in bench.units("test")
        for q in bench.queries(unit, "test")
    ]
    lists = {"grains": List(grain), "positives": List(Value("string"))}
    return Dataset.from_list(rows, features=Features(text | {"image": Image()} | lists))


def corpus(bench: mbeir.Root):
    """A row per candidate of each local pool: unit, did, modality, text, path of its image in `bench`."""
    from datasets import Dataset, Features, Value

    columns = ("did", "modality", "text", "image")
    rows = [
        {"unit": unit} | {name: getattr(candidate, name) for name in columns}
        for unit in bench.units("test")
        for candidate in bench.pool(unit, "test")
    ]
    return Dataset.from_list(rows, features=Features(dict.fromkeys(("unit", *columns), Value("string"))))


def card(
    bench: mbeir.Root,
    settings: Settings,
    counts: pd.DataFrame,
    agreement: Mapping[str, object],
) -> str:
    """The data card: how the benchmark was made, who checked it, and under which licence its images are."""
    own, images = settings.mrbench, bench.folder / "mbeir_images"
    sizes = [path.stat().st_size for path in images.rglob("*") if path.is_file()]
    if own.annotator.kind == "exact":
        annotator = "The grains come with the data; no model guessed them."
    else:
        annotator = (
            f"Annotated by {own.annotator.model} ({own.annotator.kind}, greedy, at most "
            f"{own.annotator.max_tokens} tokens); "
            f"sha256 of prompt and answer form: {annotate.prompt_hash()}. Queries "
            "whose answer could not be read are not drawn."
        )
    checked = "Not verified: nobody has looked at the annotations of these queries."
    if agreement["checked"]:
        shares = {name: f"{100 * agreement[name]:.1f} %" for name in ("precision", "low", "high", "wanted")}
        checked = (
            f"A person accepted {agreement['accepted']} of {agreement['checked']} sampled queries: "
            f"{shares['precision']}, 95 % interval that holds at every look {shares['low']} to "
            f"{shares['high']}. Wanted: {shares['wanted']}; decision: {agreement['decision']}."
        )
    return CARD.format(
        data=settings.data.name,
        min_grains=own.min_grains,
        profile=settings.profile,
        share=int(counts["drawn"].min()),
        table=markdown_table(counts).strip(),
        annotator=annotator,
        verification=checked,
        images=len(sizes),
        megabytes=sum(sizes) / 1e6,
        licence=own.licence,
    )
