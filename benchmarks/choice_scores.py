"""Time `disc-eval`'s own code and lm-eval's `HFLM` on the tiny example's probes, and compare the scores they give.

    python benchmarks/choice_scores.py

Needs lm-eval (pip install lm-eval). One thread; medians of three runs that take turns.
"""

import logging
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from disc_train.evaluation import Probe, choice_scores, read_documents, read_questions
from disc_train.loading import load_for_inference, load_tokenizer

TINY = "examples/tiny"


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    tokenizer = load_tokenizer(f"{TINY}/model")
    model = load_for_inference(f"{TINY}/model", use_cpu=True)
    files = [f"{TINY}/{name}.jsonl" for name in ("new_facts", "old_facts", "skills")]
    questions = read_questions(files, tokenizer, read_documents(f"{TINY}/documents.jsonl"))

    def ours(probes: Sequence[Probe]) -> list[float]:
        """Return the log-probability of every choice, summed over its tokens."""
        scores = choice_scores(model, tokenizer, probes)
        lengths = [[len(tokenizer.encode(c, add_special_tokens=False)) for c in probe.choices] for probe in probes]
        return [s * n for each, of in zip(scores, lengths, strict=True) for s, n in zip(each, of, strict=True)]

    def theirs(probes: Sequence[Probe]) -> list[float]:
        pairs = [(probe.context + probe.prompt, choice) for probe in probes for choice in probe.choices]
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        evaluator = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=64, add_bos_token=False)
        return [score for score, _ in evaluator.loglikelihood(requests, disable_tqdm=True)]

    closed_book = [question.closed_book for question in questions]
    in_context = [question.in_context for question in questions if question.in_context]
    for name, probes in (("closed book", closed_book), ("in context", in_context)):
        times: dict[Callable, list[float]] = {ours: [], theirs: []}
        found = {}
        for _ in range(3):
            for score, taken in times.items():
                start = time.perf_counter()
                found[score] = score(probes)
                taken.append(time.perf_counter() - start)
        difference = max(abs(a - b) for a, b in zip(found[ours], found[theirs], strict=True))
        seconds, others = median(times[ours]), median(times[theirs])
        print(
            f"{name}: {len(probes)} probes, {len(found[ours]):,} choices: ours {seconds:.1f} s, HFLM {others:.1f} s"
            f" ({others / seconds:.1f} times), largest difference {difference:.1e} nats"
        )


if __name__ == "__main__":
    main()
