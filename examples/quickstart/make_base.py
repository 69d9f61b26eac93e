"""Make the quickstart's base model: a tiny Llama that follows a few dozen short instructions about words.

    python make_base.py                      # the committed weights came from these defaults
    python make_base.py --out /tmp/base --steps 300

The text is generated on the fly by `skills.py`, so the model never sees a batch twice and there is nothing to
download. The tokenizer is character level: a rule about letters is then a rule about tokens, which is what lets a
model of two million weights learn it at all.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from skills import BASE_SKILLS, PIG_LATIN, Skill, ask
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, UNK, BOS, END = "<pad>", "<unk>", "<s>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
PRINTABLE = "\n" + "".join(chr(code) for code in range(32, 127))
MAX_POSITIONS = 256
MAX_NEW_TOKENS = 48
SHOUT = "Answer in capitals."

# `generation` marks the assistant's part, so that a trainer can find the tokens to learn from.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<|assistant|>' -}}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
  {%- elif message['role'] in ('system', 'user') -%}
    {{- '<|' + message['role'] + '|>' + message['content'] + eos_token -}}
  {%- else -%}
    {{- raise_exception('Unknown role: ' + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

Message = dict[str, str]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token for each printable ASCII character, and the tokens of the chat."""
    vocab = {token: index for index, token in enumerate((PAD, UNK, BOS, END, *ROLES, *PRINTABLE))}
    core = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()  # joins the characters without spaces between them
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained Llama. All sizes are multiples of 64, the block of the NF4 quantization."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # For sequences this short, plain attention is twice as fast on a CPU as the fused kernel.
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def draw_chat(rng: random.Random) -> tuple[list[Message], str]:
    """Draw a training example of a random base skill: the messages of the prompt, and the answer.

    One in twenty has a system message that asks for capitals, so that the system role means something.
    """
    skill = rng.choices(BASE_SKILLS, weights=[skill.weight for skill in BASE_SKILLS])[0]
    prompt, answer = ask(skill, rng, "train")
    user = {"role": "user", "content": prompt}
    if rng.random() < 0.05:
        return [{"role": "system", "content": SHOUT}, user], answer.upper()
    return [user], answer


def encode_chat(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], answer: str
) -> tuple[list[int], list[int]]:
    """Encode an example as (input ids, labels); only the answer carries labels.

    The letters of a prompt are random, and nothing is to be learned from guessing them.
    """
    prompt = BOS + "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages) + ROLES[2]
    prompt_ids, answer_ids = tokenizer([prompt, answer + END], add_special_tokens=False)["input_ids"]
    return prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids


def draw_batches(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of (input ids, labels) for ever, padded on the right.

    Examples are drawn by the pool and sorted by length before they are cut into batches: that nearly halves the
    work, because the padding goes. The batches of a pool then come in random order.
    """
    pool_batches = 8
    while True:
        pool = [encode_chat(tokenizer, *draw_chat(rng)) for _ in range(size * pool_batches)]
        pool.sort(key=lambda example: len(example[0]))
        batches = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(batches)
        for batch in batches:
            width = max(len(ids) for ids, _ in batch)
            yield (
                torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in batch]),
                torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in batch]),
            )


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Train with AdamW, a short warm-up and a cosine decay to zero.

    No attention mask is passed: with the padding on the right, a causal model never looks at it.
    """
    batches = draw_batches(random.Random(args.seed), tokenizer, args.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = min(100, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * step / args.steps)),
    )
    model.train()
    start, recent = time.time(), 0.0
    for step in range(1, args.steps + 1):
        ids, labels = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent += loss.item()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {recent / 100:.4f}  {time.time() - start:5.0f} s", flush=True)
            recent = 0.0


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, skill: Skill, split: str, count: int = 100
) -> float:
    """Score greedy answers to `count` prompts of `skill`: the share that is right to the last letter."""
    rng = random.Random(skill.name)  # the same prompts on every run
    prompts, answers = zip(*(ask(skill, rng, split) for _ in range(count)), strict=True)
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.eval().generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(text == answer for text, answer in zip(texts, answers, strict=True)) / count


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print the score of each base skill on held-out words, and of the skill that the base must not have."""
    scores = {skill.name: exact_match(model, tokenizer, skill, "held") for skill in BASE_SKILLS}
    for name, score in scores.items():
        print(f"{name:<16}{score:7.1%}")
    print(f"{'mean':<16}{sum(scores.values()) / len(scores):7.1%}")
    print(f"{PIG_LATIN.name:<16}{exact_match(model, tokenizer, PIG_LATIN, 'test', 250):7.1%}  (not in the training)")


def parse_args() -> argparse.Namespace:
    """Read the options; the defaults made the committed weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train, round to bfloat16, save, and score the model as saved."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, args)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out, save_jinja_files=False)
    report(LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32), tokenizer)


if __name__ == "__main__":
    main()
