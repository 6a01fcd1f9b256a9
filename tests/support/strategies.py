"""What tests draw: parts of scenarios."""

import typing
from typing import Any

from hypothesis import strategies as st

from lab.scenario.guests import GUEST_LIMITS
from lab.scenario.instruments import Instruments
from lab.scenario.machine import Machine
from lab.scenario.storage import Storage
from lab.scenario.workload import Workload, WorkloadKind

disks: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"disk": st.sampled_from(["ide", "virtio", "scsi"])},
        optional={"disk_cache": st.sampled_from(["writeback", "none"])},
    ),
    st.just({"disk": "virtio", "disk_cache": "none", "disk_aio": "native", "disk_iothread": True}),
)
machines = st.builds(
    lambda disk, **others: Machine(**disk, **others),
    disks,
    net=st.booleans(),
    vnc=st.booleans(),
    balloon=st.just(True),
    balloon_reporting=st.booleans(),
    flash=st.booleans(),
    undriven=st.booleans(),
    ram_mib=st.integers(GUEST_LIMITS["linux"].min_ram_mib, 65536),
    vcpus=st.integers(1, 8),
    accel=st.sampled_from(["tcg", "kvm"]),
    ram_kind=st.sampled_from(["anon", "memfd", "memfd-private", "file", "file-private"]),
    thp=st.none() | st.booleans(),
    fault_around_pages=st.sampled_from([0, 1, 16, 64]),
    chunk_kib=st.sampled_from([256, 2048, 8192]),
    extra_args=st.lists(st.text(max_size=8), max_size=3).map(tuple),
)
workloads = st.builds(
    Workload,
    kind=st.sampled_from(typing.get_args(WorkloadKind)),
    wss_mib=st.integers(1, 16),
    threads=st.integers(1, 8),
    seed=st.integers(0, 2**63 - 1),
) | st.builds(Workload, wss_mib=st.integers(1, 16), rate_ops_per_s=st.integers(1, 1_000_000_000))
instruments = st.builds(
    Instruments,
    log_faults=st.booleans(),
    time_threads=st.booleans(),
    read_host_memory=st.booleans(),
    sample_interval_us=st.integers(100, 100_000),
)
storages = st.builds(Storage, storage_mib_per_s=st.integers(0, 10_000))
