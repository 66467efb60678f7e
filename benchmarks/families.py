"""Compare every family of `AutoModelForCausalLM` with itself, run one sequence at a time; write docs/families.md.

`make families` runs it. A family is its config class, made tiny. A step of `disc-train` on a few documents, loss and
every gradient, is held to a loop over split points that calls the plain model once for each; with windows shorter and
longer than the texts, with and without templates. Each family has a process of its own, so that a crash ends only that.
"""

import copy
import itertools
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from disc_kernels.shared_prefix import can_share
from disc_train.data.dataset import DocumentDataset
from disc_train.data.example import Example
from disc_train.data.splits import TokenizedDocument
from disc_train.data.templates import NO_TEMPLATES, Templates
from disc_train.trainer import DiscTrainer

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
RESULTS = Path(__file__).parent / "results" / "cpu" / "families.json"
VOCABULARY, TEMPERATURE = 96, 2.0
SECONDS = 300  # that one family may take
LARGEST = 20_000_000  # parameters
# float32 rounding gives 1e-5 and less in most families; a wrong mask or position gives 1e-2 and more.
TOLERANCE = 1e-3
SHORT, LONG = 6, 64  # windows, beside texts of up to 44 tokens
WINDOWS = {"sliding_window", "window_size", "attention_window_size", "sliding_window_size"}
# What a size is called -> its value here.
SIZES = {
    name: value
    for names, value in {
        "hidden_size d_model n_embd embed_dim embedding_size input_embedding_size output_embedding_size emb_dim dim"
        " word_embed_proj_dim attention_hidden_size lru_width kv_lora_rank_dim"
        " hidden_size_global adapter_in_dim adapter_out_dim adapter_input_size embedding_dim ple_embed_dim": 32,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner dff d_ff ffn_hidden_size"
        " shared_intermediate_size dense_intermediate_size feed_forward_size intermediate_size_mlp dim_ff"
        " block_ff_dim": 64,
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size adapter_rank"
        " shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size": 16,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers"
        " num_decoder_layers depth num_blocks": 2,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads"
        " num_encoder_attention_heads num_decoder_attention_heads encoder_num_heads swa_num_attention_heads": 4,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads kv_n_heads": 2,
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim attention_head_size d_head d_kv dim_head"
        " index_head_dim kv_channels rotary_dim q_lora_rank kv_lora_rank attention_head_dim query_pre_attn_scalar"
        " linear_key_head_dim linear_value_head_dim linear_head_dim laurel_rank o_lora_rank hidden_size_per_layer_input"
        " global_head_dim": 8,
        "num_experts n_routed_experts num_local_experts moe_num_experts": 4,
        "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k n_group topk_group num_expert_group": 2,
        "mamba_n_heads qk_head_dim mamba_d_head mamba_headdim": 16,
        "mamba_chunk_size chunk_size": 8,
        "mamba_n_groups n_groups mamba_ngroups": 1,
        "mamba_d_ssm": 256,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size": VOCABULARY,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length"
        " max_target_positions": 256,
        "linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads first_k_dense_replace": 2,
        "state_size mamba_d_state ssm_state_size": 4,
        "num_nextn_predict_layers mtp_num_hidden_layers num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "bos_token_id decoder_start_token_id": 1,
        "eos_token_id sep_token_id forced_eos_token_id": 2,
    }.items()
    for name in names.split()
}
LAYERS = [name for name, value in SIZES.items() if "layer" in name and value == 2 and "dense" not in name]
# What some families need beside these sizes.
HEADS_OF_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
INDEXER = {"indexer_budget": 8, "indexer_compress_ratio": 4}
INDEXER |= {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8}
ROPE = {"rope_theta": 10_000.0, "rope_type": "default"}
HYBRID = {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4}
MORE: dict[str, dict[str, Any]] = {
    "bamba": HEADS_OF_MAMBA,
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": ROPE | {"clip_qkv": 8}, "rope_parameters": ROPE},
    "falcon_h1": HEADS_OF_MAMBA | {"mamba_d_ssm": 64},
    "granitemoehybrid": HEADS_OF_MAMBA,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": HYBRID | {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": HYBRID
    | {
        "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# What transformers' own class for a family does not read by itself.
OF_ANOTHER_MODEL = "it drafts for another model, whose hidden states it reads"
NOT_ALONE = {
    "gemma4_assistant": OF_ANOTHER_MODEL,
    "gemma4_unified_assistant": OF_ANOTHER_MODEL,
    "musicgen": "AutoModelForCausalLM gives its decoder, of music, the config of the whole, which that cannot read",
    "musicgen_melody": "as musicgen",
}


class Outcome(NamedTuple):
    """Say how a family came out: in which rows, by which attention, with what errors, or why not."""

    family: str
    result: str  # "equal", "padded rows", "refused", "WRONG", "FAILED" or "not run"
    attention: str = ""
    windows: str = ""
    loss: float = 0.0  # relative errors, the largest of all cases
    gradient: float = 0.0
    message: str = ""


def tiny_config(family: str, window: int) -> PreTrainedConfig:
    """Make a family's default config tiny, with this window wherever it has one."""
    config_class = CONFIG_MAPPING[family]
    more = MORE.get(family, {})
    options = config_class().to_dict()
    _shrink(options, window)
    for key, value in more.items():
        nested = isinstance(value, dict) and isinstance(options.get(key), dict)
        options[key] = options[key] | value if nested else value
    return config_class.from_dict(options)


def _shrink(options: dict[str, Any], window: int) -> None:
    layers = next((options[name] for name in LAYERS if type(options.get(name)) is int), 0)
    types = next((value for key, value in options.items() if "layer" in key and _per_layer(value, layers)), [])
    kept = list({repr(kind): number for number, kind in reversed(list(enumerate(types)))}.values())[::-1]
    kept = sorted(kept + [number for number in range(layers) if number not in kept][: max(0, 2 - len(kept))])
    options.pop("per_layer_config", None)
    for key, value in options.items():
        if isinstance(value, dict) and key not in ("id2label", "label2id", "rope_parameters"):
            _shrink(value, window)
        elif _per_layer(value, layers):
            options[key] = [value[number] for number in kept]
        elif isinstance(value, bool) or value is None:
            continue
        elif key in WINDOWS:
            options[key] = window
        elif key in LAYERS:
            options[key] = max(2, len(kept))
        elif key in SIZES and isinstance(value, int | list):
            latent = key == "num_key_value_heads" and "kv_lora_rank" in options  # keys and values of all heads
            options[key] = SIZES["num_attention_heads" if latent else key]
        elif isinstance(value, float) and ("drop" in key or "jitter" in key):
            options[key] = 0.0


def _per_layer(value: Any, layers: int) -> bool:
    return isinstance(value, list) and layers > 2 and len(value) == layers


def make_model(config: PreTrainedConfig, kind: Any = AutoModelForCausalLM, largest: int = LARGEST) -> PreTrainedModel:
    """Make a model whose attention is far from uniform, so that a wrong mask shows."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
    if size > largest:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_dataset(templates: Templates) -> DocumentDataset:
    """Make three documents in sentences of 7 tokens."""
    rng = np.random.default_rng(0)
    return DocumentDataset(
        [
            TokenizedDocument(str(n), rng.integers(3, VOCABULARY, n, dtype=np.int32), tuple(range(0, n, 7)))
            for n in (32, 24, 16)
        ],
        templates=templates,
        num_splits=3,
    )


def loop_loss(student: PreTrainedModel, teacher: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Compute the loss of a step by one plain call of each model for every split point."""

    def log_probabilities(model: PreTrainedModel, ids: list[np.ndarray], rows: int) -> Tensor:
        logits = model(input_ids=torch.from_numpy(np.concatenate(ids)).long()[None], use_cache=False).logits
        return log_softmax(logits[0, -rows - 1 : -1].float() / TEMPERATURE, dim=-1)

    of_examples = []
    for example in examples:
        losses = []
        for target, *contexts in example.branches:
            rows = len(target) - example.branches[0].first
            (theirs, ours) = (
                [trunk[: context.attach], context.lead, target]
                for trunk, context in zip((example.teacher_trunk, example.student_trunk), contexts, strict=True)
            )
            with torch.no_grad():
                p = log_probabilities(teacher, theirs, rows)
            q = log_probabilities(student, ours, rows)
            losses.append(TEMPERATURE**2 * (p.exp() * (p - q)).sum() / rows)
        of_examples.append(torch.stack(losses).mean())
    return torch.stack(of_examples).mean()


def compare(config: PreTrainedConfig, templates: Templates, folder: str) -> tuple[str, str, float, float]:
    """Return how a step ran, with which attention, and the relative errors of its loss and its gradients.

    Raises:
        ValueError: the trainer refuses the model.
        RuntimeError: the plain model itself does not run.
    """
    dataset = make_dataset(templates)
    examples = [dataset[number] for number in range(len(dataset))]
    teacher = make_model(config)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * parameter.std(correction=0) * torch.randn_like(parameter))
    expected, plain = copy.deepcopy(student).train(), copy.deepcopy(teacher)
    try:
        if expected.config._attn_implementation == "sdpa":  # it would leave out softcaps
            expected.set_attn_implementation("eager")
            plain.set_attn_implementation("eager")
        loss = loop_loss(expected, plain, examples)
        loss.backward()
    except Exception as error:
        raise RuntimeError(f"the plain model does not run: {_one_line(error)}") from error
    args = TrainingArguments(folder, use_cpu=True, report_to="none")
    trainer = DiscTrainer(student, teacher, args, dataset, temperature=TEMPERATURE)
    batch = trainer.data_collator(examples)
    got = trainer.training_step(student, batch, num_items_in_batch=batch["num_examples"])
    shared = "equal" if can_share(config) else "padded rows"
    return shared, student.config._attn_implementation, _error(got, loss), gradient_error(student, expected)


def _error(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).norm() / expected.norm()).detach())


