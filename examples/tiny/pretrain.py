"""Train the tiny model and its tokenizer from scratch, and print what it can do.

It learns the old facts by heart, the skills, and to read: most of its text is about entities that are made up on the spot
and never come back, so their facts can only be found in the context. It never sees the new entities of `documents.jsonl`.
Takes about TIME minutes on two cores; the same seed on the same machine gives the same weights:

    python examples/tiny/pretrain.py --output_dir examples/tiny/model
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

VOCAB_SIZE = 1536
LONG_ITEMS_PER_STEP = 32
SHORT_ITEMS_PER_STEP = 48
LEARNING_RATE = 3e-3
END = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {{ message['content'] }}\nAssistant:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


class Corpus:
    """An endless stream of training text."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.old, new = world.known_entities()
        self.known_names = {entity.name for entity in [*self.old, *new]}

    def fresh_entity(self) -> world.Entity:
        return world.make_entity(self.rng.choice(list(world.KINDS)), self.rng, self.known_names)

    def document(self, entity: world.Entity) -> str:
        return world.document_text(entity, self.rng) + END

    def sentences(self, entity: world.Entity) -> str:
        """One or two sentences with a space before them, as they stand inside a document."""
        statements = world.document_statements(entity, self.rng, list(entity.facts), 1)
        return "".join(f" {statement}" for statement in statements[: self.rng.randrange(1, 3)]) + END

    def question(self, entity: world.Entity) -> str:
        key = self.rng.choice(list(entity.facts))
        return chat(world.question(entity, key, self.rng), entity.facts[key])

    def reading(self, entity: world.Entity) -> str:
        """A text and a question about it: before the dialogue, or as part of what the user says. Some texts are short."""
        if self.rng.random() < 0.3:
            keys = list(entity.facts)
            text = world.document_text(entity, self.rng)
        else:
            keys = self.rng.sample(list(entity.facts), self.rng.randrange(1, len(entity.facts) + 1))
            text = " ".join(world.document_statements(entity, self.rng, keys, self.rng.randrange(1, 3)))
        key = self.rng.choice(keys)
        question, answer = world.question(entity, key, self.rng), entity.facts[key]
        if self.rng.random() < 0.5:
            return f"{text}\n\n{chat(question, answer)}"
        return chat(f"{text}\n\n{question}", answer)

    def skill(self) -> str:
        return chat(*self.rng.choice(list(world.SKILLS.values()))(self.rng))

    def long_item(self) -> str:
        if self.rng.random() < 0.9:
            return self.reading(self.fresh_entity())
        return self.document(self.rng.choice(self.old))

    def short_item(self) -> str:
        kind = self.rng.random()
        if kind < 0.45:
            return self.skill()
        if kind < 0.70:
            return self.question(self.rng.choice(self.old))
        if kind < 0.85:
            return self.sentences(self.fresh_entity())
        return self.sentences(self.rng.choice(self.old))


def chat(question: str, answer: str) -> str:
    return f"User: {question}\nAssistant: {answer}{END}"


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (item for _ in range(5_000) for item in (corpus.long_item(), corpus.short_item())), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def item_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[str]) -> torch.Tensor:
    """Mean cross-entropy over the items' tokens. Each item is a sequence of its own, with no token before it."""
    batch = tokenizer(items, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False)
    return model(**batch, labels=batch.input_ids.masked_fill(batch.attention_mask == 0, -100)).loss


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, steps: int) -> None:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    scheduler = cosine_schedule(optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    model.train()
    start = time.monotonic()
    for step in range(1, steps + 1):
        long_loss = item_loss(model, tokenizer, [corpus.long_item() for _ in range(LONG_ITEMS_PER_STEP)])
        short_loss = item_loss(model, tokenizer, [corpus.short_item() for _ in range(SHORT_ITEMS_PER_STEP)])
        (long_loss + 0.5 * short_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            losses = f"documents {long_loss.item():.3f}  short {short_loss.item():.3f}"
            print(f"step {step}/{steps}  {losses}  {time.monotonic() - start:.0f} s", flush=True)


@torch.inference_mode()
def answer_scores(
    model: LlamaForCausalLM, tokenizer: Any, prompt: str, answers: list[str]
) -> tuple[list[float], list[bool]]:
    """For each answer: its log-likelihood after `prompt`, and whether greedy generation gives it, end of text included."""
    start = len(tokenizer.encode(prompt))
    texts = [f"{prompt} {answer}{END}" for answer in answers]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False)
    logits = model(**batch).logits[:, start - 1 : -1].float()
    targets, mask = batch.input_ids[:, start:], batch.attention_mask[:, start:]
    log_probs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] * mask
    greedy = ((logits.argmax(-1) == targets) | (mask == 0)).all(-1)
    return log_probs.sum(-1).tolist(), greedy.tolist()


def accuracy(model: LlamaForCausalLM, tokenizer: Any, probes: list[dict[str, Any]], contexts: dict[str, str]) -> str:
    chosen = generated = 0
    for probe in probes:
        context = contexts[probe["document"]] + "\n\n" if contexts else ""
        answers = [probe["answer"], *(choice for choice in probe["choices"] if choice != probe["answer"])]
        scores, greedy = answer_scores(model, tokenizer, f"{context}User: {probe['question']}\nAssistant:", answers)
        chosen += scores[0] > max(scores[1:])
        generated += greedy[0]
    return f"{chosen / len(probes):7.1%} {generated / len(probes):10.1%}"


def print_gates(model: LlamaForCausalLM, tokenizer: Any, data_dir: Path) -> None:
    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data_dir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    model.eval()
    documents = {document["id"]: document["text"] for document in read("documents")}
    print(f"{'':34} choices  generated")
    print(f"{'old facts, closed book':34} {accuracy(model, tokenizer, read('old_facts'), {})}")
    print(f"{'skills':34} {accuracy(model, tokenizer, read('skills'), {})}")
    print(f"{'new facts, document in context':34} {accuracy(model, tokenizer, read('new_facts'), documents)}")
    print(f"{'new facts, closed book':34} {accuracy(model, tokenizer, read('new_facts'), {})}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    corpus = Corpus(random.Random(args.seed))
    tokenizer = train_tokenizer(corpus)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, corpus, args.steps)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    model = AutoModelForCausalLM.from_pretrained(args.output_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    print_gates(model, tokenizer, Path(__file__).parent)


if __name__ == "__main__":
    main()
