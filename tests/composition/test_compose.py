"""A composition against the dense sum of its members' updates, as PEFT computes them."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraloom import LoomConfig, compose
from loraloom.composition import learned_weights
from loraloom.update.composition import CONSTRAINTS
from tests.composition.support import LINEARS, LOGITS, MEMBERS, PAPER, WEIGHTS, base, ids, lora, set_logits, summed
from tests.tuner.support import assert_near, randomise

MODULES = {"embed", "conv", *LINEARS}


def trainable(model):
    return {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}


def test_given_weights_give_the_weighted_sum_of_pefts_updates(members):
    model = compose(base(), members, WEIGHTS).eval()
    with torch.no_grad():
        assert_near(model(ids()), summed(WEIGHTS)(ids()), factor=3)
        assert (model(ids()) - base()(ids())).abs().max() > 0.1
    assert {name for name, _ in model.get_base_model().named_modules() if name in MODULES} == MODULES
    assert not trainable(model)


def test_uniform_weights_are_equal_among_the_members_of_each_layer(members):
    model = compose(base(), members, "uniform").eval()
    learned = learned_weights(model)
    present = {m: {n for n, c in MEMBERS.items() if m in c["target_modules"]} for m in MODULES}
    assert learned.layers == {m: {n: pytest.approx(1 / len(names)) for n in names} for m, names in present.items()}
    with torch.no_grad():
        assert_near(model(ids()), summed(learned.layers)(ids()), factor=3)
    assert not trainable(model)


def test_normalizing_over_all_members_counts_those_that_a_layer_lacks(members):
    model = compose(base(), members, normalize="all", total=1).eval()
    learned = learned_weights(model)
    assert all(w == pytest.approx(1 / 3) for weights in learned.layers.values() for w in weights.values())
    with torch.no_grad():
        assert_near(model(ids()), summed(dict.fromkeys(MEMBERS, 1 / 3))(ids()), factor=3)


@pytest.mark.parametrize(("count", "total"), [(1, 1), (2, 2), (3, 3), (5, 3)])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_learned_weights_start_from_three_and_no_member_above_its_full_strength(tmp_path, count, total, constraint):
    squad = lora("squad")
    squad.save_pretrained(tmp_path / "squad")
    many = {f"copy {i}": tmp_path / "squad" for i in range(count)}
    learned = learned_weights(compose(base(), many, constraint=constraint))
    for weights in learned.layers.values():
        assert sum(weights.values()) == pytest.approx(total)
        assert max(weights.values()) <= 1 + 1e-6
    uniform = learned_weights(compose(base(), many, "uniform"))
    assert all(sum(weights.values()) == pytest.approx(1) for weights in uniform.layers.values())


def test_a_layer_with_few_members_bounds_the_start_of_all(members):
    """Some layers have a single member of the three: at a total of 3 it would be trebled."""
    learned = learned_weights(compose(base(), members))
    assert all(sum(weights.values()) == pytest.approx(1) for weights in learned.layers.values())
    everywhere = learned_weights(compose(base(), members, normalize="all"))
    assert all(w == pytest.approx(1) for weights in everywhere.layers.values() for w in weights.values())


def test_the_start_is_a_scaled_softmax(members):
    assert compose(base(), members).peft_config["composition"].composition.constraint == "scaled_softmax"


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("scope", ["layer", "module_type", "model"])
def test_learned_weights_say_what_the_model_computes(members, scope, constraint):
    model = compose(base(), members, scope=scope, constraint=constraint, total=2).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        model(ids(step)).square().mean().backward()
        optimizer.step()
    model.eval()
    learned = learned_weights(model)
    with torch.no_grad():
        assert_near(model(ids()), summed(learned.layers)(ids()), factor=3)
    if scope == "layer" and constraint != "free":
        for weights in learned.layers.values():
            assert (sum(weights.values()) == pytest.approx(2)) == (constraint != "scaled_softmax")
            assert min(weights.values()) >= 0
    for name, mean in learned.mean.items():
        assert mean == pytest.approx(
            sum(w[name] for w in learned.layers.values() if name in w) / sum(name in w for w in learned.layers.values())
        )


def test_gradients_are_those_of_the_dense_formula(members):
    """Through every kind of layer and the members' biases; a detached denominator would give others."""
    model = compose(base(), members, **PAPER).train()
    set_logits(model)
    model(ids()).square().sum().backward()
    parameters = {n.partition("model.model.")[2]: p for n, p in model.named_parameters() if p.requires_grad}

    deltas = {}  # parameter of the base -> member -> what PEFT merges into it
    for name in MEMBERS:
        merged = dict(lora(name).merge_and_unload().named_parameters())
        for key, parameter in base().named_parameters():
            deltas.setdefault(key, {})[name] = (merged[key] - parameter).double().detach()
    logits = {m: torch.nn.Parameter(parameters[f"{m}.{LOGITS}.composition.weight"].detach().double()) for m in MODULES}
    weights = {}
    for key, parameter in base().named_parameters():
        weights[key] = parameter.detach().double()
        module = key.rpartition(".")[0]
        if module in logits:
            present = [module in MEMBERS[n]["target_modules"] for n in MEMBERS]
            exp = logits[module].exp() * torch.tensor(present)
            w = exp / exp.sum()
            weights[key] = weights[key] + sum(w[i] * deltas[key][n] for i, n in enumerate(MEMBERS) if present[i])
    output = torch.func.functional_call(base().double(), weights, (ids(),))
    output.square().sum().backward()
    for module, v in logits.items():
        grad = parameters[f"{module}.{LOGITS}.composition.weight"].grad
        torch.testing.assert_close(grad.double(), v.grad, rtol=1e-4, atol=1e-6)
    assert max(v.grad.abs().max() for v in logits.values()) > 1e-2


