#!/bin/sh
# Turns the packages that mmdebstrap has unpacked into the lab's Debian: sh setup.sh TREE OUT
#
# mmdebstrap runs it as root outside of the tree, which may be root of a user namespace only. It
# takes the kernel and its initrd out of the tree into OUT, where the public key `key.pub` lies.
# Under TCG a guest boots many times slower than a real one, so what no experiment needs does not
# start.

set -eu
tree=$1
out=$2

say() { printf 'I: %s\n' "$*"; }
inside() { chroot "$tree" "$@"; }
# put FILE < CONTENT: write a file of the tree, and the folders above it.
put() {
    mkdir -p "$tree$(dirname "$1")"
    cat >"$tree$1"
}

# --- Of no machine but its own -----------------------------------------------------------------

say "naming it"
echo lab-debian | put /etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 lab-debian\n::1 localhost\n' | put /etc/hosts
echo 'nameserver 10.0.2.3' | put /etc/resolv.conf # of QEMU's user network
od -An -N16 -tx1 /dev/urandom | tr -d ' \n' | put /etc/machine-id
echo >>"$tree/etc/machine-id"
mkdir -p "$tree/var/lib/dbus"
ln -sf /etc/machine-id "$tree/var/lib/dbus/machine-id"
put /etc/apt/sources.list <<'END'
# Yours to fill, with an archive of Debian's near you
END
rm -f "$tree"/etc/apt/sources.list.d/* "$tree"/etc/apt/apt.conf.d/99mmdebstrap
sed -i '/^force-unsafe-io$/d' "$tree/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
echo 'LABEL=lab-debian / ext4 defaults 0 0' | put /etc/fstab

# --- Network: DHCP on whatever card there is ----------------------------------------------------

put /etc/systemd/network/80-lab.network <<'END'
[Match]
Type=ether

[Network]
DHCP=ipv4
LinkLocalAddressing=no
IPv6AcceptRA=no
END
# A card that is renamed, or told of again, while systemd-networkd 252 configures it is left without
# an address for good (systemd issue 24201; one boot in five on a busy host). So it keeps its name,
# and is configured when all that is to be told of it has been told.
ln -s /dev/null "$tree/etc/systemd/network/99-default.link"
put /etc/systemd/system/systemd-networkd.service.d/lab.conf <<'END'
[Unit]
Wants=systemd-udev-settle.service
After=systemd-udev-settle.service
END
inside systemctl -q enable systemd-networkd.service
inside systemctl -q disable systemd-networkd-wait-online.service

# --- Login: root on the serial console, and by the key ------------------------------------------

put /etc/systemd/system/serial-getty@ttyS0.service.d/lab.conf <<'END'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,57600,38400,9600 - $TERM
END
inside systemctl -q enable serial-getty@ttyS0.service
install -d -m 700 "$tree/root/.ssh"
install -m 600 "$out/key.pub" "$tree/root/.ssh/authorized_keys"
put /etc/ssh/sshd_config.d/lab.conf <<'END'
PermitRootLogin prohibit-password
PasswordAuthentication no
PrintMotd no
PrintLastLog no
END
# Its check of its own configuration takes as long as its start.
put /etc/systemd/system/ssh.service.d/lab.conf <<'END'
[Service]
ExecStartPre=
END
touch "$tree/root/.hushlogin"
echo 'set enable-bracketed-paste off' | put /root/.inputrc
rm -f "$tree"/etc/ssh/ssh_host_*
inside ssh-keygen -q -t ed25519 -N '' -C root@lab-debian -f /etc/ssh/ssh_host_ed25519_key

# --- Redis: in memory only, until an experiment says otherwise ----------------------------------

say "setting up Redis and PostgreSQL"
cat >>"$tree/etc/redis/redis.conf" <<'END'

# The lab's: only the host's loopback reaches a guest on QEMU's user network.
bind * -::*
protected-mode no
save ""
appendonly no
END
# Else BGSAVE is refused where the set is larger than what is free.
echo 'vm.overcommit_memory = 1' | put /etc/sysctl.d/60-lab.conf

# --- PostgreSQL: the cluster is there, with a role and a database -------------------------------

cluster=$(cd "$tree/etc/postgresql" && echo */main)
version=${cluster%/main}
# Debian lets only the local user in; the user network's hosts are in the card's subnet.
echo 'host all lab samenet trust' >>"$tree/etc/postgresql/$cluster/pg_hba.conf"
put "/etc/postgresql/$cluster/conf.d/lab.conf" <<'END'
listen_addresses = '*'
ssl = off
END
# Debian starts the server by a script in Perl, which takes seconds under TCG.
put "/etc/systemd/system/postgresql@$version-main.service.d/lab.conf" <<END
[Service]
Type=notify
User=postgres
ExecStart=
ExecStart=/usr/lib/postgresql/$version/bin/postgres -D /var/lib/postgresql/$cluster -c config_file=/etc/postgresql/$cluster/postgresql.conf
ExecStop=
ExecReload=
ExecReload=/bin/kill -HUP \$MAINPID
PIDFile=
KillMode=mixed
KillSignal=SIGINT
END
# A server for these commands, which listens to nobody.
printf '%s\n' 'CREATE ROLE lab SUPERUSER LOGIN' 'CREATE DATABASE lab OWNER lab' |
    inside setpriv --reuid postgres --regid postgres --init-groups \
        "/usr/lib/postgresql/$version/bin/postgres" --single \
        -D "/var/lib/postgresql/$cluster" \
        -c "config_file=/etc/postgresql/$cluster/postgresql.conf" \
        -c dynamic_shared_memory_type=mmap postgres >/dev/null

