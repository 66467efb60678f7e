"""Take from a Hugging Face model what a loss on hidden states needs: the last hidden states and the output head.

Call both in every step, the head second: FSDP2 gathers it while the model runs, and adapters on it change. The loss
goes inside `accelerator.autocast()`, where there is one:

    hidden = last_hidden_states(model, **inputs)
    loss = fused_suffix_kl(hidden, output_head(model), teacher_hidden, teacher_head)
"""

from disc_kernels.hf.forward import last_hidden_states
from disc_kernels.hf.head import check_output_head, output_head
from disc_kernels.linear_kl.inputs import OutputHead

__all__ = ["OutputHead", "check_output_head", "last_hidden_states", "output_head"]
