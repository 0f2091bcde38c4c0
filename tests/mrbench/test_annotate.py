"""Annotators: a misbehaving server, a real Qwen2.5-VL without training, the cache, and what counts as readable."""

from __future__ import annotations

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from elva_core import config as settings
from elva_core import files
from elva_core.config import AnnotatorSettings, ProfileError
from elva_core.data import mbeir
from elva_core.models import small_models
from elva_core.mrbench import annotate

GOOD = '{"grains": [{"kind": "entity", "text": "dog"}, {"kind": "attribute", "text": "brown"}]}'
GRAINS = [("entity", "dog"), ("attribute", "brown")]


def text_query(number: int, text: str = "A brown dog.") -> mbeir.Query:
    return mbeir.Query(f"9:{number}", text, None, "text", ("9:1",), (), 0)


@pytest.fixture
def pictures(tmp_path):
    """A root with two images, and a query for each."""
    folder = tmp_path / "root"
    (folder / "mbeir_images").mkdir(parents=True)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / f"mbeir_images/{name}.png")
    queries = [mbeir.Query(f"9:{i}", None, f"mbeir_images/{n}.png", "image", ("9:1",), (), 3) for i, n in ((1, "a"), (2, "b"))]
    return mbeir.Root(folder), queries


class Reply:
    """What the server says to one request: an answer inside an envelope, or a raw body, or a delay."""

    def __init__(self, answer: str | None = None, *, status: int = 200, raw: str = "", delay: float = 0.0, headers: dict | None = None):
        envelope = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]})
        self.body, self.status, self.delay, self.headers = raw or envelope, status, delay, headers or {}


@contextmanager
def server(*replies: Reply, otherwise: str = GOOD):
    """An OpenAI-compatible server on a free port that gives `replies` in turn, then good ones. Yields (base URL, requests)."""
    waiting, seen, stop = list(replies), [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            reply = waiting.pop(0) if waiting else Reply(otherwise)
            stop.wait(reply.delay)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body.encode())

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", seen
    finally:
        stop.set()
        running.shutdown()
        running.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(annotate, "PAUSE", 0.001)


@pytest.fixture
def asking(smoke, root, tmp_path):
    """profile annotator(url, **values) with a cache of this test."""

    def make(url: str, data: mbeir.Root = root, **values) -> annotate.Annotator:
        own = {"kind": "openai", "model": "m", "base_url": url, "retries": 2, "timeout": 5} | values
        return annotate.annotator(smoke.changed({"mrbench": {"annotator": own}}), data, tmp_path / "answers")

    return make


def test_a_request_carries_model_schema_temperature_zero_key_and_the_image_before_the_question(asking, pictures, monkeypatch):
    monkeypatch.setenv("ELVA_TEST_KEY", "abc")
    data, (shown, _) = pictures
    with server() as (url, seen):
        assert asking(url, data, key_variable="ELVA_TEST_KEY", max_tokens=77, batch=1)([text_query(1), shown]) == [GRAINS] * 2
    sent, with_image = seen
    assert (sent["path"], sent["key"], sent["model"]) == ("/v1/chat/completions", "Bearer abc", "m")
    assert (sent["temperature"], sent["max_tokens"]) == (0, 77)
    assert sent["response_format"]["type"] == "json_schema"
    assert sent["response_format"]["json_schema"]["schema"] == annotate.Answer.model_json_schema()
    assert sent["messages"][0]["content"][-1]["text"].endswith("The text: A brown dog.")
    picture, question = with_image["messages"][0]["content"]
    assert picture == annotate._data_url(data.image_path(shown.image)) and "the image above" in question["text"]


def test_failed_and_late_requests_are_sent_again_until_one_succeeds(asking):
    failures = [Reply(status=500), Reply(status=429, headers={"Retry-After": "0"}), Reply(raw="not json"), Reply(raw='{"choices": []}')]
    for number, failure in enumerate([*failures, Reply(GOOD, delay=30)]):
        with server(failure) as (url, seen):
            assert asking(url, timeout=1)([text_query(1, f"A brown dog {number}.")]) == [GRAINS] and len(seen) == 2


