"""
A server that has imported the large libraries once, and makes a copy of itself for every command that a test runs.

A command spends most of its seconds on importing torch and transformers, in its own process and in its fork server.
Here both are done before, as in transport/process.py: the copy reads the project's files again, from where its script
lies, and shares the fork server. What a copy does is what `python SCRIPT ...` does; tests/test_warm.py compares them.

    python tests/warm.py SOCKET     # ends with its standard input
"""
import contextlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def import_libraries() -> None:
    """Everything that the command imports, less the project's own modules; and the fork server."""
    sys.path.insert(0, str(ROOT))
    import transformers.generation
    import transformers.models.auto.modeling_auto
    import transformers.models.auto.tokenization_auto  # noqa: F401
    import tyro  # noqa: F401

    import asyncopd  # noqa: F401
    from transport.process import start_server
    start_server()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name != "__main__" and Path(file).parent.is_relative_to(ROOT) and ".venv" not in file:
            del sys.modules[name]
    sys.path.remove(str(ROOT))


def serve(address: str) -> None:
    """Take commands until standard input ends. Each has a connection: the request comes in with three descriptors for
    its standard streams, its process id and later its wait status go out."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    events = selectors.DefaultSelector()
    events.register(sys.stdin, selectors.EVENT_READ)
    events.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in events.select():
            if key.fileobj is sys.stdin:
                return
            if key.fileobj is not listener:
                pid, connection = key.data
                _, status = os.waitpid(pid, 0)
                events.unregister(key.fileobj)
                os.close(key.fd)
                tell(connection, status)
                connection.close()
                continue
            connection, _ = listener.accept()
            request, streams = receive(connection)
            pid = os.fork()
            if pid == 0:
                events.close()
                listener.close()
                connection.close()
                return become(streams, **request)
            for fd in streams:
                os.close(fd)
            tell(connection, pid)
            events.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))


def tell(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):                    # nobody waits for it any more
        connection.sendall(f"{number}\n".encode())


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """A request, which ends with a newline, and its descriptors."""
    data, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 16)
    return json.loads(data), list(streams)


def become(streams: list[int], arguments: list[str], cwd: str, env: dict[str, str]) -> None:
    """In the copy: be `python ARGUMENTS`, a script or -c and code."""
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    # The fork server runs, and is no child of this process, which therefore cannot ask whether it does
    forkserver._forkserver.ensure_running = forkserver.ensure_running = resource_tracker.ensure_running
    script = arguments[0]
    if script == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path[0] = ""
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        return
    sys.argv = list(arguments)
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import_libraries()
    serve(sys.argv[1])
