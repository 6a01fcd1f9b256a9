"""Live memory snapshots of virtual machines, and what they cost the guest.

The verbs are awaitable; see the notebooks for a tour.  What is public is in `__init__.pyi`, and is
loaded when it is first used, so that ``lab --help`` and ``import lab`` stay quick.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