def gradient_error(student: PreTrainedModel, expected: PreTrainedModel) -> float:
    """Return the largest relative error of a parameter's gradient; small ones are taken relative to all together."""
    pairs = [
        tuple(torch.zeros_like(each) if each.grad is None else each.grad for each in pair)
        for pair in zip(student.parameters(), expected.parameters(), strict=True)
    ]
    whole = torch.stack([want.norm() for _, want in pairs]).norm()
    return max(float((got - want).norm() / torch.maximum(want.norm(), 1e-2 * whole)) for got, want in pairs)


def examine(family: str) -> Outcome:
    """Compare one family in all cases, and name the first that does not hold."""
    if family in NOT_ALONE:
        return Outcome(family, "not run", message=NOT_ALONE[family])
    worst, seen = Outcome(family, ""), set()
    for window, templates in itertools.product((SHORT, LONG), (NO_TEMPLATES, _templates())):
        case = f"windows of {window}, {'no templates' if templates is NO_TEMPLATES else 'templates'}: "
        try:
            config = tiny_config(family, window)
            text = str(config.to_dict())
            if window == LONG and text in seen:  # no window
                continue
            seen.add(text)
            make_model(config)
        except Exception as error:
            return Outcome(family, "not run", message=f"no tiny config: {_one_line(error)}")
        try:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                shared, attention, *errors = compare(config, templates, folder)
        except (ValueError, TypeError) as error:
            return worst._replace(result="refused", message=_one_line(error))
        except Exception as error:
            result = "not run" if "plain model" in str(error) else "FAILED"
            return worst._replace(result=result, message=case + _one_line(error))
        loss, gradient = max(worst.loss, errors[0]), max(worst.gradient, errors[1])
        windows = "short and long" if window == LONG else "none"
        worst = Outcome(family, shared, attention, windows, loss, gradient)
        if not max(errors) < TOLERANCE:
            return worst._replace(result="WRONG", message=case + "the step differs from the loop")
    return worst


