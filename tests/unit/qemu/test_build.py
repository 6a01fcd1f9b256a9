"""The build's bookkeeping, with a source tree that compiles in no time."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lab.errors import BuildError, HostError
from lab.host.files import sha256_of
from lab.qemu import build, series
from lab.qemu.source import Progress, qemu_cache

# Stands in for QEMU's configure: its "compiler" copies a script.
CONFIGURE = """\
#!/bin/sh
cat > build.ninja <<'END'
rule make
  command = COMPILER
build qemu-system-x86_64: make ../tree/hello
build qemu-img: make ../tree/hello
END
"""
COPY = "cp $in $out && chmod +x $out"
HELLO = "#!/bin/sh\necho QEMU emulator version 10.0.5\n# one\n# two\n# three\n# four\n# five\n"
PATCH = """\
From: Somebody
Subject: [PATCH] hello: say more

--- a/hello
+++ b/hello
@@ -2,4 +2,5 @@
 echo QEMU emulator version 10.0.5
 # one
+echo patched
 # two
 # three
"""
NEXT_PATCH = """\
From: Somebody
Subject: [PATCH] hello: say it again

--- a/hello
+++ b/hello
@@ -5,4 +5,5 @@
 # two
 # three
+echo again
 # four
 # five
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tree"
    folder.joinpath("configs/devices/x86_64-softmmu").mkdir(parents=True)
    folder.joinpath("VERSION").write_text("10.0.5\n")
    folder.joinpath("hello").write_text(HELLO)
    set_compiler(folder, COPY)
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LAB_QEMU_SOURCE", str(folder))
    for name in ("LAB_QEMU_PATCHED", "LAB_QEMU_UNPATCHED", "LAB_KEEP_BUILD"):
        monkeypatch.delenv(name, raising=False)

    async def python(log: Path, report: Progress) -> Path:
        return Path(sys.executable)

    monkeypatch.setattr(build, "_python_for_configure", python)
    set_series(tmp_path, monkeypatch)
    return folder


def set_compiler(tree: Path, command: str) -> None:
    configure = tree / "configure"
    configure.write_text(CONFIGURE.replace("COMPILER", command))
    configure.chmod(0o755)


def set_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *patches: str) -> list[Path]:
    paths = []
    for number, text in enumerate(patches, 1):
        path = tmp_path / f"{number:04}-change.patch"
        path.write_text(text)
        paths.append(path)
    monkeypatch.setattr(build, "read_series", lambda: paths)
    return paths


def says(binary: build.QemuBinary) -> str:
    return subprocess.run([binary.path], capture_output=True, text=True, check=True).stdout


def leftovers() -> list[str]:
    kept = {"builds", "logs", "lock"}
    names = [path.name for path in qemu_cache().iterdir() if path.name not in kept]
    # What an interrupted build had is being removed behind its back.
    return [name for name in names if not name.startswith("trash-")]


