"""Multi-seed ablation study: arms (changes of a profile) trained and measured one at a time, resumable.

Data and backbone are those of the chain and the same for every seed, as a downloaded copy would be; stages 1
to 3 are trained anew per seed. An arm that is measured under the same values is never run again.

    study.run(settings, root, triplets, bench, backbone, folder, work)
    table = study.read(folder, settings)
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from elva_core import files
from elva_core.config import ProfileError, Settings
from elva_core.data import mbeir
from elva_core.evaluation import benchmark, grains, headroom, throughput
from elva_core.experiments import jobs, lock
from elva_core.experiments.arms import Arm, arms, planned
from elva_core.experiments.jobs import backbone_hash
from elva_core.experiments.keys import read_manifest
from elva_core.models import encoder
from elva_core.values import model_source

log = logging.getLogger("elva")
TIMED = 32  # queries of a timed arm whose seconds are measured
NOT_RECORDED = "not recorded"  # the hash of a backbone, in results that are older than its record


@dataclass(frozen=True)
class Study:
    """Everything that was measured, as long tables.

    A row is an arm and seed (runs), with each query of MRBench (hits) and of the units that an arm names
    (units), each grain of a query (distances), each kind of grain (errors).
    """

    runs: pd.DataFrame
    hits: pd.DataFrame
    units: pd.DataFrame
    distances: pd.DataFrame
    errors: pd.DataFrame


def fingerprint(settings: Settings, arm: Arm, seed: int, backbone: str) -> str:
    """Hash of the values that the result of an arm depends on, besides the code."""
    used = {"data", "encoder", "mrbench", "dtype", "device"}
    used |= {"stage1", "stage2"} if arm.start != "backbone" else set()
    used |= {arm.trains} if arm.trains != "nothing" else set()
    used |= {"stage3"} if arm.trains == "control" else set()  # its queries and negatives
    used |= {"backbone"} if "backbone" in arm.changes else set()
    # what is said about the benchmark, and an annotator that adds nothing, do not change what is measured
    unused = {"precision", "licence"}
    unused |= {"annotator"} if settings.mrbench.annotator.kind == "exact" else set()
    values = _dumped(settings, used, exclude={"mrbench": unused})
    units = [*settings.study.units, *arm.units]
    asked = [units] if units else []
    return files.digest(values, arm.start, arm.template, seed, Path(backbone).name, *asked)


def _dumped(settings: Settings, sections: set[str], exclude: dict | None = None) -> dict:
    """Values of some sections; those that are the default are left out, so that a new one changes no hash."""
    return settings.model_dump(mode="json", include=sections, exclude=exclude, exclude_defaults=True)


def result_folder(folder: Path, name: str, seed: int) -> Path:
    return folder / name.replace(" ", "-").replace(",", "") / f"seed-{seed}"


def missing(settings: Settings, backbone: str, folder: Path) -> list[tuple[str, Arm, int]]:
    """The planned arms without a result of these values."""
    marks = {place: record["fingerprint"] for place, record in _manifests(folder, settings).items()}
    return [
        (name, arm, seed)
        for name, arm, seed in planned(settings)
        if marks.get((name, seed)) != fingerprint(arm.applied(settings), arm, seed, backbone)
    ]


def _manifests(folder: Path, settings: Settings) -> dict[tuple[str, int], dict]:
    """The manifests of the planned arms that have a result, by (name, seed), in the order of the plan."""
    places = [(name, seed) for name, _, seed in planned(settings)]
    paths = {place: result_folder(folder, *place) / "manifest.json" for place in places}
    return {place: json.loads(path.read_text()) for place, path in paths.items() if path.is_file()}


def recorded_backbone(folder: Path, settings: Settings) -> str:
    """sha256 of the weights that the results in `folder` started from; several are joined by commas.

    Returns:
        NOT_RECORDED for results of before it was written down, and where there is no result.
    """
    records = _manifests(folder, settings).values()
    hashes = {record.get("backbone_sha256", NOT_RECORDED) for record in records}
    return ", ".join(sorted(hashes)) or NOT_RECORDED


def chain_backbone(trained: Path) -> str:
    """sha256 of the weights that the chain's contrastive stage, in folder `trained`, started from.

    Returns:
        NOT_RECORDED for a stage of before it was written down, and where there is none.
    """
    return (read_manifest(trained) or {}).get("backbone_sha256", NOT_RECORDED)


def run(
    settings: Settings,
    root: mbeir.Root,
    triplets: Path,
    bench: mbeir.Root,
    backbone: str,
    folder: Path,
    work: Path,
) -> None:
    """Trains and measures what is missing; each arm's folder appears whole, so a killed study goes on.

    Args:
        backbone: folder that every seed starts from. folder: results, one folder per arm and seed.
        work: checkpoints and stage-2 models, which results do not need.

    Raises:
        ValueError: `folder` holds results of another backbone, with which nothing may be compared.
    """
    weights = backbone_hash(backbone)
    refuse_another_backbone(settings, folder, weights)
    todo = missing(settings, backbone, folder)
    for place, (name, arm, seed) in enumerate(todo, start=1):
        log.info("study %d of %d: %s, seed %d", place, len(todo), name, seed)
        began, changed = time.perf_counter(), arm.applied(settings)
        mark = fingerprint(changed, arm, seed, backbone)
        scratch = work / files.digest(mark, weights)  # checkpoints of other weights are not gone on with

        # where the arm starts
        parts = ("data", "stage1", "stage2", *(["encoder"] if arm.start == "own stage 2" else []))
        earlier = {part: arm.changes[part] for part in parts if part in arm.changes}
        start = model_source(changed.backbone.path) if "backbone" in arm.changes else backbone
        if arm.start != "backbone":
            start = retriever(settings.changed(earlier), root, triplets, start, seed, work)

        # what it trains
        rows, trained = [], start
        if arm.trains != "nothing":
            # arms of one start differ in their training only; what they share is mined once
            stage3 = changed.stage3
            drawn = (stage3.queries, stage3.negatives.model_dump())
            shared = files.digest(backbone_hash(start), changed.encoder.model_dump(), *drawn, seed)
            mined = work / f"negatives-{shared}.safetensors"
            job = jobs.Job(arm.trains, changed, seed, root, triplets, str(start), scratch, mined)
            jobs.launch(jobs.run, job)
            rows, trained = jobs.history(job), job.model

        # what it is worth, in a folder that appears whole
        model = encoder.load(trained, changed.encoder, dtype=changed.dtype, device=changed.device)
        target = result_folder(folder, name, seed)
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if rows:
            pd.DataFrame(rows).to_csv(partial / "history.csv", index=False, float_format="%.4g")
        record = measure(model, arm, changed, root, bench, partial)
        record |= {"arm": name, "group": arm.group, "seed": seed, "fingerprint": mark, "steps": len(rows)}
        record["backbone_sha256"] = weights
        record["train_s"] = round(sum(row["step_time"] for row in rows), 1)
        record["wall_s"] = round(time.perf_counter() - began, 1)
        files.write_whole(partial / "manifest.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_another_backbone(settings: Settings, folder: Path, weights: str) -> None:
    """Nothing may be compared with results of another backbone, or of one that was not recorded.

    Args:
        weights: sha256 of the backbone.

    Raises:
        ValueError: `folder` holds such results.
    """
    before = recorded_backbone(folder, settings)
    if _manifests(folder, settings) and before != weights:
        raise ValueError(
            f"{folder} holds results of a backbone with sha256 {before}; the chain's has {weights}. "
            "Move that folder away, or give the old backbone"
        )


def retriever(
    settings: Settings, root: mbeir.Root, triplets: Path, backbone: str, seed: int, work: Path
) -> Path:
    """Folder of the stage-2 model of a seed, trained once per backbone and values that matter."""
    values = _dumped(settings, {"data", "encoder", "stage1", "stage2", "dtype", "device"})
    folder = work / f"stage2-{files.digest(values, seed, backbone_hash(backbone))}"
    if (folder / "elva.json").is_file():
        return folder
    partial, start = folder.with_name(folder.name + ".partial"), backbone
    for stage in ("stage1", "stage2"):
        job = jobs.Job(stage, settings, seed, root, triplets, str(start), partial / stage, partial / "none")
        jobs.launch(jobs.run, job)
        start = job.model
    start.rename(folder)
    shutil.rmtree(partial)
    return folder


def measure(
    model: encoder.Encoder, arm: Arm, settings: Settings, root: mbeir.Root, bench: mbeir.Root, folder: Path
) -> dict[str, float]:
    """Writes hits.csv and units.csv (rank of each query's first positive), distances.csv and errors.csv.

    Returns:
        {"hit@5"}: the average over MRBench's tasks; of an arm that writes summaries "reading"
        (`headroom.reading`), where they are kept; of a timed arm queries per second, one at a time, and the
        passes of the language model that a query waits for: 2 where it writes nothing.
    """
    measured = benchmark.measure(
        arm.group, model, root, bench, settings.evaluation, seed=0, template=arm.template, pools=()
    )
    measured.hits[["unit", "qid", "unseen", "rank"]].to_csv(folder / "hits.csv", index=False)
    names = root.matching([*settings.study.units, *arm.units], "test")
    others = [measured.searcher.evaluate(name) for name in names]
    rows = [(r.unit, q.qid, ranks[0]) for r in others for q, ranks in zip(r.queries, r.ranks, strict=True)]
    if rows:
        pd.DataFrame(rows, columns=["unit", "qid", "rank"]).to_csv(folder / "units.csv", index=False)
    unit = bench.units("test")[0]
    queries = grains.ablatable(bench.queries(unit, "test"))[: settings.evaluation.grain_queries]
    distances = grains.distances(measured.searcher, queries, unit)
    distances.to_csv(folder / "distances.csv", index=False, float_format="%.5f")
    errors = pd.concat([grains.errors(result) for result in measured.bench.values()])
    missed = errors[errors["missed"]].groupby(["unit", "kind"])["wrong"].agg(["sum", "count"])
    missed.reset_index().to_csv(folder / "errors.csv", index=False)
    record = {"hit@5": float(measured.hits.groupby("unit")["hit@5"].mean().mean())}
    reading = headroom.reading(measured.searcher, bench) if arm.template == "summary" else None
    if reading is not None:
        record["reading"] = reading
    if arm.timed:
        items = [measured.searcher.query(q, name) for name, r in measured.bench.items() for q in r.queries]
        ways, sides = {"": throughput.Way(model, arm.template)}, {"queries": items}
        (speed,) = throughput.measure(ways, sides, batches=[1], least=TIMED).to_dict("records")
        record |= {"queries_s": speed["per second"], "query_passes": speed["forwards"]}
    return record


def complete(settings: Settings, root: mbeir.Root, triplets: Path, bench: mbeir.Root, trained: Path) -> Study:
    """The results of the profile's arms; missing ones are run first if the profile says so, else counted.

    Args:
        trained: the chain's 30_pretrain_contrastive, which names the backbone.
    """
    (folder, work), backbone = folders(settings.profile), backbone_of(trained)
    if settings.study.in_chain:
        with lock.held(f"{settings.profile}/study"):  # other seeds' chains show the same study
            run(settings, root, triplets, bench, backbone, folder, work)
    elif todo := missing(settings, backbone, folder):
        lacking = f"{len(todo)} of {len(planned(settings))} trainings have no result of these values"
        log.warning("%s; run: %s", lacking, command(settings.profile))
    return read(folder, settings)


def coverage(done: Study, settings: Settings) -> str:
    """Numbers of planned arms and trainings with a result, in words, with the command of the others."""
    plan, there = planned(settings), done.runs[["arm", "seed"]]
    arms_there, arms_planned = there["arm"].nunique(), len({name for name, *_ in plan})
    rest = f"; the others: {command(settings.profile)}" if len(there) < len(plan) else ""
    return f"{arms_there} of {arms_planned} arms have a result, {len(there)} of {len(plan)} trainings{rest}."


def command(profile: str) -> str:
    """Command that trains and measures the arms without a result."""
    return f"python -m elva_core study {profile}"


def folders(profile: str) -> tuple[Path, Path]:
    """Folders of a profile's study: its results; its checkpoints and stage-2 models."""
    return files.OUTPUTS / profile / "study", files.OUTPUTS / "cache/study"


def backbone_of(trained: Path) -> str:
    """The backbone that the chain's contrastive stage started from."""
    return (trained / "backbone.txt").read_text(encoding="utf-8").strip()


def read(folder: Path, settings: Settings) -> Study:
    """Every result of the profile's arms that is there.

    Raises:
        ProfileError: nothing has been measured yet; the message has the command.
    """
    manifests, known = _manifests(folder, settings), arms(settings)
    if not manifests:
        raise ProfileError(f"{folder} holds no result; run: {command(settings.profile)}")

    def table(kind: str) -> pd.DataFrame:
        """The files of one kind, of every arm and seed that has one, with arm, group and seed."""
        parts = []
        for name, seed in manifests:
            path = result_folder(folder, name, seed) / f"{kind}.csv"
            if path.is_file():
                rows = pd.read_csv(path, dtype={"qid": str})
                parts.append(rows.assign(arm=name, group=known[name].group, seed=seed))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    return Study(pd.DataFrame(manifests.values()), *map(table, ("hits", "units", "distances", "errors")))
