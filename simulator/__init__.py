"""What happens when requests arrive? A seeded discrete-event simulation on SimPy."""

from simulator.deployment import Deployment, ReplicaSpec
from simulator.simulate import simulate
from simulator.workload import Requests, Workload

__all__ = ["Deployment", "ReplicaSpec", "Requests", "Workload", "simulate"]
