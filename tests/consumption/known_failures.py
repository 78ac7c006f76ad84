"""Cells that fail, by cause; 208 at first, none now. Each mend deletes its entries (`xfail(strict=True)`)."""

from tests.consumption.kinds import GROUPS

# Cause -> kind -> verbs, or groups of verbs.
_CAUSES: dict[str, dict[str, str]] = {}
KNOWN_FAILURES = {
    (kind, verb): cause
    for cause, kinds in _CAUSES.items()
    for kind, names in kinds.items()
    for name in names.split()
    for verb in GROUPS.get(name, (name,))
}
