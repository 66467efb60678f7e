"""Load a causal language model, run it on packed sequences, and check that it computes what the loss expects."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from disc_kernels import SharedPrefixLayout
from disc_kernels.hf import output_head
from disc_kernels.hf.forward import run_as_forward, run_decoder
from disc_kernels.hf.head import check_logits, logits_of
from disc_kernels.shared_prefix import VARLEN, attention_implementation, attention_mask, can_share
from disc_train.data.example import Context, Ids
from disc_train.models.adapters import base_of_adapter, merge_adapter, put_adapter
from disc_train.models.pretrained import explain_load_errors, load_pretrained
from disc_train.packing.branch_inputs import make_branch_inputs
from disc_train.packing.rows import arrange, row_rule


def load_model(
    name_or_path: str,
    dtype: torch.dtype,
    adapter: Literal["as_it_is", "trained", "merged"] = "as_it_is",
    quantisation: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """Load a causal language model, or an adapter on the model that it was trained on.

    Args:
        adapter: what becomes of an adapter, if it is one. The base of an adapter may be an adapter: it is merged.
        quantisation: how the weights of a model that is no adapter are quantised.

    Raises:
        ImportError: it is an adapter, and peft is not installed.
        ValueError, OSError: there is none, it is of another kind, or its files are damaged.
    """
    with explain_load_errors(name_or_path):
        base = base_of_adapter(name_or_path)
        if base is not None:
            if find_spec("peft") is None:
                raise ImportError(f"{name_or_path} is an adapter, which needs peft: pip install peft")
            if quantisation is not None:
                raise ValueError("it is an adapter, which quantised weights cannot take in: merge and save it first")
            model = load_model(base, dtype, "merged")
            if adapter == "merged":
                return merge_adapter(model, name_or_path)
            return put_adapter(model, name_or_path, trained=adapter == "trained")
    options: dict[str, Any] = {} if quantisation is None else {"quantization_config": quantisation}
    whole: PreTrainedModel = load_pretrained(AutoModelForCausalLM, name_or_path, dtype=dtype, **options)
    return whole


def check_vocabulary(model: PreTrainedModel, largest_token: int) -> None:
    """Raise ValueError if a token of the documents is none of the model's; a GPU would fail without saying so."""
    entries = _vocabulary(model)
    if largest_token >= entries:
        raise ValueError(
            f"{model.name_or_path or type(model).__name__}: expected an entry for every token of the documents, up to"
            f" {largest_token}, got a vocabulary of {entries}: the tokenizer is another model's"
        )


def _vocabulary(model: PreTrainedModel) -> int:
    """Count the tokens that a model can both read and predict."""
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return min(embeddings.shape[0], output_head(model).weight.shape[0])


def hidden_states(model: PreTrainedModel, input_ids: Tensor, layout: SharedPrefixLayout) -> Tensor:
    """Compute the decoder's last hidden states [rows, L, D] of packed rows; the head is not run.

    Where a model's parameters are divided over processes, `output_head` gives a whole weight after this, until the
    backward pass.

    Args:
        model: a causal language model that `use_attention` has prepared; it runs with what that picked.
        input_ids: [rows, L] int64. Several rows only with "sdpa", "eager" or a model that cannot share a trunk.
        layout: rows * L tokens, one row after another, on the model's device.

    Raises:
        ValueError: the model cannot run such a layout, see `disc_kernels.shared_prefix.attention_mask`.
    """

    def decode() -> Tensor:
        hidden = run_decoder(model, **_inputs(model, input_ids, layout))
        return run_as_forward(model.get_output_embeddings(), lambda hidden: hidden, hidden)

    return run_as_forward(model, decode)


@torch.no_grad()
def target_states(model: PreTrainedModel, branches: Sequence[tuple[Ids, Context, Ids]]) -> tuple[Tensor, Tensor]:
    """Run a model on branches, given as (trunk, context, target); return what predicts the targets' tokens.

    Returns:
        Hidden states [rows, L, D]; and [M] int64, for each token of the targets the row, of these flattened, before it.
    """
    rule = row_rule(model)
    rows = arrange(make_branch_inputs(branches, rule.share), rule)
    index = torch.from_numpy(rows.ends(len(target) for *_, target in branches))
    hidden = hidden_states(model, rows.input_ids.to(model.device), rows.layout.to(model.device))
    return hidden, index


def _inputs(model: PreTrainedModel, input_ids: Tensor, layout: SharedPrefixLayout) -> dict[str, Any]:
    # transformers has no public name for the implementation in use.
    implementation = model.config._attn_implementation
    rows = input_ids.shape[0]
    mask = attention_mask(model.config, layout, implementation, model.dtype, rows)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
    if mask is not None:
        inputs["position_ids"] = layout.position_ids.view(input_ids.shape)
    return inputs


