"""Another process that holds a run's directory."""

import subprocess
import sys

HOLDER = """
import sys
from pathlib import Path
from experiments.framework import lock
directory = Path(sys.argv[1])
token = sys.argv[2] if len(sys.argv) > 2 else None
if token:
    lock.join(directory, token)
else:
    token = lock.acquire(directory)
    lock.share(directory)
print(token, flush=True)
sys.stdin.readline()
lock.release_all()
"""


class Holder:
    """Another process that takes a directory, or shares it with the one that has the token."""

    def __init__(self, directory, *token):
        command = [sys.executable, "-c", HOLDER, str(directory), *token]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, **pipes)
        self.token = self.process.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def end(self):
        _, error = self.process.communicate("\n")
        return self.process.returncode, error
