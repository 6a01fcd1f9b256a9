/*
 * What workload.c and devices.c share.  ../README.md describes the records.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LAB_WORKLOAD_H
#define LAB_WORKLOAD_H

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

/* Print one record, in one write(), so that no other line can get into it. */
void record(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Print an error record and switch off. */
void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
uint64_t now_ns(void);
/* Zero-filled, resident memory in pages of 4 KiB, so that one write dirties one page. */
void *allocate(uint64_t bytes);

/* Load the drivers; the devices appear some time after. */
void load_drivers(const struct devices *devices);
/* What start_devices() will allocate. */
uint64_t devices_need_mib(const struct devices *devices);
/* Wait for the devices and start the threads that use them; they never end. */
void start_devices(const struct devices *devices, uint64_t seed);

#endif
