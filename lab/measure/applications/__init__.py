"""What those feel who ask a server in the guest for work, while a snapshot is taken."""
