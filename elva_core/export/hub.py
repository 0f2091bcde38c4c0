"""A trained model with its model card, to a folder or to the hub.

push(Path("outputs/cpu/seed-17/40_finetune_rlvr/model"), "me/elva-emoji", profile=config.load("cpu"))
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from elva_core.config import EncoderSettings, Settings
from elva_core.tables import markdown_rows, read_table

PUBLISHED = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "README.md")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
VOCABULARIES = ("tokenizer.json", "vocab.json")  # hold every string there is, paths too
LOCAL_PATH = re.compile(
    r"""(?:^|[\s"'`(=])((?:~|/[\w.@+-]+)/[\w.@+/-]+|[A-Za-z]:\\+[^\s"'`]+|file:/+[^\s"'`]+)""", re.MULTILINE
)
TEMPLATE = Path(__file__).with_name("model_card.md")


class PublishError(ValueError):
    """A model that must not leave this machine as it is, or a target that cannot take it; with the remedy."""


def is_folder(target: str) -> bool:
    """Whether a target is a folder here and not a name on the hub."""
    return Path(target).expanduser().is_dir() or target.startswith((".", "/", "~"))


def push(
    model: Path,
    to: str,
    *,
    profile: Settings | None = None,
    results: Path | None = None,
) -> str:
    """Writes or uploads a trained model with its card. Nothing is written before all checks have passed.

    Args:
        model: a folder that `Encoder.save` wrote. Its README.md, if it has one, is the card; else it is made.
        to: an existing folder, a path that starts with . / or ~, or else a hub name like owner/model.
        profile: whose training values the card shows.
        results: results.csv of `evaluate`, or claims.csv of a report.

    Returns:
        where it is now.

    Raises:
        PublishError: no elva.json, pickled weights, a local path in what would be published, a target in use,
            or a hub that says no.
    """
    target = Path(to).expanduser()
    name = target.resolve().name if is_folder(to) else to
    with staged_copy(model) as staged:
        readme = staged / "README.md"
        if not readme.is_file():
            text = card(staged, name, profile=profile, results=results)
            readme.write_text(text, encoding="utf-8")
        refuse_local_paths(staged)
        return to_folder(staged, target) if is_folder(to) else _to_hub(staged, to)


@contextmanager
def staged_copy(model: Path) -> Iterator[Path]:
    """A temporary folder with the files of a model that are published.

    Raises:
        PublishError: the folder is none of ours, or has no safetensors, or pickled weights.
    """
    if not (model / "elva.json").is_file():
        raise PublishError(
            f"{model / 'elva.json'} is missing: push takes a folder that a training stage wrote"
        )
    if pickled := sorted(p.name for p in model.iterdir() if p.suffix in PICKLED):
        raise PublishError(
            f"{model}: {', '.join(pickled)} may run code when it is loaded; keep safetensors only"
        )
    files = sorted({path for pattern in PUBLISHED for path in model.glob(pattern)})
    if not any(p.suffix == ".safetensors" for p in files):
        raise PublishError(f"{model} has no weights (*.safetensors); train it, or save it again")
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "model"
        staged.mkdir()
        for path in files:
            shutil.copyfile(path, staged / path.name)
        yield staged


def refuse_local_paths(folder: Path) -> None:
    """A published file must not say where it was made. Raises PublishError with file, line and path."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".md", ".jinja") and path.name not in VOCABULARIES:
            text = path.read_text(encoding="utf-8")
            if found := LOCAL_PATH.search(text):
                line = text.count("\n", 0, found.start(1)) + 1
                raise PublishError(
                    f"{path.name}:{line} names a path of this machine, {found[1]}; remove it, "
                    "or save the model again"
                )


def card(
    model: Path,
    name: str,
    *,
    profile: Settings | None = None,
    results: Path | None = None,
    prompts: dict[str, str] | None = None,
) -> str:
    """The model card, README.md with its YAML header; arguments as `push` has them.

    Args:
        prompts: name -> text, as sentence-transformers keeps them; adds how that library uses the model.
    """
    from transformers import AutoProcessor  # heavy, like what it takes to read it

    from elva_core.models import chat
    from elva_core.models.encoder import SPLICED

    content = json.loads((model / "elva.json").read_text(encoding="utf-8"))
    kind = json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"]
    processor = AutoProcessor.from_pretrained(model)
    settings, parents = EncoderSettings.model_validate(content["encoder"]), content.get("parents", [])
    template = content.get("template", "summary")
    hub = next((parent["hub"] for parent in parents if "hub" in parent), None)
    data = ModelCardData(
        base_model=hub,
        library_name="transformers" if prompts is None else "sentence-transformers",
        license="apache-2.0",
        pipeline_tag="feature-extraction" if prompts is None else "sentence-similarity",
        tags=["elva", "multimodal-retrieval", "universal-retrieval", kind],
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        stage=content["stage"],
        pooling=content["pooling"],
        parents=parents,
        encoder=settings,
        ret_row=processor.tokenizer.convert_tokens_to_ids(settings.ret_token),
        template=template,
        dims=content.get("dims", []),
        end=processor.tokenizer.convert_ids_to_tokens(chat.end_of_turn(processor)),
        sized=settings.max_pixels and kind in SPLICED,
        **_expressions(settings, template),
        results=results_table(results) if results else "",
        values=training_values(profile) if profile else "",
        hub=hub,
        prompts=prompts,
        units=[key for key in prompts or () if key not in ("query", "document")],
        library=version("sentence-transformers") if prompts is not None else "",
    ).content


def _expressions(settings: EncoderSettings, template: str) -> dict[str, str]:
    """Python of the card: the system's turn, if there is one, and the text of the user's turn."""
    request = json.dumps(settings.eol_request if template == "eol" else settings.summary_request)
    written = f'f"{{text}}\\n" + {request}.replace("{{content}}", content)'
    if settings.system_prompt is None:
        return {"system": "", "turn": "", "written": written}
    turn = '{"role": "system", "content": [{"type": "text", "text": instruction}]}, '
    return {"system": json.dumps(settings.system_prompt), "turn": turn, "written": f"({written}).strip()"}


def training_values(profile: Settings) -> str:
    """The profile's values as YAML, without what only this machine knows."""
    shown = {"profile", "dtype", "encoder", "stage1", "stage2", "stage3", "control", "distil"}
    values = {"data": profile.data.name} | profile.model_dump(mode="json", include=shown)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def results_table(path: Path) -> str:
    """Hit rates in percent (claims: what the report shows first) with interval and n, as a Markdown table.

    Raises:
        PublishError: neither results.csv of `evaluate` nor claims.csv of a report.
    """
    table = read_table(path)
    if {"model", "unit", "pool", "metric", "value", "ci_low", "ci_high", "n"} <= set(table):
        rows = table[table["metric"].str.fullmatch(r"hit@\d+( dim \d+)?")]
        names, scale, form = ["model", "unit", "pool", "metric"], 100, "{:.1f}"
    elif {"claim", "dataset", "metric", "ours", "ci_low", "ci_high", "n", "verdict"} <= set(table):
        # the averages, gains and distances; units and other cut-offs stay in the file
        average = table["claim"].str.endswith("average") & (table["metric"] == "hit@5")
        gains = table["metric"].str.contains("gain of hit@5|distance")
        rows = table[table["ours"].notna() & (average | gains)].rename(columns={"ours": "value"})
        names, scale, form = ["claim", "dataset", "metric", "paper", "seeds", "verdict"], 1, "{:.3g}"
    else:
        raise PublishError(
            f"{path}: columns {list(table)} are neither those of results.csv nor of claims.csv"
        )
    value, low, high = ((scale * rows[name]).map(form.format) for name in ("value", "ci_low", "ci_high"))
    cells = rows[names].astype(object).where(rows[names].notna(), "").astype(str)
    cells["value [95 %]"] = value + (" [" + low + ", " + high + "]").where(rows["ci_low"].notna(), "")
    cells["n"] = rows["n"].map("{:.0f}".format).where(rows["n"].notna(), "")
    return markdown_rows(cells.columns, cells.itertuples(index=False))


def to_folder(staged: Path, target: Path) -> str:
    """The whole folder or nothing; only a model of ours, or an empty folder, is replaced."""
    with whole_folder(target, "elva.json") as partial:
        shutil.copytree(staged, partial)
    return str(target)


@contextmanager
def whole_folder(target: Path, mark: str) -> Iterator[Path]:
    """A place to make a folder in, which becomes `target` when all went well.

    Args:
        mark: the file by which a folder that may be replaced is known; an empty one may, too.

    Raises:
        PublishError: the target is in use, or this process stands in it.
    """
    target = target.resolve()
    if Path.cwd().is_relative_to(target):
        raise PublishError(f"{target} is the folder you are in, or above it; name one inside it, ./elva")
    if target.is_dir() and any(target.iterdir()) and not (target / mark).is_file():
        raise PublishError(f"{target} holds other files; name an empty or a new folder")
    if target.is_file():
        raise PublishError(f"{target} is a file; name a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    # names of this process's own: another one may export to the same place
    own = f".{target.name}.{os.getpid()}"
    partial, retired = (target.with_name(f"{own}.{word}") for word in ("partial", "retired"))
    try:
        yield partial
        if target.exists():
            target.rename(retired)
        partial.rename(target)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _to_hub(staged: Path, name: str) -> str:
    validate_repo_id(name)
    stage = json.loads((staged / "elva.json").read_text(encoding="utf-8"))["stage"]
    api, target = HfApi(), {"repo_id": name, "repo_type": "model"}
    try:
        repository = api.create_repo(**target, exist_ok=True)
        api.upload_folder(**target, folder_path=staged, commit_message=f"ELVA workbook, {stage}")
    except Exception as error:  # what the hub says, or what its transport says where there is no connection
        raise PublishError(
            f"the hub did not take {name}: {type(error).__name__}: {error}; log in with hf auth login, "
            f"or write ./{name} for a folder"
        ) from error
    return str(repository)
