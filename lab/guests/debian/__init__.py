"""The lab's Debian: a disk with services that people run, built here and booted as anybody's is."""
