"""Annotators of grains: the data itself, a vision-language model loaded here, or one behind a server.

Answers of models are kept by the hash of what was asked, each written whole, so that a run that was killed
goes on and nothing is asked twice.

    annotate = annotator(settings, root, cache)
    grains = annotate(queries)  # per query [("entity", "dog"), ...], or None where the answer could not be
    read
"""

from __future__ import annotations

import base64
import functools
import http.client
import io
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from elva_core import files
from elva_core.config import AnnotatorSettings, ProfileError, Section, Settings
from elva_core.data import mbeir
from elva_core.data.images import open_image
from elva_core.values import model_source

log = logging.getLogger("elva")

Grains = list[tuple[str, str]]  # (kind, text), for instance ("entity", "dog")
Annotator = Callable[[Sequence[mbeir.Query]], list[Grains | None]]
Turn = tuple[str, str, Path | None]  # role, text, image
# talks -> (place of the talk, answer), as they come; None is no answer
Ask = Callable[[Sequence[list[Turn]]], Iterator[tuple[int, str | None]]]

PROMPT = """A search query is {content}. Which grains does it have? \
A grain is an atomic unit of meaning that the answer must match:
an entity (person, animal, thing, place), an attribute (colour, number, size, material, state), \
an action, or a relation between entities.
List each grain once, in the order of the query, without overlaps. {quote}
Answer with JSON only, in this form: {{"grains": [{{"kind": "entity", "text": "dog"}}, \
{{"kind": "attribute", "text": "brown"}}]}}
The kinds are entity, attribute, action and relation."""
CONTENT = {
    "text": "a text",
    "image": "the image above",
    "image,text": "the image above together with a text that changes or asks about it",
}
QUOTE = {
    "text": "Quote each grain word for word from the text.",
    "image": "Name each grain in one to three words.",
    "image,text": "Quote the grains of the text word for word; "
    "name those of the image that must be kept in one to three words.",
}
REPAIR = "This answer cannot be used: {reason}. Answer again, with JSON only, in the form that was asked for."
PAUSE = 1.0  # seconds before a failed request is sent again; doubles each time


class Grain(Section):
    kind: Literal["entity", "attribute", "action", "relation"]
    text: str


class Answer(Section):
    """Form of a model's answer. A server gets it as a JSON schema; every answer is read by it."""

    grains: tuple[Grain, ...]


def annotator(settings: Settings, root: mbeir.Root, cache: Path) -> Annotator:
    """The annotator of a profile.

    Args:
        cache: folder of the answers of models; the exact annotator needs none.
    """
    own = settings.mrbench.annotator
    if own.kind == "exact":
        return exact
    ask = served(own) if own.kind == "openai" else loaded(own, settings.dtype, settings.device)
    return functools.partial(answered, settings=own, root=root, ask=ask, cache=cache)


def exact(queries: Sequence[mbeir.Query]) -> list[Grains | None]:
    """The grains that the data carries."""
    return [mbeir.grains(q) for q in queries]


def prompt_hash() -> str:
    """Changes with every word that a model is sent besides the query."""
    return files.digest(PROMPT, CONTENT, QUOTE, REPAIR, Answer.model_json_schema(), length=32)


def answered(
    queries: Sequence[mbeir.Query], *, settings: AnnotatorSettings, root: mbeir.Root, ask: Ask, cache: Path
) -> list[Grains | None]:
    """Grains by a model; asks only for what the cache lacks, and for queries of one content once.

    An answer that cannot be read is asked for again with the reason, `settings.retries` times, then kept as
    unreadable. A query that got no answer at all is unreadable, too, but not kept: the next run asks again.
    """
    cache.mkdir(parents=True, exist_ok=True)
    kept = [cache / f"{_key(query, settings, root)}.json" for query in queries]
    missing = {file: query for file, query in zip(kept, queries, strict=True) if not file.is_file()}
    talks = {}
    for file, query in missing.items():
        talks[file] = [("user", request(query), root.image_path(query.image) if query.image else None)]
    for attempt in range(settings.retries + 1):
        order, again = list(talks), {}
        for place, text in ask(list(talks.values())):
            file = order[place]
            if text is None:
                continue
            _, reason = _read(text, missing[file])
            if reason and attempt < settings.retries:
                repair = ("user", REPAIR.format(reason=reason), None)
                again[file] = [talks[file][0], ("assistant", text, None), repair]
                continue
            if reason:
                log.warning("annotator: query %s: %s; counted as unreadable", missing[file].qid, reason)
            answer = {"answer": text, "model": settings.model, "tries": attempt + 1}
            files.write_whole(file, json.dumps(answer, indent=1) + "\n")
        talks = again
        if not talks:
            break
    return [
        _read(json.loads(file.read_text(encoding="utf-8"))["answer"], query)[0] if file.is_file() else None
        for file, query in zip(kept, queries, strict=True)
    ]


def request(query: mbeir.Query) -> str:
    """The request to a model about a query; the image, if there is one, stands before it."""
    frame = PROMPT.format(content=CONTENT[query.modality], quote=QUOTE[query.modality])
    return f"{frame}\nThe text: {query.text}" if query.text else frame


def parse(text: str, query: mbeir.Query) -> Grains:
    """Grains of an answer, each text once; words around the JSON are skipped.

    Raises:
        ValueError: no JSON of this form, a grain without text, or one that a text query does not contain; in
            words a model can act on.
    """
    try:
        answer = Answer.model_validate_json(text[text.find("{") : text.rfind("}") + 1])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}") from None
    grains: dict[str, tuple[str, str]] = {}
    whole = " ".join((query.text or "").split()).casefold()
    for grain in answer.grains:
        words = " ".join(grain.text.split()).strip(".,;:!? ")
        if not words:
            raise ValueError("a grain has no text")
        if query.modality == "text" and words.casefold() not in whole:
            raise ValueError(f'the grain "{words}" is not word for word in the text')
        grains.setdefault(words.casefold(), (grain.kind, words))
    return list(grains.values())


