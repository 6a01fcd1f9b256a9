"""The Linux guest: kernel, initramfs and its one program."""
