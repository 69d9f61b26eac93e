"""OpenAI's own client, unchanged, against the server on a real socket."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch

pytest.importorskip("openai", reason="the extra `test` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import openai
import uvicorn

import halfbyte as hb
from halfbyte.errors import BusyError
from halfbyte.infer import Engine, SamplingParams
from halfbyte.infer.server import Limits, make_app
from halfbyte.models import HalfbyteConfig

FLOAT32 = HalfbyteConfig(block_size=32, compute_dtype=torch.float32)
KEY = "secret"
PATIENCE = 120  # seconds; nothing here takes one, unless the machine is busy with something else
MESSAGES = [{"role": "user", "content": "abc"}]


@pytest.fixture(scope="module")
def poet(tiny_llama, tmp_path_factory):
    """An adapter that changes what is written."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = hb.load_model(tiny_llama, quantization=FLOAT32)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("poet")
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(tiny_llama, poet):
    with Engine(tiny_llama, {"poet": poet}, quantization=FLOAT32, slots=4, queue_limit=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine):
    """A server in a thread, on a port that the system chose."""
    app = make_app(engine, "tiny", api_key=KEY, limits=Limits(body=5000, tokens=40))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + PATIENCE
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        yield client


def test_models_are_the_model_and_its_adapters(client):
    assert [model.id for model in client.models.list()] == ["tiny", "poet"]
    assert client.models.retrieve("poet").id == "poet"


@pytest.mark.parametrize("model", ["tiny", "poet"])
def test_completions(client, engine, model):
    adapter = None if model == "tiny" else model
    (wanted,) = engine.generate(["abc"], SamplingParams(max_tokens=12), adapter=adapter)
    answer = client.completions.create(model=model, prompt="abc", max_tokens=12, temperature=0)
    assert (answer.model, answer.choices[0].text) == (model, wanted.text)
    assert answer.choices[0].finish_reason == wanted.finish
    assert answer.usage.prompt_tokens == wanted.prompt_tokens
    assert answer.usage.completion_tokens == len(wanted.choices)


def test_an_adapter_writes_something_else(engine):
    texts = [engine.generate(["abc"], SamplingParams(max_tokens=12), adapter=name)[0].text for name in (None, "poet")]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("model", ["tiny", "poet"])
def test_chat_whole_and_streamed(client, engine, model):
    adapter = None if model == "tiny" else model
    (wanted,) = engine.generate([MESSAGES], SamplingParams(max_tokens=12), adapter=adapter)
    ask = {"model": model, "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**ask)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", wanted.text)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == wanted.text
    assert chunks[-2].choices[0].finish_reason == wanted.finish
    assert chunks[-1].usage.completion_tokens == len(wanted.choices)


def test_the_streaming_helper_of_the_client(client, engine):
    """It accumulates deltas by the client's own rules, which are stricter than reading them."""
    (wanted,) = engine.generate([MESSAGES], SamplingParams(max_tokens=12))
    ask = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "logprobs": True}
    with client.chat.completions.stream(**ask) as stream:
        for _ in stream:
            pass
        choice = stream.current_completion_snapshot.choices[0]  # the final one is refused where it ended by length
    assert choice.message.content == wanted.text
    assert len(choice.logprobs.content) == len(wanted.choices)


def test_completions_streamed_for_several_prompts(client, engine):
    wanted = engine.generate(["abc", "de"], SamplingParams(max_tokens=12))
    texts = ["", ""]
    for chunk in client.completions.create(
        model="tiny", prompt=["abc", "de"], max_tokens=12, temperature=0, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [completion.text for completion in wanted]


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client, engine, stream):
    """The text ends before the stop text, though a stream has to hold back what may become it."""
    (whole,) = engine.generate(["abc"], SamplingParams(max_tokens=16))
    stop = whole.text[5:8]
    wanted = whole.text[: whole.text.index(stop)]
    answer = client.completions.create(
        model="tiny", prompt="abc", max_tokens=16, temperature=0, stop=[stop, "never"], stream=stream
    )
    choices = [choice for part in (answer if stream else [answer]) for choice in part.choices]
    assert "".join(choice.text for choice in choices) == wanted
    assert choices[-1].finish_reason == "stop"


