/*
 * mix: random numbers from a counter.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LAB_MIX_H
#define LAB_MIX_H

#include <stdint.h>

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

#endif
