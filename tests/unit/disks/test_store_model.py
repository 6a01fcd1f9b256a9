"""The rules of the store against a model of them, in any order that anybody can think of."""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from lab.disks.chain import Layer, read_chain
from lab.disks.store import HeldLayer, Store
from lab.errors import HostError

PLACES = ("a/one", "a/two", "b/one")


class StoreMachine(RuleBasedStateMachine):
    """Layers, who holds them, and snapshots that come, move and go.

    The model: `below` of every layer that was made and not removed, `held` counts, `named` are the
    references, `at` says which mark the snapshot at a path has.
    """

    qemu_img: Path
    layers = Bundle("layers")
    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.root = Path(self._folder.name).resolve()
        self.loop = asyncio.Runner()
        self.store = Store(self.root / "layers")
        self.below: dict[Path, Path | None] = {}
        self.held: dict[Path, int] = {}
        self.named: dict[Path, set[tuple[Path, str]]] = {}
        self.at: dict[Path, str] = {}
        self.closed: list[HeldLayer] = []
        self.marks = 0

    def teardown(self) -> None:
        for held in self.closed:
            held.release()
        self.loop.close()
        self._folder.cleanup()

    def call(self, work: Any) -> Any:
        return self.loop.run(work)

    @initialize(target=layers)
    def user_has_a_disk(self) -> Layer:
        for folder in ("a", "b"):
            (self.root / folder).mkdir()
        disk = self.root / "disk.raw"
        disk.write_bytes(bytes(4096))
        (layer,) = self.call(read_chain(self.qemu_img, disk, format="raw"))
        self.disk = layer
        return layer  # type: ignore[no-any-return]

    def gone(self, layer: Layer) -> bool:
        return layer != self.disk and layer.path not in self.below

    @rule(target=layers, base=layers)
    def new_layer(self, base: Layer) -> Any:
        if self.gone(base):
            with pytest.raises(HostError, match="removed"):
                self.call(self.store.new_layer(self.qemu_img, base))
            return multiple()
        return self.made(base)

    def made(self, base: Layer) -> Layer:
        held = self.call(self.store.new_layer(self.qemu_img, base))
        self.closed.append(held)
        self.below[held.layer.path] = base.path if base != self.disk else None
        self.held[held.layer.path] = 1
        self.named[held.layer.path] = set()
        return held.layer  # type: ignore[no-any-return]

    @rule(target=layers, index=st.integers(0, 99))
    def guest_goes_on(self, index: int) -> Any:
        """As at a snapshot: what was written to is frozen, and let go of."""
        if not self.closed:
            return multiple()
        below = self.closed.pop(index % len(self.closed))
        made = self.made(below.layer)
        below.release()
        self.held[below.layer.path] -= 1
        return made

    @rule(layer=layers)
    def hold(self, layer: Layer) -> None:
        if layer == self.disk:
            return
        if self.gone(layer):
            with pytest.raises(HostError, match="removed"):
                self.call(self.store.hold(layer))
            return
        self.closed.append(self.call(self.store.hold(layer)))
        self.held[layer.path] += 1

    @rule(index=st.integers(0, 99), discard=st.booleans())
    def let_go(self, index: int, discard: bool) -> None:
        if not self.closed:
            return
        held = self.closed.pop(index % len(self.closed))
        path = held.layer.path
        self.held[path] -= 1
        if discard:
            held.discard()
            if not self.held[path] and not self.named[path] and path not in self.below.values():
                self.forget_layer(path)
        else:
            held.release()

    def forget_layer(self, path: Path) -> None:
        for part in (self.below, self.held, self.named):
            del part[path]

    @rule(index=st.integers(0, 99), place=st.sampled_from(PLACES), publishes=st.booleans())
    def snapshot(self, index: int, place: str, publishes: bool) -> None:
        """Whoever is killed before it publishes leaves a reference to nothing."""
        if not self.closed:
            return
        path = self.closed[index % len(self.closed)].layer.path
        self.marks += 1
        mark = f"{self.marks:032x}"
        self.store.keep_for(path, self.root / place, mark)
        self.named[path].add((self.root / place, mark))
        if publishes:
            self.sidecar(self.root / place).write_text(json.dumps({"mark": mark}))
            self.at[self.root / place] = mark

    @staticmethod
    def sidecar(snapshot: Path) -> Path:
        return snapshot.with_name(snapshot.name + ".json")

    @rule(place=st.sampled_from(PLACES))
    def user_deletes(self, place: str) -> None:
        self.sidecar(self.root / place).unlink(missing_ok=True)
        self.at.pop(self.root / place, None)

    @rule(old=st.sampled_from(PLACES), new=st.sampled_from(PLACES), restored=st.booleans())
    def user_moves(self, old: str, new: str, restored: bool) -> None:
        source, target = self.root / old, self.root / new
        if source not in self.at or source == target:
            return
        self.sidecar(source).replace(self.sidecar(target))
        mark = self.at[target] = self.at.pop(source)
        if restored:
            for path, named in self.named.items():
                if mark in {mark for _, mark in named}:
                    self.store.keep_for(path, target, mark)
                    named.add((target, mark))

    @rule(place=st.sampled_from(("a", "b", *PLACES)))
    def forget(self, place: str) -> None:
        dropped = 0
        for named in self.named.values():
            for reference in list(named):
                at, mark = reference
                if at.is_relative_to(self.root / place) and self.at.get(at) != mark:
                    named.remove(reference)
                    dropped += 1
        assert self.call(self.store.forget(self.root / place)) == dropped

    @rule(gone=st.booleans())
    def collect(self, gone: bool) -> None:
        needed = set()
        for path in self.below:
            named = self.named[path]
            if gone:
                named = {(at, mark) for at, mark in named if self.at.get(at) == mark}
            step: Path | None = path if self.held[path] or named else None
            while step is not None:
                needed.add(step)
                step = self.below[step]
        unneeded = set(self.below) - needed

        survey = self.call(self.store.survey(self.qemu_img, gone=gone))
        assert {kept.path for kept in survey if kept.needed} == needed
        removed = self.call(self.store.collect(self.qemu_img, gone=gone))

        assert set(removed) == unneeded
        for path in unneeded:
            self.forget_layer(path)

    @invariant()
    def what_is_there_is_what_should_be(self) -> None:
        assert set(self.store.folder.glob("*.qcow2")) == set(self.below)
        assert {path.with_suffix(".qcow2") for path in self.store.folder.glob("*-*")} == set(
            self.below
        )


def test_the_store_keeps_what_its_rules_say(qemu_img: Path) -> None:
    class Machine(StoreMachine):
        pass

    Machine.qemu_img = qemu_img
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
