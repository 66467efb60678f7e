"""Train the tiny model and its tokenizer from scratch, and print what it can do.

It learns the old facts by heart, the skills, and to read: most of its text is about entities that are made up on the
spot and never come back, so that their facts can only be found in the context. The new entities, those of
`documents.jsonl`, it never sees.
The committed model took 20 minutes on one core of a busy machine (OMP_NUM_THREADS=1). The same seed, machine and number
of threads give the same weights:

    python examples/tiny/pretrain.py --output_dir examples/tiny/model
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import world
from probes import END, exact_match, load_probes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

from disc_train.evaluation import choice_accuracy

VOCAB_SIZE = 1536
TOKENS_PER_STEP = 2000
STEPS = 1600
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {{ message['content'] }}\nAssistant:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


class Corpus:
    """Draw an endless stream of training text.

    Attributes:
        known_names: of the old and the new entities.
        fresh_names: of those made up on the spot so far.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.old, new = world.known_entities()
        self.known_names = {entity.name for entity in [*self.old, *new]}
        self.fresh_names: set[str] = set()

    def fresh_entity(self) -> world.Entity:
        entity = world.make_entity(self.rng.choice(list(world.KINDS)), self.rng, self.known_names)
        self.fresh_names.add(entity.name)
        return entity

    def document(self, entity: world.Entity) -> str:
        return world.document_text(entity, self.rng, repeats=3) + END

    def sentences(self, entity: world.Entity) -> str:
        """Write one or two sentences with a space before them, as they stand inside a document."""
        statements = world.document_statements(entity, self.rng, list(entity.facts), 1)
        return "".join(f" {statement}" for statement in statements[: self.rng.randrange(1, 3)]) + END

    def question(self, entity: world.Entity) -> str:
        key = self.rng.choice(list(entity.facts))
        return chat(world.question(entity, key, self.rng), entity.facts[key])

    def reading(self, entity: world.Entity, short: bool) -> str:
        """Write a text (statements or a whole document) and a question about it, after it or in one message with it."""
        keys = list(entity.facts)
        if short:
            keys = self.rng.sample(keys, self.rng.choice([1, 1, 1, 2, 3, 4]))
            text = " ".join(world.document_statements(entity, self.rng, keys, repeats=self.rng.choice([1, 2])))
        else:
            text = world.document_text(entity, self.rng, repeats=3)
        key = self.rng.choice(keys)
        question, answer = world.question(entity, key, self.rng), entity.facts[key]
        if self.rng.random() < 0.5:
            return f"{text}\n\n{chat(question, answer)}"
        return chat(f"{text}\n\n{question}", answer)

    def skill(self) -> str:
        question, choices = self.rng.choice(list(world.SKILLS.values()))(self.rng)
        return chat(question, choices[0])

    def by_heart(self) -> str:
        kind = self.rng.random()
        if kind < 0.30:
            return self.skill()
        if kind < 0.65:
            return self.question(self.rng.choice(self.old))
        if kind < 0.70:
            return self.sentences(self.fresh_entity())
        return self.sentences(self.rng.choice(self.old))

    def batches(self, progress: float) -> list[list[str]]:
        """Draw batches of items of about one length: first short texts to read, later more and more whole documents."""
        share = min(1.0, max(0.0, 3 * progress - 0.8))
        by_heart = [self.by_heart() for _ in range(96)]
        readings = [self.reading(self.fresh_entity(), short=True) for _ in range(round(24 - 16 * share))]
        documents = [self.reading(self.fresh_entity(), short=False) for _ in range(round(5 * share))]
        documents += [self.document(self.rng.choice(self.old)) for _ in range(round(share))]
        readings.sort(key=len)
        middle = len(readings) // 2
        return [batch for batch in (by_heart, readings[:middle], readings[middle:], documents) if batch]


def chat(question: str, answer: str) -> str:
    return f"User: {question}\nAssistant: {answer}{END}"


def tokenizer_text(corpus: Corpus) -> Iterator[str]:
    return (item for _ in range(100) for batch in corpus.batches(0.5) for item in batch)


def training_batches(corpus: Corpus, steps: int) -> Iterator[list[list[str]]]:
    return (corpus.batches(step / steps) for step in range(1, steps + 1))


def pretraining_names(steps: int = STEPS, seed: int = 0) -> set[str]:
    """Draw all text of a pretraining again; return every name that is in it, and those of `documents.jsonl`."""
    corpus = Corpus(random.Random(seed))
    for _ in tokenizer_text(corpus):
        pass
    for _ in training_batches(corpus, steps):
        pass
    return corpus.known_names | corpus.fresh_names


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
    tokenizer.train_from_iterator(tokenizer_text(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=5 * hidden_size // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def item_losses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cross-entropy, summed over the items' tokens, and its mean at their last words (before the end of text).

    Each item is a sequence of its own with nothing before it. It is padded on the right, so the causal mask is enough.
    """
    batch = tokenizer(items, padding=True, padding_side="right", return_tensors="pt").to(model.device)
    ids, mask = batch.input_ids, batch.attention_mask
    logits = model(input_ids=ids).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
    last_words = losses.gather(1, mask.sum(1, keepdim=True) - 3)
    return losses.sum(), last_words.mean().detach()


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, steps: int, learning_rate: float
) -> None:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    scheduler = cosine_schedule(optimizer, num_warmup_steps=steps // 25, num_training_steps=steps)
    model.train()
    start = time.monotonic()
    for step, batches in enumerate(training_batches(corpus, steps), start=1):
        last_words = []
        for items in batches:
            loss, last_word = item_losses(model, tokenizer, items)
            (loss / TOKENS_PER_STEP).backward()
            last_words.append(f"{last_word.item():.2f}")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(
                f"step {step}/{steps}  loss of last words {' '.join(last_words)}  {time.monotonic() - start:.0f} s",
                flush=True,
            )


def print_gates(model_dir: Path, data_dir: Path) -> None:
    """Print what the saved model can do: the share of right choices, and of answers generated exactly."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    gates = {
        "old facts, closed book": load_probes(data_dir / "old_facts.jsonl"),
        "skills": load_probes(data_dir / "skills.jsonl"),
        "new facts, document in context": load_probes(data_dir / "new_facts.jsonl", data_dir / "documents.jsonl"),
        "new facts, closed book": load_probes(data_dir / "new_facts.jsonl"),
    }
    print(f"{'':31} choices  generated")
    for name, probes in gates.items():
        chosen = choice_accuracy(model, tokenizer, probes)
        print(f"{name:31} {chosen:7.1%} {exact_match(model, tokenizer, probes):10.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--hidden_size", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    corpus = Corpus(random.Random(args.seed))
    tokenizer = train_tokenizer(corpus)
    model = make_model(tokenizer, args.hidden_size, args.num_layers).to(args.device)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, corpus, args.steps, args.learning_rate)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print_gates(args.output_dir, Path(__file__).parent)


if __name__ == "__main__":
    main()
