"""HTTP over loaded checkpoints: engines, the application with its limits, the server.

ONNX checkpoints are served without torch; it is imported only for the other kinds.
"""

from qlx.serving.app import create_app
from qlx.serving.engine import Engine, LoadedEngine, load_engine, load_engines
from qlx.serving.guard import LOOPBACK_HOSTS
from qlx.serving.limits import ServingLimits
from qlx.serving.server import Server, listen, serve

__all__ = [
    "LOOPBACK_HOSTS",
    "Engine",
    "LoadedEngine",
    "Server",
    "ServingLimits",
    "create_app",
    "listen",
    "load_engine",
    "load_engines",
    "serve",
]
