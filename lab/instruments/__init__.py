"""What is measured, and with what: phases, page faults, the guest's progress."""
