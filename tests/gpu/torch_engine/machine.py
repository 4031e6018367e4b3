"""The node that the scripts here run on: this machine's GPUs, or two simulated ones, with a broker and donors as
processes."""

import argparse
import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import torch
from model import SHAPES

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "harness"))

from node import Node, eventually

__all__ = ["Machine", "eventually", "options", "started"]


class Machine(Node):
    """A node over the devices that PyTorch sees. Engines compute on the first; memory of the last one is lent."""

    def __init__(self, programs: pathlib.Path, directory: pathlib.Path, *, cuda: bool) -> None:
        self.cuda = cuda
        count = torch.cuda.device_count() if cuda else 0
        gpus = [f"GPU-{torch.cuda.get_device_properties(n).uuid}" for n in range(count)]
        self.devices = gpus or ["SIM-0", "SIM-1"]
        super().__init__(directory, programs.resolve(), ("--probe", "nvml") if cuda else ())
        self.start_broker()

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(0) if self.cuda else "no GPU"

    @property
    def last(self) -> str:
        """PyTorch's name of the last device."""
        return f"cuda:{len(self.devices) - 1}" if self.cuda else "cpu"

    @property
    def way(self) -> str:
        """Where the lent memory lies, as seen from the engine."""
        if not self.cuda:
            return "shared memory, no GPU"
        if len(self.devices) == 1:
            return "same GPU"
        reached = torch.cuda.can_device_access_peer(0, len(self.devices) - 1)
        return "peer GPU" if reached else "GPU without peer access"


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, default="target/release", help="where the programs are")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b")
    return parser


@contextlib.contextmanager
def started(arguments: argparse.Namespace) -> Iterator[Machine]:
    """Starts the machine's broker, and closes the machine at the end."""
    with tempfile.TemporaryDirectory() as directory:
        machine = Machine(arguments.programs, pathlib.Path(directory), cuda=arguments.device == "cuda")
        try:
            yield machine
        finally:
            machine.close()
