"""How fast is this machine? Its kernels, measured with torch and kept as tables of hwmodels.kernels.table."""

from planner.profiling.grid import points_for
from planner.profiling.machine import Machine, open_machine
from planner.profiling.points import Point
from planner.profiling.run import Profiled, measure, profile, read_tables

__all__ = ["Machine", "Point", "Profiled", "measure", "open_machine", "points_for", "profile", "read_tables"]
