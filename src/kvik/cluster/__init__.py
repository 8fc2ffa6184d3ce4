"""Several replicas of one model: which of them serves a request."""

from kvik.cluster.contents import Contents, Name
from kvik.cluster.policy import POLICIES, Cost, Hash, LeastLoaded, Policy, RoundRobin
from kvik.cluster.router import Router, Ticket
from kvik.cluster.routing import Replica, RoutedRequest

__all__ = [
    "POLICIES",
    "Contents",
    "Cost",
    "Hash",
    "LeastLoaded",
    "Name",
    "Policy",
    "Replica",
    "RoundRobin",
    "RoutedRequest",
    "Router",
    "Ticket",
]
