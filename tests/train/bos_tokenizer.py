"""Make a tokenizer that starts texts with a BOS token, which the tests' own does not."""

import copy

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a copy that starts every text with a BOS token of its own, <s>, when special tokens are asked for."""
    starting = copy.deepcopy(tokenizer)
    starting.add_special_tokens({"bos_token": "<s>"})
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", starting.bos_token_id)]
    )
    return starting
