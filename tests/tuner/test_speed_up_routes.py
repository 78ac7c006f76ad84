"""Sped-up models by the routes that users take: loaders, trainers, compilers, precisions, processes."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from loraloom import slow_down, speed_up
from loraloom.tuner.speed_up import FastLora
from tests.refusals import coded
from tests.tuner.speed_up_support import assert_same, base_of, input_of, layer_of, pair
from tests.tuner.support import Pair, Toy, nf4_llama, randomise
from tests.tuner.trainer import ARGUMENTS, SENTENCES, tokens

IDS = torch.arange(10, 22).reshape(2, 6)
FEATURES = {"lora": {}, "dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.1}}
FEATURES["dora, dropout"] = FEATURES["dora"] | FEATURES["dropout"]
every_feature = pytest.mark.parametrize("feature", FEATURES)


def llama(directory, **kwargs):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **kwargs)


def lora_config(feature="lora", **kwargs):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | FEATURES[feature] | kwargs)


def loss_and_gradients(model):
    torch.manual_seed(1)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


def assert_equal_training(theirs, ours, rtol=1e-5):
    """One loss and one gradient after another: float32, 64-wide sums through two layers."""
    (loss, grads), (our_loss, our_grads) = loss_and_gradients(theirs), loss_and_gradients(ours)
    assert grads.keys() == our_grads.keys()
    torch.testing.assert_close(our_loss, loss, rtol=rtol, atol=0)
    largest = max(grad.abs().max().item() for grad in grads.values())
    assert largest > 0
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=0, atol=rtol * largest)


@every_feature
def test_a_model_with_injected_layers(feature, pico_llama_dir):
    models = [llama(pico_llama_dir) for _ in range(2)]
    for i, model in enumerate(models):
        torch.manual_seed(0)
        model.add_adapter(lora_config(feature, target_modules=["q_proj", "up_proj"]), adapter_name="a")
        if i:
            assert len(speed_up(model).fast) == 4
        with pytest.warns(UserWarning, match="Already found"):
            model.add_adapter(lora_config("dora", target_modules=["v_proj", "q_proj"]), adapter_name="b")
        randomise(model)
        model.train()
    assert sum(isinstance(module, FastLora) for module in models[1].modules()) == 6
    for active in ("a", "b", ["a", "b"]):
        for model in models:
            model.set_adapter(active)
        assert_equal_training(*models)
    for model in models:
        model.delete_adapter("a")
        model.set_adapter("b")
    assert_equal_training(*models)
    for model in models:
        model.disable_adapters()
    assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)


@every_feature
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing(feature, use_reentrant, pico_llama_dir):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = get_peft_model(llama(pico_llama_dir), lora_config(feature))
        randomise(model)
        model.enable_input_require_grads()
        models.append(model.train())
    speed_up(models[1])
    models[1].base_model.model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    assert_equal_training(*models)


@pytest.mark.parametrize("order", ["before", "after"])
@every_feature
def test_a_4_bit_llama_before_and_after_it_is_prepared_for_training(order, feature, pico_llama_dir):
    models = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = nf4_llama(pico_llama_dir)
        if order == "after":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = get_peft_model(model, lora_config(feature))
        if fast:
            assert not speed_up(model).kept
        if order == "before":
            trains = [p for p in model.parameters() if p.requires_grad]
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            for p in trains:  # PEFT freezes every parameter there
                p.requires_grad_()
        randomise(model)
        models.append(model.train())
    assert_equal_training(*models)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=["fp32 adapter", "bf16 adapter"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32 base", "bf16 base"])
@every_feature
def test_mixed_precision_is_no_worse_than_pefts(feature, base, adapter, autocast):
    if base == torch.float32 and not autocast and adapter == torch.bfloat16:
        pytest.skip("PEFT computes in the adapter's precision, ours in the base's: another function")
    outputs = []
    for fast, dtypes in ((False, (torch.float64, torch.float64)), (False, (base, adapter)), (True, (base, adapter))):
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 48)
        model = get_peft_model(Toy(layer), LoraConfig(r=4, target_modules=["target"], **FEATURES[feature]))
        randomise(model)
        model.to(torch.bfloat16)  # every version starts from the same numbers
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[".lora_" in name])
        if fast:
            speed_up(model)
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtypes[0]).requires_grad_()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtypes[0] != torch.float64):
            out = model.train()(x)
        out.float().square().sum().backward()
        outputs.append([out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for exact, theirs, ours in zip(*outputs, strict=True):
        assert ours.dtype == theirs.dtype
        rounded = autocast or torch.bfloat16 in (base, adapter)  # then so is the output that gradients come from
        eps = torch.finfo(torch.bfloat16 if rounded else torch.float32).eps
        error, our_error = ((values.double() - exact).abs().max() for values in (theirs, ours))
        # Both round; which of the two is luckier in its largest entry is chance within a rounding of it.
        assert our_error <= 2 * error + eps * exact.abs().max()


@pytest.mark.parametrize("feature", ["lora", "dora", "three", "dora among others", "dropout", "dora, dropout"])
def test_torch_compile_in_one_graph(feature):
    torch.compiler.reset()
    theirs, ours = pair("linear", feature)
    ours.train("dropout" not in feature)  # a compiler draws other masks
    theirs.train(ours.training)
    compiled = torch.compile(ours.get_base_model(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        grads = []
        for run, model in ((theirs, theirs), (compiled, ours)):
            x = input_of("linear").requires_grad_()
            out = run(x)
            out.square().sum().backward()
            grads.append([out.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(0.1)
            model.zero_grad()
        for expected, actual in zip(*grads, strict=True):
            assert_same(actual, expected, "linear")


@pytest.mark.parametrize(
    ("feature", "tokens_of_a_batch"),
    [("lora", 2), ("lora", 400), ("dora", 2), ("three", 2), ("dropout", 400), ("dora, dropout", 2)],
)
def test_gradients_of_gradients(feature, tokens_of_a_batch):
    results = []
    for model in pair("linear", feature):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(tokens_of_a_batch, 6, dtype=torch.float64, generator=generator).requires_grad_()
        torch.manual_seed(3)
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max().clamp_min(1)


# The trace keeps the branch that asks whether a row of W + D all but cancels.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
@every_feature
def test_export_trace_and_functional_calls(feature):
    _, ours = pair("linear", feature)
    x, model = input_of("linear"), ours.eval().get_base_model()
    expected = model(x)
    assert_same(torch.jit.trace(model, x)(x), expected, "linear")
    assert_same(torch.export.export(model, (x,)).module()(x), expected, "linear")
    parameters = {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}
    tangent = {name: torch.ones_like(p) for name, p in parameters.items()}
    slow = pair("linear", feature)[0].eval().get_base_model()
    for transform in (torch.func.vmap, lambda f: f):
        out = transform(lambda row, m=model: torch.func.functional_call(m, parameters, (row,)))(x)
        assert_same(out, expected, "linear")
    slopes = [
        torch.func.jvp(lambda p, m=m: torch.func.functional_call(m, p, (x,)), (parameters,), (tangent,))[1]
        for m in (slow, model)
    ]
    assert_same(slopes[1], slopes[0], "linear")


def test_hotswapping(tmp_path):
    outputs = []
    for prepared in (False, True):
        for model in pair("linear", "lora"):
            other = get_peft_model(base_of("linear"), LoraConfig(r=4, target_modules=["target"]), "a0")
            randomise(other, 9)
            other.save_pretrained(tmp_path)
            if prepared:
                prepare_model_for_compiled_hotswap(model, target_rank=8)
            before = model(input_of("linear"))
            hotswap_adapter(model, str(tmp_path / "a0"), "a0")
            outputs.append(model.eval()(input_of("linear")))
            assert not torch.allclose(outputs[-1], before)
    for actual in outputs[1:]:
        assert_same(actual, outputs[0], "linear")


@every_feature
def test_transformers_trainer(feature, pico_llama_dir, tmp_path):
    logs = []
    for name in ("theirs", "ours"):
        torch.manual_seed(0)
        model = get_peft_model(llama(pico_llama_dir), lora_config(feature))
        if name == "ours":
            speed_up(model)
        arguments = TrainingArguments(output_dir=str(tmp_path / name), **ARGUMENTS)
        trainer = Trainer(model, arguments, train_dataset=tokens())
        trainer.train()
        logs.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    torch.testing.assert_close(logs[1], logs[0], rtol=1e-4, atol=0)
    saved = [{path.name for path in (tmp_path / n / "checkpoint-6").iterdir()} for n in ("theirs", "ours")]
    assert saved[0] == saved[1]
    loaded = PeftModel.from_pretrained(llama(pico_llama_dir), tmp_path / "ours" / "checkpoint-6")
    assert torch.allclose(loaded(IDS).logits, model.eval()(IDS).logits, atol=1e-5)


def test_trl_sft(pico_llama_dir, tmp_path):
    logs = []
    for name in ("theirs", "ours"):
        torch.manual_seed(0)
        trainer = SFTTrainer(
            llama(pico_llama_dir),
            SFTConfig(output_dir=str(tmp_path / name), **ARGUMENTS),
            train_dataset=Dataset.from_dict({"text": SENTENCES}),
            processing_class=AutoTokenizer.from_pretrained(pico_llama_dir),
            peft_config=lora_config("dora, dropout"),
        )
        if name == "ours":
            speed_up(trainer.model)
        trainer.train()
        logs.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    torch.testing.assert_close(logs[1], logs[0], rtol=1e-4, atol=0)


def test_generate_with_one_adapter_per_sample(pico_llama_dir):
    rows = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(llama(pico_llama_dir), lora_config(), "one")
        model.add_adapter("two", lora_config(r=2))
        randomise(model.eval())
        if fast:
            speed_up(model)
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
        rows.append(model.generate(input_ids=IDS, adapter_names=["one", "two"], **options))
    assert torch.equal(*rows)


def test_checkpoint_of_a_layer_restores_dropouts_mask():
    _, ours = pair("linear", "dropouts among others")
    results = []
    for run in (ours, lambda x: checkpoint(ours, x, use_reentrant=False)):
        x = input_of("linear").requires_grad_()
        torch.manual_seed(3)
        run(x).square().sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)


def test_slow_down_after_use():
    theirs, ours = pair("linear", "dora")
    ours(input_of("linear"))
    slow_down(ours)
    assert not isinstance(layer_of(ours), FastLora)
    assert torch.equal(theirs(input_of("linear")), ours(input_of("linear")))


def test_a_sharded_class_says_how_to_slow_down():
    model = get_peft_model(Pair(), LoraConfig(target_modules=["first"]))
    speed_up(model)
    layer = model.base_model.model.first
    layer.__class__ = type("FSDPLinear", (torch.nn.Identity, type(layer)), {})
    with pytest.raises(ValueError, check=coded("slow-down-after-sharding")) as excinfo:
        slow_down(model)
    assert excinfo.value.code == "slow-down-after-sharding"
