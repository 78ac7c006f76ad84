"""A streamed safetensors file is the one that the library writes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraloom.io.stream import write_safetensors

TENSORS = {
    "wide": torch.randn(7, 3, dtype=torch.float64),
    "a/\N{GREEK SMALL LETTER ALPHA}": torch.randn(5, 4),
    "half": torch.randn(3, 2, 2).to(torch.bfloat16),
    "half2": torch.randn(3).to(torch.float16),
    "number": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "ids": torch.arange(5),
    "eight": torch.randn(5).to(torch.float8_e4m3fn),
    "mask": torch.tensor([True, False, True]),
}


def written(path, tensors, split, metadata=None):
    def blocks(name):
        tensor = tensors[name]
        return tensor.split(2) if split and tensor.dim() else [tensor]

    return write_safetensors(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, blocks, metadata)


@pytest.mark.parametrize("split", [False, True])
def test_what_is_written_is_what_the_library_reads(tmp_path, split):
    size = written(tmp_path / "x.safetensors", TENSORS, split, {"format": "pt"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype is tensor.dtype
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert size == sum(tensor.nbytes for tensor in TENSORS.values())


def test_the_bytes_are_those_of_save_file(tmp_path):
    tensors = {name: torch.randn(3, 5) for name in ("b", "a", "c")} | {"d": torch.ones(3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    written(tmp_path / "ours.safetensors", {name: tensors[name] for name in sorted(tensors)}, True, {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_blocks_must_add_up(tmp_path):
    expected = {"x": (torch.float32, (4, 2))}
    with pytest.raises(ValueError, match="x: its blocks have 24 bytes, expected 32"):
        write_safetensors(tmp_path / "x", expected, lambda _: [torch.zeros(3, 2)])
    with pytest.raises(ValueError, match=r"x: a block is torch\.float64"):
        write_safetensors(tmp_path / "x", expected, lambda _: [torch.zeros(4, 2, dtype=torch.float64)])
