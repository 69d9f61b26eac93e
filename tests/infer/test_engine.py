"""The engine: its answers are those of transformers' generate, however requests meet each other in it."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import BusyError, CheckpointError, RequestError
from halfbyte.infer import Engine, SamplingParams
from halfbyte.infer.requests import _possible_stop
from halfbyte.infer.sampling import Sampler
from halfbyte.models import HalfbyteConfig

FLOAT32 = HalfbyteConfig(block_size=32, compute_dtype=torch.float32)
PROMPTS = ["a", "bcdefgh" * 3, "bc", "xyz" * 8, "a", "bcdefgh" * 3 + "k", "lmnop" * 14]
GREEDY = SamplingParams(max_tokens=16, ignore_end=True)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer, make_model):
    made = {}

    def get(family):
        if family not in made:
            made[family] = make_model(family, len(tiny_tokenizer), tmp_path_factory.mktemp(family))
            tiny_tokenizer.save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture(scope="module")
def engine(folder):
    with Engine(folder("llama"), quantization=FLOAT32, dtype="float32", slots=3) as engine:
        yield engine


def tokens(completions):
    return [[choice.token for choice in completion.choices] for completion in completions]


def reference(model, prompts, count=16):
    """What transformers' generate writes, one prompt at a time."""
    found = []
    for ids in prompts:
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        found.append(output[0, len(ids) :].tolist())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_transformers_own(folder, family):
    with Engine(folder(family), quantization=FLOAT32, dtype="float32", slots=2, drafts=3) as engine:
        assert engine.decoder.startswith("the native decoder")
        wanted = reference(engine.model, map(engine.token_ids, PROMPTS))
        assert len({tuple(answer) for answer in wanted}) > 3
        assert tokens(engine.generate(PROMPTS, GREEDY)) == wanted  # 2 slots for 7 requests
        again = engine.generate(PROMPTS, GREEDY)
        assert tokens(again) == wanted
        assert sum(completion.cached_tokens for completion in again) > 0


def test_a_model_that_is_not_covered_runs_through_transformers_and_says_so(folder):
    with Engine(folder("gpt2"), quantization=FLOAT32, dtype="float32", slots=2) as engine:
        assert engine.decoder == "transformers' own forward, because GPT2LMHeadModel is not of the Llama family"
        assert tokens(engine.generate(PROMPTS, GREEDY)) == reference(engine.model, map(engine.token_ids, PROMPTS))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length_are_not_covered(tmp_path, tiny_tokenizer, make_model, kind):
    factors = [1.0] * 8
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": factors, "long_factor": factors, "original_max_position_embeddings": 64}
    make_model("llama", len(tiny_tokenizer), tmp_path, rope_parameters=rope)
    with Engine(tmp_path, tokenizer=tiny_tokenizer, quantization=FLOAT32) as engine:
        assert "depend on the length" in engine.decoder


def test_the_prefix_of_a_running_request_is_copied(engine):
    """The second request begins with the first one's tokens while the first one is still being answered."""
    prompt = engine.token_ids("shared beginning of both ")
    wanted = reference(engine.model, [prompt, [*prompt, 9]], 60)
    first = engine.submit(prompt, SamplingParams(max_tokens=60, ignore_end=True))
    next(iter(first))
    second = engine.submit([*prompt, 9], SamplingParams(max_tokens=60, ignore_end=True)).result()
    assert second.cached_tokens == len(prompt)
    assert tokens([second]) == wanted[1:]
    rest = tokens([first.result()])[0]
    assert rest == wanted[0][-len(rest) :]