async def test_both_binaries_come_from_one_tree(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = set_series(tmp_path, monkeypatch, PATCH)
    seen: list[str] = []

    binaries = await build.ensure_qemu(seen.append)

    assert "patched" not in says(binaries["unpatched"])
    assert "patched" in says(binaries["patched"])
    assert "build qemu (unpatched) 2/2" in seen
    assert binaries["unpatched"].series_sha256 is None
    assert binaries["patched"].series_sha256 == series.series_sha256(patches)
    assert {binary.version for binary in binaries.values()} == {"10.0.5"}
    assert tree.joinpath("hello").read_text() == HELLO
    assert leftovers() == []


async def test_nothing_is_built_twice(tree: Path) -> None:
    first = await build.ensure_qemu()
    seen: list[str] = []

    assert await build.ensure_qemu(seen.append) == first
    assert seen == []
    assert [build.find_qemu(variant) for variant in build.VARIANTS] == list(first.values())


async def test_a_changed_series_leaves_the_unpatched_build_alone(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await build.ensure_qemu()
    set_series(tmp_path, monkeypatch, PATCH)
    with pytest.raises(HostError, match="patched QEMU is not built; run `lab build`"):
        build.find_qemu("patched")
    seen: list[str] = []

    second = await build.ensure_qemu(seen.append)

    assert second["unpatched"] == first["unpatched"]
    assert second["patched"].build_id != first["patched"].build_id
    assert not any("unpatched" in line for line in seen)


async def test_a_build_carries_a_stamp_of_what_went_into_it(tree: Path) -> None:
    binaries = await build.ensure_qemu()
    path = binaries["patched"].path
    stamp = build.read_stamp(path.parent)

    assert stamp is not None
    assert stamp.binary_sha256 == sha256_of(path)
    assert (stamp.series, tuple(stamp.flags)) == ([], build.FLAGS)
    assert stamp.compiler
    assert stamp.built_utc.endswith("+00:00")


async def test_a_build_with_sanitizers_is_kept_beside_the_others(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_series(tmp_path, monkeypatch, PATCH)
    ordinary = await build.ensure_qemu()
    found = {name: await build.ensure_sanitized_qemu(name) for name in build.SANITIZER_FLAGS}
    assert len({binary.path for binary in (*ordinary.values(), *found.values())}) == 4
    for name, binary in found.items():
        assert "echo patched" in binary.path.read_text()
        stamp = build.read_stamp(binary.path.parent)
        assert stamp is not None
        assert set(build.SANITIZER_FLAGS[name]) <= set(stamp.flags)
        assert "--disable-debug-info" not in stamp.flags
    assert build.find_qemu("patched") == ordinary["patched"]


async def test_a_failed_build_names_its_log_and_leaves_nothing(tree: Path) -> None:
    set_compiler(tree, "echo cannot compile this; false")

    with pytest.raises(BuildError, match="ninja failed with status 1") as caught:
        await build.ensure_qemu()

    log = Path(caught.value.remedy.rpartition(" ")[2])
    assert "cannot compile this" in log.read_text()
    assert leftovers() == []
    with pytest.raises(HostError, match="not built"):
        build.find_qemu("unpatched")


async def test_a_patch_that_does_not_apply_is_named(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_series(tmp_path, monkeypatch, PATCH.replace("# one", "# uno"))

    with pytest.raises(BuildError, match=r"0001-change\.patch does not apply"):
        await build.ensure_qemu()
    assert build.find_qemu("unpatched").variant == "unpatched"


async def test_editing_a_patch_does_not_reach_a_build_that_is_going_on(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (patch,) = set_series(tmp_path, monkeypatch, PATCH)

    def edit(message: str) -> None:
        if message == "configure qemu":
            patch.write_text(PATCH.replace("echo patched", "echo edited"))

    binaries = await build.ensure_qemu(edit)

    assert "patched" in says(binaries["patched"])
    with pytest.raises(HostError, match="not built"):
        build.find_qemu("patched")


async def test_an_interrupted_build_leaves_nothing(tree: Path) -> None:
    set_compiler(tree, "sleep 600")
    building = asyncio.Event()

    def report(message: str) -> None:
        if message == "configure qemu":
            building.set()

    task = asyncio.create_task(build.ensure_qemu(report))
    await building.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert leftovers() == []
    assert not qemu_cache().joinpath("builds").exists()


async def test_two_builds_at_once_share_one(tree: Path) -> None:
    seen: list[str] = []

    first, second = await asyncio.gather(build.ensure_qemu(seen.append), build.ensure_qemu())

    assert first == second
    assert len(list(qemu_cache().joinpath("builds").iterdir())) == 2


async def test_a_build_that_lost_a_file_is_built_again(tree: Path) -> None:
    binaries = await build.ensure_qemu()
    binaries["unpatched"].path.unlink()

    assert await build.ensure_qemu() == binaries
    assert binaries["unpatched"].path.exists()


async def test_a_build_can_be_kept_for_a_look(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_KEEP_BUILD", "1")
    await build.ensure_qemu()

    (work,) = qemu_cache().glob("work-*")
    assert work.joinpath("tree/hello").exists()


async def test_each_step_is_built_and_the_bad_one_named(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_series(tmp_path, monkeypatch, PATCH, NEXT_PATCH)
    assert await build.check_each_step() == ["0001-change.patch", "0002-change.patch"]

    set_series(tmp_path, monkeypatch, PATCH, PATCH)
    with pytest.raises(BuildError, match=r"0002-change\.patch"):
        await build.check_each_step()


def test_a_missing_build_says_what_to_do(tree: Path) -> None:
    with pytest.raises(HostError, match="the patched QEMU is not built; run `lab build`"):
        build.find_qemu("patched")


def test_the_environment_may_name_a_binary(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hello = tree / "hello"
    hello.chmod(0o755)
    monkeypatch.setenv("LAB_QEMU_PATCHED", str(hello))

    binary = build.find_qemu("patched")

    assert (binary.path, binary.version) == (hello, "10.0.5")
    assert binary.build_id == f"override-{sha256_of(hello)[:12]}"


@pytest.mark.parametrize("value", ["/nonexistent", "/bin/true"])
def test_a_named_binary_that_is_no_qemu_is_refused(
    tree: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LAB_QEMU_PATCHED", value)
    with pytest.raises(HostError, match=value):
        build.find_qemu("patched")


def test_a_stamp_of_another_layout_is_no_build(tmp_path: Path) -> None:
    assert build.read_stamp(tmp_path) is None
    tmp_path.joinpath("build-id.json").write_text(json.dumps({"schema": "other"}))
    assert build.read_stamp(tmp_path) is None


@pytest.mark.parametrize("name", ["a space", "a:colon", "a$dollar", "a'quote", "a\nline"])
async def test_a_cache_in_which_nothing_can_be_built_is_refused_before_the_download(
    tree: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field report F17."""
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / name))
    asked: list[str] = []

    async def obtain(*_: object, **__: object) -> None:
        asked.append("a download")

    monkeypatch.setattr(build, "obtain_source", obtain)
    for ask in (
        build.ensure_qemu(),
        build.ensure_qemu(refresh_source=True),
        build.ensure_sanitized_qemu("address"),
        build.check_each_step(),
    ):
        with pytest.raises(HostError, match="QEMU cannot be built in") as caught:
            await ask
        assert "LAB_CACHE" in caught.value.remedy
        assert "\n" not in str(caught.value)
    assert asked == []


async def test_a_cache_with_letters_of_any_language_is_built_in(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "Büro_2-b.c+d"))
    binaries = await build.ensure_qemu()
    assert all(says(binary) for binary in binaries.values())
