"""The server: OpenAI's own client against it, many clients at once, and requests that are wrong in every way."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from halfbyte.infer import Engine, SamplingParams
from halfbyte.infer.server import Limits, make_app
from halfbyte.models import HalfbyteConfig

FLOAT32 = HalfbyteConfig(block_size=32, compute_dtype=torch.float32)
JSON = {"Content-Type": "application/json"}
BODY = {"model": "tiny", "prompt": "abc", "temperature": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], "temperature": 0, "max_tokens": 9}


@pytest.fixture(scope="module")
def engine(tiny_llama):
    with Engine(tiny_llama, quantization=FLOAT32, slots=4, queue_limit=8) as engine:
        yield engine


@pytest.fixture
def client(engine):
    """An HTTP client on the application, without a socket; the engine outlives it."""
    from starlette.testclient import TestClient

    return TestClient(make_app(engine, "tiny", limits=Limits(body=5000, tokens=40)), raise_server_exceptions=False)


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_the_engines_and_streams_to_the_same(client, engine):
    (wanted,) = engine.generate(["abc"], SamplingParams(max_tokens=16))
    answer = client.post("/v1/completions", json=BODY).json()
    assert answer["choices"][0]["text"] == wanted.text
    assert answer["usage"]["completion_tokens"] == len(wanted.choices)
    assert answer["choices"][0]["finish_reason"] == wanted.finish
    body = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    pieces = events(client.post("/v1/completions", json=body))
    assert "".join(piece["choices"][0]["text"] for piece in pieces[:-1]) == wanted.text
    assert pieces[-1]["usage"]["completion_tokens"] == len(wanted.choices)
    assert pieces[-2]["choices"][0]["finish_reason"] == wanted.finish


def test_a_chat_is_rendered_by_the_template(client, engine):
    (wanted,) = engine.generate([CHAT["messages"]], SamplingParams(max_tokens=9))
    answer = client.post("/v1/chat/completions", json=CHAT).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": wanted.text}
    pieces = events(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == wanted.text


def test_several_prompts_and_several_answers_to_each(client):
    body = {**BODY, "prompt": ["a", "bc"], "n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 12}
    choices = client.post("/v1/completions", json=body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["text"] != choices[1]["text"]  # each has a seed of its own
    again = client.post("/v1/completions", json=body).json()["choices"]
    assert [c["text"] for c in again] == [c["text"] for c in choices]


def test_probabilities_in_both_shapes(client):
    answer = client.post("/v1/completions", json={**BODY, "logprobs": 2, "max_tokens": 3}).json()["choices"][0]
    probabilities = answer["logprobs"]
    ids = client.app.state.engine.generate(["abc"], SamplingParams(max_tokens=3))[0].choices
    texts = [client.app.state.engine.tokenizer.decode([choice.token]) for choice in ids]
    assert probabilities["tokens"] == texts
    assert probabilities["text_offset"] == [0, len(texts[0]), len(texts[0] + texts[1])]
    assert [max(top.values()) for top in probabilities["top_logprobs"]] == probabilities["token_logprobs"]
    chat = client.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 1}).json()
    for token in chat["choices"][0]["logprobs"]["content"]:
        assert token["top_logprobs"][0]["token"] == token["token"]
        assert bytes(token["bytes"]).decode() == token["token"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_token": 5}, "there is no parameter 'max_token'; did you mean 'max_tokens'?"),
        ({"temperature": -1}, "temperature"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 100000]}, "a token id is not in"),
        ({"prompt": "a" * 70}, "the prompt has 70 tokens"),
        ({"stop": [""]}, "stop"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"n": 0}, "n"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(client, change, message):
    response = client.post("/v1/completions", content=json.dumps({**BODY, **change}), headers=JSON)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_other_wrong_requests(client):
    assert client.post("/v1/completions", content=b"{", headers=JSON).status_code == 400
    assert client.post("/v1/completions", content=b"[]", headers=JSON).status_code == 400
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/nowhere").status_code == 404
    response = client.post("/v1/completions", json={**BODY, "model": "tyni"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert "did you mean 'tiny'?" in response.json()["error"]["message"]
    assert client.post("/v1/completions", json={**BODY, "prompt": "a" * 6000}).status_code == 413
    chunks = (b"x" * 1000 for _ in range(9))  # no length is declared
    assert client.post("/v1/completions", content=chunks, headers=JSON).status_code == 413
    for messages in ([], [{"role": "wizard", "content": "a"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        assert client.post("/v1/chat/completions", json={**CHAT, "messages": messages}).status_code == 400


def test_a_key_is_asked_for_everywhere_but_at_the_health_check(engine):
    from starlette.testclient import TestClient

    client = TestClient(make_app(engine, "tiny", api_key="secret"))
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/health").status_code == 200
    assert client.get("/metrics").status_code == 401


def test_metrics_count_what_happened(client):
    client.post("/v1/completions", json=BODY)
    client.post("/v1/completions", json={**BODY, "n": 0})
    text = client.get("/metrics").text
    assert 'halfbyte_http_requests_total{endpoint="/v1/completions",status="200"} 1.0' in text
    assert 'halfbyte_http_requests_total{endpoint="/v1/completions",status="400"} 1.0' in text
    assert "halfbyte_sent_tokens_total 16.0" in text
    assert "halfbyte_time_to_first_token_seconds_count 1.0" in text
    assert 'halfbyte_seconds_total{part="step"}' in text


def test_models_lists_the_model_and_its_adapters(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert client.get("/v1/models/none").status_code == 404


def test_too_many_requests_are_told_to_come_again(client, engine):
    """While the engine is busy with something else, nothing that is queued gets on."""
    busy = threading.Thread(target=engine._scheduler.between_steps, args=(lambda: time.sleep(1.0),))
    busy.start()
    time.sleep(0.1)
    response = client.post("/v1/completions", json={**BODY, "n": 20, "max_tokens": 30})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    busy.join()
    assert client.post("/v1/completions", json=BODY).status_code == 200


def test_an_answer_that_takes_too_long_is_cut_off(engine):
    from starlette.testclient import TestClient

    client = TestClient(make_app(engine, "tiny", limits=Limits(seconds=0.0)), raise_server_exceptions=False)
    response = client.post("/v1/completions", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    stream = client.post("/v1/completions", json={**BODY, "stream": True}).text
    assert "took longer" in stream
    assert "[DONE]" not in stream


@pytest.mark.parametrize(
    "change", [{"temperature": 1e-300}, {"temperature": 1, "repetition_penalty": 1e-300}, {"temperature": 1e-38}]
)
def test_extreme_parameters_are_answered(client, change):
    """Divided by them, logits leave float32's range."""
    response = client.post("/v1/completions", json={**BODY, "seed": 1, **change})
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] > 0


def test_half_a_surrogate_pair_in_an_unknown_key_is_refused(client):
    body = {**CHAT, "messages": [{"role": "user", "content": "a", "\ud800": 1}]}
    response = client.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400


@pytest.mark.parametrize(("stream", "early"), [(True, False), (True, True), (False, False)])
def test_a_client_that_leaves_frees_its_slot(engine, monkeypatch, stream, early):
    """It closes the connection after the first event, before it, or while it waits for the whole answer."""
    app, decode, left = make_app(engine, "tiny"), engine._scheduler._decode, asyncio.Event()

    def slowly(*arguments):
        time.sleep(0.05)
        return decode(*arguments)

    monkeypatch.setattr(engine._scheduler, "_decode", slowly)
    body = json.dumps({**BODY, "max_tokens": 50, "stream": stream}).encode()
    inbox = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if inbox:
            return inbox.pop()
        if stream and not early:
            await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message.get("body"):
            left.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    before = engine.statistics.written_tokens
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    while engine.running:
        time.sleep(0.01)
    assert early or engine.statistics.written_tokens > before
    assert engine.statistics.written_tokens - before < 45
