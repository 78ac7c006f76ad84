"""Reading checkpoints: every file that save_pretrained writes, and every way in which one can be broken."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from loraloom.errors import InputError
from loraloom.io.checkpoint import locate, open_checkpoint, read_json
from tests.refusals import coded


@pytest.fixture
def sharded(pico_llama_dir, tmp_path):
    model = AutoModel.from_pretrained(pico_llama_dir)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path, model.state_dict()


def test_one_file_and_shards_give_the_same_tensors(sharded, pico_llama_dir):
    folder, state = sharded
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.files) > 2
    assert set(checkpoint) == set(state)
    assert len(checkpoint) == len(state)
    for key, tensor in checkpoint.tensors(checkpoint.keys()):
        assert torch.equal(tensor, state[key])
        assert checkpoint.shape(key) == tuple(tensor.shape)
        assert checkpoint.dtype(key) is tensor.dtype
        assert checkpoint.nbytes(key) == tensor.nbytes
    assert len(open_checkpoint(pico_llama_dir).files) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_dtypes_are_read_from_the_header(tmp_path, dtype):
    save_file({"x": torch.zeros(3, 2).to(dtype)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype("x") is dtype is checkpoint.tensor("x").dtype
    assert checkpoint.metadata(tmp_path / "model.safetensors") == {"format": "pt"}


def test_a_tensor_is_a_copy_of_its_own(tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.tensor("x").fill_(1)
    assert torch.equal(checkpoint.tensor("x"), torch.zeros(3))


def test_rows_are_read_alone(sharded):
    folder, state = sharded
    checkpoint = open_checkpoint(folder)
    for key in checkpoint:
        assert torch.equal(checkpoint.rows(key, 3, 9), state[key][3:9])


def test_a_file_that_was_cut_off(sharded):
    folder, _ = sharded
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, check=coded("not-safetensors", shard.name)):
        open_checkpoint(folder)


def test_a_missing_shard(sharded):
    folder, _ = sharded
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(InputError, check=coded("index", shard.name)):
        open_checkpoint(folder)


def test_an_index_that_does_not_match(sharded):
    folder, _ = sharded
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost.weight"] = next(iter(index["weight_map"].values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, check=coded("index", "ghost.weight")):
        open_checkpoint(folder)


def test_an_index_cannot_point_out_of_the_folder(sharded):
    folder, _ = sharded
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../model.safetensors"}}')
    with pytest.raises(InputError, check=coded("index")):
        open_checkpoint(folder)


def test_a_pickle_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, check=coded("pickle", "pytorch_model.bin")):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, check=coded("not-safetensors")):
        open_checkpoint(tmp_path / "pytorch_model.bin")


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, check=coded("no-weights")):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, check=coded("no-folder")):
        open_checkpoint(tmp_path / "no")
    with pytest.raises(InputError, check=coded("no-folder")):
        locate(tmp_path / "no")
    with pytest.raises(InputError, check=coded("hub")):  # the tests run offline
        locate("nobody/nothing")


def test_a_wrong_name_names_the_nearest(tmp_path):
    save_file({"layer.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, check=coded("missing-tensor", "layer.wieght", "layer.weight")):
        open_checkpoint(tmp_path).tensor("layer.wieght")


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_json_must_be_an_object(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, check=coded("json", "x.json")):
        read_json(tmp_path / "x.json")
