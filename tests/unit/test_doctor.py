from pathlib import Path

import msgspec
import pytest

import lab.__main__ as command_line
from lab import doctor
from lab.cli.doctor import table
from lab.doctor import Check, _check_kernel, _check_ksm, kernel_version, run_checks
from lab.errors import HostError
from lab.host import needs
from lab.host.debian import debian_packages
from lab.host.info import HostInfo, selected
from lab.host.needs import available_memory_mib, require_memory, require_uffd
from lab.host.probe import UFFD_FEATURES, UffdProbe, feature_names, probe_uffd
from lab.host.running import is_lab_command


def test_host_info_survives_json() -> None:
    info = HostInfo.collect()

    assert msgspec.json.decode(msgspec.json.encode(info), type=HostInfo) == info


def test_host_info_describes_this_host_without_naming_it() -> None:
    info = HostInfo.collect()

    assert info.cpu_count >= 1
    assert info.memory_bytes > 0
    assert info.libraries["qemu.qmp"] == "0.0.6"
    assert "hostname" not in msgspec.to_builtins(info)


@pytest.mark.parametrize(
    ("line", "choice"),
    [
        ("always [madvise] never\n", "madvise"),
        ("[never]", "never"),
        ("performance\n", "performance"),
    ],
)
def test_the_selected_setting_is_read(line: str, choice: str) -> None:
    assert selected(line) == choice


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.1.0-18-cloud-amd64", (6, 1)),
        ("5.15.0", (5, 15)),
        ("6.12+deb13", (6, 12)),
        ("odd", (0, 0)),
    ],
)
def test_kernel_releases_are_understood(release: str, version: tuple[int, int]) -> None:
    assert kernel_version(release) == version


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["qemu", "-name", "lab-0a1b2c3d-1111-2222", "-m", "1G"], "lab-0a1b2c3d-1111-2222"),
        (["qemu", "-name", "guest=lab-0a1b2c3d"], "guest=lab-0a1b2c3d"),
        (["qemu", "-name", "lab-0a1b2c3d,debug-threads=on"], "lab-0a1b2c3d"),
        (["qemu", "-name", "laboratory"], ""),
        (["qemu", "-name"], ""),
        (["vi", "lab-0a1b2c3d"], ""),
        ([], ""),
    ],
)
def test_only_the_labs_guests_carry_the_marker(command: list[str], name: str) -> None:
    assert is_lab_command(command) == name


def test_feature_bits_have_names() -> None:
    assert feature_names(0) == frozenset()
    assert feature_names(1 | 1 << 13 | 1 << 40) == {"wp", "wp-unpopulated"}
    assert len(set(UFFD_FEATURES.values())) == len(UFFD_FEATURES)


def test_the_probe_reports_access_or_a_problem() -> None:
    probe = probe_uffd()

    assert probe.usable or probe.problem


def use_probe(monkeypatch: pytest.MonkeyPatch, probe: UffdProbe) -> None:
    monkeypatch.setattr(needs, "probe_uffd", lambda: probe)


def test_no_permission_for_userfaultfd_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    use_probe(monkeypatch, UffdProbe(access="user-mode-only", problem="Operation not permitted"))
    with pytest.raises(HostError, match=r"not permitted; run as root.*unprivileged_userfaultfd"):
        require_uffd()


def test_a_kernel_without_userfaultfd_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    use_probe(monkeypatch, UffdProbe(access="none", problem="Function not implemented"))
    with pytest.raises(HostError, match="CONFIG_USERFAULTFD"):
        require_uffd()


def test_a_kernel_without_write_protection_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_probe(monkeypatch, UffdProbe(access="device", features=frozenset({"sigbus"})))
    with pytest.raises(HostError, match=r"no wp; run on Linux 6\.4"):
        require_uffd()


def test_too_little_memory_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    available_mib = available_memory_mib()
    require_memory(1, "guests")
    with pytest.raises(
        HostError,
        match=r"guests need \d+ MiB of memory and \d+ MiB are available of the \d+ MiB of .*; ",
    ):
        require_memory(available_mib * 4, "guests")


def test_the_packages_to_check_are_those_the_set_up_installs() -> None:
    packages = debian_packages()

    assert "qemu-system-data" in packages
    assert len(set(packages)) == len(packages)
    assert all(name.strip() == name and " " not in name for name in packages)


def test_every_check_that_is_not_ok_has_a_remedy_or_a_detail() -> None:
    checks = run_checks()

    assert len({check.name for check in checks}) == len(checks)
    assert all(check.detail for check in checks)
    assert all(check.remedy for check in checks if check.status == "fail")


def test_doctor_exits_with_2_when_a_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = Check(name="userfaultfd", status="fail", detail="no", remedy="be root")
    monkeypatch.setattr(doctor, "run_checks", lambda: [failed])

    assert command_line.main(["doctor"]) == 2
    assert "-> be root" in capsys.readouterr().out


def test_the_table_puts_each_remedy_below_its_check() -> None:
    checks = [
        Check(name="a", status="ok", detail="fine"),
        Check(name="longer", status="warn", detail="meh", remedy="mend"),
    ]

    assert table(checks).splitlines() == [
        "ok    a       fine",
        "warn  longer  meh",
        "              -> mend",
    ]


@pytest.mark.parametrize(("runs", "all_of_it"), [(False, False), (True, False), (False, True)])
def test_merging_of_equal_pages_is_named_with_what_it_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: bool, all_of_it: bool
) -> None:
    """Field report F2."""
    monkeypatch.setattr(doctor, "KSM", tmp_path)
    monkeypatch.setattr(doctor, "ksm_runs", lambda: runs)
    monkeypatch.setattr(doctor, "merges_everything", lambda: all_of_it)
    (check,) = _check_ksm()
    if not runs and not all_of_it:
        assert check.status == "ok"
        return
    assert check.status == "warn"
    assert "write protection" in check.detail
    assert "mem-merge=off" in check.remedy


@pytest.mark.parametrize(
    ("release", "status"),
    [("6.11.0", "ok"), ("6.12.1", "warn"), ("6.17.3-x", "warn"), ("6.18.0", "ok"), ("7.0", "ok")],
)
def test_kernels_that_lose_protection_when_they_split_huge_pages_are_named(
    monkeypatch: pytest.MonkeyPatch, release: str, status: str
) -> None:
    monkeypatch.setattr("platform.release", lambda: release)
    (check,) = _check_kernel()
    assert check.status == status
    assert status == "ok" or "uffd-wp bit loss" in check.remedy
