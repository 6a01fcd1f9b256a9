# The devices the lab's QEMU is built with: the machines pc and q35 with their disks, a VGA screen
# and virtio; what stops a guest (a panic, a watchdog); and what writes to guest RAM from outside
# of QEMU, to be refused.
# A short list builds in a third of the time of the default one.
CONFIG_I440FX=y
CONFIG_Q35=y
CONFIG_VGA_PCI=y
CONFIG_E1000_PCI=y
CONFIG_ISA_DEBUG=y
CONFIG_IVSHMEM_DEVICE=y
CONFIG_PVPANIC_ISA=y
CONFIG_VHOST_USER_BLK=y
CONFIG_VHOST_USER_FS=y
CONFIG_VHOST_USER_SCSI=y
CONFIG_VHOST_USER_VSOCK=y
CONFIG_VHOST_VDPA_DEV=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_BALLOON=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_NET=y
CONFIG_VIRTIO_RNG=y
CONFIG_VIRTIO_SCSI=y
CONFIG_VIRTIO_SERIAL=y
CONFIG_WDT_IB6300ESB=y
