/*
 * layout: what the host finds in the guest's memory.  ../README.md describes it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LAB_LAYOUT_H
#define LAB_LAYOUT_H

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
    /* Of the microguest: the host's request number, the one that was answered last, and what the
     * answer is. */
    PROGRESS_REQUEST = 13,
    PROGRESS_ANSWERED = 14,
    PROGRESS_ANSWER = 15,
    PROGRESS_OPS = 16,
    PROGRESS_OPS_STRIDE = 8, /* a cache line per thread */
    /* Where the last thread's counter leaves room. */
    PROGRESS_DISK_OPS = 508,
    PROGRESS_NET_PACKETS = 509,
    PROGRESS_DISPLAY_WRITES = 510,
    PROGRESS_DEVICE_ERRORS = 511,

    MAX_THREADS = 62, /* counters that fit */
};

/* What PROGRESS_STATE says. */
enum { STATE_POPULATING = 1, STATE_RUNNING = 2, STATE_REFUSED = 3 };

/* Durations of operations: linear up to 2 * LATENCY_SUBS ticks, then LATENCY_SUBS buckets
 * an octave.  The last one also holds what is longer. */
enum { LATENCY_BITS = 6, LATENCY_SUBS = 1 << LATENCY_BITS, LATENCY_BUCKETS = 5 * PAGE_WORDS };

enum {
    /* Words of the latency page, which says where the buckets are. */
    LATENCY_MAGIC = 0,
    LATENCY_COUNT = 1,
    LATENCY_START_TICKS = 2,
    LATENCY_START_NS = 3,
    LATENCY_TICKS = 4,
    LATENCY_NS = 5,
    /* Of the microguest: where the working set begins, and how many ticks are slow. */
    LATENCY_SET_GPA = 6,
    LATENCY_SLOW_TICKS = 7,
    LATENCY_GPAS = 16,
    LATENCY_GPAS_STRIDE = 8, /* for each thread */
    LATENCY_PAGES = LATENCY_BUCKETS / PAGE_WORDS,
    LATENCY_SLOW_GPA = LATENCY_PAGES, /* of a thread, after those of its buckets */
};

/* Operations that were slow, of a thread: a ring of entries, of which the first is how many there
 * ever were, and the others are what follows. */
enum {
    SLOW_ENTRIES = 4096,
    SLOW_START_TICKS = 0,
    SLOW_TICKS = 1,
    SLOW_PAGE = 2,
    SLOW_OP = 3,
    SLOW_WORDS = 4,
};

static const uint64_t PROGRESS_PAGE_MAGIC = UINT64_C(0x31474f525042414c); /* "LABPROG1" */
static const uint64_t LATENCY_PAGE_MAGIC = UINT64_C(0x315954414c42414c); /* "LABLATY1" */

#endif
