"""Schedules: who starts when, when the server steps, what a late update counts."""

from hocket.schedules.base import Schedule, schedule
from hocket.schedules.cyclic import Cyclic
from hocket.schedules.sync import Overlap, Sync

__all__ = ["Cyclic", "Overlap", "Schedule", "Sync", "schedule"]
