"""Quantised bases are read as what they stand for, by references that share nothing with the readers."""

import json

import compressed_tensors.compressors as compressors
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from loraloom.adapter.inspect import inspect_adapter
from loraloom.errors import InputError
from loraloom.io.quantized.checkpoint import open_base
from loraloom.merge.merge import merge_checkpoint
from tests.adapter.support import logits, trained
from tests.models import llama

BLOCK = (20, 24)
GROUP = 16


def blocks_of_fp8(W):
    """A scale for every block of 20 x 24, the last ones cut."""
    out, width = W.shape
    scales = torch.empty(-(-out // BLOCK[0]), -(-width // BLOCK[1]))
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            block = W[i * BLOCK[0] : (i + 1) * BLOCK[0], j * BLOCK[1] : (j + 1) * BLOCK[1]]
            scales[i, j] = block.abs().max() / 448
    full = torch.kron(scales, torch.ones(BLOCK))[:out, :width]
    codes = (W / full).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.double() * full.double()


def rows_of_fp8(W):
    """compressed-tensors' float-quantized, a scale per row."""
    scales = W.abs().amax(1, keepdim=True) / 448
    codes = (W / scales).to(torch.float8_e4m3fn)
    unused = {"input_scale": torch.ones(1)}
    return {"weight": codes, "weight_scale": scales.bfloat16()} | unused, codes.double() * scales.bfloat16().double()


def tensor_of_fp8(W):
    scale = W.abs().max() / 448
    codes = (W / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.double() * scale.double()


def int8(W):
    scales = W.abs().amax(1, keepdim=True) / 127
    codes = (W / scales).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes.double() * scales.double()


def _codes(W, symmetric=False):
    """4-bit codes (in, out), zeros and scales (groups, out) of W^T."""
    groups = W.T.unflatten(0, (-1, GROUP))
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / 15).half()
    zeros = torch.full_like(low, 8) if symmetric else (-low / scales.float()).round().clamp(1, 15)
    codes = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
    exact = (codes.double() - zeros.double()[:, None]) * scales.double()[:, None]
    return codes.flatten(0, 1).int(), zeros.int(), scales, exact.flatten(0, 1).T


def _packed(codes, order=range(8)):
    """Eight codes of a row to a word, the one that `order` names first in the lowest bits."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place, which in enumerate(order):
        words += codes[:, which::8].long() << 4 * place
    return torch.where(words >= 2**31, words - 2**32, words).int()


def gptq(W, offset=1):
    codes, zeros, scales, exact = _codes(W)
    tensors = {"qweight": _packed(codes.T.contiguous()).T.contiguous(), "qzeros": _packed(zeros - offset)}
    return tensors | {"scales": scales, "g_idx": (torch.arange(len(codes)) // GROUP).int()}, exact


def gptq_v2(W):
    return gptq(W, offset=0)


def gptq_by_activation(W):
    """desc_act: the groups are of inputs in another order."""
    order = torch.randperm(W.shape[1])
    tensors, exact = gptq(W[:, order])
    words = tensors["qweight"].T.contiguous()
    codes = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(1)[:, order.argsort()]
    tensors |= {"qweight": _packed(codes).T.contiguous(), "g_idx": tensors["g_idx"][order.argsort()]}
    return tensors, exact[:, order.argsort()]


def awq(W):
    codes, zeros, scales, exact = _codes(W)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": _packed(codes, order), "qzeros": _packed(zeros, order), "scales": scales}, exact


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _fp4(values):
    """The nearest codes, two to a byte, and what they stand for."""
    nearest = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    codes = nearest + 8 * (values < 0)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed, (E2M1[nearest] * values.sign()).double()


def nvfp4(W, divide=True):
    largest = W.abs().max() / (6 * 448)
    groups = W.unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 6 / largest).to(torch.float8_e4m3fn)
    factor = scales.double() * largest.double()
    packed, values = _fp4((groups / factor[..., None]).float())
    exact = (values * factor[..., None]).flatten(1)
    packed = packed.flatten(1)
    if divide:
        return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": 1 / largest[None]}, exact
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": largest, "input_scale": torch.ones(())}, exact


def modelopt(W):
    return nvfp4(W, divide=False)


FORMATS = {
    "finegrained": (blocks_of_fp8, {"quant_method": "fp8", "weight_block_size": list(BLOCK)}),
    "float-quantized": (rows_of_fp8, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "fp8-tensor": (tensor_of_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "int8": (int8, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "gptq_v2": (gptq_v2, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
    "gptq-desc-act": (gptq_by_activation, {"quant_method": "gptq", "bits": 4, "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP}),
    "nvfp4": (nvfp4, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
    "modelopt": (modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


def write_base(folder, encode, config, model=None):
    """A model whose linear layers are stored quantised; returns what they stand for, by name."""
    torch.manual_seed(0)
    model = (model or llama()).to(torch.bfloat16)
    model.save_pretrained(folder)
    stored, exact = {}, {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if key.endswith("proj.weight"):
            parts, exact[key] = encode(tensor.float())
            stored |= {f"{key.removesuffix('weight')}{name}": part.contiguous() for name, part in parts.items()}
        else:
            stored[key] = tensor
            exact[key] = tensor.double()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return exact


@pytest.fixture(params=FORMATS)
def quantized(request, tmp_path):
    encode, config = FORMATS[request.param]
    return tmp_path / "base", write_base(tmp_path / "base", encode, config)


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def test_weights_are_what_they_stand_for(quantized):
    folder, exact = quantized
    base = open_base(folder, read_config(folder))
    assert set(base) == set(exact)
    for key, W in exact.items():
        assert base.shape(key) == tuple(W.shape)
        assert base.dtype(key) is torch.bfloat16
        # One product or two of numbers with short mantissas, rounded to float32: two units in the last place.
        torch.testing.assert_close(base.tensor(key).double(), W, rtol=3e-7, atol=0)
        assert torch.equal(base.rows(key, 1, 3), base.tensor(key)[1:3])


def test_a_merge_is_one_into_the_dequantised_weights(quantized, tmp_path):
    folder, exact = quantized
    model = llama()
    trained(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), tmp_path / "adapter")
    with pytest.raises(InputError) as caught:
        merge_checkpoint([tmp_path / "adapter"], folder, tmp_path / "out")
    assert caught.value.code == "quantized"
    options = {"base_precision": "dequantised", "dtype": "float32"}
    merge_checkpoint([tmp_path / "adapter"], folder, tmp_path / "out", **options)
    assert "quantization_config" not in read_config(tmp_path / "out")
    plain = llama()
    plain.load_state_dict({key: W.float() for key, W in exact.items()})
    plain.save_pretrained(tmp_path / "plain")
    merge_checkpoint([tmp_path / "adapter"], tmp_path / "plain", tmp_path / "expected")
    merged, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "expected"))
    torch.testing.assert_close(logits(merged), logits(expected), atol=1e-6, rtol=1e-6)
    report = inspect_adapter(tmp_path / "adapter", folder)
    assert not report.errors
    same = inspect_adapter(tmp_path / "adapter", tmp_path / "plain")
    for layer, other in zip(report.layers, same.layers, strict=True):
        assert layer.relative_norm == pytest.approx(other.relative_norm, rel=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strategy", ["group", "tensor"])
def test_packed_integers_as_compressed_tensors_writes_them(bits, symmetric, strategy, tmp_path):
    size = {"group_size": GROUP} if strategy == "group" else {}
    args = QuantizationArgs(num_bits=bits, strategy=strategy, symmetric=symmetric, type="int", **size)
    W = torch.randn(24, 64)
    groups = W.unflatten(1, (-1, GROUP)) if size else W.reshape(1, -1)
    levels, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        scales = groups.abs().amax(-1) / (middle - 1)
        zeros = torch.zeros(scales.shape, dtype=torch.int8)
    else:
        scales = (groups.amax(-1) - groups.amin(-1)) / levels
        zeros = ((-groups.amin(-1) / scales).round() - middle).to(torch.int8)
    state = {"weight": W, "weight_scale": scales, "weight_zero_point": zeros}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    packer = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    stored = packer.compress(dict(state), scheme)
    expected = packer.decompress(dict(stored), scheme)["weight"]
    save_file({f"layer.{key}": value.contiguous() for key, value in stored.items()}, tmp_path / "model.safetensors")
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    base = open_base(tmp_path, {"quantization_config": config})
    torch.testing.assert_close(base.tensor("layer.weight"), expected.float(), rtol=1e-6, atol=0)
    # Zeros are packed since its pull request 296.
    stored |= {} if symmetric else {"weight_zero_point": zeros}
    save_file({f"layer.{key}": value.contiguous() for key, value in stored.items()}, tmp_path / "model.safetensors")
    base = open_base(tmp_path, {"quantization_config": config})
    torch.testing.assert_close(base.tensor("layer.weight"), expected.float(), rtol=1e-6, atol=0)


def test_experts_of_gpt_oss(tmp_path):
    blocks = torch.randint(256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 135, (3, 10, 2), dtype=torch.uint8)
    tensors = {"mlp.experts.gate_up_proj_blocks": blocks, "mlp.experts.gate_up_proj_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    base = open_base(tmp_path, {"quantization_config": {"quant_method": "mxfp4"}})
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert list(base) == ["mlp.experts.gate_up_proj"]
    assert base.shape("mlp.experts.gate_up_proj") == tuple(expected.shape) == (3, 64, 10)
    assert torch.equal(base.tensor("mlp.experts.gate_up_proj"), expected)
    assert torch.equal(base.rows("mlp.experts.gate_up_proj", 1, 2), expected[1:2])


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"a.weight": torch.zeros(4, 4)}, {"quant_method": "aqlm"}),
        ({"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, {}),
        ({"a.weight": torch.zeros(4, 4, dtype=torch.uint8)}, {"quant_method": "hqq"}),
        ({"a.qweight": torch.zeros(4, 4, dtype=torch.int32)}, {"quant_method": "gptq"}),
        (
            {f"a.{name}": torch.zeros(8, 1, dtype=torch.int32) for name in ("qweight", "qzeros", "scales")},
            {"quant_method": "awq", "version": "gemv"},
        ),
    ],
)
def test_other_formats_are_refused_by_name(tensors, config, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        open_base(tmp_path, {"quantization_config": config})
    assert caught.value.code == "quantized"
    assert config.get("quant_method", "float8") in str(caught.value)


def test_scales_that_do_not_fit(tmp_path):
    exact = write_base(tmp_path, *FORMATS["finegrained"])
    config = read_config(tmp_path)
    config["quantization_config"]["weight_block_size"] = [8, 8]
    base = open_base(tmp_path, config)
    with pytest.raises(InputError) as caught:
        base.tensor(next(key for key in exact if key.endswith("proj.weight")))
    assert caught.value.code == "quantized"


def test_parts_that_do_not_fit_together(quantized):
    """Every part of a weight cut in each dimension: the weight is read as it was, or refused in one line."""
    folder, _ = quantized
    path, weight = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)
    parts = [key for key in tensors if key.startswith(weight.removesuffix("weight"))]
    codes = set()
    for part in parts:
        for dim in range(tensors[part].dim()):
            cut = tensors[part].narrow(dim, 0, tensors[part].shape[dim] // 2).contiguous()
            save_file(tensors | {part: cut}, path, {"format": "pt"})
            base = open_base(folder, read_config(folder))
            try:  # a cut may leave enough, for a smaller weight, which no adapter of the model fits
                base.tensor(weight)
            except InputError as error:
                codes.add((error.code, "\n" in str(error)))
    assert codes <= {("quantized", False)}
