"""transformers' own adapter calls, and generation, on a pico Llama."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraloom import LoomConfig
from tests.tuner.support import ALL_PARTS, randomise

IDS = torch.arange(10, 22).reshape(2, 6)


def llama(directory, **kwargs):
    return AutoModelForCausalLM.from_pretrained(directory, **kwargs).eval()


def config(**kwargs):
    return LoomConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | ALL_PARTS | kwargs)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_add_save_and_load_adapter_by_transformers(pico_llama_dir, tmp_path):
    model = llama(pico_llama_dir)
    base = logits(model)
    model.add_adapter(config(), adapter_name="mine")
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-5)
    randomise(model)
    expected = logits(model)
    assert (expected - base).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert all("loom_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))

    loaded = llama(pico_llama_dir)
    loaded.load_adapter(str(tmp_path), adapter_name="other")
    assert torch.equal(logits(loaded), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), base)
    loaded.enable_adapters()
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(llama(tmp_path)), expected)  # the adapter's directory names its base


def test_transformers_and_peft_read_each_others_adapters(pico_llama_dir, tmp_path):
    model = get_peft_model(llama(pico_llama_dir), config())
    randomise(model)
    model.save_pretrained(tmp_path / "peft")
    by_transformers = llama(pico_llama_dir)
    by_transformers.load_adapter(str(tmp_path / "peft"))
    assert torch.equal(logits(by_transformers), logits(model))
    by_transformers.save_pretrained(tmp_path / "transformers")
    by_peft = PeftModel.from_pretrained(llama(pico_llama_dir), tmp_path / "transformers")
    assert torch.equal(logits(by_peft), logits(model))


def test_two_adapters_by_transformers_switch_and_add(pico_llama_dir):
    model = llama(pico_llama_dir)
    base = logits(model)
    model.add_adapter(config(), adapter_name="a")
    with pytest.warns(UserWarning, match="Already found"):
        model.add_adapter(LoomConfig(r=2, target_modules=["q_proj", "v_proj"]), adapter_name="b")
    randomise(model)
    outputs = {}
    for active in ("a", "b", ["a", "b"]):
        model.set_adapter(active)
        outputs[str(active)] = logits(model)
    assert len({tuple(o.flatten().tolist()) for o in (base, *outputs.values())}) == 4
    model.delete_adapter("a")
    model.set_adapter("b")
    assert torch.equal(logits(model), outputs["b"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gates_and_magnitudes_stay_float32_through_transformers_loader(pico_llama_dir, tmp_path, dtype):
    model = get_peft_model(llama(pico_llama_dir, dtype=dtype), config())
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = llama(pico_llama_dir, dtype=dtype)
    loaded.load_adapter(str(tmp_path))
    expected = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    for name, parameter in loaded.named_parameters():
        if "magnitude_vector" in name:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, expected[name])


def test_a_shape_that_does_not_fit_is_an_error_through_transformers_loader(pico_llama_dir, tmp_path, caplog):
    get_peft_model(llama(pico_llama_dir), config(r=4)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 4', '"r": 3'))
    with pytest.raises(RuntimeError, match="mismatched"):
        llama(pico_llama_dir).load_adapter(str(tmp_path))
    assert "loom_lora_A" in caplog.text


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_every_target_of_a_llama_loads(pico_llama_dir, tmp_path, low_cpu_mem_usage):
    model = get_peft_model(llama(pico_llama_dir), config(target_modules="all-linear", modules_to_save=["lm_head"]))
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(pico_llama_dir), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not [name for name, tensor in loaded.named_parameters() if tensor.is_meta]
    assert torch.equal(logits(loaded), logits(model))


def test_trainable_tokens_train_beside_an_adapter_and_unload(pico_llama_dir, tmp_path):
    model = get_peft_model(llama(pico_llama_dir), config(trainable_token_indices={"embed_tokens": [10, 11]}))
    model.train()
    model(IDS, labels=IDS).loss.backward()
    tokens = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    assert len(tokens) == 1
    assert tokens[0].grad.abs().sum() > 0
    with torch.no_grad():
        tokens[0].add_(1.0)
    randomise(model.eval())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(pico_llama_dir), tmp_path)), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-4)


def test_embedding_and_head_adapters_on_a_llama(pico_llama_dir):
    model = get_peft_model(llama(pico_llama_dir), config(target_modules=["embed_tokens", "q_proj", "lm_head"]))
    base = logits(llama(pico_llama_dir))
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-5)
    randomise(model)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-3)


def test_generate_with_one_adapter_per_sample(pico_llama_dir):
    model = get_peft_model(llama(pico_llama_dir), config(), "a")
    model.add_adapter("b", config(use_dora=False, r=2))
    randomise(model.eval())
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    alone = []
    for name, row in zip(("a", "b"), IDS, strict=True):
        model.set_adapter(name)
        alone.append(model.generate(row[None], **options | {"attention_mask": torch.ones(1, 6)})[0])
    mixed = model.generate(IDS, adapter_names=["a", "b"], **options)
    assert all(torch.equal(m, a) for m, a in zip(mixed, alone, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_a_llama(pico_llama_dir, use_reentrant):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = get_peft_model(llama(pico_llama_dir), config(lora_dropout=0.1))
        randomise(model)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        model(IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
