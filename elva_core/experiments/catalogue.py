"""What `plan` knows besides a profile: GPUs, sizes of models, counts of data sets, assumptions (params/plan.yaml).

Counts come from the files of the data where they are on this machine.

    table = known()
    dataset(settings.load("qwen2vl-2b"), table).units["cirr_task7"].pool
"""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from elva_core.config import PARAMS, ProfileError, Section, Settings
from elva_core.data import mbeir
from elva_core.experiments import stages
from elva_core.experiments.sizes import Sizes, of_config


class Gpu(Section):
    memory: float  # GB
    tflops: float  # dense bfloat16
    bandwidth: float  # GB/s


class Assumed(Section):
    utilisation: float
    bandwidth_share: float
    seconds_per_layer: dict[str, float]
    memory_share: float
    host_tflops: float
    seconds_per_megapixel: float
    logit_copies: int
    chat_tokens: dict[str, float]
    characters_per_token: float


class Unit(Section):
    """Counts of one unit, and mean tokens of a query with its instruction and of a candidate's text."""

    train: int = 0
    test: int = 0
    pool: int = 0
    query: float
    candidate: float


class Dataset(Section):
    image_pixels: float
    padding: float  # tokens of a padded batch over tokens
    nli_rows: int
    nli_tokens: float
    images_gb: float
    multi_grain: float = 1.0  # share of the queries of MRBench's units
    union_rows: int = 0
    train_pool: int = 0
    collection: int = 0
    units: dict[str, Unit]


class Known(Section):
    """params/plan.yaml."""

    gpus: dict[str, Gpu]
    default_gpu: dict[str, str]
    assumed: Assumed
    architectures: dict[str, dict]
    tiny_tokens: int
    evaluated_models: int
    datasets: dict[str, Dataset]


def known() -> Known:
    path = PARAMS / "plan.yaml"
    try:
        return Known.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ProfileError(
            f"{path}: " + "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        ) from None


def architecture(name: str, table: Known) -> Sizes:
    """Sizes from params/plan.yaml, else from config.json of a folder or of the hub's copy on this machine.

    Raises:
        ProfileError: neither has it, or it is no Qwen2-VL.
    """
    if name in table.architectures:
        return Sizes(**table.architectures[name])
    from transformers import AutoConfig

    try:
        return of_config(AutoConfig.from_pretrained(name, local_files_only=True))
    except OSError:
        raise ProfileError(
            f"no entry for {name} in {PARAMS / 'plan.yaml'}: architectures, and no config.json on this machine; add its sizes there"
        ) from None


def dataset(settings: Settings, table: Known) -> Dataset:
    """The entry of the profile's data in params/plan.yaml, with the counts of the files where they are on this machine."""
    name, emoji = settings.data.name, settings.data.emoji
    if name not in table.datasets:
        raise ProfileError(
            f"no data set {name!r} in {PARAMS / 'plan.yaml'}; it has {', '.join(table.datasets)}; add an entry"
        )
    data = table.datasets[name]
    if emoji:
        data = _asked_for(data, settings)
    folder = stages.stage_folder(settings.profile, "10_prepare_data")
    root = mbeir.Root(Path(settings.data.root or folder / "root"))
    if not root.union_train_path().is_file():
        return data
    nli = Path(settings.data.nli or folder / "nli.csv")
    known_units = data.units.values()
    mean = Unit(
        train=1,
        **{
            side: sum(getattr(u, side) for u in known_units) / len(known_units)
            for side in ("query", "candidate")
        },
    )
    units = {}
    for unit in root.units("test"):
        counts = {"test": lines(root.query_path(unit, "test")), "pool": lines(root.pool_path(unit, "test"))}
        units[unit] = data.units.get(unit, mean).model_copy(update=counts)
    changes = {
        "units": units,
        "union_rows": lines(root.union_train_path()),
        "train_pool": lines(root.pool_path("", "train", "global")),
    }
    return data.model_copy(update=changes | ({"nli_rows": lines(nli) - 1} if nli.is_file() else {}))


def _asked_for(data: Dataset, settings: Settings) -> Dataset:
    """Counts of the embedded collection as its settings ask for them: upper bounds, for some units hold fewer."""
    emoji = settings.data.emoji
    size, limits = emoji.size or data.collection, emoji.queries_per_unit
    drawn = {split: size * len(vendors) for split, vendors in emoji.vendors.items()}
    update = {"train": max(limits["train"], emoji.up_sample), "test": limits["test"], "pool": drawn["test"]}
    units = {name: unit.model_copy(update=update) for name, unit in data.units.items()}
    texts = 2 * size  # names and translations; the drawings stand alone and captioned
    changes = {
        "units": units,
        "union_rows": update["train"] * len(units),
        "train_pool": 2 * drawn["train"] + texts,
    }
    return data.model_copy(update=changes)


def lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
