"""Whether a snapshot's memory and disks are of one instant, shown by a guest that stamps both."""