def served(settings: AnnotatorSettings) -> Ask:
    """Asks an OpenAI-compatible server, `settings.batch` requests at once.

    Raises:
        ProfileError: no server there, a wrong key, an unknown model; one bad query never ends a run.
    """

    def ask(talks: Sequence[list[Turn]]) -> Iterator[tuple[int, str | None]]:
        pool = ThreadPoolExecutor(settings.batch)
        try:
            jobs = {pool.submit(_post, settings, talk): place for place, talk in enumerate(talks)}
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        finally:
            pool.shutdown(cancel_futures=True)

    return ask


def loaded(settings: AnnotatorSettings, dtype: str, device: str) -> Ask:
    """Asks a model of transformers, greedily, `settings.batch` queries at once; loaded when first asked."""

    @functools.cache
    def parts():
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from elva_core.models.arithmetic import ATTENTION  # without cuDNN's, which spoils decoding

        source = model_source(settings.model)
        processor = AutoProcessor.from_pretrained(source)
        processor.tokenizer.padding_side = "left"  # an answer starts where its prompt ends
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, attn_implementation=ATTENTION
        )
        return model.to(device).eval(), processor

    def ask(talks: Sequence[list[Turn]]) -> Iterator[tuple[int, str | None]]:
        model, processor = parts() if talks else (None, None)
        for start in range(0, len(talks), settings.batch):
            part = talks[start : start + settings.batch]
            chats = [_messages(talk) for talk in part]
            prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
            images = [open_image(image) for talk in part for *_, image in talk if image]
            inputs = processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
            inputs = inputs.to(device)
            rows = model.generate(**inputs, max_new_tokens=settings.max_tokens, do_sample=False)
            rows = rows[:, inputs["input_ids"].shape[1] :]
            yield from enumerate(processor.tokenizer.batch_decode(rows, skip_special_tokens=True), start)

    return ask


def _messages(
    talk: Sequence[Turn], picture: Callable[[Path], dict] = lambda path: {"type": "image"}
) -> list[dict]:
    """Chat messages; `picture` makes the part that stands for an image."""
    return [
        {"role": role, "content": [*([picture(image)] if image else []), {"type": "text", "text": text}]}
        for role, text, image in talk
    ]


def _data_url(path: Path) -> dict:
    """The pixels that a model loaded here would see, inside the message."""
    file = io.BytesIO()
    open_image(path).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def _post(settings: AnnotatorSettings, talk: Sequence[Turn]) -> str | None:
    """The text of one answer; None if this query got none in `retries` + 1 requests.

    Not by huggingface_hub's InferenceClient: it turns the JSON schema into a format that OpenAI's servers do
    not know, gives any server the token that `hf auth login` saved, and refuses a server of one's own under
    HF_HUB_OFFLINE=1.
    """
    schema = {"name": "grains", "strict": True, "schema": Answer.model_json_schema()}
    body = {"model": settings.model, "messages": _messages(talk, _data_url), "temperature": 0}
    body["max_tokens"] = settings.max_tokens
    body["response_format"] = {"type": "json_schema", "json_schema": schema}
    headers = {"Content-Type": "application/json"}
    if settings.key_variable:
        if settings.key_variable not in os.environ:
            lack = f"the environment has no {settings.key_variable}; export it first"
            raise ProfileError(f"mrbench.annotator.key_variable: {lack}")
        headers["Authorization"] = f"Bearer {os.environ[settings.key_variable]}"
    url = f"{settings.base_url.rstrip('/')}/chat/completions"
    post = urllib.request.Request(url, json.dumps(body).encode(), headers)
    reason: Exception | str = ""
    for attempt in range(settings.retries + 1):
        pause = PAUSE * 2**attempt
        try:
            with urllib.request.urlopen(post, timeout=settings.timeout) as reply:
                return json.load(reply)["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.read(300).decode(errors='replace')}"
            if error.code in (401, 403, 404):
                refusal = f"{url} refuses model {settings.model}: {reason}"
                raise ProfileError(f"{refusal}; correct mrbench.annotator") from None
            if error.code != 429 and error.code < 500:
                break  # the same request would be refused again
            seconds = error.headers.get("Retry-After", "")
            pause = max(pause, float(seconds)) if seconds.isdecimal() else pause
        except urllib.error.URLError as error:
            if attempt == settings.retries:
                advice = "start the server, or correct mrbench.annotator"
                raise ProfileError(f"{url} cannot be reached ({error.reason}); {advice}") from None
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            # cut off, too late, or no such answer
            reason = f"{type(error).__name__} {error}"
        if attempt < settings.retries:
            time.sleep(pause)
    log.warning("annotator: no answer from %s: %s", url, reason)
    return None


def _key(query: mbeir.Query, settings: AnnotatorSettings, root: mbeir.Root) -> str:
    image = files.file_hash(root.image_file(query.image)) if query.image else None
    model = (settings.kind, settings.model, settings.max_tokens)
    return files.digest(prompt_hash(), *model, query.modality, query.text, image, length=32)


def _read(text: str, query: mbeir.Query) -> tuple[Grains | None, str]:
    """Grains and "", or None and why the answer cannot be read."""
    try:
        return parse(text, query), ""
    except ValueError as error:
        return None, str(error)