# --- What starts, and what does not --------------------------------------------------------------

say "leaving out what no experiment needs"
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer logrotate.timer man-db.timer systemd-tmpfiles-clean.timer \
    systemd-pstore.service systemd-random-seed.service systemd-network-generator.service \
    systemd-journal-flush.service systemd-update-utmp.service systemd-update-utmp-runlevel.service \
    systemd-binfmt.service proc-sys-fs-binfmt_misc.automount modprobe@.service dev-mqueue.mount \
    sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
    sys-fs-fuse-connections.mount getty@tty1.service; do
    ln -sf /dev/null "$tree/etc/systemd/system/$unit"
done
# Loaded for what the processor can, and used by nobody here.
printf 'blacklist %s\n' kvm_amd kvm_intel aesni_intel ghash_clmulni_intel sha512_ssse3 sha256_ssse3 \
    sha1_ssse3 | put /etc/modprobe.d/lab.conf
inside systemctl -q enable redis-server.service postgresql.service ssh.service
inside systemctl -q set-default multi-user.target
# The journal of a run is in memory, so that nothing but the application writes to the disk.
printf '[Journal]\nStorage=volatile\n' | put /etc/systemd/journald.conf.d/lab.conf

# --- The initrd: the drivers of QEMU's disks ------------------------------------------------------

say "making the initrd"
release=$(ls "$tree/lib/modules")
sed -i 's/^MODULES=.*/MODULES=list/; s/^COMPRESS=.*/COMPRESS=zstd/' \
    "$tree/etc/initramfs-tools/initramfs.conf"
echo 'RESUME=none' | put /etc/initramfs-tools/conf.d/lab
for module in virtio_pci virtio_blk virtio_scsi sd_mod ata_piix ata_generic ahci nvme ext4; do
    # Those that the kernel has, as a module or built in.
    if inside modinfo -k "$release" "$module" >/dev/null 2>&1; then echo "$module"; fi
done | tee "$out/drivers" | put /etc/initramfs-tools/modules
inside update-initramfs -c -k "$release"
mv "$tree/boot/vmlinuz-$release" "$out/vmlinuz"
mv "$tree/boot/initrd.img-$release" "$out/initrd"
echo "$release" >"$out/release"

# --- Traces of the build ---------------------------------------------------------------------------

rm -rf "$tree"/var/log/apt "$tree"/var/log/dpkg.log "$tree"/var/log/alternatives.log \
    "$tree"/var/log/bootstrap.log "$tree"/var/log/journal "$tree"/var/lib/apt/lists/* \
    "$tree"/var/cache/apt/*.bin "$tree"/var/cache/apt/archives/*.deb "$tree"/var/cache/debconf/*-old \
    "$tree"/initrd.img* "$tree"/vmlinuz* "$tree"/boot/initrd.img*
# Else systemd rebuilds caches of /etc and /var at each first boot, of which every boot is one.
touch "$tree/etc/.updated" "$tree/var/.updated"
