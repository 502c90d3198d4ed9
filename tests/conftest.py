"""Hypothesis measures laws, not the machine: no deadlines, and slow data is no failure."""

from hypothesis import HealthCheck, settings

settings.register_profile("laws", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("laws")
