"""Damaged checkpoints: every one is refused by name, and the one before it is used."""

import os
import random
import shutil

import pytest

from grpo.checkpoints import contents as checkpoint
from grpo.checkpoints.manifest import MANIFEST
from tests.faults.runs import STEPS


@pytest.fixture(scope="module")
def pair(arena, tmp_path_factory):
    """Two valid checkpoints of one run: (the older, the newer), as copies."""
    run, _, _ = arena.reference()
    folder = tmp_path_factory.mktemp("pair")
    for step in (9, STEPS):
        shutil.copytree(run.output / f"checkpoint_{step}", folder / f"checkpoint_{step}")
    assert not checkpoint.verify(folder / "checkpoint_9") and not checkpoint.verify(folder / f"checkpoint_{STEPS}")
    return folder / "checkpoint_9", folder / f"checkpoint_{STEPS}"


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def refused(folder, name):
    """Whether it is refused, and the file named (the manifest speaks of what it lists)."""
    problem = checkpoint.verify(folder)
    return problem is not None and (name in problem or name == MANIFEST)


def test_F12_one_bit_flipped(pair, record):
    """200 random bits, spread evenly over the files, the manifest included."""
    rng = random.Random(12)
    folder = pair[1]
    names = files_of(folder)
    missed = []
    for number in range(200):
        name = names[number % len(names)]
        file = folder / name
        whole = file.read_bytes()
        content = bytearray(whole)
        at = rng.randrange(len(content))
        bit = rng.randrange(8)
        content[at] ^= 1 << bit
        file.write_bytes(content)
        if not refused(folder, name):
            missed.append((name, at, bit))
        file.write_bytes(whole)
    assert checkpoint.verify(folder) is None, "the test itself left damage"
    record("F12", 200, 200 - len(missed), f"{len(names)} files; missed: {missed[:5] or 'none'}")


@pytest.mark.full
def test_F12_any_bit_of_the_manifest(pair, record):
    """Each bit of the manifest, one after the other: what vouches for the others is vouched for itself."""
    file = pair[1] / MANIFEST
    whole = file.read_bytes()
    missed = []
    for at in range(len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[at] ^= 1 << bit
            file.write_bytes(content)
            if checkpoint.verify(pair[1]) is None:
                missed.append((at, bit, whole[max(0, at - 10) : at + 5].decode()))
    file.write_bytes(whole)
    tried = 8 * len(whole)
    record("F12", tried, tried - len(missed), f"every bit of {MANIFEST}; missed {len(missed)}: {missed[:3]}")


@pytest.mark.full
def test_F12_the_one_before_is_used(arena, record):
    """A bit of the newest model file: the run says so, continues from the one before, and ends the same."""
    run = arena.run()
    run.settings["max_steps"] = 6
    run.finish()
    run.settings["max_steps"] = STEPS
    file = run.output / "checkpoint_6" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    job = run.finish()
    named = f"{run.output}/checkpoint_6 is not used: model.safetensors" in job.text()
    back = f"resuming from {run.output}/checkpoint_3" in job.text()
    differences = arena.same(run)
    good = named and back and not differences
    record("F12", 1, int(good), f"fell back, same end: {named} {back} {differences[:3]}" if not good else "fell back")


def test_F13_a_file_cut_short(pair, record):
    """Each file, to 0, 1 and 8 bytes, to half, to all but the last byte."""
    folder = pair[1]
    tried, missed = 0, []
    for name in files_of(folder):
        file = folder / name
        whole = file.read_bytes()
        for size in sorted({0, 1, 8, len(whole) // 2, len(whole) - 1}):
            file.write_bytes(whole[:size])
            tried += 1
            if not refused(folder, name):
                missed.append((name, size))
        file.write_bytes(whole)
    record("F13", tried, tried - len(missed), f"missed: {missed or 'none'}")


def all_changes(older, newer):
    """Name -> what to do to the newer one."""
    moments = next(name for name in files_of(newer) if "optimizer" in name)

    def missing(name):
        return lambda: (newer / name).unlink()

    def swap(name):
        return lambda: shutil.copy(older / name, newer / name)

    def another_step():
        shutil.rmtree(newer)
        shutil.copytree(older, newer)

    def folder_in_place():
        (newer / "config.json").unlink()
        (newer / "config.json").mkdir()

    def link_in_place():
        (newer / "config.json").unlink()
        (newer / "config.json").symlink_to("config.json")

    changes = {f"missing {name}": missing(name) for name in files_of(newer)}
    changes |= {f"{name} of another step": swap(name) for name in ("model.safetensors", moments, MANIFEST)}
    changes |= {
        "renamed file": lambda: (newer / moments).rename(newer / "trainer" / "optimizer-00007-of-00008.safetensors"),
        "folder of another step": another_step,
        "added optimizer file": lambda: shutil.copy(newer / moments, newer / "trainer" / "optimizer-00002.safetensors"),
        "added model": lambda: (newer / "pytorch_model.bin").write_bytes(b"\x80\x04."),
        "file as a folder": folder_in_place,
        "link to itself": link_in_place,
    }
    return changes


def test_F14_files_missing_added_renamed_swapped(pair, tmp_path, record):
    """Each is refused, those that were added included: nothing in a checkpoint goes unlisted."""
    older, newer = tmp_path / "checkpoint_9", tmp_path / f"checkpoint_{STEPS}"
    shutil.copytree(pair[0], older)
    missed = []
    names = []
    shutil.copytree(pair[1], newer)
    names = list(all_changes(older, newer))
    for name in names:
        shutil.rmtree(newer, ignore_errors=True)
        shutil.copytree(pair[1], newer)
        all_changes(older, newer)[name]()
        if checkpoint.verify(newer) is None:
            missed.append(name)
    record("F14", len(names), len(names) - len(missed), f"missed: {missed or 'none'}")


POINTERS = {
    "stale": b"checkpoint_3\n",
    "empty": b"",
    "dangling": b"checkpoint_99\n",
    "outside": b"../../etc\n",
    "no text": b"\xff\xfe\x00checkpoint",
}


def test_F15_a_pointer_to_the_latest(pair, tmp_path, record):
    """There is none: a file or link of such a name changes nothing, whatever it says, and leads nowhere."""
    used = []
    for folder in pair:
        shutil.copytree(folder, tmp_path / folder.name)
    for name in ("latest", "latest_checkpointed_iteration.txt", "checkpoint_latest"):
        for content in POINTERS.values():
            (tmp_path / name).write_bytes(content)
            used.append(checkpoint.newest_valid(tmp_path, lambda line: None))
    os.symlink("/etc", tmp_path / "checkpoint_100")
    used.append(checkpoint.newest_valid(tmp_path, lambda line: None))
    correct = sum(folder == tmp_path / f"checkpoint_{STEPS}" for folder in used)
    record("F15", len(used), correct, "the newest valid folder, by its own manifest")
