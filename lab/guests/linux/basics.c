/*
 * basics: what a program needs that is all of a Linux guest: records, parameters, memory that the
 * host finds, drivers.
 *
 * ../README.md describes the records.  No console, no file system and no driver is there when it
 * begins.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define _GNU_SOURCE
#include "basics.h"

#include "layout.h"
#include "mix.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef GRND_INSECURE
#define GRND_INSECURE 4
#endif

/* How long a driver may take to find its device; under TCG a disk takes a second. */
enum { APPEAR_S = 60 };

/* -------------------------------------------------------------------- console */

void record(const char *format, ...)
{
    char line[512];
    va_list args;
    int length;

    va_start(args, format);
    length = vsnprintf(line, sizeof(line) - 1, format, args);
    va_end(args);
    if (length < 0) {
        return;
    }
    if ((size_t)length > sizeof(line) - 2) {
        length = sizeof(line) - 2;
    }
    line[length++] = '\n';
    for (char *from = line; length > 0;) {
        ssize_t written = write(STDOUT_FILENO, from, (size_t)length);

        if (written < 0) {
            if (errno == EINTR || errno == EAGAIN) {
                continue;
            }
            return; /* no console: the host sees that nothing came */
        }
        from += written;
        length -= (int)written;
    }
}

void power_off(void)
{
    tcdrain(STDOUT_FILENO); /* the serial port is slower than the power switch */
    sync();
    reboot(RB_POWER_OFF);
    reboot(RB_AUTOBOOT); /* no ACPI: with -no-reboot this ends QEMU as well */
    for (;;) {
        pause();
    }
}

void fail(const char *format, ...)
{
    char text[400];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    record("LAB1 error %s", text);
    power_off();
}

void set_up_console(void)
{
    struct termios settings;

    if (!tcgetattr(STDIN_FILENO, &settings)) {
        settings.c_lflag &= ~(tcflag_t)(ECHO | ICANON | ISIG); /* only records come out */
        tcsetattr(STDIN_FILENO, TCSANOW, &settings);
    }
}

/* ----------------------------------------------------------------------- time */

uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void nap_ms(long ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

/* ----------------------------------------------------------------- parameters */

const char *printable(const char *value)
{
    static char copy[64];
    size_t n = 0;

    for (; *value && n < sizeof(copy) - 1; value++) {
        copy[n++] = *value > ' ' && *value < 127 && *value != '=' ? *value : '?';
    }
    copy[n] = 0;
    return n ? copy : "?";
}

uint64_t number(const char *name, const char *value, uint64_t least, uint64_t most)
{
    char *end;
    uint64_t result;

    errno = 0;
    result = strtoull(value, &end, 10);
    if (*value < '0' || *value > '9' || *end || errno || result < least || result > most) {
        fail("what=parameter name=%s value=%s", name, printable(value));
    }
    return result;
}

unsigned choice(const char *name, const char *value, const char *const *names, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        if (!strcmp(value, names[i])) {
            return i;
        }
    }
    fail("what=parameter name=%s value=%s", name, printable(value));
}

void each_parameter(const char *prefix, void (*take)(void *to, const char *name, const char *value),
                    void *to)
{
    char line[4096];
    char *rest = NULL;
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, line, sizeof(line) - 1);

    if (length < 0) {
        fail("what=cmdline errno=%d", errno);
    }
    close(fd);
    line[length] = 0;
    for (char *word = strtok_r(line, " \n", &rest); word; word = strtok_r(NULL, " \n", &rest)) {
        char *value = strchr(word, '=');

        if (strncmp(word, prefix, strlen(prefix))) {
            continue; /* the kernel's */
        }
        if (!value) {
            fail("what=parameter name=%s value=?", printable(word));
        }
        *value++ = 0;
        take(to, word, value);
    }
}

/* --------------------------------------------------------------------- memory */

uint64_t make_nonce(void)
{
    /* There may be no entropy this early, and blocking for it would cost a second, so the time
     * stamp counter and the clock are mixed in. */
    uint64_t nonce = 0;
    struct timespec now;

    if (getrandom(&nonce, sizeof(nonce), GRND_INSECURE) != (ssize_t)sizeof(nonce)) {
        nonce = 0;
    }
    clock_gettime(CLOCK_REALTIME, &now);
    nonce ^= mix64((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec);
    nonce = mix64(nonce ^ __builtin_ia32_rdtsc());
    return nonce ? nonce : 1;
}

uint64_t physical_address(volatile void *address)
{
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    off_t offset = (off_t)((uintptr_t)address / PAGE_BYTES * sizeof(entry));

    if (fd < 0 || pread(fd, &entry, sizeof(entry), offset) != (ssize_t)sizeof(entry)) {
        fail("what=pagemap errno=%d", errno);
    }
    close(fd);
    entry &= (UINT64_C(1) << 55) - 1; /* the page frame number */
    if (!entry) {
        fail("what=pagemap errno=0");
    }
    return entry * PAGE_BYTES;
}

void *allocate(uint64_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED) {
        fail("what=memory need_mib=%llu errno=%d", (unsigned long long)(bytes >> 20), errno);
    }
    madvise(memory, bytes, MADV_NOHUGEPAGE); /* fails harmlessly in a kernel without THP */
    if (madvise(memory, bytes, MADV_POPULATE_WRITE)) {
        /* Older than Linux 5.14: touch the pages one by one. */
        for (uint64_t at = 0; at < bytes; at += PAGE_BYTES) {
            ((volatile char *)memory)[at] = 0;
        }
    }
    return memory;
}

void *allocate_locked(uint64_t bytes)
{
    void *memory = allocate(bytes);

    if (mlock(memory, bytes)) {
        fail("what=mlock errno=%d", errno);
    }
    return memory;
}

/* -------------------------------------------------------------------- drivers */

static void load_module(const char *name)
{
    char path[96];
    int fd;

    snprintf(path, sizeof(path), "/modules/%s.ko", name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)) {
        fail("what=module name=%s errno=%d", name, errno);
    }
    close(fd);
}

void load_list(const char *list)
{
    char path[96], names[1024], *rest = NULL;
    ssize_t length;
    int fd;

    snprintf(path, sizeof(path), "/modules/%s.list", list);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return;
    }
    length = read(fd, names, sizeof(names) - 1);
    close(fd);
    names[length > 0 ? length : 0] = 0;
    for (char *name = strtok_r(names, "\n", &rest); name; name = strtok_r(NULL, "\n", &rest)) {
        load_module(name);
    }
}

int open_disk(const char *path, int flags)
{
    uint64_t end = now_ns() + APPEAR_S * UINT64_C(1000000000);

    for (;;) {
        int fd = open(path, O_RDWR | O_CLOEXEC | flags);

        if (fd >= 0) {
            return fd;
        }
        if (now_ns() > end) {
            fail("what=device name=disk problem=open errno=%d", errno);
        }
        nap_ms(10);
    }
}
