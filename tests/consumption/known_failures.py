"""Cells that fail, by cause, with the line of the audit. Each mend deletes its entries (`xfail(strict=True)`)."""

from tests.consumption.kinds import GROUPS

# Cause -> kind -> verbs, or groups of verbs.
_CAUSES: dict[str, dict[str, str]] = {
    "C4: refused in one line, as PEFT cannot add a second adapter to a tied table": {
        "embedding_tied": "intruders_memory intruders_merged",
    },
}
KNOWN_FAILURES = {
    (kind, verb): cause
    for cause, kinds in _CAUSES.items()
    for kind, names in kinds.items()
    for name in names.split()
    for verb in GROUPS.get(name, (name,))
}
