/*
 * What workload.c and devices.c share.  README.md beside this file describes the progress page
 * and the records.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LAB_WORKLOAD_H
#define LAB_WORKLOAD_H

#include <stdbool.h>
#include <stdint.h>

enum {
    PAGE_BYTES = 4096,
    PAGE_WORDS = PAGE_BYTES / 8,

    /* Words of the progress page. */
    PROGRESS_MAGIC = 0,
    PROGRESS_LAYOUT = 1,
    PROGRESS_NONCE = 2,
    PROGRESS_THREADS = 3,
    PROGRESS_WSS_PAGES = 4,
    PROGRESS_KIND = 5,
    PROGRESS_SEED = 6,
    PROGRESS_STATE = 7,
    PROGRESS_ERRORS = 8,
    PROGRESS_CHECKS = 9,
    PROGRESS_TABLE_GPA = 10,
    PROGRESS_TICK_NS = 11,
    PROGRESS_LATENCY_GPA = 12,
    PROGRESS_OPS = 16,
    PROGRESS_OPS_STRIDE = 8, /* a cache line per thread */
    /* Where the last thread's counter leaves room. */
    PROGRESS_DISK_OPS = 508,
    PROGRESS_NET_PACKETS = 509,
    PROGRESS_DISPLAY_WRITES = 510,
    PROGRESS_DEVICE_ERRORS = 511,
};

static const uint64_t GAMMA = UINT64_C(0x9e3779b97f4a7c15); /* SplitMix64's increment */

static const uint64_t MIX_1 = UINT64_C(0xbf58476d1ce4e5b9);
static const uint64_t MIX_2 = UINT64_C(0x94d049bb133111eb);

/* The output function of SplitMix64: a bijection on 64 bits. */
static inline uint64_t mix64(uint64_t z)
{
    z = (z ^ (z >> 30)) * MIX_1;
    z = (z ^ (z >> 27)) * MIX_2;
    return z ^ (z >> 31);
}

/* Scale a 64-bit random number to 0..count-1: multiply and keep the high half, because
 * a division would be the slowest instruction of the loop. */
static inline uint64_t scale(uint64_t random, uint64_t count)
{
    return (uint64_t)((__extension__ (unsigned __int128)random * count) >> 64);
}

enum disk { DISK_NONE = 0, DISK_IDE = 1, DISK_VIRTIO = 2 };

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