def test_one_v_for_the_whole_model_trains_as_one(members):
    """Each layer's copy follows the path of a single v under Adam, bit by bit the same as the others."""
    model = compose(base(), members, scope="model", **PAPER).train()
    copies = [p for p in model.parameters() if p.requires_grad]
    reference = compose(base(), members, **PAPER).train()
    slots = [p for n, p in reference.named_parameters() if LOGITS in n]
    single = torch.zeros(3, requires_grad=True)
    optimizers = torch.optim.Adam(copies, lr=0.1), torch.optim.Adam([single], lr=0.1)
    for step in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for micro in range(2):  # with accumulation
            model(ids(2 * step + micro)).square().mean().backward()
            with torch.no_grad():
                for slot in slots:
                    slot.copy_(single)
            grads = torch.autograd.grad(reference(ids(2 * step + micro)).square().mean(), slots)
            single.grad = sum(grads) if single.grad is None else single.grad + sum(grads)
        for copy_ in copies:
            torch.testing.assert_close(copy_.grad, single.grad, rtol=1e-4, atol=1e-7)
        for optimizer in optimizers:
            optimizer.step()
    assert single.abs().max() > 0.1
    for copy_ in copies:
        assert torch.equal(copy_, copies[0])
        torch.testing.assert_close(copy_, single, rtol=1e-3, atol=1e-5)


def test_simplex_is_projected_gradient_descent(members):
    """With SGD, v <- P(v - lr * dL/dv) in each layer, over the members there."""
    model = compose(base(), members, constraint="simplex").train()
    parameters = {
        n.partition("model.model.")[2].split(".loom")[0]: p for n, p in model.named_parameters() if LOGITS in n
    }
    optimizer = torch.optim.SGD(parameters.values(), lr=3.0)
    expected = {module: p.detach().clone() for module, p in parameters.items()}
    for step in range(4):
        optimizer.zero_grad()
        model(ids(step)).square().mean().backward()
        for module, p in parameters.items():
            here = torch.tensor([module in c["target_modules"] for c in MEMBERS.values()])
            v = (expected[module] - 3.0 * p.grad)[here]
            low, high = v.min() - 1, v.max()
            for _ in range(60):  # the threshold that makes the positive parts add up to 1, by bisection
                middle = (low + high) / 2
                low, high = (middle, high) if (v - middle).clamp(min=0).sum() > 1 else (low, middle)
            expected[module] = torch.zeros(3).masked_scatter(here, (v - high).clamp(min=0))
        optimizer.step()
    learned = learned_weights(model.eval())
    for module, weights in learned.layers.items():
        values = [weights.get(name, 0.0) for name in MEMBERS]
        torch.testing.assert_close(torch.tensor(values), expected[module], rtol=1e-3, atol=1e-5)
    assert 0.0 in {w for weights in learned.layers.values() for w in weights.values()}


