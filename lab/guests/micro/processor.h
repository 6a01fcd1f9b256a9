/*
 * processor: what the microguest asks of the machine besides memory: time, and more processors.
 *
 * All of it works in ring 3, because a register that is mapped is memory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LAB_MICRO_PROCESSOR_H
#define LAB_MICRO_PROCESSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Entries of page tables, accessed and dirty from the start, so that nobody writes to a table. */
#define TABLE_ENTRY 0x67
#define SMALL_PAGE 0x67
#define LARGE_PAGE 0xe7

/* Of boot.S: the two upper page tables, and which processor comes up next. */
extern uint64_t level4[512], level3[512];
extern volatile uint64_t starting;
/* Of layout.ld.S. */
extern char bss_start[], bss_end[];

/* A clock made of the time stamp counter. */
struct clock {
    uint64_t start; /* the counter when this clock was zero */
    uint64_t hz;
};

static inline uint64_t read_ticks(void)
{
    return __builtin_ia32_rdtsc();
}

/* Let the other hyperthread, or under TCG another thread, go on. */
static inline void relax(void)
{
    __builtin_ia32_pause();
}

/* value * mul / div without an overflow in between. */
static inline uint64_t scale_ratio(uint64_t value, uint64_t mul, uint64_t div)
{
    uint64_t low, high;

    __asm__("mulq %3" : "=a"(low), "=d"(high) : "a"(value), "rm"(mul) : "cc");
    __asm__("divq %2" : "+a"(low), "+d"(high) : "rm"(div) : "cc");
    return low;
}

static inline uint64_t clock_ns(const struct clock *clock, uint64_t ticks)
{
    return scale_ratio(ticks - clock->start, 1000000000, clock->hz);
}

/* Registers of the local APIC. */
enum {
    APIC_COMMAND = 0x300 / 4,
    APIC_TARGET = 0x310 / 4,
    APIC_TIMER = 0x320 / 4,
    APIC_TIMER_INITIAL = 0x380 / 4,
    APIC_TIMER_CURRENT = 0x390 / 4,
    APIC_TIMER_DIVIDE = 0x3e0 / 4,
};

enum { APIC_INIT = 0x4500, APIC_STARTUP = 0x4600, APIC_TIMER_MASKED = 1 << 16, APIC_BY_ONE = 0xb };

#define APIC ((volatile uint32_t *)UINT64_C(0xfee00000))

/* How long to compare the two counters: the timer is read in microseconds, so to a permille.  It
 * is set to run for as long as it can, 4 s, because a host that is busy may not come back sooner;
 * and one that does not count for as many ticks as a minute or so has does not count. */
enum { CALIBRATION_NS = 10000000, CALIBRATION_READS = 16 };
static const uint64_t CALIBRATION_LIMIT_TICKS = UINT64_C(1) << 37;

/* What is left of the timer, and the time stamp counter at the same time: of several readings the
 * one that took least, because a host may run something else in the middle of one. */
static inline uint32_t read_timer(uint64_t *ticks)
{
    uint64_t least = UINT64_MAX;
    uint32_t left = 0;

    for (unsigned i = 0; i < CALIBRATION_READS; i++) {
        uint64_t before = read_ticks();
        uint32_t now = APIC[APIC_TIMER_CURRENT];
        uint64_t took = read_ticks() - before;

        if (took < least) {
            least = took;
            left = now;
            *ticks = before + took / 2;
        }
    }
    return left;
}

/*
 * Find out how fast the time stamp counter counts; false if there is no timer to tell.
 *
 * The timer is that of the APIC, which in a virtual machine counts nanoseconds: QEMU's by its
 * virtual clock, and KVM's because the bus that it pretends to have runs at 1 GHz.
 */
static inline bool clock_start(struct clock *clock)
{
    uint32_t left, first;
    uint64_t ticks;

    APIC[APIC_TIMER] = APIC_TIMER_MASKED;
    APIC[APIC_TIMER_DIVIDE] = APIC_BY_ONE;
    APIC[APIC_TIMER_INITIAL] = UINT32_MAX;
    first = read_timer(&clock->start);
    do {
        left = read_timer(&ticks);
        ticks -= clock->start;
    } while (left && first - left < CALIBRATION_NS && ticks < CALIBRATION_LIMIT_TICKS);
    APIC[APIC_TIMER_INITIAL] = 0;
    if (!left || first - left < CALIBRATION_NS) {
        return false;
    }
    clock->hz = scale_ratio(ticks, 1000000000, first - left);
    return clock->hz > 1000;
}

/* Have a processor begin at `address`, in real mode; `pause` is how many ticks it gets to reset. */
static inline void start_processor(uint64_t index, uint64_t address, uint64_t pause)
{
    uint64_t since = read_ticks();

    APIC[APIC_TARGET] = (uint32_t)index << 24;
    APIC[APIC_COMMAND] = APIC_INIT;
    while (read_ticks() - since < pause) {
        relax();
    }
    APIC[APIC_TARGET] = (uint32_t)index << 24;
    APIC[APIC_COMMAND] = APIC_STARTUP | (uint32_t)(address >> 12);
}

static inline void write_port(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint32_t read_port(uint16_t port)
{
    uint32_t value;

    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

/*
 * Have all processors forget their translations.  Only for TCG, which takes the privilege level
 * for ports from the flags, and empties its software TLBs whenever the memory map changes: here
 * by what the chipset shows below 1 MiB, at an address where nothing is.
 */
static inline void flush_translations(void)
{
    enum { CONFIG_ADDRESS = 0xcf8, CONFIG_DATA = 0xcfc, SHADOW_REGISTERS = 0x58 };
    uint32_t before;

    write_port(CONFIG_ADDRESS, 0x80000000u | SHADOW_REGISTERS);
    before = read_port(CONFIG_DATA);
    /* 0x5a: 0xc0000 to 0xc7fff, read and written in RAM or not. */
    write_port(CONFIG_DATA, before ^ 0x00330000);
    write_port(CONFIG_DATA, before);
}

#endif