def test_a_prompt_that_is_read_in_chunks_between_the_steps_of_others(engine, monkeypatch):
    """40 tokens, then all that is left; the others' answers go on meanwhile."""
    monkeypatch.setattr("halfbyte.infer.scheduler.CHUNK", 40)
    monkeypatch.setattr("halfbyte.infer.scheduler.CHUNK_ALONE", 40)
    prompts = [engine.token_ids(text) for text in ("ab", "lmnopqrstu" * 10, "vwxy" * 24)]
    wanted = reference(engine.model, prompts, 16)
    first = engine.submit(prompts[0], GREEDY)
    next(iter(first))
    assert tokens(engine.generate(prompts[1:], GREEDY)) == wanted[1:]
    first.result()


def test_requests_that_come_while_others_run_change_nothing(engine):
    wanted = reference(engine.model, map(engine.token_ids, PROMPTS))
    found = [None] * 30

    def ask(number):
        time.sleep(0.003 * (number % 7))
        found[number] = engine.generate([PROMPTS[number % len(PROMPTS)]], GREEDY)[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tokens(found) == [wanted[number % len(PROMPTS)] for number in range(30)]


@pytest.mark.parametrize("text", ["b", "ef", "zzz"])
def test_a_stop_text_ends_the_answer_and_is_not_shown(engine, text):
    whole = engine.generate(PROMPTS, SamplingParams(max_tokens=30, ignore_end=True))
    cut = engine.generate(PROMPTS, SamplingParams(max_tokens=30, ignore_end=True, stop=(text, "never this")))
    for one, other in zip(whole, cut, strict=True):
        at = one.text.find(text)
        assert other.text == (one.text if at < 0 else one.text[:at])
        assert other.finish == ("length" if at < 0 else "stop")


def test_what_may_become_a_stop_text_is_held_back():
    assert [_possible_stop(text, ("abc", "cd")) for text in ("", "x", "xa", "xab", "abc", "abcc")] == [0, 0, 1, 2, 1, 1]


def test_streamed_text_is_the_answer(engine):
    params = SamplingParams(max_tokens=20, temperature=1.5, seed=5, ignore_end=True)
    (whole,) = engine.generate(["abc"], params)
    assert "".join(engine.stream("abc", params)) == whole.text
    assert whole.text == engine.tokenizer.decode([c.token for c in whole.choices], skip_special_tokens=True)


def test_a_seed_gives_the_same_answer_in_any_company(engine):
    params = SamplingParams(max_tokens=20, temperature=1.2, top_k=30, top_p=0.9, min_p=0.01, seed=11, ignore_end=True)
    alone = engine.generate(["abc"], params)
    assert tokens(engine.generate(["x", "abc", "yz"], params))[1] == tokens(alone)[0]
    assert tokens(engine.generate(["abc"], SamplingParams(**{**vars(params), "seed": 12}))) != tokens(alone)


def test_logprobs_are_the_models(engine):
    (answer,) = engine.generate(
        ["abcd"], SamplingParams(max_tokens=5, logprobs=3, ignore_end=True, temperature=0.5, seed=1)
    )
    ids = engine.token_ids("abcd")
    with torch.inference_mode():
        logits = engine.model(torch.tensor([[*ids, *(c.token for c in answer.choices)]])).logits[0]
    exact = torch.log_softmax(logits[len(ids) - 1 :], -1)
    for row, choice in zip(exact, answer.choices, strict=False):
        assert choice.logprob == pytest.approx(row[choice.token].item(), abs=1e-4)
        assert [token for token, _ in choice.top] == row.topk(3).indices.tolist()
        assert [value for _, value in choice.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_the_end_token_ends_an_answer(folder, tiny_tokenizer):
    with Engine(folder("llama"), quantization=FLOAT32, dtype="float32") as engine:
        (answer,) = engine.generate(["ab"], GREEDY)
        engine.model.generation_config.eos_token_id = [answer.choices[3].token]
        (cut,) = engine.generate(["ab"], SamplingParams(max_tokens=16))
        first = [c.token for c in answer.choices].index(answer.choices[3].token)
        assert (cut.finish, len(cut.choices)) == ("stop", first + 1)


class Held:
    """A listener that holds the engine at the first token until it is let go, so that no request ends by itself."""

    def __init__(self) -> None:
        self.finish = None
        self.began, self.go, self.ended = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, event) -> None:
        self.began.set()
        assert self.go.wait(60)
        if event.finish:
            self.finish = event.finish
            self.ended.set()


def test_a_cancelled_request_frees_its_slot(folder):
    endless = SamplingParams(max_tokens=120, ignore_end=True)
    with Engine(folder("llama"), quantization=FLOAT32, dtype="float32", slots=1, queue_limit=1) as engine:
        first, second = Held(), Held()
        running = engine.submit("a", endless, listener=first)
        assert first.began.wait(60)
        waiting = engine.submit("b", GREEDY)
        with pytest.raises(BusyError, match="1 requests are waiting"):
            engine.submit("c", GREEDY)
        running.cancel()
        first.go.set()
        assert first.ended.wait(60) and first.finish == "cancelled"
        assert waiting.result().finish == "length"
        gone = engine.submit("a", endless, listener=second)
        assert second.began.wait(60)
        queued = engine.submit("b", GREEDY)
        queued.cancel()
        gone.cancel()
        second.go.set()
        assert second.ended.wait(60) and (second.finish, queued.result().finish) == ("cancelled", "cancelled")


def test_a_closed_engine_ends_what_runs_and_takes_no_more(folder):
    engine = Engine(folder("llama"), quantization=FLOAT32, dtype="float32", slots=1)
    handles = [engine.submit("a", SamplingParams(max_tokens=120, ignore_end=True)) for _ in range(3)]
    engine.close()
    assert {handle.result().finish for handle in handles} <= {"cancelled", "length"}
    with pytest.raises(BusyError, match="closed"):
        engine.submit("a")


def test_a_failure_reaches_the_reader_and_the_engine_goes_on(folder, monkeypatch):
    with Engine(folder("llama"), quantization=FLOAT32, dtype="float32", slots=2) as engine:
        wanted = tokens(engine.generate(["abc"], GREEDY))
        original, calls = engine._scheduler._decode, []

        def fail_once(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise MemoryError("no memory for a step of 1 rows")
            return original(*arguments)

        monkeypatch.setattr(engine._scheduler, "_decode", fail_once)
        with pytest.raises(MemoryError):
            engine.generate(["abc"], GREEDY)
        assert tokens(engine.generate(["abc"], GREEDY)) == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "a" * 128}, "the prompt has 128 tokens; with its answer it may have 128"),
        ({"prompt": [5, 10_000]}, "a token id is not in 0 to"),
        ({"prompt": "a", "adapter": "nobody"}, "there is no adapter 'nobody'"),
    ],
)
def test_a_wrong_request_is_one_sentence(engine, arguments, message):
    with pytest.raises(RequestError, match=message):
        engine.submit(**arguments)


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"logprobs": 21},
        {"stop": ("",)},
    ],
)
def test_a_wrong_sampling_parameter_is_refused(values):
    with pytest.raises(RequestError, match=next(iter(values))):
        SamplingParams(**values)


