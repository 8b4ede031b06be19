"""Prometheus metrics: what a server counts, and the endpoint it is read from."""

from lorasrv.metrics.endpoint import MetricsServer
from lorasrv.metrics.server import ServerMetrics
from lorasrv.metrics.state import LevelState, ServerState

__all__ = ["LevelState", "MetricsServer", "ServerMetrics", "ServerState"]
