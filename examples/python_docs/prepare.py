"""Make base topics, new topics, a tokenizer and a small model of the base topics from Python's own documentation.

    python examples/python_docs/prepare.py --output_dir runs/python_docs

The texts are `pydoc_data.topics`, what `help("with")` shows; they differ a little between versions of Python.
"""

import argparse
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

END = "<|endoftext|>"
CONTEXT = 512  # tokens that the model reads at a time
NEW_LENGTHS = range(1_000, 20_000)  # characters: with something to restate, and not one of the great collections


def split_topics(topics: Mapping[str, str], num_new: int, seed: int) -> dict[str, dict[str, str]]:
    """Draw the new topics, and half as many control topics that are never taught; the others are the base.

    The base loses the paragraphs that stand in the others too. Topics quote each other at length ("compound" holds most
    of "for" and "try"): left in, what is new would be known.
    """
    candidates = sorted(name for name, text in topics.items() if len(text) in NEW_LENGTHS)
    chosen = random.Random(seed).sample(candidates, num_new + num_new // 2)
    held_out = {_words(paragraph) for name in chosen for paragraph in topics[name].split("\n\n")}
    base = {}
    for name in sorted(topics.keys() - set(chosen)):
        kept = [paragraph for paragraph in topics[name].split("\n\n") if _words(paragraph) not in held_out]
        if kept:
            base[name] = "\n\n".join(kept)
    new, control = ({name: topics[name] for name in names} for names in (chosen[:num_new], chosen[num_new:]))
    return {"base": base, "new": new, "control": control}


def _words(paragraph: str) -> str:
    """Return a paragraph without its indentation and line breaks, which differ between quotations."""
    return " ".join(paragraph.split())


def write_jsonl(path: Path, texts: Mapping[str, str]) -> None:
    lines = (json.dumps({"topic": name, "text": text}, ensure_ascii=False) + "\n" for name, text in texts.items())
    path.write_text("".join(lines), encoding="utf-8")


def train_tokenizer(texts: Mapping[str, str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level byte-pair tokenizer, which can write anything and keeps white space as it is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=4,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        # More than the usual 0.02, which suits wide models: a narrow one starts learning sooner.
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(model: LlamaForCausalLM, stream: torch.Tensor, steps: int, batch_size: int = 2, lr: float = 4e-3) -> None:
    """Train a model to predict the next token in windows of `stream` [N], the base topics one after the other.

    A window begins anywhere, since a student reads suffixes alone, without a token that marks a beginning.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    model.train()
    begin = time.monotonic()
    for step in range(1, steps + 1):
        starts = torch.randint(len(stream) - CONTEXT, (batch_size,)).tolist()
        windows = torch.stack([stream[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(
                f"pretraining: step {step}/{steps}, loss {loss.item():.3f}, {time.monotonic() - begin:.0f} s",
                flush=True,
            )


def prepare(
    output_dir: Path, num_new: int = 16, steps: int = 700, vocab_size: int = 2048, hidden_size: int = 128, seed: int = 0
) -> None:
    """Write base.jsonl, new.jsonl, control.jsonl and the model of the base topics into a new folder."""
    if output_dir.exists():
        raise SystemExit(f"--output_dir: {output_dir} exists already: choose another folder")
    torch.manual_seed(seed)
    parts = split_topics(topics, num_new, seed)
    base = parts["base"]
    output_dir.mkdir(parents=True)
    for part, texts in parts.items():
        write_jsonl(output_dir / f"{part}.jsonl", texts)
    tokenizer = train_tokenizer(base, vocab_size)
    stream = torch.tensor(tokenizer.encode("".join(text + END for text in base.values()), verbose=False))
    model = make_model(tokenizer, hidden_size)
    print(
        f"{len(base)} base topics, {len(stream):,} tokens; new topics: {', '.join(parts['new'])};"
        f" a model of {model.num_parameters():,} parameters, {len(tokenizer):,} tokens in its vocabulary",
        flush=True,
    )
    pretrain(model, stream, steps)
    model.save_pretrained(output_dir / "model")
    tokenizer.save_pretrained(output_dir / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/python_docs"))
    prepare(parser.parse_args().output_dir)
