"""Run public benchmarks, by lm-eval (EleutherAI's lm-evaluation-harness) where it is installed."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | dict[str, Any]],
    batch_size: int,
    add_bos: bool,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """Run tasks under lm-eval's own defaults, in the model's chat template where it has one.

    Returns:
        lm-eval's `results`, `n-samples` and `versions`; and `items`: task -> "metric,filter" -> document ->
        (part, whole), for metrics that are means of numbers.

    Raises:
        ImportError: there is no lm-eval.
        ValueError: it does not know a task, cannot get its data, or fails otherwise.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(f"--tasks needs lm-eval: pip install lm-eval ({error})") from error
    chat = bool(tokenizer.chat_template)
    try:
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=add_bos),
            tasks=list(tasks),
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
    except Exception as error:  # of whatever kind a task's own code and its data's loading raise
        raise ValueError(f"--tasks: lm-eval failed: {type(error).__name__}: {error}") from error
    samples = found.get("samples", {})
    return {key: found.get(key, {}) for key in ("results", "n-samples", "versions")} | {
        "items": {task: _items(outcomes) for task, outcomes in samples.items()}
    }


def _items(outcomes: Sequence[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    items: dict[str, dict[str, tuple[float, float]]] = {}
    for outcome in outcomes:
        for metric in outcome.get("metrics", ()):
            given = outcome[metric]
            values = given if isinstance(given, list) else [given]  # a list: of the instructions in a prompt, say
            if values and all(isinstance(value, (bool, int, float)) for value in values):
                column = items.setdefault(f"{metric},{outcome.get('filter', 'none')}", {})
                column[str(outcome["doc_id"])] = (float(sum(values)), float(len(values)))
    return items
