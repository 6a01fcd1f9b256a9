"""What another's command line says is read as QEMU reads it, and rewritten without loss."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import HostError, UsageError
from lab.vm.argv import (
    CommandLine,
    RestoreLine,
    device_ids,
    disks,
    for_restore,
    read_command_line,
    require_restorable,
)
from lab.vm.argv.options import (
    Option,
    Pairs,
    flattened,
    format_pairs,
    nested,
    parse_options,
    parse_pairs,
)

FOLDER = Path("/home/user")
PRIVATE = Path("/private")
LAYER = Path("/layers/a.qcow2")
MACHINE = "pc-q35-9.9"
END = (
    *("-chardev", "socket,id=lab-qmp,fd=9", "-mon", "chardev=lab-qmp,mode=control"),
    *("-S", "-incoming", "defer"),
)
LIBVIRT = Path(__file__).parent / "lines" / "libvirt-9.0.txt"


def line(*arguments: str) -> CommandLine:
    return CommandLine(Path("/usr/bin/qemu-system-x86_64"), arguments, FOLDER)


def restored(
    *arguments: str,
    overlays: Mapping[str, Path] = {},
    forward: Mapping[int, int] | None = {},
    networks: Mapping[str, str] = {},
) -> RestoreLine:
    return for_restore(
        line(*arguments),
        disks={FOLDER / name: layer for name, layer in overlays.items()},
        machine_type=MACHINE,
        folder=PRIVATE,
        qmp=9,
        forward=forward,
        networks=networks,
    )


def between(rewritten: RestoreLine) -> tuple[str, ...]:
    """What is left of a line of which the machine and the display are no matter."""
    words = rewritten.arguments
    assert words[-len(END) :] == END
    words = words[: -len(END)]
    assert words[:2] == ("-machine", MACHINE)
    assert words[-2:] == ("-display", "none")
    return words[2:-2]


# Options and values

KEYS = st.text("abcdefghijklmnopqrstuvwxyz0123456789.-_", min_size=1, max_size=12)
VALUES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.tuples(KEYS, VALUES), max_size=6))
def test_pairs_are_read_as_they_were_written(pairs: Pairs) -> None:
    assert parse_pairs(format_pairs(pairs)) == pairs
    assert parse_pairs(format_pairs(pairs, "driver"), "driver") == pairs


@given(VALUES.filter(bool), st.lists(st.tuples(KEYS, VALUES), max_size=4))
def test_the_first_value_is_read_without_its_key(first: str, rest: Pairs) -> None:
    pairs = [("driver", first), *rest]
    assert parse_pairs(format_pairs(pairs, "driver"), "driver") == pairs


@given(st.dictionaries(st.sampled_from(["a", "b.c", "b.d", "e.f.g", "e.f.h"]), VALUES))
def test_a_tree_is_read_as_it_was_written(leaves: Mapping[str, str]) -> None:
    tree = nested(list(leaves.items()))
    assert dict(flattened(tree)) == leaves


@pytest.mark.parametrize(
    ("text", "implied", "pairs"),
    [
        ("file=a,,b.img,format=raw", "", [("file", "a,b.img"), ("format", "raw")]),
        ("virtio-blk-pci,drive=d", "driver", [("driver", "virtio-blk-pci"), ("drive", "d")]),
        (
            "socket,path=/s,server,nowait",
            "backend",
            [("backend", "socket"), ("path", "/s"), ("server", "on"), ("wait", "off")],
        ),
        ("file=a=b", "", [("file", "a=b")]),
        ("type=pc", "type", [("type", "pc")]),
        ("", "type", []),
        ("a=,b=c", "", [("a", ""), ("b", "c")]),
        ("a=x,,,b=c", "", [("a", "x,"), ("b", "c")]),
    ],
)
def test_values_are_read_as_qemu_reads_them(text: str, implied: str, pairs: Pairs) -> None:
    assert parse_pairs(text, implied) == pairs


def test_an_option_has_one_dash_or_two() -> None:
    assert parse_options(["--S", "-m", "64", "disk", "--hda", "-x"]) == [
        Option(0, "S", None),
        Option(1, "m", "64"),
        Option(3, "", "disk"),
        Option(4, "hda", "-x"),
    ]


@pytest.mark.parametrize("arguments", [["-nonsense"], ["-m"]])
def test_what_no_qemu_was_started_with_is_refused(arguments: Sequence[str]) -> None:
    with pytest.raises(UsageError):
        parse_options(arguments)


# Disks


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-hda", "a.img"], [("-hda", "", "a.img", "", False)]),
        (["a.img"], [("", "", "a.img", "", False)]),
        (["-cdrom", "/i.iso"], [("-cdrom", "", "/i.iso", "", True)]),
        (["-drive", "file=a,,b,format=raw,id=x"], [("-drive", "x", "a,b", "raw", False)]),
        (["-drive", "file=file:a,readonly=on"], [("-drive", "", "a", "", True)]),
        (["-drive", "file=a,media=cdrom"], [("-drive", "", "a", "", True)]),
        (["-drive", "if=none,media=cdrom,id=empty,format=raw"], []),
        (["-drive", "file=nbd://h/e,format=raw"], [("-drive", "", None, "raw", False)]),
        (["-drive", "driver=qcow2,file.filename=a"], [("-drive", "", "a", "qcow2", False)]),
        (["-drive", "file.driver=file,file.filename=a"], [("-drive", "", "a", "", False)]),
        (
            ["-blockdev", "qcow2,node-name=n,file.driver=file,file.filename=a"],
            [("-blockdev", "n", "a", "qcow2", False)],
        ),
        (
            ["-blockdev", "file,node-name=n,filename=a,read-only=on"],
            [("-blockdev", "n", "a", "raw", True)],
        ),
        (
            [
                *("-blockdev", '{"driver":"file","filename":"/b","node-name":"p"}'),
                *("-blockdev", '{"driver":"raw","file":"p","node-name":"f","read-only":true}'),
                *("-blockdev", '{"driver":"throttle","throttle-group":"g","file":"f",'
                  '"node-name":"t"}'),
            ],
            [("-blockdev", "f", "/b", "raw", True)],
        ),
        (
            [
                *("-blockdev", '{"driver":"quorum","node-name":"q","vote-threshold":1,"children":'
                  '["x",{"driver":"host_device","node-name":"y","filename":"/dev/y"}]}'),
                *("-blockdev", '{"driver":"file","filename":"/x","node-name":"x"}'),
            ],
            [("-blockdev", "y", "/dev/y", "raw", False), ("-blockdev", "x", "/x", "raw", False)],
        ),
    ],
)  # fmt: skip
def test_the_disks_of_a_line_are_found(
    arguments: list[str], expected: list[tuple[str, str, str | None, str, bool]]
) -> None:
    found = [
        (disk.option, disk.name, disk.path, disk.format, disk.read_only)
        for disk in disks(line(*arguments))
    ]
    assert found == [
        (option, name, None if path is None else FOLDER / path, format_, read_only)
        for option, name, path, format_, read_only in expected
    ]


def test_who_does_a_disk_s_io_is_found() -> None:
    found = disks(
        line(
            *("-drive", "file=a,aio=native,cache=none", "-drive", "file=b"),
            *("-drive", "file.driver=file,file.filename=c,file.aio=io_uring,driver=qcow2"),
            *("-blockdev", '{"driver":"file","filename":"d","aio":"native","node-name":"below"}'),
            *("-blockdev", "driver=raw,file=below,node-name=above"),
        )
    )
    assert [(disk.filename, disk.aio) for disk in found] == [
        ("a", "native"),
        ("b", ""),
        ("c", "io_uring"),
        ("d", "native"),
    ]


def test_the_overlay_is_put_in_the_place_of_an_image() -> None:
    for arguments, expected in [
        (["-hda", "a"], ["-drive", f"index=0,media=disk,file={LAYER},format=qcow2"]),
        (["a"], ["-drive", f"index=0,media=disk,file={LAYER},format=qcow2"]),
        (["-pflash", "a"], ["-drive", f"if=pflash,file={LAYER},format=qcow2"]),
        (
            ["-drive", "file=a,format=raw,if=none,id=d,cache=none,aio=native,discard=unmap"],
            [
                "-drive",
                f"file={LAYER},if=none,id=d,cache=none,aio=native,discard=unmap,format=qcow2",
            ],
        ),
        (
            ["-drive", "file=a,format=qcow2,backing.file.filename=b,lazy-refcounts=on"],
            ["-drive", f"file={LAYER},lazy-refcounts=on,format=qcow2"],
        ),
        (
            ["-blockdev", "driver=qcow2,node-name=n,file.driver=file,file.filename=a,backing=b"],
            ["-blockdev", f"qcow2,node-name=n,file.driver=file,file.filename={LAYER}"],
        ),
        (
            ["-blockdev", "vmdk,node-name=n,file.driver=file,file.filename=a,discard=unmap"],
            [
                "-blockdev",
                f"qcow2,node-name=n,discard=unmap,file.driver=file,file.filename={LAYER}",
            ],
        ),
    ]:
        found = between(restored(*arguments, overlays={"a": LAYER}))
        assert dict([*parse_pairs(found[1], "driver")]) == dict(
            [*parse_pairs(expected[1], "driver")]
        )
        assert found[0] == expected[0]
        assert len(found) == 2


def test_a_file_without_a_format_becomes_qcow2_and_keeps_its_name() -> None:
    node = (
        '{"driver":"host_device","filename":"a","node-name":"n","cache":{"direct":true},'
        '"aio":"native"}'
    )
    _, rewritten = between(restored("-blockdev", node, overlays={"a": LAYER}))
    assert json.loads(rewritten) == {
        "driver": "qcow2",
        "node-name": "n",
        "cache": {"direct": True},
        "file": {"driver": "file", "filename": str(LAYER), "aio": "native"},
    }


def test_what_is_read_only_stays_and_what_is_written_to_needs_a_layer() -> None:
    assert between(restored("-cdrom", "a.iso")) == ("-cdrom", "a.iso")
    with pytest.raises(UsageError, match="no layer of it"):
        restored("-hda", "a")
    with pytest.raises(UsageError, match="no file of this host"):
        restored("-drive", "file=nbd://h/e,format=raw")


# The whole line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-daemonize", "-pidfile", "p", "-loadvm", "x", "-S", "-incoming", "tcp:0:1"], []),
        (["-serial", "stdio"], ["-serial", "unix:/private/serial0,server=on,wait=off"]),
        (["-serial", "mon:pty"], ["-serial", "mon:unix:/private/serial0,server=on,wait=off"]),
        (["-serial", "file:log"], ["-serial", "file:/private/serial0"]),
        (["-serial", "null", "-parallel", "none"], ["-serial", "null", "-parallel", "none"]),
        (["-serial", "vc:80Cx24C"], ["-serial", "vc:80Cx24C"]),
        (["-monitor", "tcp::4,server"], ["-monitor", "unix:/private/monitor0,server=on,wait=off"]),
        (["-gdb", "tcp::1"], ["-gdb", "unix:/private/gdb0,server=on,wait=off"]),
        (["-s"], ["-gdb", "unix:/private/gdb0,server=on,wait=off"]),
        (
            ["-chardev", "socket,id=c,host=0,port=5,server=on,telnet=on,mux=on,reconnect=1"],
            ["-chardev", "socket,id=c,mux=on,path=/private/chardev0,server=on,wait=off"],
        ),
        (
            ["-chardev", "pty,id=c,logfile=l,logappend=on"],
            [
                "-chardev",
                "socket,id=c,logfile=/private/log0,logappend=on,"
                "path=/private/chardev0,server=on,wait=off",
            ],
        ),
        (["-chardev", "file,id=c,path=o"], ["-chardev", "file,id=c,path=/private/file0"]),
        (["-chardev", "null,id=c"], ["-chardev", "null,id=c"]),
        (
            ["-add-fd", "set=1,fd=33", "-chardev", "file,id=c,path=/dev/fdset/1,append=on"],
            ["-chardev", "file,id=c,path=/private/file0,append=on"],
        ),
        (["-D", "log", "-trace", "x,file=t"],
         ["-D", "/private/log0", "-trace", "x,file=/private/trace0"]),
        (["-object", "filter-dump,id=d,netdev=n,file=cap"],
         ["-object", "filter-dump,id=d,netdev=n,file=/private/dump0"]),
        (
            ["-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=/s"],
            ["-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=/private/net0"],
        ),
        (
            ["-object", "memory-backend-file,id=m,size=1G,mem-path=/nowhere/ram,share=on"],
            ["-object", "memory-backend-memfd,id=m,size=1G,share=on"],
        ),
        (["-object", "secret,id=unused,file=/gone"], []),
        (["-netdev", "tap,id=n,ifname=tap0,script=no"],
         ["-netdev", "tap,id=n,ifname=tap0,script=no"]),
    ],
)  # fmt: skip
def test_what_is_the_first_qemus_is_not_taken(arguments: list[str], expected: list[str]) -> None:
    rewritten = restored(*arguments)
    assert list(between(rewritten)) == expected
    places = [str(path) for path in rewritten.channels.values()]
    assert all(any(place in word for word in expected) for place in places)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-vnc", ":1,to=9,password=on,id=x"], ["-vnc", "unix:/private/vnc0,id=x"]),
        (["-display", "vnc=:1"], ["-display", "vnc=unix:/private/vnc0"]),
        (["-display", "gtk,gl=on"], ["-display", "none"]),
        (["-display", "egl-headless"], ["-display", "egl-headless"]),
        (["-spice", "port=5900,password=x,streaming-video=off"],
         ["-spice", "unix=on,addr=/private/spice0,disable-ticketing=on,streaming-video=off"]),
        (["-nographic"], ["-nographic", "-serial", "mon:unix:/private/serial0,server=on,wait=off"]),
        (["-nographic", "-monitor", "none"],
         ["-nographic", "-serial", "unix:/private/serial0,server=on,wait=off",
          "-monitor", "none"]),
        (["-nographic", "-nodefaults"], ["-nographic", "-nodefaults"]),
        (["-nographic", "-serial", "null"], ["-nographic", "-serial", "null"]),
    ],
)  # fmt: skip
def test_the_display_is_out_of_the_way(arguments: list[str], expected: list[str]) -> None:
    assert restored(*arguments).arguments == ("-machine", MACHINE, *expected, *END)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["-machine", MACHINE]),
        (["-M", "pc"], ["-machine", MACHINE]),
        (["-machine", "accel=kvm"], ["-machine", f"{MACHINE},accel=kvm"]),
        (["-machine", "type=q35,usb=off", "-M", "pc,smm=off"],
         ["-machine", f"{MACHINE},usb=off", "-machine", "smm=off"]),
    ],
)  # fmt: skip
def test_the_machine_type_is_the_versioned_one(arguments: list[str], expected: list[str]) -> None:
    assert restored(*arguments).arguments == (*expected, "-display", "none", *END)


FORWARDS = "user,id=n,hostfwd=tcp::2222-:22,hostfwd=tcp:127.0.0.1:80-:80"


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        ({}, FORWARDS),
        ({2222: 2223}, FORWARDS.replace("2222", "2223")),
        (None, "user,id=n"),
    ],
)
def test_ports_are_forwarded_as_they_were_or_others_or_none(
    forward: Mapping[int, int] | None, expected: str
) -> None:
    assert between(restored("-netdev", FORWARDS, forward=forward)) == ("-netdev", expected)
    json_ = '{"type":"user","id":"n","hostfwd":[{"str":"tcp::2222-:22"}]}'
    _, rewritten = between(restored("-netdev", json_, forward=forward))
    rules = [] if forward is None else [{"str": f"tcp::{forward.get(2222, 2222)}-:22"}]
    assert json.loads(rewritten).get("hostfwd", []) == rules


def test_the_lab_s_name_and_monitor_take_the_places_of_others() -> None:
    once = for_restore(
        line("-name", "mine,process=p"),
        disks={},
        machine_type=MACHINE,
        folder=PRIVATE,
        qmp=9,
        name="lab-x",
    )
    assert once.arguments[:2] == ("-name", "lab-x,debug-threads=on")
    again = for_restore(once, disks={}, machine_type=MACHINE, folder=PRIVATE, qmp=9, name="lab-x")
    assert again.arguments == once.arguments


def test_libvirt_s_own_line_is_restored() -> None:
    program, *words = LIBVIRT.read_text().splitlines()
    original = CommandLine(Path(program), tuple(words), Path("/"))
    images = Path("/var/lib/libvirt/images")
    assert [(disk.name, disk.path, disk.format) for disk in disks(original)] == [
        ("libvirt-3-format", images / "debian.qcow2", "qcow2"),
        ("libvirt-2-format", images / "data.raw", "raw"),
    ]
    overlays = {images / "debian.qcow2": LAYER, images / "data.raw": Path("/layers/b.qcow2")}
    rewritten = for_restore(
        original, disks=overlays, machine_type="pc-q35-7.2", folder=PRIVATE, qmp=9
    )
    nodes = {
        node["node-name"]: node
        for option in parse_options(rewritten.arguments)
        if option.name == "blockdev" and (node := json.loads(option.value or ""))
    }
    cache = {"direct": True, "no-flush": False}
    assert nodes == {
        "libvirt-3-storage": {
            "driver": "file",
            "filename": str(LAYER),
            "node-name": "libvirt-3-storage",
            "cache": cache,
            "auto-read-only": True,
            "discard": "unmap",
        },
        "libvirt-3-format": {
            "node-name": "libvirt-3-format",
            "read-only": False,
            "discard": "unmap",
            "cache": cache,
            "driver": "qcow2",
            "file": "libvirt-3-storage",
        },
        "libvirt-2-storage": {
            "driver": "file",
            "filename": "/layers/b.qcow2",
            "node-name": "libvirt-2-storage",
            "auto-read-only": True,
            "discard": "unmap",
        },
        "libvirt-2-format": {
            "node-name": "libvirt-2-format",
            "read-only": False,
            "driver": "qcow2",
            "file": "libvirt-2-storage",
        },
    }
    assert "masterKey0" not in " ".join(rewritten.arguments)
    assert set(rewritten.channels) == {
        "-chardev charmonitor",
        "-chardev charserial0",
        "-chardev charchannel0",
        "-vnc 127.0.0.1:0,audiodev=audio1",
    }

    def devices(line: CommandLine) -> list[str]:
        return [str(o.value) for o in parse_options(line.arguments) if o.name == "device"]

    assert devices(rewritten) == devices(original)
    assert device_ids(rewritten) >= {"virtio-disk0", "sata0-0-0", "net0", "pci.7"}


# Refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-snapshot"], "-snapshot"),
        (["-drive", "file=a,snapshot=on"], "snapshot=on"),
        (["-readconfig", "f"], "-readconfig f"),
        (["-preconfig"], "-preconfig"),
        (["-netdev", "tap,id=n,fd=3"], "tap .id n. stands on a file"),
        (["-netdev", '{"type":"tap","fds":"3:4","id":"n"}'], "fds=3:4"),
        (["-netdev", "tap,id=n,ifname=t,vhostfd=3"], "vhostfd=3"),
        (["-netdev", "stream,id=n,addr.type=fd,addr.str=3"], "addr.type=fd"),
        (["-net", "tap,fd=3"], "-net tap"),
        (["-device", "vhost-vsock-pci,guest-cid=3,vhostfd=4,id=v"], "id v"),
        (["-blockdev", "file,node-name=n,filename=/dev/fdset/2,read-only=on"], "open when QEMU"),
        (["-netdev", "vhost-user,id=n,chardev=c"], "vhost-user"),
        (["-device", "vhost-user-fs-pci,chardev=c,tag=t"], "vhost-user-fs-pci"),
        (["-device", '{"driver":"vfio-pci","host":"0000:01:00.0","id":"h"}'], "vfio-pci .id h."),
        (["-device", "usb-host,vendorid=1"], "usb-host"),
        (["-tpmdev", "emulator,id=t,chardev=c"], "TPM"),
        (["-icount", "shift=1,rr=record,rrfile=x"], "records or replays"),
        (["-set", "drive.d.file=x"], "-set drive.d.file=x"),
        (["-drive", "file=a,format=raw,offset=512"], "part of a file"),
        (["-blockdev", '{"driver":"raw","node-name":"n","size":5,"file":{"driver":"file",'
          '"filename":"a"}}'], "part of a file"),
        (["-drive", "file=a,format=qcow2,encrypt.key-secret=s"], "encrypted"),
        (["-blockdev", "luks,node-name=n,key-secret=s,file.driver=file,file.filename=a"],
         "encrypted"),
        (["-object", "secret,id=s,file=/gone/s", "-drive", "file=/x,readonly=on,key-secret=s"],
         "/gone/s, which is gone"),
    ],
)  # fmt: skip
def test_what_cannot_be_restored_is_refused_with_a_remedy(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        restored(*arguments, overlays={"a": LAYER})
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_a_network_with_open_files_is_restored_on_another() -> None:
    tap = ("-netdev", '{"type":"tap","fd":"3","vhost":true,"vhostfd":"4","id":"hostnet0"}')
    with pytest.raises(UsageError, match="names its interface"):
        require_restorable(line(*tap))
    other = {"hostnet0": "tap,ifname=t1,script=no"}
    require_restorable(line(*tap), networks=other)
    assert between(restored(*tap, networks=other)) == (
        "-netdev",
        "tap,ifname=t1,script=no,id=hostnet0",
    )


def test_a_folder_whose_name_is_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(UsageError, match="too long for a socket"):
        for_restore(
            line("-serial", "pty"),
            disks={},
            machine_type=MACHINE,
            folder=Path("/" + "x" * 100),
            qmp=9,
        )


# Processes


@contextlib.contextmanager
def process(program: Path, *arguments: str, cwd: Path, **env: str) -> Iterator[int]:
    started = subprocess.Popen([program, *arguments], cwd=cwd, env=env, stdin=subprocess.PIPE)
    try:
        # The kernel lays the arguments out a moment after it has replaced the program.
        while not Path(f"/proc/{started.pid}/cmdline").read_bytes():
            assert started.poll() is None
        yield started.pid
    finally:
        started.communicate()


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    """A program of one's own, which runs until its input ends."""
    return Path(shutil.copy(os.path.realpath(shutil.which("cat") or ""), tmp_path / "cat"))