def test_logprobs(client, engine):
    (wanted,) = engine.generate([MESSAGES], SamplingParams(max_tokens=5, logprobs=2))
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert [token.logprob for token in content] == [choice.logprob for choice in wanted.choices]
    assert all(token.top_logprobs[0].logprob == token.logprob for token in content)
    (wanted,) = engine.generate(["abc"], SamplingParams(max_tokens=5, logprobs=2))
    plain = client.completions.create(model="tiny", prompt="abc", max_tokens=5, temperature=0, logprobs=2)
    assert plain.choices[0].logprobs.token_logprobs == [choice.logprob for choice in wanted.choices]
    assert [len(top) for top in plain.choices[0].logprobs.top_logprobs] == [2] * len(wanted.choices)


def test_n_and_seed(client):
    ask = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "n": 3, "seed": 7, "extra_body": {"top_k": 50}}
    first, again = (
        [choice.text for choice in client.completions.create(**ask, temperature=1.0).choices] for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model(client, stream):
    with pytest.raises(openai.NotFoundError, match="did you mean 'tiny'") as caught:
        client.completions.create(model="tyni", prompt="abc", stream=stream)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 90}]}, "tokens; with its answer it may have 64"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"max_token": 3}}, "did you mean 'max_tokens'"),
    ],
)
def test_a_bad_request(client, change, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **change})
    assert caught.value.type == "invalid_request_error"


def test_a_wrong_key(address):
    with (
        openai.OpenAI(base_url=address, api_key="guess", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_a_body_that_is_too_large(client):
    with pytest.raises(openai.APIStatusError, match="5000 bytes") as caught:
        client.completions.create(model="tiny", prompt="a" * 6000)
    assert caught.value.status_code == 413


def test_a_full_queue(client, engine):
    """While the engine is busy with something else, nothing that is queued gets on."""
    begun, release = threading.Event(), threading.Event()

    def hold():
        begun.set()
        release.wait(PATIENCE)

    busy = threading.Thread(target=engine._scheduler.between_steps, args=(hold,))
    busy.start()
    try:
        assert begun.wait(PATIENCE)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="abc", n=20)
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "1"
    finally:
        release.set()
        busy.join()


def test_a_client_that_may_retry_gets_its_answer_after_the_refusal(address, engine, monkeypatch):
    """The client waits as long as Retry-After says; meanwhile the queue empties."""
    (wanted,) = engine.generate(["abc"], SamplingParams(max_tokens=3))
    begun, release, submit = threading.Event(), threading.Event(), engine._scheduler.submit

    def hold():
        begun.set()
        release.wait(PATIENCE)

    def submit_or_release(request):
        try:
            submit(request)
        except BusyError:
            release.set()
            raise

    busy = threading.Thread(target=engine._scheduler.between_steps, args=(hold,))
    busy.start()
    try:
        assert begun.wait(PATIENCE)
        fill = [engine.submit("a", SamplingParams(max_tokens=1)) for _ in range(8)]  # 4 slots and a queue of 4
        monkeypatch.setattr(engine._scheduler, "submit", submit_or_release)
        asked = time.monotonic()
        with openai.OpenAI(base_url=address, api_key=KEY, max_retries=2, timeout=PATIENCE) as patient:
            reply = patient.completions.with_raw_response.create(
                model="tiny", prompt="abc", max_tokens=3, temperature=0
            )
        assert reply.retries_taken == 1
        assert time.monotonic() - asked >= 1  # not the client's own first pause, which is half a second
        answer = reply.parse()
        assert answer.choices[0].text == wanted.text
        assert all(handle.result().finish for handle in fill)
    finally:
        release.set()
        busy.join()


def test_many_threads_share_a_client(client, engine):
    """Each gets its own answer, and no more than fit at once are asked."""
    prompts = ["a", "bc", "def", "ghij"]
    wanted = [completion.text for completion in engine.generate(prompts, SamplingParams(max_tokens=12))]
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        stream = client.completions.create(
            model="tiny", prompt=prompts[index], max_tokens=12, temperature=0, stream=True
        )
        found[index] = "".join(choice.text for chunk in stream for choice in chunk.choices)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [found.get(index) for index in range(len(prompts))] == wanted
