"""The command `streammap`, forked from one process that has imported torch.

Importing it takes more than a second, and the pages run some two hundred commands.
"""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.pages.reader import ROOT

_SERVER = """
import array, gc, importlib, json, os, select, signal, socket, sys

path, *modules = sys.argv[1:]
for name in modules:
    importlib.import_module(name)
read_the_environment = {"huggingface_hub", "transformers", "fsspec"} & set(sys.modules)
assert not read_the_environment, read_the_environment
gc.freeze()
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
print("ready", flush=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    ready, _, _ = select.select([server, sys.stdin], [], [])
    if sys.stdin in ready:  # the tests are over
        os._exit(0)
    connection, _ = server.accept()
    if os.fork() == 0:
        break
    connection.close()
server.close()
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
head, extra, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(12))
ours = array.array("i", extra[0][2])
request = json.loads(connection.makefile("rb").read(int.from_bytes(head, "big")))
if pid := os.fork():
    connection.sendall(b"%d\\n" % pid)
    connection.sendall(b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)
connection.close()
for to, descriptor in enumerate(ours):
    os.dup2(descriptor, to)
    os.close(descriptor)
os.chdir(request["folder"])
os.environ.clear()
os.environ.update(request["environment"])
sys.argv = request["words"]
from streammap.cli.main import main
main(prog_name="streammap")
"""
_CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({path!r})
request = {{"folder": os.getcwd(), "environment": dict(os.environ), "words": sys.argv}}
text = json.dumps(request).encode()
descriptors = array.array("i", (0, 1, 2))
connection.sendmsg(
    [len(text).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
)
connection.sendall(text)
answer = connection.makefile()
pid = int(answer.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(pid, number))
code = int(answer.readline())
sys.exit(code if code >= 0 else 128 - code)
"""
_IMPORTED = ("torch", "streammap.cli.main", "streammap.cli.operators", "streammap.output.run")
"""What reads no variable of the environment while it is imported."""


@functools.cache
def folder() -> Path:
    """A folder for PATH, with the command; it works until this process ends."""
    place = Path(tempfile.mkdtemp(prefix="streammap-command-"))
    path = str(place / "socket")
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, path, *_IMPORTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    _SERVERS.append(server)
    command = place / "streammap"
    command.write_text(_CLIENT.format(python=sys.executable, path=path))
    command.chmod(0o755)
    return place


_SERVERS: list["subprocess.Popen[str]"] = []
"""Kept: a server ends when its standard input is closed."""