def test_a_wrong_option_is_refused(folder):
    for options in ({"dtype": "float8"}, {"cache_dtype": "int4"}, {"slots": 0}):
        with pytest.raises(RequestError, match=next(iter(options))):
            Engine(folder("llama"), quantization=FLOAT32, **options)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_a_smaller_cache_answers_nearly_the_same(folder, cache_dtype):
    """Keys and values rounded to 8 bits or fewer move logits of a few units by hundredths."""
    params = SamplingParams(max_tokens=8, logprobs=5, ignore_end=True)
    answers = []
    for kind in ("float32", cache_dtype):
        with Engine(folder("qwen3"), quantization=FLOAT32, dtype="float32", cache_dtype=kind) as engine:
            answers.append(engine.generate(["abcdefghij"], params)[0])
    exact, rounded = (answer.choices[0] for answer in answers)
    assert exact.token == rounded.token
    assert [value for _, value in rounded.top] == pytest.approx([value for _, value in exact.top], abs=0.1)
    assert exact.top != rounded.top


def test_quantizing_the_head_is_what_it_says(folder):
    with Engine(folder("qwen2"), quantization=FLOAT32, dtype="float32", quantize_head=True) as engine:
        (answer,) = engine.generate(["abc"], SamplingParams(max_tokens=4, logprobs=0, ignore_end=True))
        head = engine.model.lm_head.weight
        engine.model.lm_head.weight = torch.nn.Parameter(hb.quantize(head.detach()).dequantize())
        ids = engine.token_ids("abc")
        with torch.inference_mode():
            logits = engine.model(torch.tensor([ids])).logits[0, -1]
        exact = torch.log_softmax(logits, -1)[answer.choices[0].token].item()
        assert answer.choices[0].logprob == pytest.approx(exact, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------- adapters
def save_adapter(model, folder, seed, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **options})
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    options = {"one": {}, "two": {"r": 7, "use_rslora": True, "rank_pattern": {"q_proj": 3}}}
    for seed, (name, own) in enumerate(options.items()):
        model = hb.load_model(folder("llama"), quantization=FLOAT32)
        save_adapter(model, root / name, seed, **own)
    return {name: root / name for name in options}


