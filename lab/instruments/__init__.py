"""What is measured besides pause and duration, and with what: one module per instrument."""

from lab.instruments.faultlog import FaultLogInstrument
from lab.instruments.hostmemory import HostMemoryInstrument
from lab.instruments.hugepages import HugePagesInstrument
from lab.instruments.instrument import Instrument
from lab.instruments.knownfaults import KnownFaultsInstrument
from lab.instruments.phases import PhasesInstrument
from lab.instruments.progress import ProgressInstrument
from lab.instruments.slowwrites import SlowWritesInstrument
from lab.instruments.threads import ThreadsInstrument
from lab.instruments.writelatency import WriteLatencyInstrument

INSTRUMENTS: tuple[type[Instrument], ...] = (
    ProgressInstrument,
    FaultLogInstrument,
    KnownFaultsInstrument,
    PhasesInstrument,
    WriteLatencyInstrument,
    SlowWritesInstrument,
    # After the durations, which are the shorter reading.
    ThreadsInstrument,
    # What it asks of the kernel may delay page faults.
    HostMemoryInstrument,
    # It changes the guest.
    HugePagesInstrument,
)
"""All of them, in the order in which they read at each moment.  It is a measured decision: figures
before and after another order do not compare.  Their tables and metrics come in it, too."""
