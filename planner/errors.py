"""Expected outcomes of planner, grouped by meaning."""

from hwmodels.errors import ShardwiseError


class PlanError(ShardwiseError):
    """A plan file or question that cannot be used as given."""

    exit_code = 4


class NoFeasiblePlanError(ShardwiseError):
    """No plan meets the limits; the message names the violated limit and the best reachable value."""

    exit_code = 7