def test_a_batch_of_requests_for_different_adapters(folder, adapters):
    from peft import PeftModel

    with Engine(folder("llama"), adapters, quantization=FLOAT32, dtype="float32", slots=3) as engine:
        ids = [engine.token_ids(prompt) for prompt in PROMPTS]
        wanted = {}
        for name in (None, *adapters):
            model = hb.load_model(folder("llama"), quantization=FLOAT32)
            if name:
                model = PeftModel.from_pretrained(model, str(adapters[name])).eval()
            wanted[name] = reference(model, ids)
        assert wanted[None] != wanted["one"] != wanted["two"]
        asked = [(prompt, name) for prompt in range(len(ids)) for name in wanted]
        handles = [engine.submit(ids[prompt], GREEDY, adapter=name) for prompt, name in asked]
        found = tokens([handle.result() for handle in handles])
        assert found == [wanted[name][prompt] for prompt, name in asked]


def test_adapters_are_mixed_with_weights(folder, adapters):
    from peft import PeftModel

    mix = {"one": 0.25, "two": -1.5}
    model = PeftModel.from_pretrained(hb.load_model(folder("llama"), quantization=FLOAT32), str(adapters["one"]), "one")
    model.load_adapter(str(adapters["two"]), "two")
    model.base_model.set_adapter(list(mix))
    for module in model.modules():
        for name, weight in mix.items():
            if hasattr(module, "lora_A"):
                module.scaling[name] *= weight
    model.eval()
    with Engine(folder("llama"), adapters, quantization=FLOAT32, dtype="float32") as engine:
        ids = [engine.token_ids(prompt) for prompt in PROMPTS]
        handles = [engine.submit(row, GREEDY, adapter=mix) for row in ids]
        assert tokens([handle.result() for handle in handles]) == reference(model, ids)


def test_adapters_come_and_go_while_requests_run(folder, adapters):
    long = SamplingParams(max_tokens=100, ignore_end=True)
    with Engine(folder("llama"), quantization=FLOAT32, dtype="float32", slots=2) as engine:
        wanted = tokens(engine.generate(["abc"], long))
        running = engine.submit("abc", long)
        engine.add_adapter("one", adapters["one"])
        with pytest.raises(RequestError, match="is there already"):
            engine.add_adapter("one", adapters["one"])
        with_one = tokens(engine.generate(["abc"], long, adapter="one"))
        assert tokens([running.result()]) == wanted != with_one
        engine.add_adapter("two", adapters["two"])
        busy = engine.submit("abc", long, adapter="two")
        next(iter(busy))
        with pytest.raises(RequestError, match="being used"):
            engine.remove_adapter("two")
        busy.result()
        engine.remove_adapter("one")
        assert engine.adapters == ["two"]
        engine.remove_adapter("two")
        with pytest.raises(RequestError, match="there is no adapter 'one'"):
            engine.submit("abc", adapter="one")
        assert tokens(engine.generate(["abc"], long)) == wanted
        engine.add_adapter("one", adapters["one"])  # under its number again, and not with what slots remember of it
        assert tokens(engine.generate(["abc"], long, adapter="one")) == with_one


