# The devices the lab's QEMU is built with: a pc machine with an IDE disk, a VGA screen and virtio.
# A short list builds in a third of the time of the default one.
CONFIG_I440FX=y
CONFIG_VGA_PCI=y
CONFIG_E1000_PCI=y
CONFIG_ISA_DEBUG=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_BALLOON=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_NET=y
CONFIG_VIRTIO_RNG=y
CONFIG_VIRTIO_SCSI=y
CONFIG_VIRTIO_SERIAL=y
