"""Expected outcomes of simulator, grouped by meaning."""

from hwmodels.errors import ShardwiseError


class TraceError(ShardwiseError):
    """A trace or workload that cannot be replayed as given; names the line where there is one."""

    exit_code = 6


class SchedulerError(ShardwiseError):
    """Scheduler settings that contradict each other."""

    exit_code = 4