@torch.no_grad()
def use_attention(model: PreTrainedModel, attention: str, flex_saving: float | None = None, dense: bool = False) -> str:
    """Switch a model to the attention that packed sequences need, and check that it computes what the loss expects.

    With "auto", an implementation that fails the check is left for the next one with a warning: "flex" for "sdpa",
    at last for "eager". A model that cannot share a trunk keeps its own attention, whatever is asked for.

    Args:
        model: a causal language model on the device that it will run on; its mode (train or eval) is kept.
        attention: "eager", or "auto", "sdpa", "flex" or "varlen", see
            `disc_kernels.shared_prefix.attention_implementation`.
        flex_saving: what "auto" is told of the batches, see there.
        dense: "auto" picks "sdpa" or "eager", with which a model also reads plain batches and generates.

    Returns:
        transformers' name of the implementation in use.

    Raises:
        ValueError: the model has no usable head, does something unknown to its logits, or runs the branches of a text
            differently from the text alone: training would minimise the wrong loss. Or it cannot run a packed sequence
            at all. Or the attention asked for lacks what the model or its device needs; "flex" on the CPU.
    """
    device_type = "cpu" if dense else model.device.type
    if attention == "flex" and device_type == "cpu":
        raise ValueError("attention: 'flex' cannot train on the CPU (FlexAttention has no backward there), use 'sdpa'")
    # Different tokens, whatever the data: where a few repeat, wrong attention may give the right hidden states.
    input_ids = (torch.arange(16, device=model.device) * _vocabulary(model) // 16)[None]
    training = model.training
    model.eval()
    try:
        if not can_share(model.config):
            _check_rows(model, input_ids, _plain_hidden_states(model, input_ids))
            return model.config._attn_implementation
        candidates = [attention]
        if attention != "eager":
            candidates = [attention_implementation(model.config, attention, device_type, flex_saving)]
        if attention == "auto":
            candidates += [attention_implementation(model.config), "eager"]
        with _short_windows(model):
            # The reference of every implementation: it leaves out nothing of what a model's attention does.
            model.set_attn_implementation("eager")
            expected = _plain_hidden_states(model, input_ids)
            *candidates, last = dict.fromkeys(candidates)
            for implementation in candidates:
                try:
                    return _check_packed(model, implementation, input_ids, expected)
                except ValueError as failure:
                    warnings.warn(f"attention {implementation!r} is not used: {failure}", stacklevel=3)
            return _check_packed(model, last, input_ids, expected)
    finally:
        model.train(training)


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Shorten sliding windows to a few tokens, so that they hide something of the check's short text.

    A text longer than a real window (4,096 tokens and more) would take the memory of a long step, and a copy of the
    model that of the model. `sliding_window` is the only window of models that share trunks, see `can_share`.
    """
    holders: list[Any] = [model.config.get_text_config(), *model.modules()]
    holders += [config for module in model.modules() if (config := vars(module).get("config")) is not None]
    windows = [
        (vars(holder), window) for holder in holders if type(window := vars(holder).get("sliding_window")) is int
    ]
    for attributes, window in windows:
        attributes["sliding_window"] = min(window, 5)
    try:
        yield
    finally:
        for attributes, window in windows:
            attributes["sliding_window"] = window


def _plain_hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Compute the hidden states [1, L, D] of one text, and check that they give the logits of a plain call."""
    alone = SharedPrefixLayout.from_trees([(input_ids.shape[1], [])]).to(input_ids.device)
    with _explain_run_errors(model, model.config._attn_implementation):
        logits = model(input_ids=input_ids, use_cache=False).logits.float()
        hidden = hidden_states(model, input_ids, alone)
    head = output_head(model)
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"{type(model).__name__}: expected an output head that takes hidden states of {hidden.shape[-1]} entries,"
            f" got one that takes {head.weight.shape[1]}: there are layers between the two that the loss would leave"
            " out, so models of this family cannot be trained or read"
        )
    # The bounds leave room for rounding, in 16 bits or in TF32, and for kernels that differ between lengths; real
    # faults are further off.
    check_logits(model, head, logits_of(head, hidden), logits, 0.1 if _low_precision(model) else 1e-3)
    return hidden


def _check_packed(model: PreTrainedModel, implementation: str, input_ids: Tensor, expected: Tensor) -> str:
    """Switch to an implementation; compare a text, its second half and the whole again as branches, with `expected`.

    Returns:
        The implementation in use: a model with attention code of its own may not switch.
    """
    length = input_ids.shape[1]
    half = length // 2
    layout = SharedPrefixLayout.from_trees([(length, [(half, length - half), (0, length)])]).to(input_ids.device)
    packed = torch.cat([input_ids, input_ids[:, half:], input_ids], dim=1)
    with _explain_run_errors(model, implementation):
        model.set_attn_implementation(implementation)
        hidden = hidden_states(model, packed, layout)
    _check_equal(model, hidden, torch.cat([expected, expected[:, half:], expected], dim=1), "packed after another")
    return model.config._attn_implementation


def _check_rows(model: PreTrainedModel, input_ids: Tensor, expected: Tensor) -> None:
    """Compare a text in a padded row with `expected`, for models that take one sequence a row."""
    length = input_ids.shape[1]
    layout = SharedPrefixLayout.from_trees([(length, []), (length, [])]).to(input_ids.device)
    with _explain_run_errors(model, model.config._attn_implementation):
        hidden = hidden_states(model, input_ids.repeat(1, 2), layout)[:, :length]
    _check_equal(model, hidden, expected, "in a padded row")


def _check_equal(model: PreTrainedModel, got: Tensor, expected: Tensor, where: str) -> None:
    error = (got - expected).float().norm() / expected.float().norm()
    if error > (0.2 if _low_precision(model) else 0.01):
        raise ValueError(
            f"{type(model).__name__}: expected the same hidden states for a text {where} as for the text alone, but"
            f" they differ by {error:.1%}: the model does not follow attention_mask or position_ids"
        )


@contextmanager
def _explain_run_errors(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Turn an error of any kind in the model's own code into one that says what was being tried."""
    try:
        yield
    except Exception as failure:
        raise ValueError(
            f"{type(model).__name__}: expected a model that runs a packed sequence, by its attention_mask and"
            f" position_ids, with attention {implementation!r}, got {type(failure).__name__}: {failure}"
        ) from failure


def _low_precision(model: PreTrainedModel) -> bool:
    # Variable-length attention rounds to 16 bits whatever the model's dtype.
    return torch.finfo(model.dtype).bits < 32 or model.config._attn_implementation == VARLEN
