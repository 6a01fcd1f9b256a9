"""The Linux guest: kernel, initramfs, its one program and the protocol it speaks with the host."""
