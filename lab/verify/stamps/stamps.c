/*
 * stamps: write the number of a round to memory and then to each disk, over and over.
 *
 * It is all of a Linux guest: PID 1, one thread.  In round k it writes k to its page of memory and
 * then, one disk after the other and always in the same order, to a block of each disk.  What a
 * write has reached when it returns is the disk: it goes past the guest's page cache, or an fsync
 * follows.  For each disk the page has two numbers, the last round that was begun to be written and
 * the last that is known to be on it; a store comes before the write, another one after it.
 *
 * Once in a round it reads a block of one of the disks that it has written before, at random, and
 * compares it.  So a guest that finds itself on the disk of another instant notices.
 *
 * check.py is the host's side.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define _GNU_SOURCE
#include "basics.h"
#include "layout.h"
#include "mix.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

enum {
    MAX_DISKS = 4,
    BLOCKS = 2048, /* of a disk; block PLACE(k) has round k */
    STEP = 37,     /* odd, so that no two of BLOCKS rounds have one place, and in another cluster */

    /* Words of the page. */
    STAMP_MAGIC = 0,
    STAMP_NONCE = 1,
    STAMP_DISKS = 2,
    STAMP_CHECK = 3, /* of the round; it is stored before it */
    STAMP_ROUND = 4,
    STAMP_ERRORS = 5,
    STAMP_BEGUN = 16, /* of disk i: STAMP_BEGUN + STAMP_STRIDE * i */
    STAMP_KNOWN = 17,
    STAMP_STRIDE = 8,

    /* Words of a block; the rest follows from disk and round. */
    BLOCK_MAGIC = 0,
    BLOCK_DISK = 1,
    BLOCK_ROUND = 2,
    BLOCK_REST = 3,
};

static const uint64_t STAMPS_PAGE_MAGIC = UINT64_C(0x31504d545342414c);  /* "LABSTMP1" */
static const uint64_t STAMPS_BLOCK_MAGIC = UINT64_C(0x4b4c425342414c56); /* "VLABSBLK" */

static const char *const DISK_LISTS[] = {"disk-ide", "disk-virtio", "disk-scsi"};
static const char *const DISK_NAMES[] = {"ide", "virtio", "scsi"};

struct parameters {
    uint64_t disks;
    unsigned kind;
    uint64_t cached;     /* whether the guest's page cache is used */
    uint64_t sync_every; /* rounds between two fsync; 0: none */
};

static volatile uint64_t *page;
static uint64_t nonce;
static int disks[MAX_DISKS];

static void take_parameter(void *to, const char *name, const char *value)
{
    struct parameters *p = to;

    if (!strcmp(name, "stamps.disks")) {
        p->disks = number(name, value, 1, MAX_DISKS);
    } else if (!strcmp(name, "stamps.kind")) {
        p->kind = choice(name, value, DISK_NAMES, 3);
    } else if (!strcmp(name, "stamps.cached")) {
        p->cached = number(name, value, 0, 1);
    } else if (!strcmp(name, "stamps.sync_every")) {
        p->sync_every = number(name, value, 0, 1000000);
    } else {
        fail("what=parameter name=%s value=?", printable(name));
    }
}

static off_t place(uint64_t round)
{
    return (off_t)(round * STEP % BLOCKS * PAGE_BYTES);
}

static void fill(uint64_t *words, uint64_t disk, uint64_t round)
{
    uint64_t value = mix64(nonce ^ mix64(round * MAX_DISKS + disk));

    words[BLOCK_MAGIC] = STAMPS_BLOCK_MAGIC ^ nonce;
    words[BLOCK_DISK] = disk;
    words[BLOCK_ROUND] = round;
    for (unsigned i = BLOCK_REST; i < PAGE_WORDS; i++) {
        words[i] = value += GAMMA;
    }
}

/* Count an error, and say what the first few are. */
static void error(const char *what, uint64_t disk, uint64_t round, uint64_t found)
{
    uint64_t before = page[STAMP_ERRORS]++;

    if (before < 8) {
        record("LAB1 error what=%s disk=%llu round=%llu found=%llu", what,
               (unsigned long long)disk, (unsigned long long)round, (unsigned long long)found);
    }
}

static void write_round(const struct parameters *p, uint64_t *buffer, uint64_t disk, uint64_t round)
{
    volatile uint64_t *begun = &page[STAMP_BEGUN + STAMP_STRIDE * disk];
    volatile uint64_t *known = &page[STAMP_KNOWN + STAMP_STRIDE * disk];
    bool sync = p->sync_every && round % p->sync_every == 0;

    fill(buffer, disk, round);
    *begun = round;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (pwrite(disks[disk], buffer, PAGE_BYTES, place(round)) != PAGE_BYTES) {
        error("write", disk, round, (uint64_t)errno);
        nap_ms(100);
        return;
    }
    if (sync && fdatasync(disks[disk])) {
        error("sync", disk, round, (uint64_t)errno);
        nap_ms(100);
        return;
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!p->cached || sync) {
        *known = round;
    }
}

static void read_round(uint64_t *buffer, const uint64_t *expected, uint64_t disk, uint64_t round)
{
    if (pread(disks[disk], buffer, PAGE_BYTES, place(round)) != PAGE_BYTES) {
        error("read", disk, round, (uint64_t)errno);
        nap_ms(100);
    } else if (memcmp(buffer, expected, PAGE_BYTES)) {
        error("data", disk, round, buffer[BLOCK_ROUND]);
    }
}

static void open_disks(const struct parameters *p)
{
    for (uint64_t i = 0; i < p->disks; i++) {
        char path[32];

        snprintf(path, sizeof(path), "/dev/%s%c", p->kind == 1 ? "vd" : "sd", (char)('a' + i));
        disks[i] = open_disk(path, p->cached ? 0 : O_DIRECT);
    }
}

int main(void)
{
    struct parameters p = {.disks = 1, .kind = 1};
    uint64_t *buffer, *expected;

    set_up_console();
    if (mount("proc", "/proc", "proc", 0, NULL) ||
        (mount("dev", "/dev", "devtmpfs", 0, NULL) && errno != EBUSY)) {
        fail("what=mount errno=%d", errno);
    }
    each_parameter("stamps.", take_parameter, &p);
    if (p.cached && !p.sync_every) {
        fail("what=parameter name=stamps.sync_every value=0");
    }
    load_list(DISK_LISTS[p.kind]);
    open_disks(&p);

    page = allocate_locked(PAGE_BYTES);
    buffer = allocate_locked(PAGE_BYTES);
    expected = allocate_locked(PAGE_BYTES);
    nonce = make_nonce();
    page[STAMP_NONCE] = nonce;
    page[STAMP_DISKS] = p.disks;
    page[STAMP_MAGIC] = STAMPS_PAGE_MAGIC;
    for (uint64_t round = 1;; round++) {
        uint64_t disk, old;

        page[STAMP_CHECK] = mix64(nonce ^ round);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        page[STAMP_ROUND] = round;
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        for (disk = 0; disk < p.disks; disk++) {
            write_round(&p, buffer, disk, round);
        }
        disk = round % p.disks;
        old = round - scale(mix64(nonce + round), round < BLOCKS ? round : BLOCKS);
        fill(expected, disk, old);
        read_round(buffer, expected, disk, old);
        if (round == 2) {
            record("LAB1 ready nonce=%016llx stamps_gpa=%llu", (unsigned long long)nonce,
                   (unsigned long long)physical_address(page));
        }
    }
}
