"""Expected outcomes of simulator, grouped by meaning."""

from hwmodels.errors import ShardwiseError


class TraceError(ShardwiseError):
    """A trace or workload that cannot be replayed as given; names the line where there is one."""

    exit_code = 6


class SchedulerError(ShardwiseError):
    """Scheduler settings that contradict each other."""

    exit_code = 4


class MetricError(ShardwiseError):
    """A latency limit or measuring window that cannot be used as given."""

    exit_code = 4


class SaveError(ShardwiseError):
    """A result that cannot be written where it was asked for; nothing was left half-written."""

    exit_code = 8


class PoolError(ShardwiseError):
    """Pools of replicas that cannot serve together."""

    exit_code = 4


class OffloadError(ShardwiseError):
    """A plan for experts that do not fit which cannot be carried out."""

    exit_code = 4
