"""What `plan` knows besides a profile: GPUs, sizes of models, counts of data sets, assumptions (params/plan.yaml).

Files on this machine come before the table: config.json of the backbone, the lines of the data.

    table = known()
    dataset(settings.load("qwen2vl-2b"), table).units["cirr_task7"].pool
"""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from elva_core import artifacts, mbeir
from elva_core.settings import PARAMS, ProfileError, Section, Settings
from elva_core.sizes import Sizes, of_config, of_tiny


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
    union_rows: int = 0
    train_pool: int = 0
    collection: int = 0
    units: dict[str, Unit]


class Annotation(Section):
    model: str
    new_tokens: int
    batch: int


class Known(Section):
    """params/plan.yaml."""

    gpus: dict[str, Gpu]
    default_gpu: dict[str, str]
    assumed: Assumed
    architectures: dict[str, dict]
    tiny_tokens: int
    evaluated_models: int
    annotation: Annotation
    datasets: dict[str, Dataset]


def known() -> Known:
    path = PARAMS / "plan.yaml"
    try:
        return Known.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ProfileError(f"{path}: " + "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from None


def backbone(settings: Settings, table: Known) -> Sizes:
    if settings.backbone.path:
        return architecture(settings.backbone.path, table)
    return of_tiny(settings.backbone.tiny, table.tiny_tokens)


def architecture(name: str, table: Known) -> Sizes:
    """Sizes from config.json of a folder or of the hub's copy on this machine, else from params/plan.yaml.

    Raises:
        ProfileError: neither has it, or it is no Qwen2-VL.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except OSError:
        if name not in table.architectures:
            raise ProfileError(
                f"no config.json of {name} on this machine and no entry in {PARAMS / 'plan.yaml'}: architectures; add its sizes there"
            ) from None
        return Sizes(**table.architectures[name])
    return of_config(config)


def dataset(settings: Settings, table: Known) -> Dataset:
    """The entry of the profile's data in params/plan.yaml, with the counts of the files where they are on this machine."""
    name, emoji = settings.data.name, settings.data.emoji
    if name not in table.datasets:
        raise ProfileError(f"no data set {name!r} in {PARAMS / 'plan.yaml'}; it has {', '.join(table.datasets)}; add an entry")
    data = table.datasets[name]
    if emoji:
        data = _asked_for(data, settings)
    folder = artifacts.stage_folder(settings.profile, "10_prepare_data")
    root = mbeir.Root(Path(settings.data.root or folder / "root"))
    if not root.union_train_path().is_file():
        return data
    nli = Path(settings.data.nli or folder / "nli.csv")
    mean = Unit(query=_mean(data, "query"), candidate=_mean(data, "candidate"), train=1)
    units = {
        unit: data.units.get(unit, mean).model_copy(
            update={"test": lines(root.query_path(unit, "test")), "pool": lines(root.pool_path(unit, "test"))}
        )
        for unit in root.units("test")
    }
    changes = {"units": units, "union_rows": lines(root.union_train_path()), "train_pool": lines(root.pool_path("", "train", "global"))}
    return data.model_copy(update=changes | ({"nli_rows": lines(nli) - 1} if nli.is_file() else {}))


def _asked_for(data: Dataset, settings: Settings) -> Dataset:
    """Counts of the embedded collection as its settings ask for them: upper bounds, for some units hold fewer."""
    emoji = settings.data.emoji
    size, limits = emoji.size or data.collection, emoji.queries_per_unit
    drawn = {split: size * len(vendors) for split, vendors in emoji.vendors.items()}
    update = {"train": max(limits["train"], emoji.up_sample), "test": limits["test"], "pool": drawn["test"]}
    units = {name: unit.model_copy(update=update) for name, unit in data.units.items()}
    texts = 2 * size  # names and translations; the drawings stand alone and captioned
    changes = {"units": units, "union_rows": update["train"] * len(units), "train_pool": 2 * drawn["train"] + texts}
    return data.model_copy(update=changes)


def _mean(data: Dataset, which: str) -> float:
    return sum(getattr(u, which) for u in data.units.values()) / len(data.units)


def lines(path: Path) -> int:
    """Lines of a file, 0 if there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