def test_adapters_of_a_model_that_is_not_covered(folder, tmp_path):
    from peft import PeftModel

    save_adapter(hb.load_model(folder("gpt2"), quantization=FLOAT32), tmp_path / "one", 0)
    with Engine(folder("gpt2"), {"one": tmp_path / "one"}, quantization=FLOAT32, dtype="float32") as engine:
        ids = engine.token_ids("abc")
        model = hb.load_model(folder("gpt2"), quantization=FLOAT32)
        wanted = reference(model, [ids])
        adapted = reference(PeftModel.from_pretrained(model, str(tmp_path / "one")).eval(), [ids])
        assert wanted != adapted
        for adapter, answer in ((None, wanted), ("one", adapted), (None, wanted)):
            assert tokens(engine.generate([ids], GREEDY, adapter=adapter)) == answer
        with pytest.raises(RequestError, match="one adapter at a time"):
            engine.submit(ids, adapter={"one": 0.5})


@pytest.mark.parametrize("option", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}])
def test_an_adapter_that_the_decoder_does_not_do_is_refused_and_leaves_nothing(folder, adapters, tmp_path, option):
    save_adapter(hb.load_model(folder("llama"), quantization=FLOAT32), tmp_path / "odd", 0, **option)
    with Engine(folder("llama"), quantization=FLOAT32, dtype="float32") as engine:
        wanted = tokens(engine.generate(["abc"], GREEDY))
        with pytest.raises(RequestError, match="merge it into the model first"):
            engine.add_adapter("odd", tmp_path / "odd")
        assert engine.adapters == []
        assert tokens(engine.generate(["abc"], GREEDY)) == wanted
        engine.add_adapter("one", adapters["one"])
        with pytest.raises(RequestError, match="merge it into the model first"):
            engine.add_adapter("odd", tmp_path / "odd")
        assert tokens(engine.generate(["abc"], GREEDY)) == wanted


def test_an_adapter_folder_that_is_none(folder, adapters, tmp_path):
    with Engine(folder("llama"), quantization=FLOAT32, dtype="float32") as engine:
        with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
            engine.add_adapter("one", tmp_path)
        (tmp_path / "adapter_config.json").write_text((adapters["one"] / "adapter_config.json").read_text())
        with pytest.raises(CheckpointError, match="pickles"):
            engine.add_adapter("one", tmp_path)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
        with pytest.raises(CheckpointError, match="damaged"):
            engine.add_adapter("one", tmp_path)
        assert engine.adapters == []


def test_an_answer_that_cannot_be_chosen_fails_alone(folder, monkeypatch):
    choose = Sampler.choose

    def choose_or_fail(self, logits):
        if self.params.seed == 13:
            raise RuntimeError("probability tensor contains nan")
        return choose(self, logits)

    monkeypatch.setattr(Sampler, "choose", choose_or_fail)
    with Engine(folder("llama"), quantization=FLOAT32, dtype="float32", slots=2) as engine:
        (wanted,) = engine.generate(["bcdefgh"], GREEDY)
        ill = engine.submit("a", SamplingParams(max_tokens=16, seed=13))
        well = engine.submit("bcdefgh", GREEDY)
        with pytest.raises(RuntimeError, match="contains nan"):
            ill.result()
        assert well.result().text == wanted.text