def test_only_the_weights_train_whatever_is_called(members):
    model = compose(base(), members)
    assert trainable(model) == {LOGITS}
    model.set_adapter("composition")
    assert trainable(model) == {LOGITS}
    model.set_requires_grad("composition", requires_grad=True)
    assert trainable(model) == {LOGITS}
    with model.disable_adapter():
        assert not trainable(model)
    assert trainable(model) == {LOGITS}
    model.add_adapter("other", LoomConfig(target_modules=["plain"]))
    model.set_adapter("other")
    assert LOGITS not in trainable(model)
    model.set_adapter("composition")
    assert trainable(model) == {LOGITS}


def test_a_head_trains_with_the_weights(members):
    model = compose(base(), members, modules_to_save=["mix"])
    assert {n.split(".")[3] for n, p in model.named_parameters() if p.requires_grad and LOGITS not in n} == {
        "modules_to_save"
    }


def loaded(configs):
    """A PeftModel with loom adapters of the given configurations, every part different from its start."""
    model = None
    for name, config in configs.items():
        config = LoomConfig(target_modules=LINEARS, **config)
        if model is None:
            model = get_peft_model(base(), config, name)
        else:
            model.add_adapter(name, config)
    randomise(model)
    return model.eval()


PARTS = {
    "mixed": {"use_mixer": "kaiming", "r": 2, "lora_alpha": 3},
    "gated": {"use_gate": True, "use_rslora": True, "r": 5},
    "anchored": {"init_lora_weights": "pissa", "r": 3, "use_gate": True},
}


@pytest.mark.parametrize("stored", [False, True], ids=["of the model", "in folders"])
def test_mixers_gates_and_anchors_are_folded_in(tmp_path, stored):
    model = loaded(PARTS)
    weights = dict(zip(PARTS, (0.5, -1.0, 2.0), strict=True))
    expected = base()
    with torch.no_grad():
        for module in LINEARS:
            layer = model.get_base_model().get_submodule(module)
            delta = sum(w * layer.get_delta_weight(name) for name, w in weights.items())
            expected.get_submodule(module).weight += delta
        where = {name: name for name in PARTS}
        if stored:
            model.save_pretrained(tmp_path)
            model, where = base(), {name: tmp_path / name for name in PARTS}
        composed = compose(model, where, weights)
        assert (composed is model) != stored
        assert_near(composed(ids()), expected(ids()), factor=3)
        assert composed.active_adapter == "composition"
    ranks = composed.peft_config["composition"].composition.ranks
    assert ranks == {module: [2, 5, 6] for module in LINEARS}


def test_a_composition_can_be_a_member(members, tmp_path):
    model = compose(base(), members, WEIGHTS, adapter_name="first")
    model = compose(model, {"twice": "first", "nli": members["nli"]}, {"twice": 2.0, "nli": 0.25}).eval()
    with torch.no_grad():
        expected = summed({name: 2 * w + 0.25 * (name == "nli") for name, w in WEIGHTS.items()})
        assert_near(model(ids()), expected(ids()), factor=3)
        model.save_pretrained(tmp_path)
        again = compose(base(), {"all": tmp_path / "composition"}, {"all": 1.0})
        assert_near(again(ids()), expected(ids()), factor=3)


def test_a_composition_and_other_adapters_add_up(members):
    model = compose(base(), members, WEIGHTS)
    model.add_adapter("other", LoomConfig(target_modules=LINEARS, init_lora_weights=False))
    expected = summed(WEIGHTS)
    model.eval()
    with torch.no_grad():
        for module in LINEARS:
            delta = model.get_base_model().get_submodule(module).get_delta_weight("other")
            expected.get_submodule(module).weight += delta
        model.base_model.set_adapter(["composition", "other"])
        assert_near(model(ids()), expected(ids()), factor=3)


def test_a_mixed_batch_gives_each_row_its_composition(members):
    model = compose(base(), members, WEIGHTS, adapter_name="one").eval()
    compose(model, {"squad": members["squad"]}, "uniform", adapter_name="two").eval()
    names = ["one", "two", "__base__", "one"]
    rows = {"one": summed(WEIGHTS), "two": summed({"squad": 1.0}), "__base__": base()}
    with torch.no_grad():
        output = model(ids(), adapter_names=names)
        for i, name in enumerate(names):
            assert_near(output[i], rows[name](ids())[i], factor=3)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not func.is_view:
                self.entries = max(self.entries, leaf.numel())
        return result


