"""lora.py against peft on transformers: the same logits and the same gradients, and adapters that are merged."""

import copy
import re

import pytest
import tiny
import torch

import lora
from config import LORA_TARGETS, InputError, LoraConfig
from llama import load_pretrained

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "gate": "gate_proj", "up": "up_proj",
               "down": "down_proj"}


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="peft is the judge here, and is not installed")


def with_peft(peft, config: LoraConfig, kv_heads: int = tiny.KV_HEADS, tied: bool = True):
    """A random transformers Llama with peft's adapters, their numbers random too."""
    model = peft.get_peft_model(copy.deepcopy(tiny.hf_model(kv_heads, tied)), peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, target_modules=[PROJECTIONS[name] for name in config.targets],
        use_rslora=config.rs, use_dora=config.dora, lora_dropout=config.dropout))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) / 8)
    return model.eval()


def plain(name: str) -> tuple[str, str]:
    """peft's name of an adapter's parameter as our name, and the target's name."""
    layer, projection, kind = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.(lora_\w+)\.", name).groups()
    target = next(target for target, theirs in PROJECTIONS.items() if theirs == projection)
    ours = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "magnitude"}[kind]
    return f"layers.{layer}.{LORA_TARGETS[target]}.{ours}", target


def ours_of(model, tmp_path, config: LoraConfig):
    """Our model with the same weights and the same adapters."""
    base = model.get_base_model()
    hf = type(base)(base.config)
    state = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora_" not in name}
    hf.load_state_dict(state)
    path = tmp_path / "base.pt"
    torch.save(tiny.pt_dict(hf), path)
    llama = load_pretrained(path)
    lora.add(llama, config)
    own = dict(llama.named_parameters())
    with torch.no_grad():
        for name, value in adapters_of(model).items():
            own[name].copy_(value)
    return llama


def adapters_of(model, gradients: bool = False) -> dict[str, torch.Tensor]:
    """The numbers, or the gradients, of peft's adapters under our names and in our order of rows."""
    c, found = model.config, {}
    heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            ours, target = plain(name)
            value = parameter.grad if gradients else parameter.detach()
            if target in heads and not ours.endswith("lora_a"):
                value = tiny.permute(value, heads[target])
            found[ours] = value
    return found


CASES = [*(LoraConfig(4, 8.0, targets=(name,)) for name in LORA_TARGETS), LoraConfig(4, 8.0),
         LoraConfig(4, 8.0, rs=True), LoraConfig(4, 8.0, dora=True), LoraConfig(3, 6.0, rs=True, dora=True)]


@pytest.mark.parametrize("config", CASES, ids=str)
def test_logits_and_gradients_are_those_of_peft(peft, tmp_path, config):
    compare(with_peft(peft, config), tmp_path, config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_with_other_numbers_of_key_heads_and_untied(peft, tmp_path, kv_heads, tied):
    config = LoraConfig(4, 8.0, dora=True)
    compare(with_peft(peft, config, kv_heads, tied), tmp_path, config)


def compare(judge, tmp_path, config: LoraConfig) -> None:
    llama = ours_of(judge, tmp_path, config)
    tokens = tiny.tokens(3, 11)
    expected, (logits, _) = judge(tokens).logits, llama(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    factors = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (expected * factors).sum().backward()
    (logits * factors).sum().backward()
    wanted = adapters_of(judge, gradients=True)
    own = {name: parameter.grad for name, parameter in llama.named_parameters() if parameter.requires_grad}
    assert own.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(own[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-4, msg=name)


@pytest.mark.parametrize("config", [LoraConfig(4, 8.0), LoraConfig(4, 8.0, rs=True, dora=True)], ids=str)
def test_merged_weights_give_the_same_logits(config):
    llama = random_adapters(tiny.llama(), config)
    tokens = tiny.tokens(3, 11)
    before = llama(tokens)[0].detach()
    merged = tiny.llama(seed=1)
    merged.load_state_dict(lora.merge(llama))
    torch.testing.assert_close(merged(tokens)[0], before, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(tiny.llama()(tokens)[0], before, atol=1e-2)


def random_adapters(llama, config: LoraConfig):
    lora.add(llama, config)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if lora.is_adapter(name):
                parameter.add_(torch.randn_like(parameter) / 8)
    return llama


@pytest.mark.parametrize("config", [LoraConfig(4, 8.0), LoraConfig(4, 8.0, dora=True)], ids=str)
def test_new_adapters_change_nothing(config):
    llama, tokens = tiny.llama(), tiny.tokens(3, 11)
    before = llama(tokens)[0]
    lora.add(llama, config)
    torch.testing.assert_close(llama(tokens)[0], before, atol=1e-5, rtol=1e-5)
    trained = {name for name, parameter in llama.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in llama.named_parameters() if lora.is_adapter(name)}


def test_numbers_that_are_not_finite_are_not_merged():
    llama = random_adapters(tiny.llama(), LoraConfig(4, 8.0))
    with torch.no_grad():
        llama.layers[1].feed_forward.w1.lora_b[3, 2] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.feed_forward\.w1.*not finite"):
        lora.merge(llama)


def test_dropout_is_in_front_of_the_adapter_alone():
    llama = random_adapters(tiny.llama(), LoraConfig(4, 8.0, dropout=0.5))
    tokens = tiny.tokens(3, 11)
    quiet = llama(tokens)[0]
    llama.train()
    assert not torch.equal(llama(tokens)[0], quiet)
    for _, module in lora.adapted(llama):
        module.lora_b.data.zero_()
    torch.testing.assert_close(llama(tokens)[0], tiny.llama()(tokens)[0])


@pytest.mark.parametrize("wrong", [{"r": 0}, {"r": 2.0}, {"alpha": 0}, {"dropout": 1.0}, {"targets": ()},
                                   {"targets": ("q", "x")}, {"rs": 1}], ids=str)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError):
        LoraConfig(**{"r": 4, "alpha": 8.0, **wrong})
