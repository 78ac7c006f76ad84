"""What tests expect of a refusal: its code and what it names, not its sentence, which may get better."""

from collections.abc import Callable


def coded(code: str, *named: object) -> Callable[[Exception], bool]:
    """For `pytest.raises(InputError, check=coded("rank", "q_proj"))`: the error's code, and what its line names."""
    return lambda error: getattr(error, "code", None) == code and all(str(name) in str(error) for name in named)