def test_pauses_double_and_follow_the_server_where_it_asks_for_longer(asking, monkeypatch):
    pauses = []
    monkeypatch.setattr(annotate, "PAUSE", 1.0)
    monkeypatch.setattr(annotate.time, "sleep", pauses.append)
    with server(Reply(status=503), Reply(status=429, headers={"Retry-After": "7"}), Reply(status=503)) as (url, _):
        assert asking(url, retries=3)([text_query(1)]) == [GRAINS]
    assert pauses == [1.0, 7.0, 4.0]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("I see a dog.", "Invalid JSON"),
        ('{"grains": [{"kind": "entity", "text": "dog"', "Invalid JSON"),
        ('{"grains": [{"kind": "colour", "text": "brown"}]}', "grains.0.kind"),
        ('{"things": []}', "Field required"),
        ('{"grains": [{"kind": "entity", "text": " . "}]}', "no text"),
        ('{"grains": [{"kind": "entity", "text": "cat"}]}', "not word for word"),
    ],
)
def test_an_unreadable_answer_is_asked_for_again_with_the_reason(asking, bad, reason):
    with server(Reply(bad)) as (url, seen):
        assert asking(url)([text_query(1)]) == [GRAINS]
    first, again = (request["messages"] for request in seen)
    assert again[:1] == first and again[1] == {"role": "assistant", "content": [{"type": "text", "text": bad}]}
    assert reason in again[2]["content"][0]["text"]


def test_what_stays_unreadable_is_counted_once_and_not_asked_for_again(asking, tmp_path):
    with server(otherwise="no") as (url, seen):
        assert asking(url)([text_query(1)]) == [None] and len(seen) == 3
        assert asking(url)([text_query(1)]) == [None] and len(seen) == 3
    (kept,) = (tmp_path / "answers").iterdir()
    assert json.loads(kept.read_text()) == {"answer": "no", "model": "m", "tries": 3}


def test_a_query_the_server_refuses_ends_nothing_and_is_asked_again_next_time(asking):
    with server(Reply(status=400, raw="image too large")) as (url, seen):
        assert asking(url, batch=1)([text_query(1), text_query(2, "A dog, brown.")]) == [None, GRAINS] and len(seen) == 2
        assert asking(url)([text_query(1)]) == [GRAINS]


def test_a_server_that_is_not_there_or_refuses_everything_is_named(asking, monkeypatch):
    with server(Reply(status=404, raw="no model m")) as (url, _), pytest.raises(ProfileError, match=r"404 no model m; correct mrbench"):
        asking(url)([text_query(1)])
    with pytest.raises(ProfileError, match="cannot be reached"):
        asking(url)([text_query(1)])
    monkeypatch.delenv("ELVA_TEST_KEY", raising=False)
    with pytest.raises(ProfileError, match="no ELVA_TEST_KEY"):
        asking(url, key_variable="ELVA_TEST_KEY")([text_query(1)])


def test_many_requests_are_under_way_at_once_and_answers_go_to_their_queries(asking):
    together, most = threading.Barrier(4, timeout=5), []
    with server() as (url, seen), pytest.MonkeyPatch.context() as patched:

        def post(own, talk):
            most.append(together.wait())  # breaks unless four are there
            word = re.search(r"The text: A (\w+)", talk[0][1])[1]
            return f'{{"grains": [{{"kind": "entity", "text": "{word}"}}]}}'

        patched.setattr(annotate, "_post", post)
        words = ["cat", "dog", "cow", "fox", "owl", "bee", "ant", "eel"]
        found = asking(url, batch=4)([text_query(i, f"A {w}.") for i, w in enumerate(words, start=1)])
    assert found == [[("entity", w)] for w in words] and len(most) == 8 and not seen


def test_the_cache_spares_a_call_and_knows_model_prompt_text_and_image(asking, pictures, monkeypatch):
    data, (first, second) = pictures
    with server() as (url, seen):

        def calls(query, model="m") -> int:
            before = len(seen)
            asking(url, data, model=model)([query])
            return len(seen) - before

        assert [calls(first), calls(first), calls(second), calls(second)] == [1, 0, 1, 0]
        assert [calls(first, "other"), calls(first, "other")] == [1, 0]
        assert [calls(text_query(1)), calls(text_query(2)), calls(text_query(1, "A brown dog here."))] == [1, 0, 1]
        Image.new("RGB", (40, 30), "green").save(data.folder / first.image)
        assert [calls(first), calls(first)] == [1, 0]
        monkeypatch.setattr(annotate, "PROMPT", annotate.PROMPT + "\nBe brief.")
        assert [calls(first), calls(first)] == [1, 0]


def test_queries_of_one_content_are_asked_for_once(asking):
    with server() as (url, seen):
        assert asking(url)([text_query(1), text_query(2), text_query(3)]) == [GRAINS] * 3 and len(seen) == 1


