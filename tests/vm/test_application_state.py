"""What applications find after a restore: all of before the instant, and nothing of after it."""

import asyncio
import subprocess
from pathlib import Path

import pytest

import lab
from lab.disks.commit import export
from lab.errors import HostError
from lab.guests.debian.build import ensure_debian
from lab.loads.load import redis_load
from lab.loads.pgbench import find_pgbench, initialise, pgbench_load
from lab.qemu.build import find_qemu
from lab.scenario.methods import Variant
from lab.snapshot.image import read_sidecar

pytestmark = [
    pytest.mark.vm,
    pytest.mark.thorough,
    pytest.mark.platforms("tcg"),
    # The first of these tests downloads and builds Debian.
    pytest.mark.timeout(3600),
]

CLIENTS = 10
READY_S = 600.0
"""Far more than it takes: a guest under TCG on a host that is busy with other things."""

SQLITE_WRITER = """
sqlite3 /root/t.db 'pragma journal_mode=wal; create table t(a integer primary key)' >/dev/null
nohup sh -c 'while :; do
    sqlite3 /root/t.db "insert into t default values"
done' >/dev/null 2>&1 &
"""

SUMS = (
    "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from "
    "pgbench_branches), (select sum(tbalance) from pgbench_tellers), (select coalesce(sum(delta), "
    "0) from pgbench_history)"
)
"""Each transaction of pgbench adds one number to one row of each table."""


@pytest.fixture(autouse=True)
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_LAYERS_DIR", str(tmp_path / "layers"))
    try:
        asyncio.run(ensure_debian())
        find_pgbench()
    except HostError as error:
        pytest.skip(f"an application cannot be loaded here: {error}")


@pytest.mark.parametrize(
    ("method", "binary"), [("live", "patched"), ("background", "unpatched")], ids=str
)
async def test_applications_have_all_of_before_the_instant_and_nothing_of_after(
    tmp_path: Path, method: str, binary: Variant
) -> None:
    machine = lab.Machine(
        image=("debian",), ram_mib=1024, vcpus=2, forward=("0:22", "0:6379", "0:5432")
    )
    snap = tmp_path / "a.snap"
    async with lab.boot(machine, binary=binary) as vm:
        await vm.shell("until redis-cli ping && pg_isready; do sleep 1; done", timeout_s=READY_S)
        await initialise(1, port=vm.ports[5432])
        await vm.shell(SQLITE_WRITER, timeout_s=READY_S)
        async with (
            redis_load(port=vm.ports[6379], clients=CLIENTS, sequence=1, ready_s=READY_S) as load,
            pgbench_load(port=vm.ports[5432], clients=2) as transactions,
        ):
            await load.wait_requests(50 * CLIENTS, READY_S)
            await transactions.wait_requests(10, READY_S)
            snapshot = await vm.snapshot(snap, method)
            await load.wait_requests(load.completed + 10 * CLIENTS, READY_S)
        requests = load.df()
    assert snapshot.stop_ns is not None
    assert snapshot.resume_ns is not None

    async with lab.restore(snap) as again:
        keys = " ".join(f"lab:{client}" for client in range(CLIENTS))
        values = (await again.shell(f"redis-cli mget {keys}", timeout_s=READY_S)).split()
        for client, value in enumerate(map(int, values)):
            own = requests[requests["client"] == client]
            acknowledged = own[own["done_ns"].notna() & (own["done_ns"] < snapshot.stop_ns)]
            begun = own[own["sent_ns"] <= snapshot.resume_ns]
            assert acknowledged["number"].max() <= value <= begun["number"].max()
        sums = await again.shell(
            f'runuser -u postgres -- psql -At -d lab -c "{SUMS}"', timeout_s=READY_S
        )
        assert len(set(sums.strip().split("|"))) == 1, sums
        check = "runuser -u postgres -- /usr/lib/postgresql/*/bin/pg_amcheck --install-missing lab"
        await again.shell(check, timeout_s=READY_S)
        sqlite = await again.shell(
            'sqlite3 -cmd ".timeout 60000" /root/t.db "pragma integrity_check"', timeout_s=READY_S
        )
        assert sqlite.strip().splitlines()[-1] == "ok"

    # As after a power cut at that instant: the journal is replayed, and nothing else is wrong.
    [disk] = read_sidecar(snap).disks
    image = await export(
        find_qemu("patched").qemu_img, Path(disk.layer), tmp_path / "disk.raw", format="raw"
    )
    replayed = await asyncio.to_thread(fsck, "-p", image)
    assert replayed.returncode in (0, 1), replayed.stdout
    checked = await asyncio.to_thread(fsck, "-fn", image)
    assert checked.returncode == 0, checked.stdout


def fsck(how: str, image: Path) -> "subprocess.CompletedProcess[str]":
    path = "/usr/sbin:/sbin:/usr/bin:/bin"
    return subprocess.run(
        ["e2fsck", how, image], capture_output=True, text=True, env={"PATH": path}, timeout=600
    )
