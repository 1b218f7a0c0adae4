"""Schedules: who starts when, when the server steps, what a late update counts."""

from hocket.schedules.base import Schedule, Term, schedule
from hocket.schedules.ca2fl import CA2FL
from hocket.schedules.cyclic import Cyclic
from hocket.schedules.fedasync import FedAsync
from hocket.schedules.fedbuff import FADAS, FedBuff
from hocket.schedules.fedfa import FedFa
from hocket.schedules.port import Port
from hocket.schedules.safa import SAFA
from hocket.schedules.sync import Overlap, Sync

__all__ = [
    "CA2FL",
    "FADAS",
    "SAFA",
    "Cyclic",
    "FedAsync",
    "FedBuff",
    "FedFa",
    "Overlap",
    "Port",
    "Schedule",
    "Sync",
    "Term",
    "schedule",
]
