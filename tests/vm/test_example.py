"""What the package promises in its first example, as a notebook's reader would type it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

import lab

pytestmark = [pytest.mark.vm, pytest.mark.platforms("tcg")]


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    plt.switch_backend("agg")
    yield
    plt.close("all")


async def test_two_snapshots_of_one_guest_are_drawn_and_one_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with lab.boot(lab.Machine(ram_mib=256), lab.Workload("random", wss_mib=48)) as vm:
        assert f"process {vm.pid}" in vm._repr_html_()
        live = await vm.snapshot("live.snap", method="live")
        base = await vm.snapshot("base.snap", method="migrate-to-file")
    assert "<td>ended</td>" in vm._repr_html_()
    latency = lab.plot_fault_latency(live.df_faults())
    assert np.asarray(latency.get_lines()[0].get_ydata())[-1] == 1
    speed = lab.plot_slowdown(live.df_progress(), base.df_progress())
    assert [ax.texts[0].get_text() for ax in speed] == ["live", "migrate-to-file"]
    assert "live" in live._repr_html_()
    async with lab.restore("live.snap") as again:
        assert (await again.progress_page()).nonce == again.ready.nonce
