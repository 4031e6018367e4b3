"""Donors whose memory goes bad."""

from __future__ import annotations

import mmap
import os
from pathlib import Path


def corrupt(donor: int) -> int:
    """Flips every byte that is not zero in the memory a donor lends. Returns how many pages that touched."""
    touched = 0
    for link in Path(f"/proc/{donor}/fd").iterdir():
        try:
            if "memfd:" not in os.readlink(link):
                continue
            file = open(link, "r+b")  # noqa: SIM115
        except OSError:
            continue  # it has been closed meanwhile
        with file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                continue
            with mmap.mmap(file.fileno(), size) as memory:
                for at in range(0, size, mmap.PAGESIZE):
                    page = memory[at : at + mmap.PAGESIZE]
                    if any(page):
                        memory[at : at + mmap.PAGESIZE] = bytes(byte ^ 0x55 for byte in page)
                        touched += 1
    return touched
