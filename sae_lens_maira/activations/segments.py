"""Files of rows, written and read in segments that are checked, straight between the file and the caller's memory.

    safetensors file = 8 bytes n, n bytes of JSON, rows x d_in numbers;   segment i = rows 1024 i to 1024 (i + 1)

Reading a megabyte at a time and hashing it while it is in the processor's cache costs 0.22 CPU seconds per gigabyte; a
memory map with CRC-32 and a copy cost 0.61 (2-core virtual machine, shared), most of it page faults.
"""

import json
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import xxhash

from sae_lens_maira.activations.prefetch import empty_rows
from sae_lens_maira.activations.store_spec import SEGMENT
from sae_lens_maira.errors import StoreError
from sae_lens_maira.io import atomic_file

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PIECE = 1 << 20
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write_rows(
    path: Path, hook: str, values: torch.Tensor, order: torch.Tensor | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Write rows to a safetensors file, one segment after the other; no second copy of the rows is made.

    Args:
        path: File to write atomically.
        hook: Hook point, for the file's metadata.
        values: (rows, d_in) bfloat16 or float32.
        order: (rows,) numbers of the rows in the order of the file; unchanged if not given.

    Returns:
        {"name", "bytes"} of the file, and the XXH3-64 of every segment as hexadecimal digits.

    Raises:
        DiskError: The disk is full.
    """
    sums = []
    with atomic_file(path) as draft:
        with draft.open("wb") as file:
            file.write(header(hook, len(values), values.shape[1], values.dtype))
            for start in range(0, len(values), SEGMENT):
                stop = start + SEGMENT
                piece = values[start:stop] if order is None else values[order[start:stop]]
                memory = _bytes(piece)
                sums.append(xxhash.xxh3_64_hexdigest(memory))
                file.write(memory)
        size = draft.stat().st_size
    return {"name": path.name, "bytes": size}, sums


def header(hook: str, rows: int, width: int, dtype: torch.dtype) -> bytes:
    """First bytes of a file of (rows, width) numbers."""
    entry = {
        "dtype": _NAMES[dtype],
        "shape": [rows, width],
        "data_offsets": [0, rows * width * dtype.itemsize],
    }
    text = json.dumps({"__metadata__": {"hook": hook}, "values": entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_rows(path: Path, rows: int, sums: Sequence[str], start: int, place: torch.Tensor) -> None:
    """Read `len(place)` rows from row `start` on; every segment that is touched is read whole and checked.

    Args:
        path: Safetensors file with one tensor (rows, d_in).
        rows: Rows it must hold.
        sums: Result of `write_rows`.
        start: First row.
        place: (n, d_in) memory in the file's dtype.

    Raises:
        StoreError: The file is missing, cut or damaged; the message names what is wrong, not the shard.
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
    header = json.loads(file.read(length))["values"]
    if header["shape"] != [rows, width]:
        raise ValueError(f"it holds {header['shape']}, the manifest says {[rows, width]}")
    return 8 + length + header["data_offsets"][0]


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
