import pytest

from tests.composition.support import save_members


@pytest.fixture(scope="session")
def members(tmp_path_factory):
    """The folders of three PEFT LoRAs that adapt different modules of `support.Net`."""
    return save_members(tmp_path_factory.mktemp("members"))