def test_members_are_in_memory_once(tmp_path):
    """Neither building nor a training step makes a second copy of the stacked factors."""
    width, count, rank = 96, 16, 8
    paths = {}
    for i in range(count):
        config = LoraConfig(r=rank, target_modules=["0"], init_lora_weights=False)
        member = get_peft_model(torch.nn.Sequential(torch.nn.Linear(width, width)), config)
        member.save_pretrained(tmp_path / str(i))
        paths[f"m{i}"] = tmp_path / str(i)
    net = torch.nn.Sequential(torch.nn.Linear(width, width))
    model = compose(net, paths).train()
    adapter = sum(p.numel() for n, p in model.named_parameters() if ".loom_" in n)
    assert adapter == 2 * count * rank * width + count + 1  # logits and the total
    x = torch.randn(4, width, requires_grad=True)
    with Largest() as largest:
        model(x).sum().backward()
    assert largest.entries <= width * width < count * rank * width
    before = dict.fromkeys(id(p) for p in model.parameters())
    with Largest() as largest:
        compose(model, paths, adapter_name="second")
    # The empty factors themselves, and pieces of one member's size.
    assert largest.entries == count * rank * width
    sizes = [p.numel() for p in model.parameters() if id(p) not in before]
    assert sum(sizes) == adapter


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_copy_of_the_model_trains_by_itself(members, scope):
    model = compose(base(), members, scope=scope).train()
    model(ids()).square().sum().backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    other(ids()).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert torch.equal(a.grad, b.grad)
            assert a.grad is not b.grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(members, reentrant):
    model = compose(base(), members, scope="model").train()
    set_logits(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(next(p for p in model.parameters() if p.requires_grad))
    net = model.get_base_model()

    def gradients(run):
        model.zero_grad()
        x = torch.randn(3, 18, generator=torch.Generator().manual_seed(0), requires_grad=True)
        run(net.plain, torch.tanh(run(net.layers[1], run(net.layers[0], x)))).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]

    plain = gradients(lambda layer, x: layer(x))
    checkpoint = torch.utils.checkpoint.checkpoint
    for a, b in zip(gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant)), plain, strict=True):
        torch.testing.assert_close(a, b)
    assert all(grad.abs().max() > 0 for grad in plain)


@pytest.mark.parametrize("first", ["eager", "compiled"])
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at every input
def test_compiles_as_one_graph(members, scope, first):
    torch.compiler.reset()
    model = compose(base(), members, scope=scope).train()
    layers, x = model.get_base_model().layers, torch.randn(3, 18)
    logits = [layer.loom_logits_lora_magnitude_vector["composition"].weight for layer in layers]

    def run(layer):
        model.zero_grad()
        for _ in range(2):
            output = layer(x)
            output.square().sum().backward()
        return [output.detach(), *(p.grad.clone() for p in logits if p.grad is not None)]

    routes = {"eager": layers[0], "compiled": torch.compile(layers[0], fullgraph=True, backend="aot_eager")}
    results = {name: run(routes[name]) for name in sorted(routes, key=lambda name: name != first)}
    assert len(results["eager"]) == (2 if scope == "layer" else 3)
    for a, b in zip(results["compiled"], results["eager"], strict=True):
        assert_near(a, b, factor=3)
    assert results["eager"][1].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_keeps_members_and_weights_in_float32(members, dtype):
    model = compose(base().to(dtype), members, WEIGHTS).eval()
    assert {p.dtype for n, p in model.named_parameters() if ".loom_" in n} == {torch.float32}
    with torch.no_grad():
        expected = summed(WEIGHTS)(ids())
        assert (model(ids()) - expected).abs().max() < 0.05 * expected.abs().max()


def test_deleting_a_composition_leaves_nothing_of_it(members):
    model = compose(base(), members, adapter_name="one")
    compose(model, {"squad": members["squad"]}, adapter_name="two")
    model.delete_adapter("one")
    assert not [n for n in model.state_dict() if ".one" in n]
    assert not model.get_base_model().layers[0].compositions.keys() - {"two"}
    assert model(ids()).isfinite().all()
