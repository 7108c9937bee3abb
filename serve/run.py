"""Start the server: take the port, load the models, serve until a signal, finish what is in work."""

from __future__ import annotations

import logging
import math
import signal
import socket
import sys
from collections.abc import Collection
from types import FrameType

import uvicorn

from mdm.errors import ConfigError

from .app import make_app
from .limits import Limits
from .memory import MIB
from .models import open_student, open_teacher
from .service import Service

log = logging.getLogger("mdm.serve")


def listen(host: str, port: int) -> socket.socket:
    """The port, taken before models are loaded. Raises ConfigError if that fails."""
    if not 0 <= port <= 2**16 - 1:
        raise ConfigError(f"--port must be 0 … 65535 (0 = a free one); got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port"
        ) from error
    return listener


def open_service(
    model: str,
    teacher: str | None,
    limits: Limits,
    *,
    name: str | None = None,
    dtype: str = "float32",
    quantization: str = "",
    device: str | None = None,
    threads: int | None = None,
    log_requests: bool = False,
) -> Service:
    """The student, the teacher beside it if one is named, and an engine that has not been started."""
    import torch

    threads = threads or torch.get_num_threads()
    # Forwards run in the engine's thread, with helpers of its own. If this thread had some too, there
    # would be more than cores, and OpenMP would put helpers to sleep at the end of every operation
    # instead of letting them wait: 20 % slower forwards on two cores.
    torch.set_num_threads(1)
    student = open_student(model, name=name, dtype=dtype, quantization=quantization, device=device)
    beside = None
    if teacher is not None:
        beside = open_teacher(
            teacher, name=None, dtype=dtype, quantization=quantization, device=device
        )
        if beside.name == student.name:
            raise ConfigError(
                f"student and teacher are both called {student.name!r}; name the student with --name"
            )
    return Service(student, beside, limits, threads=threads, log_requests=log_requests)


class Server(uvicorn.Server):
    """uvicorn's, which also tells the engine that a signal has come."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self.service, self.drain_s = service, drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.engine.drain(self.drain_s)
        super().handle_exit(sig, frame)


def run(
    service: Service,
    listener: socket.socket,
    *,
    keys: Collection[str],
    hosts: Collection[str] | None,
    origins: Collection[str],
    drain_s: float,
) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is in work, for at most `drain_s` seconds."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    for name in ("httpx", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    app = make_app(
        service,
        keys=keys,
        hosts=hosts,
        origins=origins,
    )
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # it would log query strings; the service logs what matters
        server_header=False,
        # The engine ends what is in work at drain_s, so that clients are told; then they are read to.
        timeout_graceful_shutdown=math.ceil(drain_s) + 5,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signal again when it is done; by then it means an ordinary end.
        signal.signal(number, _exit)
    host, port = listener.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    log.info(
        "serving %s at http://%s:%d (page /, API /docs); %d MiB for forwards; key %s",
        " and ".join(f"{one.name} ({one.kind}, {one.source})" for one in service.models.values()),
        place,
        port,
        service.workspace // MIB,
        "needed" if keys else "not needed",
    )
    Server(config, service, drain_s).run(sockets=[listener])


def _exit(_: int, __: FrameType | None) -> None:
    sys.exit(0)
