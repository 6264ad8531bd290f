"""Rows of one file, read in segments that are checked: the page cache into the caller's memory, with nothing between.

    safetensors file = 8 bytes n, n bytes of JSON, rows x d_in numbers;   segment i = rows 4096 i to 4096 (i + 1)

Reading a megabyte at a time and hashing it while it is in the processor's cache costs 0.22 CPU seconds a gigabyte; a
memory map with CRC-32 and a copy cost 0.61 (2-core virtual machine, shared), most of it page faults. It knows nothing
about shards.
"""

import json
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import torch
import xxhash

from sae_lens_maira.activations.prefetch import empty_rows
from sae_lens_maira.errors import StoreError

SEGMENT = 4096
"""Rows per checked piece; the unit in which readers shuffle."""
PIECE = 1 << 20


def checksums(values: torch.Tensor) -> list[str]:
    """XXH3-64 of every segment of (rows, d_in) values, as hexadecimal digits."""
    return [xxhash.xxh3_64_hexdigest(_bytes(piece)) for piece in values.split(SEGMENT)] if len(values) else []


def read_rows(path: Path, rows: int, sums: Sequence[str], start: int, place: torch.Tensor) -> None:
    """Read `len(place)` rows from row `start` on; every segment that is touched is read whole and checked.

    Args:
        path: safetensors file with one tensor (rows, d_in).
        rows: rows it must hold.
        sums: of `checksums`.
        start: first row.
        place: (n, d_in) memory in the file's dtype.

    Raises:
        StoreError: the file is missing, cut or damaged; the message names what is wrong, not the shard.
    """
    stop, width = start + len(place), place.shape[1]
    row_bytes = width * place.element_size()
    try:
        with path.open("rb", buffering=0) as file:
            offset = _offset(file, rows, width)
            for segment in range(start // SEGMENT, -(-stop // SEGMENT)):
                first, last = segment * SEGMENT, min((segment + 1) * SEGMENT, rows)
                inside = start <= first and last <= stop
                target = (
                    place[first - start : last - start]
                    if inside
                    else empty_rows(last - first, width, place.dtype)
                )
                file.seek(offset + first * row_bytes)
                if _fill(file, _bytes(target)) != sums[segment]:
                    raise StoreError(f"segment {segment} of {path.name} has another checksum")
                if not inside:
                    part = target[max(start - first, 0) : stop - first]
                    begin = max(first - start, 0)
                    place[begin : begin + len(part)] = part
    except (OSError, EOFError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path.name} cannot be read ({error})") from error


def _offset(file: FileIO, rows: int, width: int) -> int:
    """Where the numbers begin, after a look at the header."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length < 1 << 20:
        raise ValueError("its header has no plausible length")
    told = json.loads(file.read(length))["values"]
    if told["shape"] != [rows, width]:
        raise ValueError(f"it holds {told['shape']}, the manifest says {[rows, width]}")
    return 8 + length + told["data_offsets"][0]


def _fill(file: FileIO, memory: memoryview) -> str:
    """Fill memory from the file and return its checksum."""
    digest = xxhash.xxh3_64()
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done : done + PIECE])
        if not count:
            raise EOFError("it ends too early")
        digest.update(memory[done : done + count])
        done += count
    return digest.hexdigest()


def _bytes(values: torch.Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().reshape(-1).data