def test_a_line_is_read_as_it_was_given(cat: Path, tmp_path: Path) -> None:
    words = ("-", "a,b", "", "ü x")
    # The empty file name is an error that it reports and goes on from.
    with process(cat, *words, cwd=tmp_path) as pid:
        assert read_command_line(pid) == CommandLine(cat, words, tmp_path)


def test_who_went_into_the_background_was_started_where_its_environment_says(
    cat: Path, tmp_path: Path
) -> None:
    with process(cat, "--", "-", "-daemonize", cwd=Path("/"), PWD=str(tmp_path)) as pid:
        assert read_command_line(pid).folder == tmp_path


def test_a_program_that_was_deleted_is_refused_and_one_that_was_replaced_is_told(
    cat: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with process(cat, cwd=tmp_path) as pid:
        cat.unlink()
        with pytest.raises(HostError, match="was deleted since"):
            read_command_line(pid)
        cat.touch()
        assert read_command_line(pid).program == cat
        assert "was replaced since" in caplog.text


def test_a_process_that_is_gone_is_refused() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    with pytest.raises(UsageError, match="there is no process"):
        read_command_line(ended.pid)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every process")
def test_another_user_s_process_is_refused() -> None:
    with pytest.raises(HostError, match="another user's"):
        read_command_line(1)
