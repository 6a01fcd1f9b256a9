"""What runs in a machine, and how it talks with the host."""
