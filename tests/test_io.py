"""Atomic writes of files and folders: after any failure the old content is there, and no draft is left."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_lens_maira.errors import DiskError, LockError
from sae_lens_maira.io import atomic_file, atomic_folder, atomic_write, locked, save_figure

pytestmark = pytest.mark.compat


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_files():
    """The kernel refuses files over 100 kB, as a quota or a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_tables_and_figures_are_written_in_one_way():
    """`csv_of` and `save_figure`: no formulas in a spreadsheet, no half figure after a kill."""
    root = Path(__file__).parents[1]
    files = [path for name in ("sae_lens_maira", "hooks", "recipes") for path in (root / name).rglob("*.py")]
    assert len(files) > 100
    others = [
        str(path) for path in files if any(call in path.read_text() for call in (".savefig(", ".to_csv("))
    ]
    assert others == [str(root / "sae_lens_maira" / "io.py")]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_figure_is_replaced_in_one_piece(tmp_path, suffix):
    from matplotlib.figure import Figure

    path = tmp_path / f"figure.{suffix}"
    save_figure(Figure(figsize=(1, 1)), path, dpi=20)
    before = path.read_bytes()
    assert before[:4] == {"png": b"\x89PNG", "svg": b"<?xm"}[suffix]
    with pytest.raises(TypeError):
        save_figure(Figure(figsize=(1, 1)), path, metadata=3)
    assert path.read_bytes() == before
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_replaced_in_one_piece(tmp_path, sync):
    """Until the block ends the old content stands under the name."""
    path = tmp_path / "file"
    atomic_write(path, "old", sync=sync)
    with atomic_file(path, sync=sync) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
        assert str(os.getpid()) in draft.name
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_a_failure_leaves_the_old_file_and_no_draft(tmp_path):
    """Also an interruption, which is no Exception."""
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def interrupted():
        with atomic_file(path) as draft:
            draft.write_bytes(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_said_in_one_paragraph(tmp_path, small_files):
    """The kernel's refusal becomes a DiskError that names the place; the old file stands."""
    path = tmp_path / "file"
    atomic_write(path, b"old")
    with pytest.raises(DiskError, match=r"No space to write .*file: .* run the same command again") as caught:
        atomic_write(path, bytes(200_000))
    assert isinstance(caught.value, OSError)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]
    with pytest.raises(DiskError, match="No space"), atomic_folder(tmp_path / "folder") as draft:
        (draft / "large").write_bytes(bytes(200_000))
    assert names(tmp_path) == ["file"]


def test_torch_on_a_full_disk(tmp_path, small_files):
    """torch and safetensors hide the kernel's reason; the old file stands and no draft is left."""
    path = tmp_path / "state.pt"
    with atomic_file(path) as draft:
        torch.save({"a": torch.zeros(10)}, draft)
    with pytest.raises(DiskError, match="No space"), atomic_file(path) as draft:
        torch.save({"a": torch.zeros(100_000)}, draft)
    with pytest.raises(DiskError, match="No space"), atomic_folder(tmp_path / "sae") as draft:
        save_file({"a": torch.zeros(100_000)}, draft / "sae.safetensors")
    assert torch.load(path, weights_only=True)["a"].shape == (10,)
    assert names(tmp_path) == ["state.pt"]


