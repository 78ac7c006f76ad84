"""A folder of bases: found again by content, and never believed when it is damaged."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraloom.intruders.solvers.basis import BasisCache, left_basis


def flipped(content):
    return content[:-9] + bytes([content[-9] ^ 64]) + content[-8:]


def of_another(file):
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-16]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no tensors"),
    "a bit": lambda file: file.write_bytes(flipped(file.read_bytes())),
    "another basis": of_another,
    "without S": lambda file: save_file({"U": load_file(file)["U"]}, file),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_computed_and_written_again(tmp_path, damage):
    W = torch.randn(12, 20)
    expected = left_basis(W)
    BasisCache(tmp_path)(W)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damage(file)
    assert all(map(torch.equal, BasisCache(tmp_path)(W), expected))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == whole
