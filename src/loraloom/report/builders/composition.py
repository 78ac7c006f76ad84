"""The weights of a composition: which member counts where."""

from collections.abc import Mapping

from loraloom.report.builders.modules import labels_of
from loraloom.report.model import Bars, Heatmap, Section


def composition_sections(weights: Mapping[str, Mapping[str, float]], mean: Mapping[str, float]) -> list[Section]:
    """Mean weight of each member as bars, and the weights of every module as a heatmap.

    Args:
        weights: module name to (member to weight); a member that does not adapt a module has none there.
        mean: member to its mean weight over the modules that it adapts.
    """
    members = [*mean]
    matrix = [[row.get(member) for member in members] for row in weights.values()]
    signed = any(value < 0 for row in weights.values() for value in row.values())
    heatmap = Heatmap("module", "member", labels_of(weights), members, matrix, "weight", signed=signed)
    return [
        Section(
            "Mean weights",
            "Over the modules that a member adapts.",
            Bars("mean weight", members, [*mean.values()]),
        ),
        Section(
            "Weights by module",
            "What each member's update is multiplied by; a dot where it has none.",
            heatmap,
        ),
    ]
