"""Expected outcomes of hwmodels, grouped by meaning; each carries the exit code the command line returns."""


class ShardwiseError(Exception):
    """An expected outcome told in one line: the value, what was expected, and a way out."""

    exit_code = 1


class ProfileError(ShardwiseError):
    """A profile, model configuration or name that cannot be used as given."""

    exit_code = 3


class MappingError(ShardwiseError):
    """Parallel degrees that break a law of the model or of the cluster."""

    exit_code = 4


class OutOfMemoryError(ShardwiseError):
    """A model that does not fit; the message says by how many GiB."""

    exit_code = 5


class MeasurementError(ShardwiseError):
    """A table of measurements that cannot be used as given, or is not there."""

    exit_code = 9