def test_processes_do_not_share_a_draft(tmp_path):
    """Two that write the same file at once: both succeed, and the last one's content is whole."""
    path = tmp_path / "file"
    code = (
        "import sys\nfrom pathlib import Path\nfrom sae_lens_maira.io import atomic_write\n"
        "for _ in range(100): atomic_write(Path(sys.argv[1]), sys.argv[2] * 50_000, sync=False)\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert path.read_text() in ("a" * 50_000, "b" * 50_000)
    assert names(tmp_path) == ["file"]


def put(folder: Path, text: str, existing, meanwhile: str | None = None) -> None:
    """Write a folder with one file; `meanwhile` another process's folder appears at the place."""
    with atomic_folder(folder, existing) as draft:
        (draft / "file").write_text(text)
        if meanwhile is not None:
            folder.mkdir()
            (folder / "file").write_text(meanwhile)


def test_what_becomes_of_a_folder_that_is_there(tmp_path):
    """Refuse fails and leaves it, keep drops the new one, replace drops the old one; an empty one is no obstacle."""
    place = tmp_path / "deep" / "folder"
    place.mkdir(parents=True)
    put(place, "first", "refuse")
    with pytest.raises(FileExistsError):
        put(place, "second", "refuse")
    assert (place / "file").read_text() == "first"
    put(place, "second", "keep")
    assert (place / "file").read_text() == "first"
    put(place, "second", "replace")
    assert (place / "file").read_text() == "second"
    put(tmp_path / "deep" / "raced", "mine", "keep", meanwhile="theirs")
    assert (tmp_path / "deep" / "raced" / "file").read_text() == "theirs"
    assert names(tmp_path / "deep") == ["folder", "raced"]


def test_an_owner_removes_what_it_left_when_it_was_killed(tmp_path):
    """Drafts of the same owner only."""
    for owner in ("0-17", "10-17"):
        (tmp_path / f"folder.{owner}.partial").mkdir()
    with atomic_folder(tmp_path / "folder", owner="0") as draft:
        (draft / "file").touch()
    assert names(tmp_path) == ["folder", "folder.10-17.partial"]


def test_a_lock_excludes_others_until_its_process_ends(tmp_path):
    """A second owner is refused with host, process and age; a killed owner's lock is taken over; nothing stays."""
    folder = tmp_path / "work"
    program = (
        "import sys, time; from sae_lens_maira.io import locked\n"
        f"with locked({str(folder)!r}):\n    print('held', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(LockError, match=rf"process {owner.pid} on .*, started \d+ s ago"), locked(folder):
            pass
        with pytest.raises(LockError, match="in use"), locked(folder, "rank 0 of 2"):
            pass
    finally:
        owner.kill()
        owner.communicate()
    assert names(tmp_path) == [".work.lock"]  # the killed process left it
    with locked(folder), pytest.raises(LockError), locked(folder):
        pass
    assert names(tmp_path) == []


def test_links_stay_and_lead_to_what_was_written(tmp_path):
    """A link to another disk is a choice of the user: files and folders are replaced there, under one lock."""
    disk = tmp_path / "disk"
    (disk / "old").mkdir(parents=True)
    (disk / "old" / "a").write_text("old")
    (disk / "file").write_text("old")
    for name in ("old", "new", "file"):
        (tmp_path / name).symlink_to(disk / name)
    for name in ("old", "new"):
        with atomic_folder(tmp_path / name, "replace") as draft:
            (draft / "b").write_text("new")
    atomic_write(tmp_path / "file", "new")
    assert all((tmp_path / name).is_symlink() for name in ("old", "new", "file"))
    assert names(disk) == ["file", "new", "old"]
    assert names(disk / "old") == names(disk / "new") == ["b"]
    assert (disk / "file").read_text() == "new"
    with locked(tmp_path / "old"), pytest.raises(LockError, match="is in use"), locked(disk / "old"):
        pass


def test_parts_of_a_folder_exclude_the_whole_and_themselves(tmp_path):
    """Ranks share a folder; no other process works in it meanwhile, and no lock file is left."""
    folder = tmp_path / "work"
    with locked(folder, "rank 0 of 2"):
        with locked(folder, "rank 1 of 2"), pytest.raises(LockError), locked(folder):
            pass
        with pytest.raises(LockError), locked(folder, "rank 0 of 2"):
            pass
        with pytest.raises(LockError, match=f"process {os.getpid()} "), locked(folder):
            pass
    assert names(tmp_path) == []
    with locked(folder), pytest.raises(LockError), locked(folder, "rank 0 of 2"):
        pass
    assert names(tmp_path) == []
