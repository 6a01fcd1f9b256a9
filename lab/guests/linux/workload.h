/*
 * What workload.c and devices.c share.  ../README.md describes the records.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LAB_WORKLOAD_H
#define LAB_WORKLOAD_H

#include "basics.h"
#include "layout.h"
#include "mix.h"

#include <stdbool.h>
#include <stdint.h>

enum disk { DISK_NONE = 0, DISK_IDE = 1, DISK_VIRTIO = 2, DISK_SCSI = 3 };

/* Which devices to put load on. */
struct devices {
    enum disk disk;
    bool net;
    bool display;
    bool balloon;
};

extern volatile uint64_t *progress;

/* Load the drivers; the devices appear some time after. */
void load_drivers(const struct devices *devices);
/* What start_devices() will allocate. */
uint64_t devices_need_mib(const struct devices *devices);
/* Wait for the devices and start the threads that use them; they never end. */
void start_devices(const struct devices *devices, uint64_t seed);

#endif
