/*
 * What the lab's programs have in common that are all of a Linux guest; each ends the guest when
 * something fails.  ../README.md describes the records.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LAB_BASICS_H
#define LAB_BASICS_H

#include <stdint.h>

/* Echo nothing, so that only records come out. */
void set_up_console(void);
/* Print one record, in one write(), so that no other line can get into it. */
void record(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Print an error record and switch off. */
void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
void power_off(void) __attribute__((noreturn));

uint64_t now_ns(void);
void nap_ms(long ms);

/* Make a value from the command line safe to put into a record. */
const char *printable(const char *value);
/* The number that the value of a parameter is. */
uint64_t number(const char *name, const char *value, uint64_t least, uint64_t most);
/* The position of a value in a list of names. */
unsigned choice(const char *name, const char *value, const char *const *names, unsigned count);
/* Hand over each parameter of the kernel's command line whose name begins like that.  Needs /proc. */
void each_parameter(const char *prefix, void (*take)(void *to, const char *name, const char *value),
                    void *to);

/* A number nobody chose, and not zero. */
uint64_t make_nonce(void);
/* Zero-filled, resident memory in pages of 4 KiB, so that one write dirties one page. */
void *allocate(uint64_t bytes);
/* The same, and it stays where it is: the host knows the physical address. */
void *allocate_locked(uint64_t bytes);
/* Guest physical address of a resident page of ours.  Needs /proc. */
uint64_t physical_address(volatile void *address);

/* Load what a list in the initramfs names, in its order.  No list: the drivers are in the kernel. */
void load_list(const char *list);
/* Open a disk, with flags besides O_RDWR, as soon as its driver has found it.  Needs /dev. */
int open_disk(const char *path, int flags);

#endif
