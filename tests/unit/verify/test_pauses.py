"""What disks add to the pause is the difference within pairs."""

from lab.verify.stamps.pauses import Pair, added


def pair(disks: int, number: int, with_ms: float, without_ms: float, switch_ms: float) -> Pair:
    return Pair(
        disks=disks,
        number=number,
        frozen_first=bool(number % 2),
        with_ms=with_ms,
        without_ms=without_ms,
        switch_ms=switch_ms,
    )


def test_what_disks_add_is_the_median_of_differences_by_their_number() -> None:
    # The host becomes slower from pair to pair, which the difference within a pair does not see.
    four = [pair(4, n, 10.0 * n + 0.5, 10.0 * n, 0.25) for n in range(1, 8)]
    one = [pair(1, n, 2.0, 2.0 + extra, 0.1) for n, extra in enumerate((0.0, -0.2, 0.1), start=1)]

    first, second = added([*four, *one])

    assert (first.disks, first.n, second.disks, second.n) == (1, 3, 4, 7)
    assert second.added_ms == 0.5
    assert (second.interval.low, second.interval.high) == (0.5, 0.5)
    assert (second.with_ms, second.without_ms, second.switch_ms) == (40.5, 40.0, 0.25)
    assert abs(first.added_ms) < 1e-9
    assert (round(first.interval.low, 9), round(first.interval.high, 9)) == (-0.1, 0.2)


def test_nothing_is_said_of_nothing() -> None:
    assert added([]) == []