def test_a_killed_run_keeps_whole_answers_and_goes_on(asking, interrupted, tmp_path):
    queries = [text_query(i, f"A brown dog {i}.") for i in range(1, 6)]
    with server() as (url, seen):
        with interrupted(files, "write_whole", 4):
            asking(url, batch=1)(queries)
        kept = sorted((tmp_path / "answers").iterdir())
        assert len(kept) == 3 and all(json.loads(p.read_text())["answer"] == GOOD for p in kept)
        before = len(seen)
        assert asking(url, batch=1)(queries) == [GRAINS] * 5 and len(seen) - before == 2


def test_repeated_grains_count_once_and_words_around_the_json_are_skipped():
    said = '```json\n{"grains": [{"kind": "entity", "text": "Dog"}, {"kind": "entity", "text": " dog. "}]}\n```'
    assert annotate.parse(said, text_query(1)) == [("entity", "Dog")]
    both = mbeir.Query("8:1", "Make it brown.", "x.png", "image,text", ("8:2",), (), 7)
    assert annotate.parse('{"grains": [{"kind": "entity", "text": "cat"}]}', both) == [("entity", "cat")]  # seen in the image


def test_the_annotator_section_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="base_url"):
        AnnotatorSettings(kind="openai", model="m")
    with pytest.raises(ValueError, match="kind exact needs no model"):
        AnnotatorSettings(kind="exact", model="m")


@pytest.fixture(scope="module")
def qwen25(model_folder, tmp_path_factory):
    """A tiny Qwen2.5-VL of the real class without training, saved as a pretrained folder."""
    sizes = settings.teaching("tiny").sizes.model_copy(update={"architecture": "qwen2_5_vl"})
    folder = tmp_path_factory.mktemp("qwen25")
    for part in small_models.build_from(str(model_folder), sizes, seed=5):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def local(smoke, pictures, qwen25, tmp_path):
    own = {"kind": "transformers", "model": str(qwen25), "batch": 2, "retries": 1, "max_tokens": 6}
    return annotate.annotator(smoke.changed({"mrbench": {"annotator": own}}), pictures[0], tmp_path / "answers")


def test_a_model_without_training_writes_nothing_readable_and_that_is_counted(local, pictures, tmp_path, monkeypatch):
    batches, original = [], Qwen2_5_VLForConditionalGeneration.generate
    monkeypatch.setattr(
        Qwen2_5_VLForConditionalGeneration, "generate", lambda self, **kw: batches.append(len(kw["input_ids"])) or original(self, **kw)
    )
    assert local([*pictures[1], text_query(3)]) == [None] * 3
    assert batches == [2, 1, 2, 1]  # each asked for again, in batches
    assert all(json.loads(p.read_text())["tries"] == 2 for p in (tmp_path / "answers").iterdir())


def test_a_query_gets_the_answer_in_a_batch_that_it_gets_alone(qwen25, pictures):
    talks = [[("user", "Hello", pictures[0].image_path(q.image))] for q in pictures[1]]
    talks += [[("user", text, None)] for text in ("A dog.", "A long question about the colour of a small animal in the grass.")]

    def said(batch: int) -> list[tuple[int, str | None]]:
        own = AnnotatorSettings(kind="transformers", model=str(qwen25), batch=batch, max_tokens=8)
        return list(annotate.loaded(own, "float32", "cpu")(talks))

    assert said(4) == said(1) and len(set(said(1))) == 4


def test_a_model_that_answers_well_is_read_in_the_order_of_the_queries(local, pictures, qwen25, monkeypatch):
    tokenizer = Qwen2_5_VLProcessor.from_pretrained(qwen25).tokenizer
    words, shapes = iter(["cat", "owl", "dog"]), []

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, **images):
        assert not do_sample and max_new_tokens == 6 and (attention_mask[:, -1] == 1).all()  # padded on the left
        shapes.append(images["pixel_values"].shape[0] if "pixel_values" in images else 0)
        said = [f'{{"grains": [{{"kind": "entity", "text": "{next(words)}"}}]}}' for _ in input_ids]
        rows = tokenizer(said, padding=True, padding_side="right", return_tensors="pt").input_ids
        return torch.cat([input_ids, rows], dim=1)

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "generate", generate)
    assert local([*pictures[1], text_query(3)]) == [[("entity", "cat")], [("entity", "owl")], [("entity", "dog")]]
    assert shapes[0] > 0 and shapes[1] == 0


def test_the_profiles_name_their_annotator(root, tmp_path):
    assert annotate.annotator(settings.load("cpu"), root, tmp_path) is annotate.exact
    paper = settings.load("qwen2vl-7b").mrbench
    assert paper.annotator.model == "Qwen/Qwen2.5-VL-7B-Instruct" and set(paper.units) < set(mbeir.OFFICIAL_UNITS)