def _templates() -> Templates:
    ids = np.arange(3, 30, dtype=np.int32)
    return Templates(teacher_header=ids[:5], teacher_footer=ids[5:8], student_header=ids[8:14])


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 400 else text[:400] + " ..."


def _examine_apart(family: str) -> Outcome:
    """Examine a family in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(examine(family)))
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return receiver.recv()
        return Outcome(family, "FAILED", message=f"not done after {SECONDS} s")
    except EOFError:
        process.join()
        return Outcome(family, "FAILED", message=f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def examine_all(families: Sequence[str]) -> Iterator[Outcome]:
    """Examine families one after another; print each outcome and how many are done."""
    for number, family in enumerate(families, start=1):
        outcome = _examine_apart(family)
        figures = f" {outcome.loss:.1e} {outcome.gradient:.1e}" if outcome.attention else ""
        print(f"{number}/{len(families)} {family}: {outcome.result}{figures} {outcome.message}", flush=True)
        yield outcome


def render(outcomes: Sequence[Outcome]) -> str:
    """Write the page."""
    counts = Counter(outcome.result for outcome in outcomes)
    lines = [
        "# Families of models",
        "",
        f"`make families`, transformers {transformers.__version__}, PyTorch {torch.__version__}; the figures are those"
        f" of [{RESULTS.name}](../benchmarks/results/cpu/{RESULTS.name}).",
        "",
        f"Each of the {len(outcomes)} families of `AutoModelForCausalLM` is made with a tiny config and random weights,"
        " in float32 on the CPU. A step of `disc-train` (`disc`, three documents) is compared with a loop over split"
        " points that calls the plain model once for each: without and with templates, and where the config has"
        f" windows, with windows shorter ({SHORT} tokens) and longer ({LONG}) than the texts. Errors are relative, the"
        " largest of all cases: of the loss, and of a parameter's gradient.",
        "",
        "- *equal*: branches share their trunks.",
        "- *padded rows*: equal too, but every sequence has a row, since layers do not let branches share a trunk.",
        "- *refused*: the trainer ends with the message.",
        "- *not run*: no tiny model was made or run, for the reason given; nothing is known of the family.",
        "",
        ", ".join(f"{count} {result}" for result, count in counts.most_common()) + ".",
        "",
        "| family | result | attention | windows | loss | gradient | message |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        errors = [f"{outcome.loss:.0e}", f"{outcome.gradient:.0e}"] if outcome.attention else ["", ""]
        message = outcome.message.replace("|", "\\|")
        cells = [outcome.family, outcome.result, outcome.attention, outcome.windows, *errors, message]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    # Families that are named on the command line are examined anew, and the others kept.
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if sys.argv[1:] and RESULTS.exists() else {}
    for found in examine_all(sys.argv[1:] or sorted(FAMILIES)):
        known[found.family] = found._asdict()
        RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    outcomes = [Outcome(**known[family]) for family in sorted(known)]
    PAGE.write_text(render(outcomes), encoding="utf-8")
    sys.exit(any(outcome.result in ("WRONG", "FAILED") for outcome in outcomes))
