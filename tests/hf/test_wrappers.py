"""Hidden states and heads through what is put around models: peft, DDP, FSDP2, accelerate, torch.compile."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from disc_kernels import fused_suffix_kl
from disc_kernels.hf import check_output_head, last_hidden_states, output_head
from tests.hf.models import IDS, gradients, make, perturbed
from tests.hf.test_output_head import assert_same_loss, fused_loss


@pytest.fixture
def one_process(tmp_path):
    """Make a process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def adapted(family: str = "llama", **options):
    """Put adapters into a model, with values that change what it predicts."""
    torch.manual_seed(0)
    model = get_peft_model(make(family), LoraConfig(task_type="CAUSAL_LM", r=4, **options)).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


ON_THE_HEAD = {"target_modules": ["lm_head", "q_proj"]}
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", ON_THE_HEAD), ("cohere", ON_THE_HEAD), ("llama", SAVED), ("phi", ON_THE_HEAD | {"lora_bias": True})],
)
def test_adapters_on_a_head_are_merged_and_get_gradients(family, options):
    """Of the teacher, which is the model with its adapters off, the head is the original one."""
    model = adapted(family, **options)
    check_output_head(model, IDS)
    with model.disable_adapter():
        check_output_head(model, IDS)
        assert torch.equal(output_head(model).weight, make(family).lm_head.weight)
    assert_same_loss(model, make(family))
    got = gradients(model, fused_loss(model, make(family)))
    assert any("lm_head" in name for name in got) and all("lora_" in name or "lm_head" in name for name in got)


def test_a_merged_adapter_is_not_added_twice():
    model = adapted(**ON_THE_HEAD)
    expected = output_head(model).weight
    model.merge_adapter()
    torch.testing.assert_close(output_head(model).weight, expected)
    check_output_head(model, IDS)
    with model.disable_adapter(), pytest.raises(ValueError, match="expected adapters that can be left out, got merged"):
        output_head(model)


def test_beside_a_merged_adapter_no_other_is_added():
    model = adapted(**ON_THE_HEAD)
    model.add_adapter("other", LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    check_output_head(model, IDS)
    model.base_model.merge_adapter(["other"])
    check_output_head(model, IDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "expected plain LoRA, .* got DoraLinearVariant of peft"),
        ({"lora_dropout": 0.1}, r"expected lora_dropout 0 in training, .*, got 0\.1"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(options, message):
    model = adapted(target_modules=["lm_head"], **options)
    with pytest.raises(ValueError, match=f"the output head's adapter 'default': {message}"):
        output_head(model.train())
    with model.disable_adapter():
        output_head(model)
    if "lora_dropout" in options:
        check_output_head(model.eval(), IDS)


def test_adapters_of_another_kind_are_refused():
    model = get_peft_model(make(), IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"expected plain LoRA, .* got Linear of peft"):
        output_head(model)
    model = get_peft_model(make(), AdaLoraConfig(target_modules=["lm_head"], total_step=10))
    with pytest.raises(ValueError, match=r"expected plain LoRA, .* got SVDLinear of peft"):
        output_head(model)
    activated = adapted(target_modules=["lm_head"], alora_invocation_tokens=[2])
    with pytest.raises(ValueError, match=r"expected plain LoRA, .* got ALoraLinearVariant of peft"):
        check_output_head(activated, IDS)
    assert last_hidden_states(activated, input_ids=IDS).shape == (*IDS.shape, 32)


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_ddp(one_process, find_unused_parameters):
    teacher = make()
    student = DistributedDataParallel(perturbed(teacher).train(), find_unused_parameters=find_unused_parameters)
    check_output_head(student, IDS)
    assert_same_loss(student, teacher)


@pytest.mark.parametrize("head_apart", [False, True])
@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_fsdp2(one_process, family, head_apart):
    teacher = make(family)
    student = perturbed(teacher).train()
    expected = gradients(plain := copy.deepcopy(student), fused_loss(plain, teacher))
    mesh = init_device_mesh("cpu", (1,))
    if head_apart:
        teacher.config.tie_word_embeddings = student.config.tie_word_embeddings = False
        student.lm_head.weight = nn.Parameter(student.lm_head.weight.detach().clone())
        expected = gradients(plain := copy.deepcopy(student), fused_loss(plain, teacher))
        for module in (*student.model.layers, student.lm_head):
            fully_shard(module, mesh=mesh)
    fully_shard(student, mesh=mesh)
    check_output_head(student, IDS)
    got = gradients(student, fused_loss(student, teacher))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert isinstance(got[name], DTensor)
        torch.testing.assert_close(got[name].full_tensor(), gradient, rtol=1e-7, atol=1e-9, msg=name)


def test_compiled_models():
    """Another call compiles nothing, nor does a graph break."""
    teacher = make()
    student = torch.compile(perturbed(teacher), backend="eager", fullgraph=True)
    check_output_head(student, IDS)
    assert_same_loss(student, teacher)
    with torch.compiler.set_stance("fail_on_recompile"):
        fused_loss(student, teacher)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 does not trace a forward that is replaced meanwhile")
def test_a_compiled_step():
    teacher = make("cohere")
    student = perturbed(teacher)
    expected = gradients(student, fused_loss(student, teacher))
    step = torch.compile(fused_loss, backend="eager", fullgraph=True)
    for name, gradient in gradients(student, step(student, teacher)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-9, msg=name)


def test_the_autocast_that_accelerate_puts_into_a_model():
    """Outside `accelerator.autocast()` too, the decoder runs in 16 bits; the head is what autocast makes of it."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        student, teacher = make().float(), make().float()
        with torch.no_grad(), accelerator.autocast():
            expected = student.model(IDS).last_hidden_state
        prepared = accelerator.prepare(student)
        check_output_head(prepared, IDS)
        hidden = last_hidden_states(prepared, input_ids=IDS)
        assert torch.equal(hidden, expected)
        with accelerator.autocast():
            logits = prepared(input_ids=IDS).logits
            rows = fused_suffix_kl(hidden, output_head(prepared), hidden, output_head(teacher), reduction="none")
        assert rows.abs().max() < 1e-6
        assert logits.dtype == torch.float32  # as accelerate gives them
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("share", "ours", "peft"), [(2**-4, 0.03, 0.04), (2**-8, 0.40, 0.59), (2**-12, 0.95, 7.0)], ids=lambda value: ""
)
def test_float32_adapters_merged_into_a_16_bit_head_are_rounded(share, ours, peft):
    """As docs/heads.md says, by how much; peft's own forward loses more."""
    torch.manual_seed(0)
    model = get_peft_model(make("llama").float(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    causal_lm = model.base_model.model
    layer = causal_lm.lm_head
    layer.base_layer.weight = torch.nn.Parameter((0.02 * torch.randn(4096, 512)).bfloat16(), requires_grad=False)
    layer.base_layer.out_features, layer.base_layer.in_features = 4096, 512
    a, b = torch.randn(8, 512), torch.randn(4096, 8)
    weight = layer.base_layer.weight.double()
    b *= share * weight.norm() / (b @ a).norm() / layer.scaling["default"]
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = map(torch.nn.Parameter, (a, b))
    hidden = torch.randn(64, 512).bfloat16()
    exact = hidden.double() @ (b @ a).double().T * layer.scaling["default"]
    with torch.no_grad():
        merged = hidden.double() @ output_head(model).weight.double().T
        by_peft = layer(hidden).double()
    errors = [float((got - hidden.double() @ weight.T - exact).norm() / exact.norm()) for got in (merged, by_peft)]
    assert errors == pytest.approx([ours, peft], rel=0.2)
